"""`jaxlm import` and `jaxlm export`: folders of transformers come in, train on and go out, and hostile ones do not."""
import functools
import json
import math
import shutil
import types
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given, settings, strategies as st

import jaxlm
from jaxlm import config as configs, evaluate, train as training
from jaxlm.checkpoint import steps
from jaxlm.data import tokenizer
from jaxlm.errors import UsageError
from jaxlm.interop import convert, exporting, gguf, importing
from jaxlm.interop.classics import CLASSICS
from jaxlm.interop.mapping import units
from jaxlm.lm import LM
from jaxlm.schema import FREE, TRAINING, flatten
from tests import common, families
from tests.test_checkpoint import run_config

BYTES = tokenizer.make('bytes', iter(())).json
V = 257
TEXTS = ['Hello, world', ' naïve  λόγος\n\tif x == 10:', "1234567 it's", '🙂']
QUIET = lambda text: None


def save(folder, name='llama 3', dtype=torch.float32, shard='1GB', **changes):
  """A tiny model of tests/families.py in `folder`, beside a byte tokenizer → the model of it, in float32."""
  kind, arguments = families.FAMILIES[name]
  arguments = {**arguments, 'vocab_size': V, 'bos_token_id': 0, 'eos_token_id': 0, **changes}
  with mock.patch.dict(families.FAMILIES, {name: (kind, arguments)}):
    families.make(name).to(dtype).save_pretrained(folder, max_shard_size=shard)
  (folder / 'tokenizer.json').write_text(BYTES, encoding='utf-8')
  return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation='eager')


def run_import(folder, workdir, vocab_multiple=1, *overrides):
  return importing.run(str(folder), workdir, None, vocab_multiple, overrides, QUIET)


def tensors(folder):
  return {k: t for file in folder.glob('*.safetensors') for k, t in safetensors.torch.load_file(file).items()}


def logits_of(peer, tokens_BL):
  with torch.no_grad():
    return peer(torch.tensor(tokens_BL, dtype=torch.long), use_cache=False).logits.numpy()


def some_tokens(length=48):
  return np.random.default_rng(0).integers(0, V, (2, length), dtype=np.int32)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """name → (the model in transformers, its folder, an imported workdir)."""
  @functools.cache
  def make(name):
    folder = tmp_path_factory.mktemp('saved')
    peer = save(folder / 'hf', name)
    run_import(folder / 'hf', folder / 'run')
    return peer, folder / 'hf', folder / 'run'
  return make


# 1. Both directions of every family, on models that nobody has thought of.

GEMMA = dict(norm_place='both', norm_offset=1., mlp='geglu', scale_embedding=True)


@st.composite
def models(draw, kind):
  """Any tiny model that the family holds."""
  whole, pick = lambda low, high: draw(st.integers(low, high)), lambda *of: draw(st.sampled_from(of))
  G, vocab, pad = whole(1, 3), whole(5, 20), whole(0, 7)
  m = dict(H=G * whole(1, 3), G=G, K=4 * whole(1, 3), D=whole(3, 17), F=whole(1, 9), N=whole(1, 5), V=vocab + pad,
           vocab=vocab if pad else 0, tied=pick(True, False), norm_eps=pick(1e-5, 1e-6))
  rope = {'rope.base': pick(1e4, 5e5)}
  if kind in ('llama', 'qwen2', 'qwen3', 'deepseek_v3'):
    rope |= pick({}, {'rope.scaling': 'linear', 'rope.factor': 2.},
                 {'rope.scaling': 'llama3', 'rope.factor': 8., 'rope.original': 16, 'rope.low': 1., 'rope.high': 4.},
                 {'rope.scaling': 'yarn', 'rope.factor': 4., 'rope.original': 16, 'rope.low': 1., 'rope.high': 32.,
                  'rope.magnitude': 1.25})
  local = pick({}, {'pattern': 'local', 'window': whole(1, 9)})
  period = whole(2, 5)
  mixed = {'pattern': 'local ' * (period - 1) + 'global', 'window': 3} if period <= m['N'] else {}
  by_layer = pick(local, mixed)
  scale = pick({}, {'attention_scale': (m['K'] + 1) ** -0.5})
  moe = {'moe.E': 4 * whole(1, 2), 'moe.top_k': whole(1, 2)}
  if kind in ('gpt2', 'gpt_neo', 'gpt_neox'):
    m |= dict(D=m['H'] * m['K'], G=m['H'], norm='layer')
  learned = dict(position='learned', P=whole(1, 9), mlp='gelu')
  latent = whole(1, m['K'] // 2 - 1)
  more = {
      'gpt2': {**learned, 'bias': 'all'},
      'gpt_neo': {**learned, **by_layer, 'bias': 'not_qkv', 'attention_scale': 1.},
      'gpt_neox': {**rope, 'rope.share': pick(.5, 1.), 'mlp': 'gelu_exact', 'bias': 'all', 'parallel': pick(True, False)},
      'llama': rope,
      'mistral': {**rope, **local},
      'qwen2': {**rope, **by_layer, 'bias': 'qkv'},
      'qwen3': {**rope, **by_layer, 'qk_norm': 'head'},
      'gemma2': {**rope, **GEMMA, **by_layer, **scale, 'attention_cap': pick(0., 50.), 'logit_cap': pick(0., 30.)},
      'gemma3_text': {**rope, **GEMMA, **by_layer, **scale, 'qk_norm': 'head', 'rope.local_base': 1e3},
      'olmo2': {**rope, 'norm_place': 'post', 'qk_norm': 'all'},
      'phi3': {**rope, **local, 'rope.share': pick(.5, 1.)},
      'mixtral': {**rope, **local, **moe, 'moe.F': m['F']},
      'qwen3_moe': {**rope, **local, **moe, 'qk_norm': 'head', 'moe.F': whole(1, 9), 'moe.normalize': pick(True, False),
                    **pick({'moe.first': whole(0, m['N'] - 1)}, {'moe.every': whole(1, m['N'])})},
      'deepseek_v3': {**rope, **moe, 'G': m['H'], 'moe.F': 3, 'moe.shared': 3 * whole(0, 2), 'moe.groups': 2,
                      'moe.top_groups': whole(1, 2), 'moe.scale': 2.5, 'moe.score': 'sigmoid', 'moe.bias': True,
                      'moe.first': whole(0, m['N'] - 1), 'mla.kv': whole(1, 9), 'mla.q': whole(0, 9),
                      'mla.rope': 2 * latent, 'mla.v': whole(1, 9),
                      'attention_scale': .4 if rope.get('rope.scaling') == 'yarn' else 0.},
  }
  flat = {**m, **more[kind]}
  return configs.from_flat({'length': 1, 'loss.chunks': 1, **{f'model.{k}': v for k, v in flat.items()}}).model


def check_bijection(rows, m):
  """Integers through the rows: each element of ours is one of theirs, once, and comes back to its place."""
  shapes = convert.shapes(m)
  ours, at, names = {path: np.full(shape, -1) for path, shape in shapes.items()}, 0, []
  for unit in units(rows, m, shapes):
    x = at + np.arange(math.prod(unit.shape)).reshape(unit.shape)
    at += x.size
    names.append(unit.theirs)
    arrays = unit.to_ours(x)
    np.testing.assert_array_equal(unit.to_theirs(arrays), x)
    for part, array in zip(unit.parts, arrays, strict=True):
      assert array.shape == part.shape and (ours[part.path][part.index] == -1).all()
      ours[part.path][part.index] = array
    noise = [np.random.default_rng(at).standard_normal(part.shape, np.float32) for part in unit.parts]
    for a, b in zip(unit.to_ours(unit.to_theirs(noise)), noise, strict=True):
      np.testing.assert_array_equal(a, b)
    assert not unit.is_copy or np.array_equal(arrays[0], x)
  assert len(names) == len(set(names))
  np.testing.assert_array_equal(np.sort(np.concatenate([a.ravel() for a in ours.values()])), np.arange(at))


@pytest.mark.parametrize('kind', [kind for kind in convert.FAMILIES if kind not in CLASSICS])  # those: test_classics.py
def test_both_directions_are_bijections(kind):
  @settings(max_examples=6, deadline=None, derandomize=True, database=None)
  @given(models(kind))
  def check(m):
    check_bijection(convert.FAMILIES[kind].rows, m)
    written = json.loads(json.dumps(convert.to_config_json(kind, m)))  # as a file would say it
    values = {f'model.{k}': v for k, v in convert.to_model(convert.FAMILIES[kind], written).items()}
    back = flatten(configs.from_flat({'length': 1, 'loss.chunks': 1, **values}).model)
    function = lambda flat: {k: v for k, v in flat.items() if not any(r.match(f'model.{k}') for r in (FREE, TRAINING))}
    assert function(back) == function({**flatten(m), 'V': m.vocab or m.V, 'vocab': 0})
    assert convert.to_config_json(convert.family_of(m), m)  # perhaps another, that says the same function
    if kind == 'llama':  # as GGUF has it, rotary pairs side by side
      check_bijection(gguf.GgufFile.family.fget(types.SimpleNamespace(model_type='llama', _interleaved=True)).rows, m)
  with mock.patch.object(convert, 'shapes', functools.cache(convert.shapes)):
    check()


# 2. Import.

@pytest.mark.parametrize('name, dtype, shard', [
    ('llama 3', torch.float32, '20KB'), ('gpt2', torch.bfloat16, '1GB'), ('gemma2', torch.float16, '20KB'),
    ('qwen3_moe', torch.float32, '1GB'), ('deepseek_v3', torch.bfloat16, '1GB')])
def test_imported_logits_equal_transformers(name, dtype, shard, tmp_path):
  peer = save(tmp_path / 'hf', name, dtype, shard)
  assert (len(list((tmp_path / 'hf').glob('*.safetensors'))) > 3) == (shard != '1GB')
  run_import(tmp_path / 'hf', tmp_path / 'run')
  np.testing.assert_allclose(jaxlm.load(tmp_path / 'run').logits(some_tokens()), logits_of(peer, some_tokens()), atol=2e-4)


def test_a_redundant_output_matrix_changes_nothing(saved, tmp_path):
  _, folder, run = saved('smollm2')
  assert 'lm_head.weight' not in tensors(folder)
  shutil.copytree(folder, tmp_path / 'hf')
  both = tensors(folder)
  safetensors.torch.save_file({**both, 'lm_head.weight': both['model.embed_tokens.weight'].clone()},
                              tmp_path / 'hf' / 'model.safetensors')
  run_import(tmp_path / 'hf', tmp_path / 'run')
  assert set(jaxlm.load(tmp_path / 'run').params) == {'embed', 'layers', 'norm'}
  common.assert_trees_equal(jaxlm.load(tmp_path / 'run').params, jaxlm.load(run).params)


def train(workdir, texts, *overrides):
  usual = {'data.source': f'text:{texts}/*.txt', 'data.heldout': '0.2', 'batch': '8', 'length': '32', 'log_every': '1',
           'optimizer.warmup': '1'}
  training.train(configs.load(f'{workdir}/config.json', [*usual.items(), *overrides]), workdir)


def test_a_padded_vocabulary_is_as_good_and_trains_and_is_cut_again(texts, tmp_path):
  peer, tokens_BL = save(tmp_path / 'hf'), some_tokens()
  config = run_import(tmp_path / 'hf', tmp_path / 'run', 64)
  lm = jaxlm.load(tmp_path / 'run')
  assert (config.model.V, config.model.vocab, lm.logits(tokens_BL).shape[-1]) == (320, V, 320)
  np.testing.assert_allclose(lm.logits(tokens_BL)[..., :V], logits_of(peer, tokens_BL), atol=2e-4)
  assert (lm.logits(tokens_BL)[..., V:] < -1e29).all()

  ids = [lm.tokenizer.opening, *lm.tokenizer.encode(TEXTS[1])]  # eval: the cross entropy of transformers
  found = evaluate.evaluate(lm, [('a', TEXTS[1])], 48, 24, 8)
  nll = torch.nn.functional.cross_entropy(torch.tensor(logits_of(peer, [ids[:-1]])[0]), torch.tensor(ids[1:]))
  assert found['tokens'] == len(ids) - 1 and abs(found['nll_per_token'] - nll) < 1e-5
  prompt = torch.tensor([lm.tokenizer.prompt('if x')])  # generate: its continuation
  new = peer.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8)[0, prompt.shape[1]:]
  assert lm.generate(['if x'], 8, 0.) == [lm.tokenizer.decode([i for i in new.tolist() if i])]

  how = ('optimizer.lr', '0.003'), ('optimizer.schedule', 'constant')
  with pytest.raises(UsageError, match='model.moe.scale was 1.0 and is now 2.0'):  # unused here: nothing is compiled anew
    train(tmp_path / 'run', texts, ('steps', '2'), *how, ('model.moe.scale', '2.'))
  assert steps(tmp_path / 'run') == [0] and jaxlm.load(tmp_path / 'run').step == 0
  train(tmp_path / 'run', texts, ('steps', '2'), *how)
  train(tmp_path / 'run', texts, ('steps', '4'), *how)
  lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  assert [m['step'] for m in lines] == [1, 2, 3, 4] and all(math.isfinite(m['loss']) for m in lines)
  trained = jaxlm.load(tmp_path / 'run')
  after = trained.logits(tokens_BL)
  assert trained.step == 4 and np.abs(after[..., :V] - lm.logits(tokens_BL)[..., :V]).max() > 1e-3
  assert (after[..., V:] < -1e29).all() and not np.asarray(trained.params['embed'])[V:].any()

  exporting.run(trained, tmp_path / 'out', None, 'float32')
  written = tensors(tmp_path / 'out')
  assert written['lm_head.weight'].shape == written['model.embed_tokens.weight'].shape == (V, 32)
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
  np.testing.assert_allclose(logits_of(again, tokens_BL), after[..., :V], atol=2e-4)


# 3. Export.

@pytest.mark.parametrize('name', ['llama 3', 'smollm2', 'gpt2', 'qwen3_moe'])
def test_export_gives_back_what_was_imported(name, saved, tmp_path, monkeypatch):
  peer, folder, run = saved(name)
  monkeypatch.setattr(exporting, 'SHARD', 20_000)
  report = exporting.run(jaxlm.load(run), tmp_path / 'out', peer.config.model_type, 'float32')
  assert report == json.loads((tmp_path / 'out' / 'parity.json').read_text())
  assert report['max_abs_logit_difference'] <= 2e-4 and report['positions'] == 128 and report['dtype'] == 'float32'
  files = sorted(p.name for p in (tmp_path / 'out').glob('*.safetensors'))
  assert len(files) > 3 and all(f.endswith(f'-of-{len(files):05}.safetensors') for f in files)
  before, after = tensors(folder), tensors(tmp_path / 'out')
  assert set(before) == set(after)
  loaded, original = (transformers.AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / 'out', folder))
  for key in before:
    assert after[key].dtype == torch.float32 and torch.equal(after[key], before[key]), key
  assert {k: v.tolist() for k, v in loaded.state_dict().items()} == {k: v.tolist() for k, v in original.state_dict().items()}
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  ours = jaxlm.load(run).tokenizer
  for text in TEXTS:
    assert theirs(text)['input_ids'] == ours.prompt(text) and theirs.decode(ours.encode(text)) == text
  assert theirs.eos_token_id == theirs.bos_token_id == 0 and loaded.generation_config.eos_token_id in (0, [0])


def test_export_in_bfloat16_and_never_over_what_is_there(saved, tmp_path, monkeypatch):
  _, folder, run = saved('llama 3')
  lm = jaxlm.load(run)
  report = exporting.run(lm, tmp_path / 'out', None, 'bfloat16')
  before, after = tensors(folder), tensors(tmp_path / 'out')
  for key in before:
    assert after[key].dtype == torch.bfloat16 and torch.equal(after[key], before[key].bfloat16()), key
  assert report['dtype'] == 'bfloat16' and 1e-4 < report['max_abs_logit_difference'] < 1
  assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out').dtype == torch.bfloat16
  names = sorted(p.name for p in tmp_path.rglob('*'))
  with pytest.raises(UsageError, match='--out=.*exists'):
    exporting.run(lm, tmp_path / 'out', None, 'float32')
  with pytest.raises(UsageError, match='--family=xlnet'):
    exporting.run(lm, tmp_path / 'new', 'xlnet', 'float32')
  monkeypatch.setattr(exporting, 'parity', mock.Mock(side_effect=MemoryError))  # after the tensors are written
  with pytest.raises(MemoryError):
    exporting.run(lm, tmp_path / 'new', None, 'float32')
  assert sorted(p.name for p in tmp_path.rglob('*')) == names


@pytest.mark.parametrize('changes, what', [
    ({'norm': 'layer'}, "llama, has no place for model.norm='layer'$"),
    ({'mlp': 'relu'}, "llama, has no place for model.mlp='relu'$"), ({'attention_scale': 2.}, 'model.attention_scale=2.0$'),
    ({'moe.E': 4, 'moe.F': 8, 'moe.every': 2, 'moe.first': 1}, 'model.moe'),
    ({'mla.kv': 8, 'mla.rope': 2, 'mla.v': 4, 'G': 8, 'attention_scale': .3}, 'deepseek_v3, .*model.attention_scale=0.3')])
def test_a_model_of_no_family_is_refused(changes, what, tmp_path):
  lm = LM(common.config(**{f'model.{k}': v for k, v in changes.items()}), tokenizer.Tokenizer(BYTES), {}, None, 0)
  with pytest.raises(UsageError, match=f'^no family holds this model; the nearest, .*{what}'):
    exporting.run(lm, tmp_path / 'out', None, 'float32')
  with pytest.raises(UsageError, match='^llama has no place for model'):
    exporting.run(lm, tmp_path / 'out', 'llama', 'float32')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_what_is_trained_here_is_exported(family, texts, tmp_path):
  c = run_config(texts, save_every=12, **{f'model.{k}': v for k, v in common.MODELS[family].items()})
  training.train(c, tmp_path / 'run')
  lm = jaxlm.load(tmp_path / 'run')
  report = exporting.run(lm, tmp_path / 'out', None, 'float32')
  assert lm.step == c.steps
  peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
  assert peer.config.model_type == family and report['max_abs_logit_difference'] <= 2e-4
  tokens_BL = some_tokens(32)
  np.testing.assert_allclose(logits_of(peer, tokens_BL), lm.logits(tokens_BL), atol=2e-4)
  assert transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')(TEXTS[0])['input_ids'] == lm.tokenizer.prompt(TEXTS[0])


# 4. Workdirs.

def listing(folder):
  return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob('*')}


def test_a_workdir_with_checkpoints_is_left_as_it_is(saved, tmp_path):
  _, folder, run = saved('llama 3')
  before = listing(run)
  with pytest.raises(UsageError, match='has checkpoints already'):
    run_import(folder, run)
  with pytest.raises(UsageError, match='--vocab_multiple=0'):
    run_import(folder, tmp_path / 'new', 0)
  with pytest.raises(UsageError, match='--tokenizer=.*no such file'):
    importing.run(str(folder), tmp_path / 'new', str(tmp_path / 'none.json'), 1, [], QUIET)
  with pytest.raises(UsageError, match='no such folder'):
    run_import(tmp_path / 'none', tmp_path / 'new')
  assert listing(run) == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_an_import_that_dies_midway_can_be_run_again(error, saved, tmp_path, monkeypatch):
  _, folder, run = saved('llama 3')
  read = convert.read

  def some(*arguments):
    for n, item in enumerate(read(*arguments)):
      if n == 5:
        raise error('it dies here')
      yield item
  monkeypatch.setattr(convert, 'read', some)
  with pytest.raises(error, match='it dies here'):
    run_import(folder, tmp_path / 'run')
  assert not list((tmp_path / 'run').iterdir())
  monkeypatch.undo()
  (tmp_path / 'run' / '.import' / 'checkpoints' / '0').mkdir(parents=True)  # of one that was killed
  (tmp_path / 'run' / '.import' / 'checkpoints' / 'x').write_text('left over')
  run_import(folder, tmp_path / 'run')
  common.assert_trees_equal(jaxlm.load(tmp_path / 'run').params, jaxlm.load(run).params)
  assert sorted(p.name for p in (tmp_path / 'run').iterdir()) == ['checkpoints', 'config.json', 'tokenizer.json']
