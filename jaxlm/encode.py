"""Texts through an encoder: the scores of its head, and vectors of texts."""
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import tokenizers
from tokenizers import processors

from jaxlm.data import pipeline
from jaxlm.errors import UsageError
from jaxlm.models import heads, kinds

ROWS = 32    # texts at a time
PLACES = 32  # rows have a multiple of so many places, so that few lengths are compiled
NEVER = np.float32(-1e30)


@functools.partial(jax.jit, static_argnums=0)
def _scores(cfg, params, batch):
  return heads.outputs(cfg, params, kinds.forward(cfg, params, batch))


@functools.partial(jax.jit, static_argnums=0)
def _vectors(cfg, params, batch):
  cfg = dataclasses.replace(cfg, head='none')  # hidden states as they are before a head
  return heads.vectors(cfg, kinds.forward(cfg, params, batch).x_BLD, batch['segments'] > 0)


def reader(lm) -> tokenizers.Tokenizer:
  """What encodes a text, or a pair of them, as the tokenizer's template says (as [CLS] a [SEP] b [SEP] if it closes no text),
  cut to the run's length, the longer of a pair first."""
  found = tokenizers.Tokenizer.from_str(lm.tokenizer.json)
  found.encode_special_tokens = True
  found.no_padding()
  found.no_truncation()
  if len(found.encode('').ids) < 2:
    cls, sep = map(lm.tokenizer.text_of, (lm.tokenizer.cls, lm.tokenizer.sep))
    found.post_processor = processors.TemplateProcessing(
        single=f'{cls} $A {sep}', pair=f'{cls} $A {sep} $B:1 {sep}:1',
        special_tokens=sorted({(cls, lm.tokenizer.cls), (sep, lm.tokenizer.sep)}))
  found.enable_truncation(lm.config.length)
  return found


def _batches(lm, texts: Sequence) -> Iterator[tuple[list[int], list[int], dict]]:
  """(which texts, how many tokens each has, the batch on the mesh), the texts sorted by length."""
  good = lambda t: isinstance(t, str) or (len(t) == 2 and all(isinstance(s, str) for s in t))
  if isinstance(texts, str) or not all(map(good, texts)):
    raise UsageError('wants a list of texts, or of pairs of texts')
  encodings = lm.reader.encode_batch([t if isinstance(t, str) else tuple(t) for t in texts])
  order = sorted(range(len(texts)), key=lambda i: len(encodings[i].ids))
  count = min(ROWS, 1 << max(0, len(texts) - 1).bit_length())  # few sizes too
  size = -(-count // lm.rows_multiple) * lm.rows_multiple
  for at in range(0, len(order), size):
    rows = order[at:at + size]
    lengths = [len(encodings[i].ids) for i in rows]
    shape = (size, -(-max(lengths) // PLACES) * PLACES)
    batch = {name: np.zeros(shape, np.int32) for name in ('tokens', 'types', 'segments', 'positions')}
    for b, (i, n) in enumerate(zip(rows, lengths)):
      batch['tokens'][b, :n] = encodings[i].ids
      batch['types'][b, :n] = np.minimum(encodings[i].type_ids, max(lm.config.model.T - 1, 0))
      batch['segments'][b, :n], batch['positions'][b, :n] = 1, np.arange(n)
    yield rows, lengths, pipeline.place(lambda low, high, b=batch: {k: a[low:high] for k, a in b.items()}, size, lm.mesh)


def scores(lm, texts: Sequence) -> np.ndarray:
  """See LM.scores."""
  m, found = lm.config.model, {}
  if m.head not in ('classify', 'tag', 'span'):
    raise UsageError(f'model.head={m.head!r}: makes no scores; classify, tag and span do')
  with jax.set_mesh(lm.mesh):
    for rows, lengths, batch in _batches(lm, texts):
      out = jax.device_get(_scores(m, lm.params, batch))
      found |= {i: out[b] if m.head == 'classify' else out[b, :n] for b, (i, n) in enumerate(zip(rows, lengths))}
  if m.head == 'classify':
    return np.array([found[i] for i in range(len(texts))], np.float32).reshape(len(texts), m.C)
  out_BLC = np.full((len(texts), max(map(len, found.values()), default=0), m.C), NEVER)
  for i, row_LC in found.items():
    out_BLC[i, :len(row_LC)] = row_LC
  return out_BLC


def embed(lm, texts: Sequence) -> np.ndarray:
  """See LM.embed."""
  m = lm.config.model
  if m.pool == 'none':
    raise UsageError("model.pool='none': says no way to a vector of a text; import it with --config.model.pool=mean or first")
  out_BD = np.zeros((len(texts), m.D), np.float32)
  with jax.set_mesh(lm.mesh):
    for rows, _, batch in _batches(lm, texts):
      out_BD[rows] = jax.device_get(_vectors(m, lm.params, batch))[:len(rows)]
  return out_BD
