"""Runs that start from others, and low-rank adaptation."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config as configs, lm as lms, tensors, train
from jaxlm.errors import UsageError
from jaxlm.models import kinds, lora
from jaxlm.optimizer import make_optimizer
from jaxlm.step import init_state, make_step
from tests import common

LORA = {'model.lora.rank': 2, 'model.lora.alpha': 8., 'model.lora.targets': 'attention/(q|v|o)/w|mlp/up/w'}


def run_config(texts, **changes):
  flat = {f'model.{k}': v for k, v in common.LLAMA.items()}
  return configs.from_flat({**flat, 'batch': 8, 'length': 32, 'loss.chunks': 4, 'steps': 4, 'save_every': 4, 'data.tokenizer': 'bytes',
                            'data.source': f'text:{texts}/*.txt', 'optimizer.warmup': 1, 'mesh.fsdp': 4, 'mesh.tensor': 2, **changes})


@pytest.fixture(scope='module')
def base(texts, tmp_path_factory):
  folder = tmp_path_factory.mktemp('base')
  train.train(run_config(texts), folder)
  return folder


def flat_params(workdir):
  return {k: np.asarray(v) for k, v in lora.flat(lms.load(workdir).params).items()}


def test_what_fits_is_loaded_and_the_rest_is_reported(base, texts, tmp_path, capsys):
  """One layer fewer fits nowhere but in the tables; more rows keep the first."""
  start = {'start.checkpoint': str(base), 'data.tokenizer': 'start', 'optimizer.lr': 1e-9, 'optimizer.weight_decay': 0.}
  train.train(run_config(texts, **start, **{'model.V': 272, 'model.tied': False}), tmp_path / 'a')
  said = capsys.readouterr().out
  assert 'start: more rows here, the first loaded: embed' in said and 'start: fresh: unembed' in said
  old, new = flat_params(base), flat_params(tmp_path / 'a')
  for path in old:
    np.testing.assert_allclose(new[path][:264] if path == 'embed' else new[path], old[path], atol=1e-6)
  assert new['embed'].shape[0] == 272 and np.abs(new['embed'][264:]).max() > 0
  with pytest.raises(UsageError, match='no array of it has the path and shape'):
    train.train(run_config(texts, **start, **{'model.D': 64, 'model.N': 2, 'model.K': 16}), tmp_path / 'b')


MLA = {'G': 8, 'mla.kv': 8, 'mla.rope': 4, 'mla.v': 4}
MIXTURE = {'moe.E': 4, 'moe.F': 16}


@pytest.mark.parametrize('family, changes', [
    *((family, {}) for family in common.MODELS), ('llama', MLA), ('llama', {**MLA, 'mla.q': 8}), ('llama', MIXTURE),
    ('llama', {**MIXTURE, 'moe.shared': 8, 'moe.first': 1}), ('t5', {**MIXTURE, 'moe.shared': 8, 'moe.every': 2})], ids=str)
def test_weights_that_can_have_a_pair_are_known_without_making_them(one_device, family, changes):
  """What validation, which has no jax, says of them is what the models' own code makes."""
  m = common.config(family, **{f'model.{k}': v for k, v in changes.items()}).model
  assert sorted(tensors.weights(m)) == sorted(path for path in lora.flat(kinds.abstract_params(m)) if lora.STACKED.match(path))


def test_a_run_goes_on_from_its_own_checkpoint_and_not_from_the_start(base, texts, tmp_path, capsys):
  start = {'start.checkpoint': str(base), 'data.tokenizer': 'start'}
  train.train(run_config(texts, **start), tmp_path)
  assert 'start: ' in capsys.readouterr().out
  train.train(run_config(texts, **start, steps=6), tmp_path, ('steps',))
  said = capsys.readouterr().out
  assert 'goes on from step 4' in said and 'start: ' not in said


def test_other_tokens_and_missing_checkpoints_are_refused(base, texts, tmp_path):
  with pytest.raises(UsageError, match='trained on other tokens; set data.tokenizer=start'):
    train.train(run_config(texts, **{'start.checkpoint': str(base), 'data.tokenizer': 'bpe:260'}), tmp_path / 'a')
  with pytest.raises(UsageError, match='has no checkpoints; name a workdir'):
    train.train(run_config(texts, **{'start.checkpoint': str(tmp_path / 'none')}), tmp_path / 'b')
  with pytest.raises(UsageError, match=r'has the steps \[4\]; set start.step'):
    train.train(run_config(texts, **{'start.checkpoint': str(base), 'start.step': 3}), tmp_path / 'c')
  with pytest.raises(UsageError, match='wants start.checkpoint'):
    train.train(run_config(texts, **{'data.tokenizer': 'start'}), tmp_path / 'd')


@pytest.mark.parametrize('family', ['llama', 't5', 'lstm'])
@pytest.mark.parametrize('sizes', [(1, 1, 1), (2, 2, 2)])
def test_pairs_start_as_nothing_and_are_all_that_is_trained(family, sizes):
  targets = {'model.lora.targets': r'layers/(x|h)/w'} if family == 'lstm' else {}
  c = common.config(family, **{**LORA, **targets})
  with jax.set_mesh(common.mesh_of(*sizes)):
    tx, schedule = make_optimizer(c.optimizer, c.steps)
    state = jax.jit(lambda key: init_state(c, tx, key))(jax.random.key(0))
    plain = {k: v for k, v in state['params'].items() if k != 'lora'}
    batch = common.put(common.examples_of(c))
    forward = lambda params: kinds.forward(c.model, params, batch).x_BLD
    np.testing.assert_array_equal(jax.jit(forward)(state['params']), jax.jit(forward)(plain))
    moments = sum(a.size for a in jax.tree.leaves(state['opt']))
    pairs = sum(a.size for a in jax.tree.leaves(state['params']['lora']))
    assert 2 * pairs <= moments < 2 * pairs + 10 < sum(a.size for a in jax.tree.leaves(plain))
    before = jax.device_get(plain)
    step = jax.jit(make_step(c, tx, schedule), donate_argnums=0)
    losses = []
    for _ in range(6):
      state, sums = step(state, batch)
      losses.append(float(sums['nll']))
    assert losses[-1] < losses[0] and step._cache_size() == 1
    common.assert_trees_equal({k: v for k, v in state['params'].items() if k != 'lora'}, before)


def test_merging_is_the_sum(one_device):
  c = common.config('llama', **LORA)
  params = common.perturbed(jax.jit(lambda key: kinds.init_params(c.model, key))(jax.random.key(0)))
  merged = lora.flat(jax.device_get(lora.merged(c.model, jax.tree.map(jnp.asarray, params))))
  pairs = lora.flat(params['lora'])
  names = {p.rpartition('/')[0] for p in pairs}
  assert names == {f'layers/{n}/w' for n in ('attention/q', 'attention/v', 'attention/o', 'mlp/up')}
  for path, w in lora.flat({k: v for k, v in params.items() if k != 'lora'}).items():
    if path in names:
      a, b = pairs[f'{path}/a'], pairs[f'{path}/b']
      w = w + 4. * np.tensordot(a[0], b[0], 1)[None] if w.shape[0] == 1 else w + 4. * np.stack(
          [np.tensordot(x, y, 1) for x, y in zip(a, b)])
    np.testing.assert_allclose(merged[path], w, atol=1e-5)


def test_a_trained_adaptation_loads_as_one_model(base, texts, tmp_path):
  start = {'start.checkpoint': str(base), 'data.tokenizer': 'start', 'optimizer.lr': 1e-2}
  train.train(run_config(texts, **start, **LORA), tmp_path)
  lm, before = lms.load(tmp_path), lms.load(base)
  assert 'lora' not in lm.params and lm.config == dataclasses.replace(lm.config, model=before.config.model)
  ids = np.arange(40, 60)[None]
  assert np.abs(lm.logits(ids) - before.logits(ids)).max() > 1e-3
  np.testing.assert_array_equal(lm.params['embed'], before.params['embed'])
