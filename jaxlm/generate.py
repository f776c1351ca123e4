"""Text from a trained model: greedy, or sampled at a temperature. Each new token reads its whole context again."""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import layout
from jaxlm.config import ModelConfig
from jaxlm.data import pipeline
from jaxlm.errors import UsageError
from jaxlm.models.decoder import Decoder, unembed


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _next(cfg: ModelConfig, vocab: int, temperature: float, params, batch, key):
  """The next token of each row, int32 [B]: tokens [B, L] with `last` [B, L] marking each row's last one."""
  x_BLD, unembed_VD = Decoder(cfg).apply({'params': params}, batch['tokens'], batch['positions'], batch['segments'])
  x_BLD = jnp.sum(jnp.where(batch['last'][..., None] == 1, x_BLD, 0), 1, keepdims=True)
  logits_BV = jax.sharding.reshard(unembed(x_BLD, unembed_VD), layout.spec('BL') + (None,))[:, 0]
  logits_BV = jnp.where(jnp.arange(cfg.V)[None] < vocab, logits_BV, -jnp.inf)  # padded vocabulary rows are no tokens
  if temperature == 0:
    return jnp.argmax(logits_BV, -1).astype(jnp.int32)
  noise_BV = jax.random.gumbel(key, logits_BV.shape, out_sharding=jax.typeof(logits_BV).sharding)
  return jnp.argmax(logits_BV / temperature + noise_BV, -1).astype(jnp.int32)


def generate(lm, prompts: list[str], max_length: int, temperature: float, seed: int, stream=None) -> list[str]:
  """Continuations of `prompts` (up to max_length new tokens, or the end of the document), by an LM (see lm.py).

  The context is the last config.length tokens. stream(text so far of the first prompt) is called a token at a time.
  """
  if max_length < 1 or temperature < 0:
    raise UsageError(f'--max_length={max_length} --temperature={temperature}: want at least 1, and at least 0')
  context = lm.config.length
  rows = [[lm.tokenizer.boundary, *lm.tokenizer.encode(p)] for p in prompts]
  starts = [len(r) for r in rows]
  size = -(-len(rows) // lm.rows_multiple) * lm.rows_multiple
  open_rows = set(range(len(rows)))
  with jax.set_mesh(lm.mesh):
    keys = jax.random.split(jax.random.key(seed), max_length)
    for key in keys:
      batch = _windows(rows, size, context)
      placed = pipeline.place(lambda low, high: {k: a[low:high] for k, a in batch.items()}, size, lm.mesh)
      tokens_B = jax.device_get(_next(lm.config.model, lm.tokenizer.vocab_size, float(temperature), lm.params, placed,
                                      key))
      for r in sorted(open_rows):
        if tokens_B[r] == lm.tokenizer.boundary:
          open_rows.discard(r)
        else:
          rows[r].append(int(tokens_B[r]))
      if stream:
        stream(lm.tokenizer.decode(rows[0][starts[0]:]))
      if not open_rows:
        break
  return [lm.tokenizer.decode(r[s:]) for r, s in zip(rows, starts)]


def _windows(rows: list[list[int]], size: int, context: int) -> dict[str, np.ndarray]:
  """The last `context` tokens of each row, from the left; what is to their right is of another segment."""
  batch = {k: np.zeros((size, context), np.int32) for k in ('tokens', 'segments', 'last')}
  for r, row in enumerate(rows):
    tail = row[-context:]
    batch['tokens'][r, :len(tail)], batch['segments'][r, :len(tail)] = tail, 1
    batch['last'][r, len(tail) - 1] = 1
  batch['positions'] = np.broadcast_to(np.arange(context, dtype=np.int32), (size, context))
  return batch
