"""Text from a model: sampled here, searched in beams.py; decoding.py runs the model."""
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import beams, decoding, layout, sampling
from jaxlm.errors import UsageError
from jaxlm.sampling import Sampling


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4,))
def _choose(s: Sampling, vocab: int, never: tuple[int, ...], logits_BV, seen_BV, seed_B, at):
  """(tokens_B, seen_BV with them). Columns from `vocab` on are no tokens, and those of `never` are not said."""
  logits_BV = jnp.where(sampling.barred(never, vocab, logits_BV.shape[1]), -jnp.inf, logits_BV)
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
    rows = decoding.make(lm, prompts, max_length)
    replicated = lambda a: jax.device_put(a, layout.spec('B') + (None,) * (a.ndim - 1))
    seed_B = replicated(np.arange(seed, seed + rows.size, dtype=np.uint32))
    seen_BV = replicated(rows.seen() if s.repetition_penalty != 1 else np.zeros((rows.size, 1), bool))
    never, logits_BV = decoding.never_of(lm), rows.start()
    for at in range(max_length):
      tokens_B, seen_BV = _choose(s, lm.tokenizer.vocab_size, never, logits_BV, seen_BV, seed_B, at)
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


def stopper(stop_ids, decode: Callable[[list[int]], str], strings: Sequence[str]) -> Callable[[int, list[int]], bool]:
  """`sample`'s stop: at a stop token, or where one of the strings is in the text."""
  reach = 8 + max((len(x.encode()) for x in strings), default=0)  # tokens back in which a string can begin
  return lambda b, row: row[-1] in stop_ids or any(x in decode(row[-reach:]) for x in strings)


def generate(lm, prompts: list[str], max_length: int, s: Sampling, seed: int, stop_strings: Sequence[str] = (),
             stream: Callable[[str], None] | None = None) -> list[str]:
  """Continuations of texts by an LM (see lm.py): up to max_length new tokens each, or the end of the document, or to
  before the first of the stop strings. stream(text of the first prompt so far) is called after each token."""
  if max_length < 1:
    raise UsageError(f'--max_length={max_length}: wants at least 1')
  if not prompts or any(not isinstance(s_, str) or not s_ for s_ in stop_strings):
    raise UsageError('generate wants at least one prompt, and stop strings that are not empty')
  ids = [lm.prompt(p) for p in prompts]

  def text_of(row: list[int]) -> str:
    ended = next((i for i, t in enumerate(row) if t in lm.stop_ids), len(row))
    text = lm.tokenizer.decode(row[:ended])
    return text[:min((text.find(x) for x in stop_strings if x in text), default=len(text))]

  if s.num_beams > 1:
    new = beams.search(lm, ids, max_length, s, lm.stop_ids)
  else:
    stop = stopper(lm.stop_ids, lm.tokenizer.decode, stop_strings)
    new = sample(lm, ids, max_length, s, seed, stop, stream and (lambda row: stream(text_of(row))))
  return [text_of(row) for row in new]
