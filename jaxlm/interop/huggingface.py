"""Hugging Face folders: config.json, safetensors (also in shards), tokenizer.json. Nothing of them is run or unpickled."""
import json
import math
import pathlib
import re
from collections.abc import Iterator

import numpy as np
import safetensors

from jaxlm.errors import UsageError
from jaxlm.interop.families import FAMILIES, Family

# Wrappers around a language model, as of images: only the language model is read.
WRAPPED = {'gemma3': ('gemma3_text', r'^(?:model\.)?language_model\.(?:model\.)?', r'vision_tower|multi_modal_projector')}


FLOATS = ('F64', 'F32', 'F16', 'BF16')
BLOCK = 8 * 2 ** 20  # floats
POOLING = {'pooling_mode_mean_tokens': 'mean', 'pooling_mode_cls_token': 'first'}  # sentence-transformers' → model.pool


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
  """The rows of an array, so many at a time that they have about BLOCK elements."""
  step = max(1, BLOCK // max(1, math.prod(shape[1:])))
  return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


class Folder:
  """The tensors of a folder by their names. Raises UsageError for what is missing, malformed or cut short."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    if not path.is_dir():
      raise UsageError(f'{path}: no such folder')
    self.config = read_json(path / 'config.json')
    self.model_type = self.config.get('model_type')
    self._rename, self._skip = None, None
    if str(self.model_type) in WRAPPED:
      self.model_type, self._rename, self._skip = WRAPPED[self.model_type]
      self.config = self.config.get('text_config')
      if not isinstance(self.config, dict):
        raise UsageError(f'{path}/config.json: has no text_config')
    if str(self.model_type) not in FAMILIES:
      raise UsageError(f'{path}/config.json: model_type={self.model_type!r} is no known family; known are '
                       + ', '.join(FAMILIES))
    where = {}  # its name → (file, its name there)
    for file in self._files():
      with self._open(file) as f:
        for name in f.keys():
          if not (self._skip and re.search(self._skip, name)):
            where[re.sub(self._rename, 'model.', name) if self._rename else name] = (file, name)
    self._where = {}
    for name, ours in sorted(self.family.named(set(where)).items()):
      if ours in self._where:
        raise UsageError(f'{path}: holds {ours} twice, as {self._where[ours][1]} and as {name}')
      self._where[ours] = where[name]
    self.config = self.family.settle(self.config, self.names())

  @property
  def family(self) -> Family:
    return FAMILIES[self.model_type]

  def _files(self) -> list[str]:
    index = self.path / 'model.safetensors.index.json'
    if index.is_file():
      where = read_json(index).get('weight_map')
      files = list(where.values()) if isinstance(where, dict) else [where]
      outside = [f for f in files if not isinstance(f, str) or pathlib.PurePath(f).name != f or f == '..']
      if outside:
        raise UsageError(f'{index}: names {outside[0]!r}, and wants files of the folder')
      return sorted(set(files))
    if (self.path / 'model.safetensors').is_file():
      return ['model.safetensors']
    others = [p.name for p in self.path.glob('*.bin')]
    raise UsageError(f'{self.path}: has no safetensors' + (
        f'; {others[0]} is a pickle, which can run code, and is not read: convert it to safetensors' if others else ''))

  def _open(self, file: str):
    try:
      return safetensors.safe_open(self.path / file, framework='np')
    except (OSError, safetensors.SafetensorError) as e:
      raise UsageError(f'{self.path / file}: cannot be read ({e})') from e

  def names(self) -> set[str]:
    return set(self._where)

  def shape(self, name: str) -> tuple[int, ...]:
    """UsageError if there is no such tensor, or it is no float."""
    if name not in self._where:
      raise UsageError(f'{self.path}: has no tensor {name}')
    file, stored = self._where[name]
    with self._open(file) as f:
      piece = f.get_slice(stored)
      if piece.get_dtype() not in FLOATS:
        raise UsageError(f'{self.path / file}: tensor {stored} is {piece.get_dtype()}, and none of {", ".join(FLOATS)}')
      return tuple(piece.get_shape())

  def blocks(self, name: str) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows, float32 array of them), some MB at a time; the file is opened for each, so that no page of it stays."""
    shape, (file, stored) = self.shape(name), self._where[name]
    for rows in row_blocks(shape):
      with self._open(file) as f:
        try:
          yield rows, f.get_slice(stored)[rows].astype(np.float32)
        except (OSError, safetensors.SafetensorError) as e:
          raise UsageError(f'{self.path / file}: tensor {stored} cannot be read ({e})') from e

  def tokenizer(self) -> str:
    """The text of tokenizer.json."""
    file = self.path / 'tokenizer.json'
    if not file.is_file():
      raise UsageError(f'{self.path}: has no tokenizer.json; save it with a fast tokenizer, or name one with --tokenizer')
    return file.read_text(encoding='utf-8')

  def ends(self) -> list:
    """Tokens that end a text, as generation_config.json or else config.json says."""
    return self._said('eos_token_id')

  def starts(self) -> list:
    """The token that a decoder beside an encoder begins with, or none."""
    return self._said('decoder_start_token_id')[:1]

  def never(self) -> list:
    """Tokens that are never generated, as Marian never says its padding. UsageError for words of several."""
    words = self._said('bad_words_ids')
    long = [word for word in words if not isinstance(word, list) or len(word) != 1]
    if long:
      raise UsageError(f'bad_words_ids has {long[0]!r}: known are lists of one token; take it out of generation_config.json')
    return [word[0] for word in words]

  def classes(self) -> list[str]:
    """The names of a classifier's classes; [] if it gives none, or such that data.classes cannot hold."""
    names = self.config.get('id2label') or {}
    names = [names.get(str(n)) for n in range(len(names))] if isinstance(names, dict) else []
    usual = [f'LABEL_{n}' for n in range(len(names))]
    fits = all(isinstance(name, str) and name and '|' not in name for name in names) and len(set(names)) == len(names)
    return names if fits and names != usual else []

  def _said(self, key: str) -> list:
    file = self.path / 'generation_config.json'
    said = {**self.config, **(read_json(file) if file.is_file() else {})}
    value = said.get(key)
    return [] if value is None else value if isinstance(value, list) else [value]

  def sentence_length(self) -> int:
    """Tokens of a text that sentence-transformers reads of it, 0 if the folder says none."""
    file = self.path / 'sentence_bert_config.json'
    length = (read_json(file).get('max_seq_length') if file.is_file() else 0) or 0
    if type(length) is not int or length < 0:
      raise UsageError(f'{file.name}: max_seq_length={length!r} is no count')
    return length

  def sentence_vector(self) -> dict:
    """How sentence-transformers makes a vector of hidden states, as {'pool': …, 'normalize': …} of our model keys; {}
    if the folder does not say. UsageError for a way that is not known here."""
    file = self.path / 'modules.json'
    if not file.is_file():
      return {}
    modules = read_json(file, list)
    out = {}
    for module in modules:
      kind = str(module.get('type') if isinstance(module, dict) else module).rpartition('.')[2]
      if kind == 'Pooling':
        pooling = self.path / '1_Pooling' / 'config.json'
        said = read_json(pooling)
        modes = [key for key, on in said.items() if key.startswith('pooling_mode_') and on is True]
        if modes not in [[mode] for mode in POOLING]:
          raise UsageError(
              f'1_Pooling/config.json: {" and ".join(modes) or "no pooling_mode"}: known is one of {", ".join(POOLING)}')
        out['pool'] = POOLING[modes[0]]
      elif kind == 'Normalize':
        out['normalize'] = True
      elif kind != 'Transformer':
        raise UsageError(f'{file.name}: {kind!r}: known are Transformer, Pooling and Normalize')
    return out


def read_json(file: pathlib.Path, kind: type = dict):
  try:
    value = json.loads(file.read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError) as e:
    raise UsageError(f'{file}: cannot be read ({e})') from e
  if not isinstance(value, kind):
    raise UsageError(f'{file}: is no JSON {"object" if kind is dict else "list"}')
  return value
