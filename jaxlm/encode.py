"""Texts through an encoder: the scores of its head and what they choose, tags or answers; vectors of texts."""
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import tokenizers
from tokenizers import processors

from jaxlm.data import asked as asking, forms, pipeline
from jaxlm.errors import UsageError
from jaxlm.models import heads, kinds

ROWS = 32    # texts at a time
PLACES = 32  # rows have a multiple of so many places, so that few lengths are compiled
LONGEST = 30  # tokens of an answer


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


Row = tuple[Sequence[int], Sequence[int]]  # ids and their types


def _encoded(lm, texts: Sequence) -> list[Row]:
  good = lambda t: isinstance(t, str) or (len(t) == 2 and all(isinstance(s, str) for s in t))
  if isinstance(texts, str) or not all(map(good, texts)):
    raise UsageError('wants a list of texts, or of pairs of texts')
  return [(e.ids, e.type_ids) for e in lm.reader.encode_batch([t if isinstance(t, str) else tuple(t) for t in texts])]


def _batches(lm, texts: Sequence[Row]) -> Iterator[tuple[list[int], list[int], dict]]:
  """(which texts, how many tokens each has, the batch on the mesh), the texts sorted by length."""
  order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]))
  count = min(ROWS, 1 << max(0, len(texts) - 1).bit_length())  # few sizes too
  size = -(-count // lm.rows_multiple) * lm.rows_multiple
  for at in range(0, len(order), size):
    rows = order[at:at + size]
    lengths = [len(texts[i][0]) for i in rows]
    shape = (size, -(-max(lengths) // PLACES) * PLACES)
    batch = {name: np.zeros(shape, np.int32) for name in ('tokens', 'types', 'segments', 'positions')}
    for b, (i, n) in enumerate(zip(rows, lengths)):
      batch['tokens'][b, :n] = texts[i][0]
      batch['types'][b, :n] = np.minimum(texts[i][1], max(lm.config.model.T - 1, 0))
      batch['segments'][b, :n], batch['positions'][b, :n] = 1, np.arange(n)
    yield rows, lengths, pipeline.place(lambda low, high, b=batch: {k: a[low:high] for k, a in b.items()}, size, lm.mesh)


def _of_rows(lm, texts: Sequence[Row], heads_wanted: tuple[str, ...] = ('classify', 'tag', 'span')) -> list[np.ndarray]:
  """The scores of each text: [C], or [L, C] of its tokens. UsageError for a model that makes none such."""
  m, found = lm.config.model, {}
  if m.head not in heads_wanted:
    raise UsageError(f'model.head={m.head!r}: makes no such scores; {", ".join(heads_wanted)} would')
  with jax.set_mesh(lm.mesh):
    for rows, lengths, batch in _batches(lm, texts):
      out = jax.device_get(_scores(m, lm.params, batch))
      found |= {i: out[b] if m.head == 'classify' else out[b, :n] for b, (i, n) in enumerate(zip(rows, lengths))}
  return [found[i] for i in range(len(texts))]


def scores(lm, texts: Sequence) -> np.ndarray:
  """See LM.scores."""
  found, C = _of_rows(lm, _encoded(lm, texts)), lm.config.model.C
  if lm.config.model.head == 'classify':
    return np.array(found, np.float32).reshape(len(texts), C)
  out_BLC = np.full((len(texts), max(map(len, found), default=0), C), heads.NEVER, np.float32)
  for out_LC, row_LC in zip(out_BLC, found):
    out_LC[:len(row_LC)] = row_LC
  return out_BLC


def tags(lm, sentences: Sequence[Sequence[str]]) -> list[list[str]]:
  """See LM.tag."""
  classes, tokenizer, rows, places = lm.config.data.classes.split('|'), lm.tokenizer, [], []
  for sentence, words in enumerate(sentences):
    ids, first = forms.first_tokens(tokenizer, words)
    room = lm.config.length - 2
    for start in range(0, len(ids), room):
      places += [(len(rows), sentence, word, at - start + 1) for word, at in enumerate(first)
                 if at is not None and start <= at < start + room]
      rows.append(([tokenizer.cls, *ids[start:start + room], tokenizer.sep], [0] * (min(room, len(ids) - start) + 2)))
  found, out = _of_rows(lm, rows, ('tag',)), [[classes[0]] * len(words) for words in sentences]  # of words with no token
  for row, sentence, word, at in places:
    out[sentence][word] = classes[int(found[row][at].argmax())]
  return out


def answers(lm, questions: Sequence[str], contexts: Sequence[str]) -> list[str]:
  """See LM.answer."""
  tokenizer, rows, parts = lm.tokenizer, [], []
  for n, (question, context) in enumerate(zip(questions, contexts, strict=True)):
    asked, room = asking.fit_question(lm.config.length, tokenizer, np.array(tokenizer.encode(question), np.int32))
    ids, offsets = tokenizer.with_offsets(context)
    for start in range(0, max(1, len(ids) - room // 2), max(1, room // 2)):  # what one part cuts is whole in the next
      out = {k: np.zeros((1, lm.config.length), np.int32) for k in ('tokens', 'segments', 'positions', 'types')}
      before = asking.put_pair(tokenizer, out, 0, asked, ids[start:start + room])
      size = int(out['segments'].sum())
      parts.append((n, before, offsets[start:start + room]))
      rows.append((out['tokens'][0, :size], out['types'][0, :size]))
  best = [(-np.inf, '')] * len(questions)
  for (n, before, offsets), scores_LC in zip(parts, _of_rows(lm, rows, ('span',))):
    best[n] = max(best[n], _best_span(contexts[n], before, offsets, scores_LC), key=lambda b: b[0])
  return [text for _, text in best]


def _best_span(context: str, before: int, offsets, scores_LC) -> tuple[float, str]:
  """(how much likelier than no answer, the text) of the likeliest span of a part that ends where it begins or later, at most
  LONGEST tokens on (Devlin et al. 2019, §4.2 and 4.3)."""
  none = float(scores_LC[0].sum())
  first_S, last_S = (scores_LC[before:before + len(offsets), c].astype(np.float64) for c in (0, 1))
  if not len(first_S):
    return 0., ''
  apart_SS = np.arange(len(last_S))[None] - np.arange(len(first_S))[:, None]
  total_SS = np.where((apart_SS >= 0) & (apart_SS < LONGEST), first_S[:, None] + last_S[None], -np.inf)
  first, last = np.unravel_index(total_SS.argmax(), total_SS.shape)
  score = float(total_SS[first, last]) - none
  return (score, context[offsets[first][0]:offsets[last][1]].strip()) if score > 0 else (0., '')


def embed(lm, texts: Sequence) -> np.ndarray:
  """See LM.embed."""
  m = lm.config.model
  if m.pool == 'none':
    raise UsageError("model.pool='none': says no way to a vector of a text; import it with --config.model.pool=mean or first")
  out_BD = np.zeros((len(texts), m.D), np.float32)
  with jax.set_mesh(lm.mesh):
    for rows, _, batch in _batches(lm, _encoded(lm, texts)):
      out_BD[rows] = jax.device_get(_vectors(m, lm.params, batch))[:len(rows)]
  return out_BD
