"""Adapters of peft, its own and ours, read into runs beside their bases, and what is refused."""
import json
import shutil

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch

from jaxlm import cli, lm as lms, train
from jaxlm.errors import UsageError
from jaxlm.interop import adapter, importing
from tests import classics, common
from tests.test_adapter import ALL, DECODER, PAIRS, peer_of, said, with_pairs
from tests.test_start import run_config


def base_run(name, folder):
  """(the model in transformers, a run that is an import of it)."""
  peer = peer_of(name)
  peer.save_pretrained(folder / 'hf')
  (folder / 'hf' / 'tokenizer.json').write_text(common.BYTES.json, encoding='utf-8')
  importing.run(str(folder / 'hf'), folder / 'base', None, 1, [], lambda text: None)
  return peer, folder / 'base'


def asked(m):
  rng = np.random.default_rng(1)
  tokens_BL, inputs_BM = (rng.integers(3, m.V - 1, (2, 24)) for _ in range(2))
  return tokens_BL, inputs_BM if m.kind == 'seq2seq' else None


@pytest.mark.parametrize('name, targets', [
    ('gpt2', 'attention/(k|v|o)/w|mlp/up/w'), ('phi3', ALL), ('pythia (gpt_neox)', 'attention/q/w'),
    ('deepseek_v3', 'attention/.*/w'), ('roberta, classes', 'attention/(q|v)/w'), ('t5 1.1', DECODER)])
def test_what_was_exported_comes_back(name, targets, tmp_path):
  """Bit for bit the same pairs, of the same rank, and a classifier that the base did not have."""
  peer, base = base_run(name, tmp_path)
  _, lm = with_pairs(name, tmp_path / 'again', targets)
  if 'classify' in lm.params:
    lm.params['classify']['bias'] += 1
  adapter.run(lm, tmp_path / 'out', peer.config.model_type, 'float32', None)
  config = adapter.read(tmp_path / 'out', tmp_path / 'run', [('start.checkpoint', str(base))])
  assert config.model.lora.rank == 3 and config.model.lora.alpha == pytest.approx(6) and config.start.checkpoint == str(base)
  common.assert_trees_equal(lms.load(tmp_path / 'run', merge=False).params, lm.params)


PEFTS = {  # case → (model, its LoraConfig, our rank)
    'gpt2': ('gpt2', dict(r=4, lora_alpha=12, target_modules=['c_attn', 'c_fc'], fan_in_fan_out=True, task_type='CAUSAL_LM'), 4),
    'qwen2, ranks': ('qwen2', dict(r=4, lora_alpha=8, target_modules=['q_proj', 'o_proj', 'mlp.down_proj'], use_rslora=True,
                                   rank_pattern={'down_proj': 2, 'layers.1.self_attn.q_proj': 5}, alpha_pattern={'o_proj': 5},
                                   layers_to_transform=[1, 2]), 5),
    'phi3': ('phi3', dict(r=2, lora_alpha=3, target_modules=['qkv_proj', 'gate_up_proj']), 2),
    'bert, classes': ('bert, classes', dict(r=2, target_modules=['query', 'output.dense'], task_type='SEQ_CLS'), 2),
    't5': ('t5', dict(r=2, lora_alpha=3, target_modules=['q', 'wi'], task_type='SEQ_2_SEQ_LM'), 2),
}


@pytest.mark.parametrize('case', PEFTS)
def test_an_adapter_of_peft_is_read(case, tmp_path):
  name, arguments, rank = PEFTS[case]
  peer, base = base_run(name, tmp_path)
  dressed = peft.get_peft_model(peer, peft.LoraConfig(**arguments)).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for key, p in dressed.named_parameters():
      if p.requires_grad:
        p.add_(0.1 * torch.randn(p.shape, generator=generator))
  dressed.save_pretrained(tmp_path / 'adapter')
  config = adapter.read(tmp_path / 'adapter', tmp_path / 'run', [('start.checkpoint', str(base)), ('optimizer.lr', '1e-3')])
  assert config.model.lora.rank == rank and config.optimizer.lr == 1e-3
  lm = lms.load(tmp_path / 'run')
  ours, theirs = lm.outputs(*asked(lm.config.model)), said(dressed, *asked(lm.config.model))
  before = lms.load(base).outputs(*asked(lm.config.model))
  close = 2e-5 * np.abs(theirs).max()
  assert np.abs(ours - before).max() > 100 * close
  np.testing.assert_allclose(ours, theirs, atol=close)


@pytest.fixture(scope='module')
def runs(texts, tmp_path_factory):
  """(a trained run, an adapter of one that started from it and trained pairs)."""
  folder = tmp_path_factory.mktemp('runs')
  train.train(run_config(texts), folder / 'base')
  train.train(run_config(texts, **PAIRS, **{'start.checkpoint': str(folder / 'base')}), folder / 'pairs')
  adapter.run(lms.load(folder / 'pairs', merge=False), folder / 'adapter', None, 'float32', None)
  return folder


def test_an_adapter_is_trained_on(runs, tmp_path, monkeypatch):
  """By the command: the pairs change, what is frozen does not, and what is exported is an adapter of the same base."""
  monkeypatch.setenv('GLIBC_TUNABLES', '')  # the command is this process, which need not start again
  cli.run(['import', str(runs / 'adapter'), f'--workdir={tmp_path / "run"}', f'--config.start.checkpoint={runs / "base"}'])
  first, old = (lms.load(folder, merge=False) for folder in (tmp_path / 'run', runs / 'pairs'))
  common.assert_trees_equal(first.params, old.params)
  cli.run(['train', f'--workdir={tmp_path / "run"}', '--config.steps=2', '--config.optimizer.lr=0.01'])
  last = lms.load(tmp_path / 'run', merge=False)
  pairs = last.params.pop('lora')
  common.assert_trees_equal(last.params, {k: v for k, v in old.params.items() if k != 'lora'})
  for a, b in zip(jax.tree.leaves(jax.device_get(pairs)), jax.tree.leaves(jax.device_get(old.params['lora']))):
    assert np.abs(a - b).max() > 0
  cli.run(['export', f'--workdir={tmp_path / "run"}', f'--out={tmp_path / "out"}', '--adapter'])
  shape = lambda folder: {k: v.shape for k, v in safetensors.numpy.load_file(folder / 'adapter_model.safetensors').items()}
  assert shape(tmp_path / 'out') == shape(runs / 'adapter')


Q = 'base_model.model.model.layers.0.self_attn.q_proj.lora_'
WORDS = {  # case → (keys of adapter_config.json, one line)
    'another method': ({'peft_type': 'LOHA'}, "peft_type='LOHA': known are plain pairs"),
    'magnitudes': ({'use_dora': True}, 'use_dora=True: known are plain pairs'),
    'biases': ({'bias': 'all'}, "bias='all': known are"),
    'a changed base': ({'init_lora_weights': 'pissa'}, "init_lora_weights='pissa': known are"),
    'a rank that is none': ({'r': 'x'}, "r='x' of .*: wants a number above 0"),
    'a rank of another': ({'r': 5}, r'o_proj.lora_A is \[2, 64\], where its base and its config want \[5, 64\]'),
    'a rank below': ({'r': -1}, 'r=-1 of'),
    'a vast rank': ({'r': 10 ** 9}, 'r=1000000000 of'),
    'no scale': ({'lora_alpha': float('nan')}, 'lora_alpha=nan of'),
    'a scale that is a list': ({'lora_alpha': [8]}, r'lora_alpha=\[8\] of'),
    'patterns that are run': ({'rank_pattern': {'(a+)+$': 3}}, r"rank_pattern has '\(a\+\)\+\$': wants names of modules"),
    'patterns that are none': ({'alpha_pattern': 7}, 'alpha_pattern has 7: wants names'),
}
TENSORS = {  # case → (what is done to the tensors, one line)
    'half a pair': (lambda t: t.pop(Q + 'B.weight'), r'has no model.layers.0.self_attn.q_proj.lora_B.weight, the other half'),
    'a strange name': (lambda t: t.update({Q.replace('q_proj', 'x_proj') + 'A.weight': t.pop(Q + 'A.weight')}),
                       'x_proj.weight is no tensor of the base, as llama names them'),
    'another layer': (lambda t: t.update({Q.replace('.0.', '.7.') + x: t[Q + x] for x in ('A.weight', 'B.weight')}),
                      r'layers.7.self_attn.q_proj.weight is no tensor of the base'),
    'another prefix': (lambda t: t.update({'x': t[Q + 'A.weight']}), 'x is no float tensor of base_model.model.'),
    'integers': (lambda t: t.update({Q + 'A.weight': t[Q + 'A.weight'].astype(np.int32)}), 'lora_A.weight is no float tensor'),
    'another shape': (lambda t: t.update({Q + 'B.weight': t[Q + 'B.weight'][:-1]}), r'q_proj.lora_B is \[63, 2\], where'),
    'no pairs': (lambda t: t.clear(), r'has no pairs \(lora_A, lora_B\)'),
    'a pair of an embedding': (lambda t: t.update({f'base_model.model.model.embed_tokens.lora_{x}.weight': t[Q + 'A.weight']
                                                   for x in 'AB'}), 'embed_tokens is no linear layer of a stack'),
}


@pytest.mark.parametrize('case', [*WORDS, *TENSORS])
def test_what_is_no_adapter_of_the_base_is_refused_in_one_line(case, runs, tmp_path):
  shutil.copytree(runs / 'adapter', tmp_path / 'in')
  words, match = WORDS.get(case, ({}, ''))
  file = tmp_path / 'in' / 'adapter_config.json'
  file.write_text(json.dumps({**json.loads(file.read_text()), **words}))
  if case in TENSORS:
    change, match = TENSORS[case]
    stored = safetensors.numpy.load_file(tmp_path / 'in' / 'adapter_model.safetensors')
    change(stored)
    safetensors.numpy.save_file(stored, tmp_path / 'in' / 'adapter_model.safetensors')
  refused(tmp_path / 'in', tmp_path / 'run', match, runs)


def refused(folder, workdir, match, runs, **overrides):
  with pytest.raises(UsageError, match=match) as e:
    adapter.read(folder, workdir, list(({'start.checkpoint': str(runs / 'base')} | overrides).items()))
  assert '\n' not in str(e.value) and not workdir.exists()


def test_files_and_flags_that_are_none_are_refused(runs, tmp_path, monkeypatch):
  monkeypatch.setenv('GLIBC_TUNABLES', '')
  shutil.copytree(runs / 'adapter', tmp_path / 'in')
  file, run = tmp_path / 'in' / 'adapter_model.safetensors', tmp_path / 'run'
  refused(tmp_path / 'in', run, "^start.checkpoint='': an adapter wants a base; name a run", runs, **{'start.checkpoint': ''})
  refused(tmp_path / 'in', run, 'no checkpoints', runs, **{'start.checkpoint': str(tmp_path / 'none')})
  refused(tmp_path / 'in', run, '^model.lora.rank=4: an adapter has the model of its base', runs, **{'model.lora.rank': '4'})
  for flag in ('--tokenizer=x', '--vocab_multiple=8'):
    with pytest.raises(UsageError, match='an adapter has the tokens of its base; leave --tokenizer and'):
      cli.run(['import', str(tmp_path / 'in'), f'--workdir={run}', flag])
  with pytest.raises(UsageError, match='has checkpoints already; import into another'):
    adapter.read(tmp_path / 'in', runs / 'pairs', [('start.checkpoint', str(runs / 'base'))])
  file.write_bytes(file.read_bytes()[:-9])
  refused(tmp_path / 'in', run, 'adapter_model.safetensors: cannot be read', runs)
  file.rename(tmp_path / 'in' / 'adapter_model.bin')
  refused(tmp_path / 'in', run, 'has no adapter_model.safetensors; a .bin is a pickle, which can run code, and is not read', runs)
  (tmp_path / 'in' / 'adapter_config.json').write_text('[]')
  refused(tmp_path / 'in', run, 'adapter_config.json: is no JSON object', runs)
