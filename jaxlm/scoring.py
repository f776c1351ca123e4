"""How many nats each document costs a model, kind by kind. Every token of a document [opening, t1 … tn] is scored exactly
once, whatever the batch size and the mesh:

    decoder      given what precedes it in a window of the context C: the first window scores C tokens, each further one S
                 more (S the stride), with at least C − S before them. Windows are packed into rows, apart by segment.
    seq2seq      the same, and the encoder reads the `objective.source` tokens before the window.
    rnn          given the whole document before it: documents run in lanes, the state goes on from piece to piece.
    encoder      given all other tokens of its window of C tokens, it alone masked: a pseudo-log-likelihood (Salazar et al.
                 2020), which is no probability of the text and is no bound for the others.
    ngram        given the model.ngram.order − 1 tokens before it, on the host.
"""
import dataclasses
import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from jaxlm.data import pipeline
from jaxlm.data.rows import CHOICES
from jaxlm.errors import UsageError
from jaxlm.loss import per_token_nll
from jaxlm.models import heads, kinds
from jaxlm.schema import Config


@dataclasses.dataclass
class Document:
  """What a document came to: its bytes, the tokens that were scored, and their nats."""
  name: str
  bytes: int
  tokens: int
  nll: float = 0.


@dataclasses.dataclass(frozen=True)
class Window:
  """ids are inputs and one target more; only targets from index `scored` on count. source: what an encoder reads before."""
  ids: np.ndarray
  scored: int
  source: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
  owner: int = 0  # of which document
  first: int = 1  # where in it the first token stands that counts


class Piece(NamedTuple):
  """What was scored at once of document `owner`: its tokens first, first + 1, … (0 is the opening) cost nll_S nats each."""
  owner: int
  first: int
  nll_S: np.ndarray


Texts = Iterator[tuple[int, np.ndarray]]  # (which document, its ids [opening, t1 … tn])


def windows(ids: np.ndarray, context: int, stride: int, source: int = 0, owner: int = 0) -> Iterator[Window]:
  """Windows of [opening, t1 … tn] in which every t is scored once (see the module's text)."""
  n, end = len(ids) - 1, 0
  while end < n:
    new_end = min(context if end == 0 else end + stride, n)
    start = max(0, new_end - context)
    yield Window(ids[start:new_end + 1], end - start, ids[max(0, start - source):start], owner, end + 1)
    end = new_end


def rows(all_windows: Iterable[Window], context: int, source: int = 0, alone: bool = False) -> Iterator[list[Window]]:
  """Windows in order, as many to a row as fit (alone: one)."""
  row, used, used_source = [], 0, 0
  for window in all_windows:
    size = len(window.ids) - 1
    if row and (alone or used + size > context or used_source + len(window.source) > source):
      yield row
      row, used, used_source = [], 0, 0
    row.append(window)
    used += size
    used_source += len(window.source)
  if row:
    yield row


def to_batch(row_list: list[list[Window]], size: int, context: int, source: int = 0) -> dict[str, np.ndarray]:
  """Rows → a batch of `size` rows, the missing ones empty."""
  names = {'tokens': context, 'targets': context, 'segments': context, 'positions': context, 'inputs': source,
           'input_segments': source, 'input_positions': source}
  batch = {k: np.zeros((size, length), np.int32) for k, length in names.items() if length}
  batch['weights'] = np.zeros((size, context), np.float32)
  for r, row in enumerate(row_list):
    at = at_source = 0
    for segment, w in enumerate(row, 1):
      span = slice(at, at + len(w.ids) - 1)
      batch['tokens'][r, span], batch['targets'][r, span] = w.ids[:-1], w.ids[1:]
      batch['segments'][r, span], batch['positions'][r, span] = segment, np.arange(len(w.ids) - 1)
      batch['weights'][r, at + w.scored:span.stop] = 1
      at = span.stop
      if len(w.source):
        span = slice(at_source, at_source + len(w.source))
        batch['inputs'][r, span], batch['input_segments'][r, span] = w.source, segment
        batch['input_positions'][r, span] = np.arange(len(w.source))
        at_source = span.stop
  return batch


def make_nll(config: Config) -> Callable:
  """Jitted (params, batch [B, L], carry) → (−log p of each target, float32 [B, L], 0 where its weight is 0; the carry)."""
  @jax.jit
  def nll(params, batch, carry=None):
    hidden = kinds.forward(config.model, params, batch, carry=carry)
    if config.objective.name in CHOICES:
      scores_BSC = heads.choices(config.model, params, hidden, batch['segments'])
      return heads.class_nll(scores_BSC, batch['labels']) * batch['weights'], hidden.carry
    losses = per_token_nll(config.model, config.loss, hidden.x_BLD, hidden.unembed, batch['targets'])
    return losses * batch['weights'], hidden.carry
  return nll


class Scorer:
  """Runs batches of rows on an LM's mesh (see lm.py). context, stride, batch: see the module's text."""

  def __init__(self, lm, context: int, stride: int, batch: int):
    self.lm, self.context, self.stride = lm, context, stride
    self.batch = -(-batch // lm.rows_multiple) * lm.rows_multiple
    self._nll = make_nll(lm.config)

  def nll(self, arrays: dict, carry=None):
    """(float32 [B, L] on the host, carry) of a batch of numpy arrays."""
    placed = pipeline.place(lambda low, high: {k: a[low:high] for k, a in arrays.items()}, self.batch, self.lm.mesh)
    nll_BL, carry = self._nll(self.lm.params, placed, carry)
    return jax.device_get(nll_BL), carry

  def in_batches(self, items: Iterable) -> Iterator[list]:
    waiting = []
    for item in items:
      waiting.append(item)
      if len(waiting) == self.batch:
        yield waiting
        waiting = []
    if waiting:
      yield waiting

  def of_windows(self, texts: Texts) -> Iterator[Piece]:
    """Decoders, and decoders beside an encoder."""
    source = self.lm.config.objective.source
    found = (w for owner, ids in texts for w in windows(ids, self.context, self.stride, source, owner))
    alone = self.lm.config.model.kind == 'rnn_seq2seq'
    for row_list in self.in_batches(rows(found, self.context, source, alone)):
      nll_BL, _ = self.nll(to_batch(row_list, self.batch, self.context, source))
      for row, nll_L in zip(row_list, nll_BL):
        at = 0
        for w in row:
          yield Piece(w.owner, w.first, nll_L[at + w.scored:at + len(w.ids) - 1])
          at += len(w.ids) - 1

  def of_lanes(self, texts: Texts) -> Iterator[Piece]:
    """Recurrent models. The longest document goes first, each to the lane that is shortest so far."""
    lanes = [(0, lane, []) for lane in range(self.batch)]
    for owner, ids in sorted(texts, key=lambda t: -len(t[1])):
      used, lane, held = heapq.heappop(lanes)
      heapq.heappush(lanes, (used + len(ids) - 1, lane, [*held, (owner, ids)]))
    pieces = -(-max(used for used, _, _ in lanes) // self.context)
    shape = (self.batch, pieces * self.context)
    arrays = {k: np.zeros(shape, np.int32) for k in ('tokens', 'targets', 'segments', 'positions')}
    arrays['weights'], owners = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
    for _, lane, held in lanes:
      at = 0
      for owner, ids in held:
        span = slice(at, at + len(ids) - 1)
        for name, values in (('tokens', ids[:-1]), ('targets', ids[1:]), ('positions', np.arange(len(ids) - 1)),
                             ('segments', 1), ('weights', 1)):
          arrays[name][lane, span] = values
        owners[lane, span] = owner
        at = span.stop
    carry = None
    for start in range(0, shape[1], self.context):
      cut = slice(start, start + self.context)
      nll_BL, carry = self.nll({k: a[:, cut] for k, a in arrays.items()}, carry)
      for owner in np.unique(owners[:, cut]):
        its_BL = (owners[:, cut] == owner) & (arrays['weights'][:, cut] > 0)
        if its_BL.any():
          yield Piece(int(owner), int(arrays['positions'][:, cut][its_BL][0]) + 1, nll_BL[its_BL])

  def of_masks(self, texts: Texts) -> Iterator[Piece]:
    """Encoders: a row for each token, with it masked."""
    tokenizer, size = self.lm.tokenizer, self.context - 2

    def masked():
      for owner, ids in texts:
        for start in range(1, len(ids), size):
          row = np.array([tokenizer.cls, *ids[start:start + size], tokenizer.sep], np.int32)
          for at in range(1, len(row) - 1):
            yield owner, start + at - 1, row, at
    for items in self.in_batches(masked()):
      batch = {k: np.zeros((self.batch, self.context), np.int32) for k in ('tokens', 'segments', 'positions')}
      batch |= {k: np.zeros((self.batch, 1), np.int32) for k in ('at', 'targets')}
      batch['weights'] = np.zeros((self.batch, 1), np.float32)
      for b, (_, _, row, at) in enumerate(items):
        batch['tokens'][b, :len(row)], batch['segments'][b, :len(row)] = row, 1
        batch['positions'][b, :len(row)] = np.arange(len(row))
        batch['at'][b], batch['targets'][b], batch['weights'][b] = at, row[at], 1
        batch['tokens'][b, at] = tokenizer.mask
      nll_B1, _ = self.nll(batch)
      for (owner, first, _, _), nll_1 in zip(items, nll_B1):
        yield Piece(owner, first, nll_1)

  def of_counts(self, texts: Texts) -> Iterator[Piece]:
    """n-grams. The opening is START, whatever token it is."""
    model = self.lm.counted
    for owner, ids in texts:
      ids[0], first = model.V, 1
      for nats in model.each(ids):
        yield Piece(owner, first, nats)
        first += len(nats)


SCORERS = {'decoder': Scorer.of_windows, 'seq2seq': Scorer.of_windows, 'rnn_seq2seq': Scorer.of_windows,
           'rnn': Scorer.of_lanes, 'encoder': Scorer.of_masks, 'ngram': Scorer.of_counts}


def score(lm, documents: Iterable[tuple[str, str]], context: int, stride: int, batch: int, progress=None) -> list[Document]:
  """Scores (name, text) documents with an LM. UsageError for a context or stride that it cannot have."""
  _check(lm, context, stride)
  out: list[Document] = []

  def texts():
    for name, text in documents:
      ids = ids_of(lm, text)
      out.append(Document(name, len(text.encode()), len(ids) - 1))
      if progress:
        progress(out[-1].bytes)
      yield len(out) - 1, ids
  with jax.set_mesh(lm.mesh):
    for piece in SCORERS[lm.config.model.kind](Scorer(lm, context, stride, batch), texts()):
      out[piece.owner].nll += float(piece.nll_S.sum(dtype=np.float64))
  return out


def per_token(lm, text: str, context: int, stride: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
  """(ids [opening, t1 … tn], float32 nats of t1 … tn) of one text; the nats sum to what `score` gives. Errors as there."""
  _check(lm, context, stride)
  ids, kind = ids_of(lm, text), lm.config.model.kind
  if len(ids) == 1:
    raise UsageError(f'the text {text!r} has no token to score')
  context = min(context, -(-(len(ids) + 1) // 16) * 16)  # a short text is one short row, not `batch` long ones
  stride = min(stride, context)
  batch = min(batch, {'encoder': len(ids) - 1, 'rnn': 1}.get(kind, sum(1 for _ in windows(ids, context, stride))))
  nll_S = np.full(len(ids) - 1, np.nan, np.float32)
  with jax.set_mesh(lm.mesh):
    for piece in SCORERS[kind](Scorer(lm, context, stride, batch), iter([(0, ids)])):
      nll_S[piece.first - 1:piece.first - 1 + len(piece.nll_S)] = piece.nll_S
  return ids, nll_S


def ids_of(lm, text: str) -> np.ndarray:
  """int32 [opening, t1 … tn]."""
  return np.array([lm.tokenizer.opening, *lm.tokenizer.encode(text)], np.int32)


def _check(lm, context: int, stride: int) -> None:
  if not 1 <= stride <= context:
    raise UsageError(f'--stride={stride}: wants 1 up to the context, {context}')
  m = lm.config.model
  limit = m.P - m.first_position if m.P else context
  if context > limit:
    raise UsageError(f'--context={context}: the model has only {limit} learned positions')
  if m.kind == 'encoder' and (m.head != 'mlm' or context < 3):
    raise UsageError(f'--context={context}, model.head={m.head}: an encoder scores with head=mlm, in windows of 3 or more')
