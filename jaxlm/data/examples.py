"""How a window of the token stream becomes an example, objective by objective. All of it is a pure function of (config,
tokenizer, stream, window, example number): masks are drawn anew for each example of the run, and the same after a resume.

A batch is a dict of arrays [B, …], `shapes` says which: tokens, segments, positions (what the model, or its decoder,
reads), inputs, input_segments, input_positions (what an encoder beside it reads), targets and weights (what is to be said),
at (the places of the targets, where they are not all), types and labels (of pairs). Segment and weight 0 are padding.
"""
import dataclasses
import functools
import hashlib

import numpy as np

from jaxlm.data.packing import Stream
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UsageError
from jaxlm.schema import Config, ObjectiveConfig, selected, span_lengths


@dataclasses.dataclass(frozen=True)
class Task:
  """What the examples of a run are made with."""
  config: Config
  tokenizer: Tokenizer
  packed: dict = dataclasses.field(default_factory=dict, compare=False)  # of each stream of answers: its rows

  @property
  def objective(self) -> ObjectiveConfig:
    return self.config.objective

  def rng(self, number: int) -> np.random.Generator:
    """Randomness of one example (by its number in the run) or window (static masks)."""
    digest = hashlib.blake2b(f'{self.config.seed}/{number}'.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, 'little')))


def _shifted(slices: dict) -> dict[str, np.ndarray]:
  """L + 1 tokens a row → L inputs and their targets; the one that would cross into another document has weight 0."""
  segments_BM = slices['segments']
  same_BL = (segments_BM[:, :-1] == segments_BM[:, 1:]) & (segments_BM[:, 1:] > 0)
  return {'tokens': slices['tokens'][:, :-1], 'targets': slices['tokens'][:, 1:], 'segments': segments_BM[:, :-1],
          'positions': slices['positions'][:, :-1], 'weights': same_BL.astype(np.float32)}


def causal(task: Task, stream: Stream, windows_B, numbers_B, since_B=None) -> dict[str, np.ndarray]:
  """Next-token prediction: window w is stream[w·L : w·L + L + 1], so that every token is a target once an epoch."""
  del numbers_B
  L = task.config.length
  return _shifted(stream.slices(windows_B * L, L + 1, since_B))


def following(task: Task, stream: Stream, windows_B, numbers_B) -> dict[str, np.ndarray]:
  """The window as `causal`, and the `source` tokens before it for the encoder: a language model of encoder and decoder.
  Every token is a target once an epoch; of the source, only what is of the same document is seen."""
  L, M = task.config.length, task.objective.source
  whole = stream.slices(windows_B * L - M, M + L + 1)
  batch = causal(task, stream, windows_B, numbers_B)
  segments_BM = whole['segments'][:, M:]
  return {**batch, 'segments': segments_BM[:, :-1], 'inputs': whole['tokens'][:, :M],
          'input_segments': whole['segments'][:, :M], 'input_positions': whole['positions'][:, :M]}


def prefix(task: Task, stream: Stream, windows_B, numbers_B) -> dict[str, np.ndarray]:
  """Prefix LM (Raffel et al. 2020, §3.2.1): each row is cut somewhere; the encoder reads what is before, the decoder says
  what is after."""
  L, M = task.config.length, task.objective.source
  whole = stream.slices(windows_B * L, L + 1)
  out = _blank(task, len(windows_B))
  for b, number in enumerate(numbers_B):
    cut = int(task.rng(number).integers(1, min(M, L) + 1))
    _put(out, b, 'inputs', {k: whole[k][b, :cut] for k in whole})
    rest = {k: whole[k][b:b + 1, cut - 1:] for k in whole}
    for name, row in _shifted(rest).items():
      out[name][b, :row.shape[1]] = row[0]
  out['positions'] = _recount(out['segments'])
  return out


def _recount(segments_BL) -> np.ndarray:
  """Positions that start from 0 wherever the segment changes."""
  at_BL = np.broadcast_to(np.arange(segments_BL.shape[1]), segments_BL.shape)
  starts_BL = np.concatenate([np.ones_like(segments_BL[:, :1], bool), segments_BL[:, 1:] != segments_BL[:, :-1]], 1)
  return (at_BL - np.maximum.accumulate(np.where(starts_BL, at_BL, 0), 1)).astype(np.int32)


def _put(out: dict, b: int, name: str, row: dict) -> None:
  """A row's tokens, segments and positions into the arrays of the encoder's input."""
  keys = {'tokens': name, 'segments': 'input_segments', 'positions': 'input_positions'}
  for theirs, ours in keys.items():
    out[ours][b, :len(row[theirs])] = row[theirs]


def spans(task: Task, stream: Stream, windows_B, numbers_B) -> dict[str, np.ndarray]:
  """Span corruption (T5, Raffel et al. 2020, §3.1.4): spans of a window become one sentinel each; the targets are the
  sentinels, each with what it stands for. A document's spans stay its own: a span ends where the document does."""
  L, (size, _) = task.config.length, span_lengths(task.objective)
  whole = stream.slices(windows_B * size, size)
  out = _blank(task, len(windows_B))
  for b, number in enumerate(numbers_B):
    row = {k: a[b] for k, a in whole.items()}
    inputs, targets = _corrupt(task, task.rng(number), row['tokens'], row['segments'])
    lost = np.flatnonzero(np.isin(targets[0], task.tokenizer.sentinels) & ~np.isin(targets[0], inputs[0][:task.objective.source]))
    targets = [a[:lost[0] if len(lost) else None] for a in targets]  # spans that were cut leave more than there is room for
    for name, (ids, segments), room in (('inputs', inputs, task.objective.source), ('targets', targets, L)):
      ids, segments = ids[:room], segments[:room]
      keys = ('inputs', 'input_segments', 'input_positions') if name == 'inputs' else ('targets', 'segments', 'positions')
      for key, value in zip(keys, (ids, segments, _recount(segments[None])[0])):
        out[key][b, :len(ids)] = value
    out['tokens'][b, 1:] = out['targets'][b, :-1]
    first = out['positions'][b] == 0
    out['tokens'][b, first & (out['segments'][b] > 0)] = task.tokenizer.boundary
  out['weights'] = (out['segments'] > 0).astype(np.float32)
  return out


def _corrupt(task: Task, rng, tokens_L, segments_L):
  """((inputs, their segments), (targets, their segments)) of a window, in which noise and the rest are cut into as many
  pieces of random length, in turn, the rest first."""
  size, o = len(tokens_L), task.objective
  noise = min(max(round(size * o.share), 1), size - 1)
  count = min(max(1, round(noise / o.span)), size - noise, len(task.tokenizer.sentinels))
  cut = lambda n: np.diff(np.concatenate([[0], np.sort(rng.choice(np.arange(1, n), count - 1, replace=False)), [n]]))
  lengths = np.stack([cut(size - noise), cut(noise)], 1).reshape(-1)
  inputs, targets, at = [], [], 0
  for n, (kept, masked) in enumerate(zip(lengths[::2], lengths[1::2])):
    inputs += zip(tokens_L[at:at + kept], segments_L[at:at + kept])
    start, at = at + kept, at + kept + masked
    own = slice(start, start + int(np.sum(segments_L[start:at] == segments_L[start])))
    if segments_L[start] and n < len(task.tokenizer.sentinels):
      sentinel = (task.tokenizer.sentinels[n], segments_L[start])
      inputs += [sentinel, *zip(tokens_L[own.stop:at], segments_L[own.stop:at])]
      targets += [sentinel, *zip(tokens_L[own], segments_L[own])]
  real = lambda pairs: np.array([p for p in pairs if p[1] > 0], np.int32).reshape(-1, 2).T
  return real(inputs), real(targets)


def mask(task: Task, stream: Stream, windows_B, numbers_B) -> dict[str, np.ndarray]:
  """Masked language modelling (BERT, Devlin et al. 2019, §3.1) of full windows (RoBERTa, Liu et al. 2019, §4.2)."""
  batch = stream.slices(windows_B * task.config.length, task.config.length)
  return _masked(task, batch, windows_B if task.objective.static else numbers_B)


def _masked(task: Task, batch: dict, numbers_B) -> dict[str, np.ndarray]:
  """Of `share` of the tokens (boundaries are none), 80% become the mask, 10% any token, 10% stay; all are to be said."""
  o, tokenizer, S = task.objective, task.tokenizer, selected(task.config)
  B, tokens_BL = len(batch['tokens']), batch['tokens'].copy()
  at_BS, targets_BS, weights_BS = np.zeros((B, S), np.int32), np.zeros((B, S), np.int32), np.zeros((B, S), np.float32)
  fixed = (tokenizer.boundary, tokenizer.cls, tokenizer.sep)
  for b, number in enumerate(numbers_B):
    rng = task.rng(number)
    may_L = (batch['segments'][b] > 0) & ~np.isin(batch['tokens'][b], fixed)
    want = min(S, max(1, round(o.share * int(may_L.sum()))))
    if o.whole_words:
      word_L = np.cumsum(tokenizer.word_starts[batch['tokens'][b]] | (np.diff(batch['segments'][b], prepend=-1) != 0) | ~may_L)
      order = rng.permutation(np.unique(word_L[may_L]))
      sizes = np.bincount(word_L[may_L], minlength=word_L[-1] + 1)[order]
      taken = order[np.cumsum(sizes) <= want]
      places = np.flatnonzero(may_L & np.isin(word_L, taken))
    else:
      places = np.sort(rng.permutation(np.flatnonzero(may_L))[:want])
    how = rng.random(len(places))
    n = len(places)
    at_BS[b, :n], targets_BS[b, :n], weights_BS[b, :n] = places, batch['tokens'][b, places], 1
    tokens_BL[b, places[how < 0.8]] = tokenizer.mask
    anything = rng.integers(0, tokenizer.vocab_size, len(places))
    tokens_BL[b, places[how >= 0.9]] = anything[how >= 0.9]
  return {**batch, 'tokens': tokens_BL, 'at': at_BS, 'targets': targets_BS, 'weights': weights_BS}


def pairs(task: Task, stream: Stream, windows_B, numbers_B) -> dict[str, np.ndarray]:
  """Masked language modelling of pairs, [CLS] A [SEP] B [SEP], and whether B follows A in its document (label 0) or comes
  from elsewhere (1), half of each (BERT, §3.1)."""
  L, B = task.config.length, len(windows_B)
  count = stream.windows(L)
  out = {k: np.zeros((B, L), np.int32) for k in ('tokens', 'segments', 'positions', 'types')}
  labels_B1 = np.zeros((B, 1), np.int32)
  for b, (window, number) in enumerate(zip(windows_B, numbers_B)):
    rng = task.rng(-1 - int(window if task.objective.static else number))
    text = _longest(task, stream, int(window))
    cut = int(rng.integers(1, max(2, len(text))))
    first, second = text[:cut], text[cut:]
    if count > 1 and rng.random() < 0.5:
      labels_B1[b] = 1
      other = (int(window) + int(rng.integers(1, count))) % count
      second = _longest(task, stream, other)
    a = min(len(first), max(L - 3 - len(second), (L - 3) // 2))
    first, second = first[:a], second[:L - 3 - a]
    row = np.concatenate([[task.tokenizer.cls], first, [task.tokenizer.sep], second, [task.tokenizer.sep]])
    out['tokens'][b, :len(row)] = row
    out['segments'][b, :len(row)] = 1
    out['types'][b, len(first) + 2:len(row)] = 1
  out['positions'] = _recount(out['segments'])
  return {**_masked(task, out, windows_B if task.objective.static else numbers_B), 'labels': labels_B1}


def _longest(task: Task, stream: Stream, window: int) -> np.ndarray:
  """Tokens of the document that fills most of a window."""
  row = stream.slices(np.array([window * task.config.length]), task.config.length)
  tokens_L, segments_L = row['tokens'][0], row['segments'][0]
  text = segments_L * (tokens_L != task.tokenizer.boundary)
  return tokens_L[text == np.argmax(np.bincount(text, minlength=2)[1:]) + 1]


def _fit(task: Task, question: int, answer: int) -> tuple[int, int]:
  """How many tokens of each are kept: the last of the question and the first of the answer, each with a boundary after it."""
  L, M = task.config.length, task.objective.source
  if M:
    return min(question, M - 1), min(answer, L - 1)
  answer = min(answer, L - 2)
  return min(question, L - 2 - answer), answer


def rows_of_answers(task: Task, stream: Stream) -> list[list[int]]:
  """The documents of each row: in an order that the seed chooses, as many as fit (a recurrent model takes one)."""
  if id(stream) not in task.packed:
    questions, answers = stream.answers - stream.starts[:-1] - 2, stream.starts[1:] - stream.answers - 1
    L, M, alone = task.config.length, task.objective.source, task.config.model.kind == 'rnn_seq2seq'
    rows, room = [], (0, 0)
    for n in task.rng(-1).permutation(len(answers)):
      question, answer = _fit(task, int(questions[n]), int(answers[n]))
      wants = (question + 1, answer + 1) if M else (0, question + answer + 2)
      if alone or not rows or wants[0] > room[0] or wants[1] > room[1]:
        rows.append([])
        room = (M, L)
      rows[-1].append(int(n))
      room = (room[0] - wants[0], room[1] - wants[1])
    task.packed[id(stream)] = rows
  return task.packed[id(stream)]


def answer(task: Task, stream: Stream, windows_B, numbers_B) -> dict[str, np.ndarray]:
  """Questions and their answers; only the answer counts. An encoder reads the question and a boundary, the decoder starts
  from one; a decoder alone reads [boundary, question, boundary, answer]."""
  del numbers_B
  rows, out, boundary = rows_of_answers(task, stream), _blank(task, len(windows_B)), task.tokenizer.boundary
  for b, window in enumerate(windows_B):
    at = at_source = 0
    for segment, n in enumerate(rows[window], 1):
      question, said = stream.document(n)
      kept, size = _fit(task, len(question), len(said))
      question, said = question[len(question) - kept:], said[:size]
      if task.objective.source:
        span = slice(at_source, at_source + kept + 1)
        out['inputs'][b, span], out['input_segments'][b, span] = [*question, boundary], segment
        at_source, before = span.stop, [boundary]
      else:
        before = [boundary, *question, boundary]
      ids = [*before, *said, boundary]
      span = slice(at, at + len(ids) - 1)
      out['tokens'][b, span], out['targets'][b, span], out['segments'][b, span] = ids[:-1], ids[1:], segment
      out['weights'][b, at + len(before) - 1:span.stop] = 1
      at = span.stop
  for prefix in ('', 'input_') if task.objective.source else ('',):
    out[f'{prefix}positions'] = _recount(out[f'{prefix}segments'])
  return out


def labels_of(task: Task, stream: Stream) -> np.ndarray:
  """int32 [documents]: which of data.classes each answer is. UsageError for one that is none."""
  if ('labels', id(stream)) not in task.packed:
    classes = {name: n for n, name in enumerate(task.config.data.classes.split('|'))}
    said = [task.tokenizer.decode(stream.document(n)[1]) for n in range(len(stream.answers))]
    strange = sorted(set(said) - set(classes))
    if strange:
      raise UsageError(f'data.classes={task.config.data.classes!r}: field {task.config.data.target} also has {strange[0]!r}')
    task.packed['labels', id(stream)] = np.array([classes[name] for name in said], np.int32)
  return task.packed['labels', id(stream)]


def classify(task: Task, stream: Stream, windows_B, numbers_B) -> dict[str, np.ndarray]:
  """A text a row, [CLS] text [SEP], cut at its end, and which class it is of."""
  del numbers_B
  out, t = _blank(task, len(windows_B)), task.tokenizer
  for b, n in enumerate(windows_B):
    row = [t.cls, *stream.document(n)[0][:task.config.length - 2], t.sep]
    out['tokens'][b, :len(row)], out['segments'][b, :len(row)] = row, 1
  out['positions'] = _recount(out['segments'])
  return {**out, 'labels': labels_of(task, stream)[windows_B][:, None], 'weights': np.ones_like(out['weights'])}


EXAMPLES = {'causal': causal, 'next': following, 'prefix': prefix, 'spans': spans, 'mask': mask, 'pairs': pairs,
            'answer': answer, 'classify': classify}


def make(task: Task, stream: Stream, windows_B: np.ndarray, numbers_B: np.ndarray) -> dict[str, np.ndarray]:
  """The examples of some windows of a stream; numbers: of the examples in the run, which their randomness follows."""
  return EXAMPLES[task.objective.name](task, stream, windows_B, numbers_B)


def count(task: Task, stream: Stream) -> int:
  """Windows that a stream has."""
  if task.objective.name == 'classify':
    return len(labels_of(task, stream))
  return len(rows_of_answers(task, stream)) if task.objective.name == 'answer' else stream.windows(stride(task.config))


def stride(config: Config) -> int:
  """Tokens of the stream from one window to the next."""
  return span_lengths(config.objective)[0] if config.objective.name == 'spans' else config.length


@functools.cache
def shapes(config: Config) -> dict[str, tuple[int, type]]:
  """name → (length, dtype) of the arrays [B, length] of a batch."""
  name, L, M = config.objective.name, config.length, config.objective.source
  out = {k: (L, np.int32) for k in ('tokens', 'targets', 'segments', 'positions')} | {'weights': (L, np.float32)}
  if M:
    out |= {k: (M, np.int32) for k in ('inputs', 'input_segments', 'input_positions')}
  if name in ('mask', 'pairs'):
    S = selected(config)
    out |= {'at': (S, np.int32), 'targets': (S, np.int32), 'weights': (S, np.float32)}
  if name == 'pairs':
    out |= {'types': (L, np.int32), 'labels': (1, np.int32)}
  if name == 'classify':
    del out['targets']
    out |= {'labels': (1, np.int32), 'weights': (1, np.float32)}
  return out


def _blank(task: Task, rows: int) -> dict[str, np.ndarray]:
  return {name: np.zeros((rows, length), dtype) for name, (length, dtype) in shapes(task.config).items()}


def check(config: Config, tokenizer: Tokenizer) -> None:
  """UsageError if the model's vocabulary has no row for a token that the objective puts in."""
  name = config.objective.name
  extra = [tokenizer.mask] if name in ('mask', 'pairs') else tokenizer.sentinels if name == 'spans' else []
  size = max([tokenizer.vocab_size - 1, *extra]) + 1
  for key in ('V', 'vocab'):
    if 0 < getattr(config.model, key) < size:
      raise UsageError(f'model.{key}={getattr(config.model, key)}: the tokenizer has {tokenizer.vocab_size} tokens'
                       + (f', and objective.name={name} puts in others' if size > tokenizer.vocab_size else '')
                       + f'; set at least {size}')
