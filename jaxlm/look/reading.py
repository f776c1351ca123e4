"""A text as a model reads it, and its tokens as a person does."""
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UsageError

KINDS = ('decoder', 'encoder', 'seq2seq', 'rnn')  # whose layers hidden.py runs one by one
VISIBLE = str.maketrans({' ': '␣', '\n': '⏎', '\t': '⇥'})


class Reading(NamedTuple):
  """int32 ids that a decoder reads, [opening, t1 … tn], or an encoder, [cls, t1 … tn, sep]; beside an encoder, `source`:
  the ids that the encoder reads, opened as a prompt is."""
  ids: np.ndarray
  source: np.ndarray | None = None


def read(lm, text: str, source: str | None = None) -> Reading:
  """UsageError for a kind of model whose layers cannot be looked at, a text with more tokens than the model has positions,
  a source that is missing or not wanted."""
  kind, t = lm.config.model.kind, lm.tokenizer
  if kind not in KINDS:
    raise UsageError(f'model.kind={kind}: its layers cannot be looked at, only those of {", ".join(KINDS)}; look loss takes it')
  reads = kind == 'seq2seq'
  if reads and source is None:
    raise UsageError(f'model.kind={kind}: wants --source=…, the text that its encoder reads')
  if source is not None and not reads:
    raise UsageError(f'--source={source!r}: model.kind={kind} has no encoder beside it; leave it out')
  ids = [t.cls, *t.encode(text), t.sep] if kind == 'encoder' else [t.opening, *t.encode(text)]
  array = lambda name, ids: _fitting(lm, name, np.array(ids, np.int32))
  return Reading(array('text', ids), array('source', t.prompt(source)) if reads else None)


def to_encoder(lm, text: str) -> Reading:
  """As `read`, of the text that the encoder of a seq2seq reads; its decoder reads no more than what opens a text."""
  if lm.config.model.kind != 'seq2seq':
    return read(lm, text)
  t = lm.tokenizer
  return Reading(np.array([t.opening], np.int32), _fitting(lm, 'text', np.array(t.prompt(text), np.int32)))


def _fitting(lm, name: str, ids: np.ndarray) -> np.ndarray:
  m = lm.config.model
  if m.P and len(ids) > m.P - m.first_position:
    raise UsageError(f'--{name}: has {len(ids)} tokens, and the model {m.P - m.first_position} learned positions; shorten it')
  return ids


def labels(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
  """Each token alone, as text with its white space made visible; as the vocabulary writes it where it is part of a
  character or none that prints, and #id where the vocabulary has no such row."""
  out = []
  for i in map(int, ids):
    written = tokenizer.text_of(i)
    text = '' if written is None else tokenizer.decode([i])
    text = text.translate(VISIBLE)
    if '\ufffd' in text or not text or not text.isprintable():
      text = f'#{i}' if written is None else written
    out.append(text)
  return out


def stretches(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[int, int, str]]:
  """(first token, the one after the last, text) of the shortest runs of ids that are whole characters: mostly one token
  each, several where they make up one character. The texts in a row are the decoded text."""
  out, before, start = [], [], 0
  for end in range(1, len(ids) + 1):
    known = tokenizer.decode(before)  # what came before decides whether a space goes between
    text = tokenizer.decode([*before, *map(int, ids[start:end])])[len(known):]
    if text.endswith('\ufffd') and end - start < 4 and end < len(ids):
      continue  # a character of UTF-8 has at most 4 bytes
    out.append((start, end, text))
    before, start = list(map(int, ids[start:end])), end
  return out
