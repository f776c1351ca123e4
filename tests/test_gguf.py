"""GGUF files, written here with the gguf package as llama.cpp's own script does it, come in as what they were made from;
none that is damaged comes in, nor ends in a traceback."""
import functools
import shutil
import struct

import gguf
import numpy as np
import pytest
import regex
import safetensors.torch
import tokenizers
import torch
from hypothesis import given, settings, strategies as st

import jaxlm
from jaxlm.errors import UsageError
from jaxlm.interop import convert, importing
from jaxlm.interop.huggingface import Folder
from tests import common
from tests.test_families import tree_of
from tests.test_interop import BYTES, QUIET, logits_of, run_import, save, saved, some_tokens, tensors

NAMES = {  # Hugging Face's → llama.cpp's
    'model.embed_tokens': 'token_embd', 'model.norm': 'output_norm', 'lm_head': 'output', 'input_layernorm': 'attn_norm',
    'post_attention_layernorm': 'ffn_norm', 'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k',
    'self_attn.v_proj': 'attn_v', 'self_attn.o_proj': 'attn_output', 'mlp.gate_proj': 'ffn_gate', 'mlp.up_proj': 'ffn_up',
    'mlp.down_proj': 'ffn_down'}
SCALES = {'Q2_K': (80, 84), 'Q3_K': (108, 110), 'Q4_K': (0, 4), 'Q5_K': (0, 4), 'Q6_K': (208, 210)}  # float16, in a block
MERGES = ['1 2', '12 3', '123 4', 'Ġ 1', 'b a', 'ba r', '. bar', "' S"]
TOKENS = ['<|endoftext|>', '<|begin|>', '<tool>', *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
          *(m.replace(' ', '') for m in MERGES)]
KINDS = [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.USER_DEFINED] + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3)
CUTS = {  # llama.cpp's own, of src/llama-vocab.cpp; one after the other, and what none matches is a piece too
    'gpt-2': [r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"],
    'smollm': [r'\p{N}', r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"],
    'llama-bpe': [r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'],
    'qwen2': [r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
              r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'],
}


def quantised(x, kind):
  """(stored, what the package says it means)."""
  q = gguf.GGMLQuantizationType[kind]
  if kind in SCALES:  # the package has no quantiser: any bytes, with scales that are small
    rng, (block, size) = np.random.default_rng(x.size), gguf.GGML_QUANT_SIZES[q]
    stored = rng.integers(0, 256, (x.size // block, size), dtype=np.uint8)
    low, high = SCALES[kind]
    stored[:, low:high] = rng.uniform(1e-4, 1e-3, (len(stored), (high - low) // 2)).astype(np.float16).view(np.uint8)
    stored = stored.reshape(len(x), -1)
  else:
    stored = gguf.quants.quantize(x, q)
  return stored, q, gguf.dequantize(stored, q)


def write(path, peer, kind='F32', pre='gpt-2', change=lambda writer: None, drop='', **changes):
  """`peer` as a GGUF file → {Hugging Face's name: float32 array that the file holds}."""
  c, meant = peer.config, {}
  w = gguf.GGUFWriter(path, changes.get('architecture', c.model_type))
  w.add_context_length(c.max_position_embeddings)
  w.add_embedding_length(c.hidden_size)
  w.add_block_count(changes.get('layers', c.num_hidden_layers))
  w.add_feed_forward_length(c.intermediate_size)
  w.add_head_count(c.num_attention_heads)
  w.add_head_count_kv(c.num_key_value_heads)
  w.add_layer_norm_rms_eps(c.rms_norm_eps)
  w.add_rope_freq_base(c.rope_parameters['rope_theta'])
  w.add_tokenizer_model(changes.get('model', 'gpt2'))
  w.add_tokenizer_pre(pre)
  w.add_token_list(TOKENS)
  w.add_token_types(KINDS)
  w.add_token_merges(MERGES)
  w.add_bos_token_id(1)
  w.add_eos_token_id(0)
  change(w)
  heads = {'q_proj': c.num_attention_heads, 'k_proj': c.num_key_value_heads}
  for name, tensor in peer.state_dict().items():
    if name == drop or (name == 'lm_head.weight' and c.tie_word_embeddings):
      continue
    x = tensor.float().numpy()
    H = heads.get(name.split('.')[-2]) if c.model_type == 'llama' else None
    turn = lambda a, first: a.reshape(H, first, -1, a.shape[1]).swapaxes(1, 2).reshape(a.shape) if H else a
    stored, q, means = quantised(turn(x, 2), kind if x.ndim == 2 else 'F32')
    meant[name] = turn(means, len(x) // H // 2 if H else 0)
    layer, _, part = name.partition('.weight')[0].partition('.bias')[0].removeprefix('model.layers.').partition('.')
    stem = f'blk.{layer}.{NAMES[part]}' if layer.isdigit() else NAMES[name.removesuffix('.weight')]
    w.add_tensor(f'{stem}.{name.rpartition(".")[2]}', stored, raw_dtype=q)
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.write_tensors_to_file()
  w.close()
  return meant


@pytest.fixture(scope='module')
def peers(tmp_path_factory):
  """(family, wide) → (a model, its folder); wide: K-quants have blocks of 256."""
  @functools.cache
  def make(family, wide=False, tied=False):
    sizes = dict(hidden_size=256, head_dim=64, num_hidden_layers=1) if wide else {}
    more = dict(use_sliding_window=False) if family == 'qwen2' else dict(num_key_value_heads=2)
    folder = tmp_path_factory.mktemp('peer') / 'hf'
    return save(folder, family, vocab_size=320, tie_word_embeddings=tied, intermediate_size=256, **more, **sizes), folder
  return make


@pytest.mark.parametrize('family', ['llama 2', 'qwen2'])
def test_logits_equal_the_model_that_it_was_made_from(family, peers, tmp_path):
  peer, folder = peers(family)
  write(tmp_path / 'm.gguf', peer)
  config = run_import(tmp_path / 'm.gguf', tmp_path / 'run', 64, ('batch', '8'))
  assert config.model == run_import(folder, tmp_path / 'same').model and config.batch == 8
  assert config.data.stop == '<|endoftext|>' and config.length == 64
  lm = jaxlm.load(tmp_path / 'run')
  common.assert_trees_equal(lm.params, jaxlm.load(tmp_path / 'same').params)
  np.testing.assert_allclose(lm.logits(some_tokens()), logits_of(peer, some_tokens()), atol=2e-4)


@pytest.mark.parametrize('family, kind', [
    *(('llama 2', k) for k in ('F16', 'BF16', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0', *SCALES)), ('qwen2', 'Q8_0'),
    ('qwen2', 'Q4_K')])
def test_arrays_are_what_the_package_dequantises(family, kind, peers, tmp_path, monkeypatch):
  wide = kind in SCALES
  monkeypatch.setattr('jaxlm.interop.huggingface.BLOCK', 20_000 if wide else 1000)  # so that tensors come in pieces
  peer, folder = peers(family, wide, kind == 'Q8_0')
  meant = write(tmp_path / 'm.gguf', peer, kind)
  assert all(np.isfinite(a).all() and a.std() > 1e-3 for a in meant.values()) and len(meant) > 10
  shutil.copytree(folder, tmp_path / 'hf')
  safetensors.torch.save_file({k: torch.tensor(a) for k, a in meant.items()}, tmp_path / 'hf' / 'model.safetensors')
  config = run_import(tmp_path / 'm.gguf', tmp_path / 'run')
  found = jaxlm.load(tmp_path / 'run').params
  common.assert_trees_equal(found, tree_of(Folder(tmp_path / 'hf'), config.model))
  np.testing.assert_array_equal(found['embed'], meant['model.embed_tokens.weight'])


def refuse(source, workdir, match):
  """The import fails with one line that matches and names the source, and leaves no trace."""
  with pytest.raises(UsageError, match=match) as e:
    run_import(source, workdir)
  assert str(source) in str(e.value) and '\n' not in str(e.value)
  assert not workdir.exists() or not list(workdir.iterdir())


def tokenizer_of(path):
  return importing.tokenizer_of(importing.open_source(str(path)), None)


def cut(pieces, pattern):
  for piece in pieces:
    at = 0
    for match in regex.finditer(pattern, piece):
      yield from filter(None, (piece[at:match.start()], match[0]))
      at = match.end()
    if piece[at:]:
      yield piece[at:]


@pytest.mark.parametrize('pre, says', [
    ('gpt-2', "Ġ|1234|Ġ|a|.|bar|Ġ|I|T|'|S"), ('smollm', "Ġ|1|2|3|4|Ġ|a|.|bar|Ġ|I|T|'|S"),
    ('llama-bpe', "Ġ|123|4|Ġ|a|.bar|Ġ|I|T|'S"), ('qwen2', "Ġ|1|2|3|4|Ġ|a|.bar|Ġ|I|T|'S")])
def test_text_is_cut_as_llama_cpp_cuts_it(pre, says, peers, tmp_path):
  write(tmp_path / 'm.gguf', peers('llama 2')[0], pre=pre)
  tokenizer = tokenizer_of(tmp_path / 'm.gguf')
  assert '|'.join(map(tokenizer.text_of, tokenizer.encode(" 1234 a.bar IT'S"))) == says
  pre_tokenizer = tokenizers.Tokenizer.from_str(tokenizer.json).pre_tokenizer

  @settings(max_examples=200, deadline=None, derandomize=True, database=None)
  @given(st.lists(st.sampled_from(["'s", "'LL", "'d", 'a', 'É', 'λ', '漢', '1', '23', '٣', '½', ' ', '  ', '\n', '\r\n',
                                   '\t', '.', '!?', '🙂', '_', "'"]), min_size=1, max_size=12).map(''.join))
  def check(text):
    pieces = [text]
    for pattern in CUTS[pre]:
      pieces = list(cut(pieces, pattern))
    assert [text[a:b] for _, (a, b) in pre_tokenizer.pre_tokenize_str(text)] == pieces
    assert tokenizer.decode(tokenizer.encode(text)) == text
  check()


@pytest.mark.parametrize('bos', [True, False])
def test_special_tokens_are_the_files_own(bos, peers, tmp_path):
  write(tmp_path / 'm.gguf', peers('qwen2')[0], change=lambda w: w.add_add_bos_token(bos))
  config = run_import(tmp_path / 'm.gguf', tmp_path / 'run')
  tokenizer = jaxlm.load(tmp_path / 'run').tokenizer
  plain = tokenizer.encode('a<tool>b')
  assert [tokenizer.text_of(i) for i in plain] == ['a', '<tool>', 'b'] and plain[1] == 2
  assert tokenizer.prompt('a<tool>b') == [1] * bos + plain and tokenizer.opening == int(bos)
  assert tokenizer.encode('<|begin|>')[0] != 1 and config.data.stop == '<|endoftext|>' and tokenizer.boundary == 0


def test_a_tokenizer_that_is_not_known_can_be_named(peers, tmp_path):
  write(tmp_path / 'm.gguf', peers('llama 2')[0], pre='strange')
  refuse(tmp_path / 'm.gguf', tmp_path / 'run', "m.gguf: .*pre='strange'.*--tokenizer")
  (tmp_path / 't.json').write_text(BYTES, encoding='utf-8')
  importing.run(str(tmp_path / 'm.gguf'), tmp_path / 'run', str(tmp_path / 't.json'), 1, [], QUIET)
  assert jaxlm.load(tmp_path / 'run').tokenizer.json == BYTES


def endless(w):
  w.add_array('z.numbers', [1, 2, 3])


def rewrite(change):
  return lambda file: file.write_bytes(change(file.read_bytes()))


EXTRA = np.ones((2, 32), np.float32)
DAMAGED = {  # (what is written otherwise, what is done to the file, what the line must name)
    'half of it': ({}, rewrite(lambda b: b[:len(b) // 2]), 'm.gguf: is no whole GGUF'),
    'less one byte': ({}, rewrite(lambda b: b[:-1]), 'm.gguf: is no whole GGUF'),
    'nothing': ({}, rewrite(lambda b: b''), 'm.gguf: is no whole GGUF'),
    'garbage': ({}, rewrite(lambda b: np.random.default_rng(0).bytes(5000)), 'm.gguf: is no whole GGUF'),
    'garbage after the magic': ({}, rewrite(lambda b: b[:8] + bytes(range(256))), 'm.gguf: is no whole GGUF'),
    '2**60 tensors': ({}, rewrite(lambda b: b[:8] + (2 ** 60).to_bytes(8, 'little') + b[16:]), 'm.gguf: is no whole GGUF'),
    '2**60 numbers': ({'change': endless}, rewrite(lambda b: b.replace(
        struct.pack('<IQI', 5, 3, 1), struct.pack('<IQI', 5, 2 ** 60, 1))), 'm.gguf: is no whole GGUF.*it ends at byte'),
    'a folder': ({}, lambda file: (file.unlink(), file.mkdir()), 'm.gguf: is no whole GGUF'),
    'gone': ({}, lambda file: file.unlink(), 'm.gguf: is no whole GGUF'),
    'another architecture': ({'architecture': 'mamba'}, None, "m.gguf: general.architecture='mamba'; known are"),
    'a tensor gone': ({'drop': 'model.layers.1.mlp.up_proj.weight'}, None, 'm.gguf: .*layers.1.mlp.up_proj.weight'),
    'a tensor too many': ({'change': lambda w: w.add_tensor('blk.1.attn_gate.weight', EXTRA)}, None, 'm.gguf: .*attn_gate'),
    'a tensor of integers': ({'change': lambda w: w.add_tensor('output_norm.weight', np.ones(32, np.int32)),
                              'drop': 'model.norm.weight'}, None, 'm.gguf: model.norm.weight is I32'),
    'a tensor of another shape': ({'change': lambda w: w.add_tensor('output_norm.weight', np.ones(64, np.float32)),
                                   'drop': 'model.norm.weight'}, None, r'm.gguf: model.norm.weight is \[64\]'),
    'a layer too many': ({'layers': 4}, None, 'm.gguf: .*layers.3'),
    '2**32 layers': ({'layers': 2 ** 32 - 1}, None, 'm.gguf: block_count'),
    'a scaled rope': ({'change': lambda w: w.add_tensor('rope_freqs.weight', EXTRA)}, None, 'm.gguf: rope_freqs.weight'),
    'a rope of half a head': ({'change': lambda w: w.add_rope_dimension_count(4)}, None, 'm.gguf: rope.dimension_count=4'),
    'another vocabulary': ({'model': 'llama'}, None, "m.gguf: tokenizer.ggml.model='llama'.*--tokenizer"),
}


@pytest.mark.parametrize('case', DAMAGED)
def test_damaged_files_are_refused_in_one_line(case, peers, tmp_path):
  how, damage, match = DAMAGED[case]
  write(tmp_path / 'm.gguf', peers('llama 2')[0], **how)
  before = (tmp_path / 'm.gguf').read_bytes()
  (damage or (lambda file: None))(tmp_path / 'm.gguf')
  assert not damage or not (tmp_path / 'm.gguf').is_file() or (tmp_path / 'm.gguf').read_bytes() != before
  refuse(tmp_path / 'm.gguf', tmp_path / 'run', match)


def test_whatever_byte_is_wrong_there_is_no_other_error(peers, tmp_path):
  """Cuts and flips in what a file says of itself: it is refused, or read as something else, but never a traceback."""
  write(tmp_path / 'm.gguf', peers('llama 2')[0])
  whole, rng = (tmp_path / 'm.gguf').read_bytes(), np.random.default_rng(0)
  size = gguf.GGUFReader(tmp_path / 'm.gguf').data_offset
  refused = 0
  for n in range(100):
    at, damaged = int(rng.integers(0, size)), bytearray(whole)
    damaged[at] ^= int(rng.integers(1, 256))
    (tmp_path / 'm.gguf').write_bytes(damaged if n % 3 else whole[:at])
    try:
      source = importing.open_source(str(tmp_path / 'm.gguf'))
      config = importing.config_of(source, importing.tokenizer_of(source, None), tmp_path / 't.json', 1, [])
      next(convert.read(source, config.model))
    except UsageError as e:
      assert 'm.gguf' in str(e)
      refused += 1
  assert refused > 40
