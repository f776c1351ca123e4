"""GGUF files (llama.cpp's), through the gguf package: float and quantised tensors, dequantised a few rows at a time."""
import dataclasses
import json
import pathlib
from collections.abc import Iterator

import gguf
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from jaxlm.errors import UsageError
from jaxlm.interop.families import FAMILIES, Family
from jaxlm.interop.huggingface import row_blocks

# general.architecture → (our family, whether llama.cpp keeps the rotary pairs of q and k side by side)
ARCHITECTURES = {'llama': ('llama', True), 'qwen2': ('qwen2', False), 'qwen3': ('qwen3', False)}

_SPLIT = lambda regex: pre_tokenizers.Sequence([
    pre_tokenizers.Split(tokenizers.Regex(regex), 'isolated'),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# tokenizer.ggml.pre → how text is cut before merges, as llama.cpp does it (src/llama-vocab.cpp)
PRE_TOKENIZERS = {
    'gpt-2': lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    'smollm': lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                               pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    'llama-bpe': lambda: _SPLIT(_WORDS % '{1,3}'),
    'qwen2': lambda: _SPLIT(_WORDS % ''),
}


class _Reader(gguf.GGUFReader):
  """The package's, which does not look where the file ends: an array of 2**60 numbers would be read for ever."""

  def _get(self, offset, dtype, count=1, override_order=None):
    if int(count) * np.dtype(dtype).itemsize > len(self.data) - offset:
      raise ValueError(f'it ends at byte {len(self.data)}, before what it says is at {offset}')
    return super()._get(offset, dtype, count, override_order)


class GgufFile:
  """A GGUF file as interop reads sources (see huggingface.Folder)."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    try:
      self._read()
    except (OSError, ValueError, LookupError, ArithmeticError, MemoryError, TypeError, AttributeError, RecursionError) as e:
      raise UsageError(f'{path}: is no whole GGUF file ({type(e).__name__}: {e})') from e

  def _read(self) -> None:
    path, reader = self.path, _Reader(self.path)
    self._fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = self._fields.get('general.architecture')
    if architecture not in ARCHITECTURES:
      raise UsageError(f'{path}: general.architecture={architecture!r}; known are {", ".join(ARCHITECTURES)}')
    self._prefix = f'{architecture}.'
    self.model_type, self._interleaved = ARCHITECTURES[architecture]
    layers = self._key('block_count')
    if layers > len(reader.tensors):
      raise UsageError(f'{path}: block_count={layers} is more than its {len(reader.tensors)} tensors')
    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture), layers)
    hf_names = {}  # the gguf package says which of theirs each of Hugging Face's is
    for row in FAMILIES[self.model_type].rows:
      for n in range(layers if '{n}' in row.theirs else 1):
        name = row.theirs.format(n=n, e='{e}')
        stored = names.get_name(name, try_suffixes=('.weight', '.bias'))
        if stored:
          hf_names[stored] = name
    self._tensors = {hf_names.get(t.name, t.name): t for t in reader.tensors}
    if 'rope_freqs.weight' in self._tensors:
      raise UsageError(f'{path}: rope_freqs.weight (a scaled rope) is not read from GGUF; import the safetensors instead')
    self.config = self._config()

  @property
  def family(self) -> Family:
    family = FAMILIES[self.model_type]
    if not self._interleaved:
      return family
    side_by_side = lambda spec: spec.replace('HK>(HK)', 'HK>(HK~)').replace('GK>(GK)', 'GK>(GK~)')
    turned = tuple(dataclasses.replace(row, ours={p: side_by_side(s) for p, s in row.ours.items()})
                   if any(p.startswith(('layers/attention/q/', 'layers/attention/k/')) for p in row.ours) else row
                   for row in family.rows)
    return dataclasses.replace(family, rows=turned)

  def _key(self, name: str, default=None):
    value = self._fields.get(self._prefix + name, default)
    if value is None:
      raise UsageError(f'{self.path}: has no {self._prefix}{name}')
    return value

  def _config(self) -> dict:
    """What config.json would say."""
    plain = lambda x: float(str(np.float32(x)))  # GGUF keeps float32: 1e-05 is not 9.999999747e-06
    D, H = self._key('embedding_length'), self._key('attention.head_count')
    kind = self._key('rope.scaling.type', 'none')
    head_dim = self._key('attention.key_length', D // H)
    if (turned := self._key('rope.dimension_count', head_dim)) != head_dim:
      raise UsageError(f'{self.path}: rope.dimension_count={turned} of a head of {head_dim} is not read from GGUF')
    rope = {'rope_theta': plain(self._key('rope.freq_base', 10_000.))}
    if kind not in ('none', ''):
      rope |= {'rope_type': kind, 'factor': plain(self._key('rope.scaling.factor')),
               'original_max_position_embeddings': self._key('rope.scaling.original_context_length',
                                                             self._key('context_length'))}
    return {'hidden_size': D, 'num_attention_heads': H, 'num_key_value_heads': self._key('attention.head_count_kv', H),
            'head_dim': head_dim, 'intermediate_size': self._key('feed_forward_length'),
            'num_hidden_layers': self._key('block_count'), 'vocab_size': self.shape('model.embed_tokens.weight')[0],
            'rms_norm_eps': plain(self._key('attention.layer_norm_rms_epsilon')),
            'max_position_embeddings': self._key('context_length'), 'rope_parameters': rope,
            'tie_word_embeddings': 'lm_head.weight' not in self._tensors}

  def names(self) -> set[str]:
    return set(self._tensors)

  def shape(self, name: str) -> tuple[int, ...]:
    if name not in self._tensors:
      raise UsageError(f'{self.path}: has no tensor {name}')
    return tuple(int(n) for n in reversed(self._tensors[name].shape))

  def blocks(self, name: str) -> Iterator[tuple[slice, np.ndarray]]:
    tensor = self._tensors[name]
    for rows in row_blocks(self.shape(name)):
      try:
        yield rows, gguf.dequantize(np.array(tensor.data[rows]), tensor.tensor_type)
      except NotImplementedError as e:
        raise UsageError(f'{self.path}: {name} is {tensor.tensor_type.name}, which the gguf package cannot read') from e

  def tokenizer(self) -> str:
    """A tokenizer.json of the file's vocabulary and merges, cut as its own tokenizer.ggml.pre says."""
    say = lambda key, default=None: self._fields.get(f'tokenizer.ggml.{key}', default)
    if say('model') != 'gpt2' or say('pre') not in PRE_TOKENIZERS:
      raise UsageError(f'{self.path}: tokenizer.ggml.model={say("model")!r} pre={say("pre")!r}: only byte-level BPE cut as '
                       f'{", ".join(PRE_TOKENIZERS)} is known; name a tokenizer.json with --tokenizer')
    tokens, kinds = say('tokens'), say('token_type')
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [tuple(m.split(' ', 1)) for m in say('merges')]))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[say('pre')]()
    tokenizer.decoder = decoders.ByteLevel()
    special = [tokens[i] for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([tokens[i] for i, kind in enumerate(kinds) if kind == gguf.TokenType.USER_DEFINED])
    if say('add_bos_token', False):
      bos = tokens[say('bos_token_id')]
      tokenizer.post_processor = processors.TemplateProcessing(single=f'{bos} $A', special_tokens=[(bos, vocab[bos])])
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False)

  def never(self) -> list:
    """Tokens that are never generated: the format has no word for them."""
    return []

  def ends(self) -> list:
    """Tokens that end a text."""
    eos = self._fields.get('tokenizer.ggml.eos_token_id')
    return [] if eos is None else [eos]
