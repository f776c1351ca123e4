"""Objectives that ask of windows of a stream of texts: each is (task, stream, windows, example numbers) → a batch."""
import numpy as np

from jaxlm.data.packing import Stream
from jaxlm.data.rows import Task, blank, recount
from jaxlm.schema import selected, span_lengths


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
  out = blank(task, len(windows_B))
  for b, number in enumerate(numbers_B):
    cut = int(task.rng(number).integers(1, min(M, L) + 1))
    _put(out, b, 'inputs', {k: whole[k][b, :cut] for k in whole})
    rest = {k: whole[k][b:b + 1, cut - 1:] for k in whole}
    for name, row in _shifted(rest).items():
      out[name][b, :row.shape[1]] = row[0]
  out['positions'] = recount(out['segments'])
  return out


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
  out = blank(task, len(windows_B))
  for b, number in enumerate(numbers_B):
    row = {k: a[b] for k, a in whole.items()}
    inputs, targets = _corrupt(task, task.rng(number), row['tokens'], row['segments'])
    lost = np.flatnonzero(np.isin(targets[0], task.tokenizer.sentinels) & ~np.isin(targets[0], inputs[0][:task.objective.source]))
    targets = [a[:lost[0] if len(lost) else None] for a in targets]  # spans that were cut leave more than there is room for
    for name, (ids, segments), room in (('inputs', inputs, task.objective.source), ('targets', targets, L)):
      ids, segments = ids[:room], segments[:room]
      keys = ('inputs', 'input_segments', 'input_positions') if name == 'inputs' else ('targets', 'segments', 'positions')
      for key, value in zip(keys, (ids, segments, recount(segments[None])[0])):
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
  out['positions'] = recount(out['segments'])
  return {**_masked(task, out, windows_B if task.objective.static else numbers_B), 'labels': labels_B1}


def _longest(task: Task, stream: Stream, window: int) -> np.ndarray:
  """Tokens of the document that fills most of a window."""
  row = stream.slices(np.array([window * task.config.length]), task.config.length)
  tokens_L, segments_L = row['tokens'][0], row['segments'][0]
  text = segments_L * (tokens_L != task.tokenizer.boundary)
  return tokens_L[text == np.argmax(np.bincount(text, minlength=2)[1:]) + 1]
