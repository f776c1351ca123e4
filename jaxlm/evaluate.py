"""How good a model is on a text: nats per token, perplexity, and bits per byte of the original bytes.

A document is [opening, t1 … tn] (the tokenizer says what opens one): each of its n tokens is scored exactly once, given what precedes it in the document.
A document longer than the context C is read in windows that end C, C + S, C + 2S, … tokens in (S the stride): after
the first, a window scores its last S tokens with at least C − S before them. Windows are packed into rows, apart from
each other by segment; the result does not depend on how many rows go at a time, nor on the mesh.
"""
import dataclasses
import gzip
import lzma
import math
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from jaxlm.schema import Config
from jaxlm.data import pipeline, sources
from jaxlm.errors import UsageError
from jaxlm.loss import per_token_nll
from jaxlm.models.decoder import forward
from jaxlm.models.ngram import NGram


def make_nll(config: Config):
  """Jitted (params, batch [B, L]) → −log p of each target, float32 [B, L] on the host, 0 where its weight is 0."""
  @jax.jit
  def nll(params, batch):
    x_BLD, unembed_VD, _ = forward(config.model, params, batch['tokens'], batch['positions'], batch['segments'])
    return per_token_nll(config.model, config.loss, x_BLD, unembed_VD, batch['targets']) * batch['weights']
  return lambda params, batch: jax.device_get(nll(params, batch))


class HeldOut:
  """The evaluator that training runs: mean loss on the first windows of the cached held-out split."""

  def __init__(self, config: Config, cache, mesh):
    stream = cache.streams['heldout']
    count = min(config.eval_windows, stream.windows(config.length))
    if not count:
      raise UsageError(f'eval_every={config.eval_every}: nothing is held out (data.heldout={config.data.heldout})')
    self._nll = make_nll(config)
    self._batches = []
    for start in range(0, count, config.batch):
      windows = np.arange(start, start + config.batch)
      self._batches.append(pipeline.place(
          lambda low, high: _only(stream.batch(windows[low:high], config.length), windows[low:high] < count),
          config.batch, mesh))

  def run(self, params) -> Iterator[tuple[str, float]]:
    """Yields ('heldout_loss', nats per token)."""
    nll = sum(self._nll(params, b).sum(dtype=np.float64) for b in self._batches)
    tokens = sum(jax.device_get(b['weights']).sum(dtype=np.float64) for b in self._batches)
    yield 'heldout_loss', nll / tokens


def _only(batch: dict, rows_B: np.ndarray) -> dict:
  return {**batch, 'weights': batch['weights'] * rows_B[:, None].astype(np.float32)}


@dataclasses.dataclass(frozen=True)
class Window:
  """ids are inputs and one target more; only targets from index `scored` on count."""
  ids: np.ndarray
  scored: int


def windows(ids: np.ndarray, context: int, stride: int) -> Iterator[Window]:
  """Windows of [opening, t1 … tn] in which every t is scored once (see the module's text)."""
  n, end = len(ids) - 1, 0
  while end < n:
    new_end = min(context if end == 0 else end + stride, n)
    start = max(0, new_end - context)
    yield Window(ids[start:new_end + 1], end - start)
    end = new_end


def rows(all_windows: Iterable[Window], context: int) -> Iterator[list[Window]]:
  """Windows in order, as many to a row as fit."""
  row, used = [], 0
  for window in all_windows:
    size = len(window.ids) - 1
    if row and used + size > context:
      yield row
      row, used = [], 0
    row.append(window)
    used += size
  if row:
    yield row


def to_batch(row_list: list[list[Window]], size: int, context: int) -> dict[str, np.ndarray]:
  """Rows → a batch of `size` rows, the missing ones empty."""
  batch = {k: np.zeros((size, context), np.int32) for k in ('tokens', 'targets', 'segments', 'positions')}
  batch['weights'] = np.zeros((size, context), np.float32)
  for r, row in enumerate(row_list):
    at = 0
    for segment, w in enumerate(row, 1):
      span = slice(at, at + len(w.ids) - 1)
      batch['tokens'][r, span], batch['targets'][r, span] = w.ids[:-1], w.ids[1:]
      batch['segments'][r, span], batch['positions'][r, span] = segment, np.arange(len(w.ids) - 1)
      batch['weights'][r, at + w.scored:span.stop] = 1
      at = span.stop
  return batch


def evaluate(lm, documents: Iterable[tuple[str, str]], context: int, stride: int, batch: int, progress=None) -> dict:
  """Scores (name, text) documents with an LM (see lm.py) → the JSON of `jaxlm eval` (nats; null where undefined)."""
  if not 1 <= stride <= context:
    raise UsageError(f'--stride={stride}: wants 1 up to the context, {context}')
  limit = lm.config.model.P or context
  if context > limit:
    raise UsageError(f'--context={context}: the model has only {limit} learned positions')
  lm_config = dataclasses.replace(lm.config, loss=dataclasses.replace(
      lm.config.loss, chunks=math.gcd(lm.config.loss.chunks, context)))
  nll_fn = make_nll(lm_config)
  shards = lm.mesh.shape['data'] * lm.mesh.shape['fsdp']
  batch = -(-batch // shards) * shards
  totals = {'documents': 0, 'bytes': 0, 'tokens': 0}
  nll = 0.

  def all_windows():
    for _, text in documents:
      ids = np.array([lm.tokenizer.opening, *lm.tokenizer.encode(text)], np.int32)
      totals['documents'] += 1
      totals['bytes'] += len(text.encode())
      if progress:
        progress(len(text.encode()))
      totals['tokens'] += len(ids) - 1
      yield from windows(ids, context, stride)

  def score(row_list):
    arrays = to_batch(row_list, batch, context)
    placed = pipeline.place(lambda low, high: {k: a[low:high] for k, a in arrays.items()}, batch, lm.mesh)
    return nll_fn(lm.params, placed).sum(dtype=np.float64)

  with jax.set_mesh(lm.mesh):
    waiting = []
    for row in rows(all_windows(), context):
      waiting.append(row)
      if len(waiting) == batch:
        nll += score(waiting)
        waiting = []
    if waiting:
      nll += score(waiting)
  per_token = nll / totals['tokens'] if totals['tokens'] else None
  return {'nll_per_token': per_token,
          'perplexity': math.exp(per_token) if per_token is not None and per_token < 700 else None,
          'bits_per_byte': nll / math.log(2) / totals['bytes'] if totals['bytes'] else None,
          **totals, 'step': lm.step, 'context': context, 'stride': stride}


def baselines(documents: list[tuple[str, str]], config: Config) -> dict[str, float]:
  """Bits per byte of the same documents by gzip -9 and xz -9 (of them all in a row), and by a byte 5-gram counted on
  the run's training documents."""
  texts = [text.encode() for _, text in documents]
  whole = b''.join(texts)
  model = NGram(5, (text.encode() for _, text in sources.documents(config.data.source, config.data, 'train')))
  return {'gzip_bits_per_byte': len(gzip.compress(whole, 9)) * 8 / len(whole),
          'xz_bits_per_byte': len(lzma.compress(whole, preset=9)) * 8 / len(whole),
          'fivegram_bits_per_byte': sum(model.bits(text) for text in texts) / len(whole)}


def resolve(source: str, config: Config) -> tuple[str, str]:
  """--data=SOURCE → (source, split). 'heldout' and 'train' are the run's own documents; the run's own source means its
  held-out ones, so that no model is judged on what it was trained on; SOURCE/train and SOURCE/all say so outright."""
  if source in ('heldout', 'train'):
    return config.data.source, source
  if source.startswith('stdlib/'):
    split = source.partition('/')[2]
    if split not in ('train', 'heldout', 'all'):
      raise UsageError(f'--data={source}: stdlib has the parts stdlib/heldout, stdlib/train and stdlib/all')
    return 'stdlib', split
  return source, 'heldout' if source in (config.data.source, 'stdlib') else 'all'


def source_documents(source: str, config: Config) -> tuple[str, list[tuple[str, str]]]:
  """(description, documents) of --data=SOURCE. UsageError if there is none."""
  name, split = resolve(source, config)
  found = list(sources.documents(name, config.data, split))
  if not found:
    raise UsageError(f'--data={source}: no document in it ({split} documents of {name})')
  return f'{split} documents of {name}', found
