"""Pairs of low rank as adapters of peft: laid on the base in transformers they are the model with its pairs merged."""
import dataclasses
import json
import warnings

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from jaxlm import cli, layout, lm as lms, train
from jaxlm.errors import UsageError
from jaxlm.interop import adapter
from jaxlm.interop.huggingface import Folder
from jaxlm.interop.mapping import Row, factors, units
from jaxlm.models import kinds
from jaxlm.schema import LoraConfig, StartConfig
from tests import classics, common, families
from tests.test_classics import config_of
from tests.test_families import tree_of
from tests.test_kinds import make_lm
from tests.test_start import run_config

ALL = r'attention/.*/w|mlp/.*/w|shared/.*/w'
DECODER = r'^layers/(attention|memory_attention)/(q|o)/w'
CASES = {  # (model of transformers, targets) → (ends of the modules' names, those ranks that are not 3)
    ('llama 3', 'attention/(q|v)/w'): ('q_proj v_proj', {}),
    ('gpt2', ALL): ('c_attn c_fc c_proj', {'c_attn': 9}),  # three weights in one tensor, its inputs first
    ('gpt2', 'attention/(k|v|o)/w'): ('attn.c_attn attn.c_proj', {'c_attn': 6}),
    ('pythia (gpt_neox)', ALL): ('dense dense_4h_to_h dense_h_to_4h query_key_value', {'query_key_value': 9}),  # within each head
    ('qwen2', ALL): ('down_proj gate_proj k_proj o_proj q_proj up_proj v_proj', {}),
    ('gemma2', 'mlp/(gate|down)/w|attention/o'): ('down_proj gate_proj o_proj', {}),
    ('phi3', ALL): ('down_proj gate_up_proj o_proj qkv_proj', {'gate_up_proj': 6, 'qkv_proj': 9}),
    ('mixtral', 'attention/.*/w'): ('k_proj o_proj q_proj v_proj', {}),
    ('deepseek_v3', 'attention/.*/w'): ('kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj q_b_proj', {}),  # rotary pairs side by side
    ('bert', 'mlp/.*/w'): (' '.join(f'{n}.{x}.dense' for n in range(3) for x in ('intermediate', 'output')), {}),
    ('bert, classes', ALL): ('intermediate.dense output.dense self.key self.query self.value', {}),
    ('roberta, classes', 'attention/(q|v)/w'): ('query value', {}),
    ('bert, tags', 'attention/(q|v)/w'): ('query value', {}),
    ('roberta, spans', 'attention/(q|v)/w'): ('query value', {}),
    ('bert, bare', 'attention/(q|v)/w'): ('query value', {}),
    ('t5 1.1', DECODER): (' '.join(f'decoder.block.{n}.layer.{part}.{x}' for n in range(3)
                                   for part in ('0.SelfAttention', '1.EncDecAttention') for x in 'oq'), {}),
    ('bart', 'attention/(q|v)/w|mlp/up/w'): ('fc1 q_proj v_proj', {}),
}
SAVED = {'bert, classes': ['bert.pooler', 'classifier'], 'roberta, classes': ['classifier'], 'bert, tags': ['classifier'],
         'roberta, spans': ['qa_outputs']}
TASKS = {'bert': None, 'bert, classes': 'SEQ_CLS', 'roberta, classes': 'SEQ_CLS', 'bert, tags': 'TOKEN_CLS',
         'roberta, spans': 'QUESTION_ANS', 'bert, bare': 'FEATURE_EXTRACTION', 't5 1.1': 'SEQ_2_SEQ_LM', 'bart': 'SEQ_2_SEQ_LM'}


def peer_of(name):
  return classics.make(name) if name in classics.ALL else families.make(name)


def with_pairs(name, folder, targets, rank=3, alpha=6.):
  """(the base in transformers, our LM of it with random pairs)."""
  peer = peer_of(name)
  peer.save_pretrained(folder)
  source = Folder(folder)
  c = config_of(source)
  c = dataclasses.replace(c, model=dataclasses.replace(c.model, lora=LoraConfig(rank, alpha, targets)),
                          start=StartConfig('moved away'))
  plain = dataclasses.replace(c.model, lora=LoraConfig())
  mesh = common.mesh_of(1, 1, 1)
  with jax.set_mesh(mesh):
    like = layout.named(kinds.abstract_params(c.model), mesh)
  pairs = common.perturbed(jax.tree.map(lambda a: np.zeros(a.shape, np.float32), like['lora']), scale=0.1)
  return peer, lms.LM(c, common.BYTES, common.put_params({**tree_of(source, plain), 'lora': pairs}, like), mesh, 0)


def said(peer, tokens_BL, inputs_BM):
  ids = lambda a: torch.tensor(a, dtype=torch.long)
  with torch.no_grad():
    return classics.outputs(peer, **({'input_ids': ids(tokens_BL)} if inputs_BM is None else
                                     {'input_ids': ids(inputs_BM), 'decoder_input_ids': ids(tokens_BL)})).numpy()


@pytest.mark.parametrize('name, targets', CASES)
def test_an_adapter_on_its_base_is_the_merged_model(name, targets, tmp_path):
  peer, lm = with_pairs(name, tmp_path / 'hf', targets)
  report = adapter.run(lm, tmp_path / 'out', peer.config.model_type, 'float32', 'some/base')
  config = json.loads((tmp_path / 'out' / 'adapter_config.json').read_text())
  names, ranks = CASES[name, targets]
  assert config['target_modules'] == names.split() and config['rank_pattern'] == ranks and config['r'] == 3
  assert config['alpha_pattern'] == {end: 2 * r for end, r in ranks.items()} and config['lora_alpha'] == 6
  assert config['modules_to_save'] == SAVED.get(name) and config['task_type'] == TASKS.get(name, 'CAUSAL_LM')
  assert config['fan_in_fan_out'] == (name == 'gpt2') and config['base_model_name_or_path'] == 'some/base'
  base = peer_of(name)
  with torch.no_grad():  # a base that has no classifier gets its own from the adapter
    for module in SAVED.get(name, []):
      for p in base.get_submodule(module).parameters():
        p.zero_()
  with warnings.catch_warnings():
    warnings.filterwarnings('error', '.*(missing|unexpected).*')
    dressed = peft.PeftModel.from_pretrained(base, tmp_path / 'out').eval()
  stored = safetensors.numpy.load_file(tmp_path / 'out' / 'adapter_model.safetensors')
  assert set(peft.get_peft_model_state_dict(dressed)) == set(stored)
  m, rng = lm.config.model, np.random.default_rng(1)
  tokens_BL, inputs_BM = (rng.integers(3, m.V - 1, (2, 64 - m.first_position)) for _ in range(2))
  inputs_BM = inputs_BM if m.kind == 'seq2seq' else None
  ours, before = lm.outputs(tokens_BL, inputs_BM), said(peer, tokens_BL, inputs_BM)
  close = 2e-5 * np.abs(before).max()
  assert np.abs(ours - before).max() > 500 * close
  np.testing.assert_allclose(said(dressed, tokens_BL, inputs_BM), ours, atol=close)
  np.testing.assert_allclose(said(dressed.merge_and_unload(), tokens_BL, inputs_BM), ours, atol=close)
  assert report['max_abs_logit_difference'] <= close and report['read_by'].startswith('peft ')


# ---- the command, and what is refused

PAIRS = {'model.lora.rank': 2, 'model.lora.alpha': 8., 'model.lora.targets': 'attention/(q|o)/w', 'data.tokenizer': 'start',
         'optimizer.lr': 1e-2}


@pytest.fixture(scope='module')
def runs(texts, tmp_path_factory):
  """(a trained run, one that started from it and trained pairs)."""
  folder = tmp_path_factory.mktemp('runs')
  train.train(run_config(texts), folder / 'base')
  train.train(run_config(texts, **PAIRS, **{'start.checkpoint': str(folder / 'base')}), folder / 'pairs')
  return folder / 'base', folder / 'pairs'


def test_the_command_exports_what_the_run_is(runs, tmp_path, monkeypatch):
  """Base and adapter, each exported by the command, are in peft the run with its pairs merged."""
  monkeypatch.setenv('GLIBC_TUNABLES', '')  # the command is this process, which need not start again
  base, pairs = runs
  cli.run(['export', f'--workdir={base}', f'--out={tmp_path / "base"}'])
  cli.run(['export', f'--workdir={pairs}', f'--out={tmp_path / "out"}', '--adapter', f'--base={tmp_path / "base"}',
           '--dtype=bfloat16', f'--json={tmp_path / "report.json"}'])
  assert json.loads((tmp_path / 'report.json').read_text()) == json.loads((tmp_path / 'out' / 'parity.json').read_text())
  assert {f.name for f in (tmp_path / 'out').iterdir()} == {'adapter_config.json', 'adapter_model.safetensors', 'parity.json'}
  stored = safetensors.torch.load_file(tmp_path / 'out' / 'adapter_model.safetensors')
  assert {t.dtype for t in stored.values()} == {torch.bfloat16} and len(stored) == 3 * 2 * 2
  dressed, lm = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / 'out').eval(), lms.load(pairs)
  tokens_BL = np.random.default_rng(0).integers(3, 250, (2, 64))
  before = lms.load(base).logits(tokens_BL)
  found, ours = said(dressed, tokens_BL, None), lm.logits(tokens_BL)
  change = np.abs(ours - before).max()
  assert np.abs(found - ours).max() < 0.02 * change  # bfloat16 has 8 bits
  with pytest.raises(UsageError, match='exists; name a folder that does not'):
    cli.run(['export', f'--workdir={pairs}', f'--out={tmp_path / "out"}', '--adapter'])
  with pytest.raises(UsageError, match='^--base=x: is said in an adapter; add --adapter'):
    cli.run(['export', f'--workdir={base}', f'--out={tmp_path / "no"}', '--base=x'])
  with pytest.raises(UsageError, match='model.lora.rank=0: the run has no pairs'):
    cli.run(['export', f'--workdir={base}', f'--out={tmp_path / "no"}', '--adapter'])
  assert not list(tmp_path.glob('no*'))


def refused(lm, match, tmp_path, family=None):
  with pytest.raises(UsageError, match=match) as e:
    adapter.run(lm, tmp_path / 'out', family, 'float32', None)
  assert '\n' not in str(e.value) and not list(tmp_path.glob('out*'))


def test_what_no_adapter_can_say_is_refused(runs, tmp_path):
  """A base that nobody has, weights that peft takes for others, and a model of no family."""
  base, pairs = runs
  merged = 'export the merged model, without --adapter$'
  lm = lms.load(pairs, merge=False)
  assert 'lora' in lm.params
  start = lambda c, **changes: dataclasses.replace(lm, config=dataclasses.replace(lm.config, start=StartConfig(c), **changes))
  refused(start(''), "^--adapter: start.checkpoint='': the run started from nothing.*" + merged, tmp_path)
  wider = dataclasses.replace(lm.config.model, V=272)
  refused(start(str(base), model=wider), r'embed is \[272, 32\] here, and in start.checkpoint=.* \[264, 32\]; ' + merged,
          tmp_path)
  untied = dataclasses.replace(lm.config.model, tied=False)
  refused(start(str(base), model=untied), 'unembed is .* not there; ' + merged, tmp_path)
  _, mixture = with_pairs('deepseek_v3', tmp_path / 'hf', 'shared/up/w')
  refused(mixture, 'layers/moe/shared/up/w: peft takes it for a part of the experts; ' + merged, tmp_path)
  refused(make_lm('lstm', **{**PAIRS, 'data.tokenizer': 'bytes', 'model.lora.targets': 'layers/x/w', 'start.checkpoint': 'x'}),
          'no family holds this model', tmp_path)
  refused(start('x'), '--family=gpt5: wants one of', tmp_path, 'gpt5')


def test_a_tensor_that_is_no_matrix_of_one_layer_is_refused():
  shapes = {'layers/mlp/up/w': (2, 4, 6), 'layers/attention/q/w': (2, 4, 2, 3)}
  m = common.model('llama', N=2)
  for row, inputs in ((Row('a.{n}.weight', {'layers/attention/q/w': 'DHK>(DH)K'}), 1),
                      (Row('a.{n}.weight', {'layers/attention/q/w': 'DHK>HDK'}), 1),
                      (Row('a.{n}.weight', {'layers/mlp/up/w': 'DF>FD', 'layers/attention/q/w': 'DHK>(HK)D'}, 'D'), 1)):
    unit = next(units((row,), m, shapes))
    with pytest.raises(ValueError, match='a.0.weight is no matrix from D to'):
      factors(unit, inputs, [2] * len(unit.parts))
