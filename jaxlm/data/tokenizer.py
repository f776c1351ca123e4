"""Tokenizers: text ↔ token ids, through the `tokenizers` library, kept as one tokenizer.json text.

    bpe:SIZE        byte-level BPE of SIZE tokens, trained on the run's training documents
    bytes           a token a byte
    PATH            a tokenizer.json, as Hugging Face checkpoints carry it
"""
import functools
import hashlib
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jaxlm.errors import UsageError

BOUNDARY = '<|endoftext|>'
SENTINELS = 100
# Bytes of a word that BPE is trained on; longer ones (DNA, base64, text of a script without spaces) are cut, for training takes the square
# of a word's length: 0.4 MB without a space took 34 s, 2 MB no end. Encoding does not.
LONGEST = 1024
# What opens and closes a document in vocabularies of the field, the first that is there.
BOUNDARIES = (BOUNDARY, '<|end_of_text|>', '<｜end▁of▁sentence｜>', '</s>', '<eos>', '[SEP]')


class Tokenizer:
  """Documents are [boundary, t1 … tn, boundary]. A boundary written in a document's own text is plain text."""

  def __init__(self, json_text: str):
    self._tokenizer = tokenizers.Tokenizer.from_str(json_text)
    self._tokenizer.encode_special_tokens = True
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    found = [b for b in BOUNDARIES if self._tokenizer.token_to_id(b) is not None]
    if not found:
      raise UsageError(f'the tokenizer has none of {" ".join(BOUNDARIES)} to part documents with; add one of them')
    self.json = json_text
    self.boundary = self._tokenizer.token_to_id(found[0])
    self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

  @functools.cached_property
  def sha256(self) -> str:
    return hashlib.sha256(self.json.encode()).hexdigest()

  def encode(self, text: str) -> list[int]:
    """Token ids of a text, with no boundary."""
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def prompt(self, text: str) -> list[int]:
    """Token ids of a text to go on from, opened as the tokenizer's own template says (a boundary, a <bos>, or nothing)."""
    return self._tokenizer.encode(text, add_special_tokens=True).ids or [self.boundary]

  @functools.cached_property
  def opening(self) -> int:
    """The token that a document is read after: what the template puts before a text, else the boundary."""
    return (self._tokenizer.encode('', add_special_tokens=True).ids or [self.boundary])[0]

  def _first(self, names: Iterable[str], otherwise: int) -> int:
    """The first of `names` that is in the vocabulary, else an id that need not be."""
    return next((i for i in map(self._tokenizer.token_to_id, names) if i is not None), otherwise)

  @functools.cached_property
  def cls(self) -> int:
    """What stands before a text that an encoder reads."""
    return self._first(('[CLS]', '<s>'), self.boundary)

  @functools.cached_property
  def sep(self) -> int:
    """What stands after it."""
    return self._first(('[SEP]', '</s>'), self.boundary)

  @functools.cached_property
  def mask(self) -> int:
    """What stands for a masked token: where the vocabulary has none, the row after it."""
    return self._first(('[MASK]', '<mask>'), self.vocab_size)

  @functools.cached_property
  def sentinels(self) -> list[int]:
    """What stands for masked spans: where the vocabulary has none, the rows after it."""
    return [self._first((f'<extra_id_{n}>',), self.vocab_size + n) for n in range(SENTINELS)]

  @functools.cached_property
  def word_starts(self) -> np.ndarray:
    """bool [vocabulary]: the token begins a word (WordPiece: has no ##; else: has a space before it, or no letter first)."""
    texts = [self.text_of(i) or ' ' for i in range(self.vocab_size)]
    if any(t.startswith('##') for t in texts):
      return np.array([not t.startswith('##') for t in texts])
    return np.array([t[0] in 'ĠĊĉ▁' or not t[0].isalnum() for t in texts])

  def ids_of(self, tokens: Iterable[str], key: str = 'data.stop') -> list[int]:
    """Ids of tokens by their text. UsageError for one that is not in the vocabulary; key: of the config, which names it."""
    ids = {t: self._tokenizer.token_to_id(t) for t in tokens}
    missing = [t for t, i in ids.items() if i is None]
    if missing:
      raise UsageError(f'{key} names {missing[0]!r}, which is no token of the tokenizer')
    return list(ids.values())

  def text_of(self, index: int) -> str:
    """A token as the vocabulary writes it."""
    return self._tokenizer.id_to_token(index)

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

  def with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """`encode`, and which characters of the text each token is."""
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets

  @functools.cached_property
  def _templates(self) -> tokenizers.Tokenizer:
    found = tokenizers.Tokenizer.from_str(self.json)
    found.no_truncation()
    found.no_padding()
    return found

  def encode_template(self, text: str) -> list[int]:
    """`encode` of what is no document's text: special tokens that are written in it are themselves."""
    return self._templates.encode(text, add_special_tokens=False).ids

  @functools.cached_property
  def between(self) -> list[int]:
    """What stands between two texts that an encoder reads, as the tokenizer's template says, else `sep`."""
    encoding = self._tokenizer.encode('a', 'b', add_special_tokens=True)
    inner = ''.join(map(str, encoding.special_tokens_mask)).strip('1').strip('0')
    at = ''.join(map(str, encoding.special_tokens_mask)).find(inner, 1) if inner else 0
    return encoding.ids[at:at + len(inner)] or [self.sep]

  def decode(self, ids: Iterable[int]) -> str:
    return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def make(spec: str, texts: Iterator[str], progress=None) -> Tokenizer:
  """The tokenizer that `spec` names; `texts` is read only to train one. UsageError if it cannot be made."""
  if spec == 'bytes':
    return Tokenizer(_byte_level(0, iter(())).to_str())
  kind, _, size = spec.partition(':')
  if kind == 'bpe':
    if not size.isdigit() or int(size) < 257:
      raise UsageError(f'data.tokenizer={spec!r}: bpe wants a size of at least 257 (256 bytes and a boundary)')
    return Tokenizer(_byte_level(int(size), texts, progress).to_str())
  if not pathlib.Path(spec).is_file():
    raise UsageError(f'data.tokenizer={spec!r}: wants bpe:SIZE, bytes, or the path of a tokenizer.json')
  return Tokenizer(pathlib.Path(spec).read_text(encoding='utf-8'))


def _byte_level(size: int, texts: Iterator[str], progress=None) -> tokenizers.Tokenizer:
  """Byte-level BPE (Sennrich et al. 2016; GPT-2). With no texts there are no merges: a token a byte."""
  tokenizer, by_bytes = tokenizers.Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([by_bytes, pre_tokenizers.FixedLength(LONGEST)])
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  trainer = trainers.BpeTrainer(vocab_size=max(size, 257), special_tokens=[BOUNDARY], initial_alphabet=alphabet,
                                show_progress=False)
  tokenizer.train_from_iterator(_batches(texts, progress), trainer)
  tokenizer.pre_tokenizer = by_bytes
  tokenizer.post_processor = processors.TemplateProcessing(
      single=f'{BOUNDARY} $A', special_tokens=[(BOUNDARY, tokenizer.token_to_id(BOUNDARY))])
  return tokenizer


def _batches(texts: Iterator[str], progress, size: int = 256) -> Iterator[list[str]]:
  batch = []
  for text in texts:
    batch.append(text)
    if progress:
      progress(len(text))
    if len(batch) == size:
      yield batch
      batch = []
  if batch:
    yield batch
