"""Text from a model: prefill and step, both jitted, with a cache of keys and values (models/cache.py)."""
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import layout, sampling
from jaxlm.errors import UsageError
from jaxlm.models import cache as caches
from jaxlm.sampling import Sampling
from jaxlm.schema import ModelConfig

PLACES = 64  # caches and prompts have a multiple of so many places, so that few lengths are compiled


class Rows:
  """Prompts in a batch with its cache: `start` reads them, `extend` one more token each. Logits are of the last tokens."""

  def __init__(self, lm, prompts: Sequence[Sequence[int]], new: int):
    self.cfg, self.params = lm.config.model, lm.decoding_params
    size = -(-len(prompts) // lm.rows_multiple) * lm.rows_multiple
    longest = max(map(len, prompts))
    self.length = -(-longest // PLACES) * PLACES
    self._fit(longest + new)
    self.places = -(-(self.length + new) // PLACES) * PLACES
    tokens_BL = np.zeros((size, self.length), np.int32)
    pad_B = np.full(size, self.length - 1, np.int32)
    for b, ids in enumerate(prompts):
      pad_B[b] = self.length - len(ids)
      tokens_BL[b, pad_B[b]:] = ids
    self.size, self._prompts = size, prompts
    self._tokens_BL, self._pad_B = tokens_BL, jax.device_put(pad_B, layout.spec('B'))
    self.at = self.length

  def _fit(self, length: int) -> None:
    if self.cfg.P and length > self.cfg.P:
      raise UsageError(f'prompt and --max_length come to {length} tokens; the model has {self.cfg.P} learned positions')

  def start(self):
    """logits_BV after the prompts."""
    empty = _empty(self.cfg, self.size, self.places)
    logits_BV, self.cache = _forward(self.cfg, self.params, empty, jax.device_put(self._tokens_BL, layout.spec('BL')), 0,
                                     self._pad_B)
    return logits_BV

  def extend(self, tokens_B):
    """logits_BV after one more token a row, int32 [B] on the device."""
    logits_BV, self.cache = _forward(self.cfg, self.params, self.cache, tokens_B[:, None], self.at, self._pad_B)
    self.at += 1
    return logits_BV

  def reorder(self, rows_B: np.ndarray) -> None:
    """Row b goes on from what row rows_B[b] was."""
    self.cache = _reorder(self.cache, rows_B)

  def seen(self) -> np.ndarray:
    """bool [B, V]: the row's prompt has the token."""
    seen_BV = np.zeros((self.size, self.cfg.V), bool)
    for b, ids in enumerate(self._prompts):
      seen_BV[b, list(ids)] = True
    return seen_BV


_forward = jax.jit(caches.forward, static_argnums=0, donate_argnums=2)
_empty = jax.jit(caches.empty, static_argnums=(0, 1, 2))
_reorder = jax.jit(lambda cache, rows_B: jax.tree.map(
    lambda a: a.at[rows_B].get(out_sharding=jax.typeof(a).sharding.spec), cache), donate_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def _choose(s: Sampling, vocab: int, logits_BV, seen_BV, seed_B, at):
  """(tokens_B, seen_BV with them). Columns from `vocab` on are no tokens."""
  logits_BV = jnp.where(jnp.arange(logits_BV.shape[1])[None] < vocab, logits_BV, -jnp.inf)
  keys_B = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), at))(seed_B)
  tokens_B = sampling.choose(s, logits_BV, seen_BV, keys_B)
  if s.repetition_penalty != 1:
    seen_BV |= jnp.arange(seen_BV.shape[1])[None] == tokens_B[:, None]
  return tokens_B, seen_BV


def sample(lm, prompts: Sequence[Sequence[int]], max_length: int, s: Sampling, seed: int,
           stop: Callable[[int, list[int]], bool], stream: Callable[[list[int]], None] | None = None) -> list[list[int]]:
  """New token ids of each prompt (lists of ids, none empty): up to max_length of them, or to where stop(row, ids so far)
  says so; the last may be a stop token. stream(ids of the first row) is called after each token.

  Row b draws with seed + b: what it says does not depend on the rows beside it.
  """
  out, open_rows = [[] for _ in prompts], set(range(len(prompts)))
  with jax.set_mesh(lm.mesh):
    rows = Rows(lm, prompts, max_length)
    replicated = lambda a: jax.device_put(a, layout.spec('B') + (None,) * (a.ndim - 1))
    seed_B = replicated(np.arange(seed, seed + rows.size, dtype=np.uint32))
    seen_BV = replicated(rows.seen() if s.repetition_penalty != 1 else np.zeros((rows.size, 1), bool))
    logits_BV = rows.start()
    for at in range(max_length):
      tokens_B, seen_BV = _choose(s, lm.tokenizer.vocab_size, logits_BV, seen_BV, seed_B, at)
      if at + 1 < max_length:
        logits_BV = rows.extend(tokens_B)  # dispatched before the tokens are read
      host_B = jax.device_get(tokens_B)
      for b in sorted(open_rows):
        out[b].append(int(host_B[b]))
        if stop(b, out[b]):
          open_rows.discard(b)
      if stream:
        stream(out[0])
      if not open_rows:
        break
  return out


def generate(lm, prompts: list[str], max_length: int, s: Sampling, seed: int, stop_strings: Sequence[str] = (),
             stream: Callable[[str], None] | None = None) -> list[str]:
  """Continuations of texts by an LM (see lm.py): up to max_length new tokens each, or the end of the document, or to
  before the first of the stop strings. stream(text of the first prompt so far) is called after each token."""
  if max_length < 1:
    raise UsageError(f'--max_length={max_length}: wants at least 1')
  if not prompts or any(not isinstance(s_, str) or not s_ for s_ in stop_strings):
    raise UsageError('generate wants at least one prompt, and stop strings that are not empty')
  from jaxlm import beams  # pylint: disable=g-import-not-at-top  # needs this module
  ids = [lm.tokenizer.prompt(p) for p in prompts]

  def text_of(row: list[int]) -> str:
    ended = next((i for i, t in enumerate(row) if t in lm.stop_ids), len(row))
    text = lm.tokenizer.decode(row[:ended])
    return text[:min((text.find(x) for x in stop_strings if x in text), default=len(text))]

  def stop(b: int, row: list[int]) -> bool:
    del b
    return row[-1] in lm.stop_ids or any(x in lm.tokenizer.decode(row) for x in stop_strings)
  if s.num_beams > 1:
    new = beams.search(lm, ids, max_length, s, lm.stop_ids)
  else:
    new = sample(lm, ids, max_length, s, seed, stop, stream and (lambda row: stream(text_of(row))))
  return [text_of(row) for row in new]
