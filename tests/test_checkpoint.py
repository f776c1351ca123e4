"""Resume equals an unbroken run, bit for bit; and a checkpoint that is not good is never trained on from step 0."""
import json
import shutil

import jax
import numpy as np
import pytest

from jaxlm import checkpoint, config as configs, lm as lms, train as training
from jaxlm.checkpoint import Checkpoints, steps
from jaxlm.errors import CheckpointError, JaxlmError, StorageError, UsageError
from jaxlm.models import kinds
from jaxlm.resume import load
from jaxlm.schema import MeshConfig
from tests import common


def run_config(texts, **changes):
  return common.config(**{'data.source': f'text:{texts}/*.txt', 'data.heldout': 0.2, 'steps': 12, 'save_every': 3,
                          'log_every': 1, 'mesh.fsdp': 4, 'mesh.tensor': 2, 'checkpoint.keep': 10, **changes})


def metrics(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def losses(workdir):
  return [(m['step'], m['loss'], m['grad_norm'], m['param_norm']) for m in metrics(workdir) if 'loss' in m]


def state_of(workdir, step):
  """Everything in a checkpoint, as numpy, with no model."""
  import orbax.checkpoint as ocp
  with ocp.PyTreeCheckpointer() as checkpointer:
    return checkpointer.restore((workdir / 'checkpoints' / str(step) / 'state').absolute())


@pytest.fixture(scope='module')
def unbroken(texts, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('unbroken')
  training.train(run_config(texts), workdir)
  return workdir


@pytest.fixture
def copy(unbroken, tmp_path):
  """The unbroken run as if killed between step 6 and its next save."""
  shutil.copytree(unbroken, tmp_path / 'run')
  for step in (9, 12):
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / str(step))
  (tmp_path / 'run' / 'checkpoints' / checkpoint.NEWEST).write_text(str(max(steps(tmp_path / 'run'))))
  return tmp_path / 'run'


@pytest.mark.parametrize('stops', [[3], [5, 8]])
def test_resume_is_bit_for_bit(texts, unbroken, tmp_path, stops):
  for stop in [*stops, 12]:
    training.train(run_config(texts, steps=12 if stop == 12 else stop, **{'optimizer.schedule': 'constant'}), tmp_path)
  whole = tmp_path.with_name(tmp_path.name + '-whole')
  training.train(run_config(texts, **{'optimizer.schedule': 'constant'}), whole)
  assert losses(tmp_path) == losses(whole) and len(losses(whole)) == 12
  common.assert_trees_equal(state_of(tmp_path, 12), state_of(whole, 12))


def test_a_killed_run_repeats_its_lost_steps_exactly(texts, unbroken, copy):
  (copy / 'checkpoints' / '9.orbax-checkpoint-tmp').mkdir()  # what a kill in a save leaves
  training.train(run_config(texts), copy)
  assert losses(copy) == losses(unbroken)
  common.assert_trees_equal(state_of(copy, 12), state_of(unbroken, 12))
  assert steps(copy) == [3, 6, 9, 12]


def test_async_saves_hold_the_state_of_their_step(texts, tmp_path):
  """Saving at every step while the loop donates its buffers: each checkpoint is the state of its own step."""
  training.train(run_config(texts, save_every=1, steps=8), tmp_path)
  for step in range(1, 8):
    found = state_of(tmp_path, step)
    assert found['step'] == step
    norm = np.sqrt(sum((np.asarray(a, np.float64) ** 2).sum() for a in jax.tree.leaves(found['params'])))
    np.testing.assert_allclose(norm, dict((l[0], l[3]) for l in losses(tmp_path))[step], rtol=1e-6)


@pytest.mark.parametrize('mesh', [{'mesh.fsdp': 8, 'mesh.tensor': 1}, {'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2}])
def test_restores_onto_another_mesh(texts, unbroken, copy, mesh):
  training.train(run_config(texts, **mesh), copy)
  got, expected = np.array(losses(copy)), np.array(losses(unbroken))
  np.testing.assert_array_equal(got[:6], expected[:6])
  np.testing.assert_allclose(got[6:], expected[6:], rtol=1e-4)


def damage(workdir, step, how='state'):
  folder = workdir / 'checkpoints' / str(step)
  if how == 'empty':
    shutil.rmtree(folder)
    folder.mkdir()
  else:
    for path in [folder / how, *(folder / how).rglob('*')]:
      if path.is_file():
        path.write_bytes(b'')


@pytest.mark.parametrize('how', ['state', 'run.json', 'seal.json', 'empty'])
def test_a_damaged_newest_step_is_named_and_the_one_before_is_used(texts, unbroken, copy, how, capsys):
  damage(copy, 6, how)
  reader = Checkpoints(copy, read_only=True)
  assert reader.newest(reader.read_meta)[0] == 3
  assert not (copy / 'quarantine').exists() and (copy / 'checkpoints' / '6').exists()  # reading moves nothing
  training.train(run_config(texts), copy)
  assert losses(copy) == losses(unbroken)
  out = capsys.readouterr().out
  assert 'checkpoint 6 is bad: ' in out and 'goes on from step 3' in out
  assert [p.name.split('-')[0] for p in (copy / 'quarantine').iterdir()] == ['6']


@pytest.mark.parametrize('how', ['state', 'run.json', 'seal.json', 'empty'])
def test_no_good_checkpoint_is_an_error_and_nothing_is_touched(texts, copy, how):
  for step in (3, 6):
    damage(copy, step, how)
  before = sorted(str(p) for p in (copy / 'checkpoints').rglob('*'))
  with pytest.raises(CheckpointError, match=r'none of the steps \[6, 3\]') as e:
    training.train(run_config(texts), copy)
  assert e.value.code == 3
  assert sorted(str(p) for p in (copy / 'checkpoints').rglob('*')) == before


def test_a_folder_with_no_step_in_it_is_not_a_fresh_start(texts, tmp_path):
  (tmp_path / 'checkpoints' / 'backup-of-600').mkdir(parents=True)
  with pytest.raises(CheckpointError, match='backup-of-600'):
    training.train(run_config(texts), tmp_path)


@pytest.mark.parametrize('change', [
    {'model.N': 2}, {'model.rope.base': 500.}, {'model.H': 16}, {'model.norm': 'layer'}, {'optimizer.name': 'muon'},
    {'optimizer.lr': 0.1}, {'seed': 7}, {'batch': 16}, {'length': 64}])
def test_a_checkpoint_of_another_run_names_the_first_field_that_differs(texts, copy, change):
  key, value = next(iter(change.items()))
  before = (copy / 'config.json').read_bytes()
  with pytest.raises(UsageError, match=rf'{key} was .* and is now {value!r}'):
    training.train(run_config(texts, **change), copy)
  assert (copy / 'config.json').read_bytes() == before


def test_other_data_is_refused(texts, copy, tmp_path):
  other = tmp_path / 'texts'
  shutil.copytree(texts, other)
  shutil.rmtree(copy / 'data')
  path = next(other.iterdir())
  path.write_text(path.read_text() + 'changed')
  with pytest.raises(UsageError, match='data.source'):
    training.train(run_config(other), copy)
  shutil.rmtree(copy / 'data')
  original = texts / path.name
  saved = original.read_text()
  try:
    original.write_text(saved + 'changed')
    with pytest.raises(UsageError, match='other tokens'):
      training.train(run_config(texts), copy)
  finally:
    original.write_text(saved)


def test_retention_keeps_the_last_k_and_every_nth(texts, tmp_path):
  training.train(run_config(texts, save_every=2, **{'checkpoint.keep': 2, 'checkpoint.keep_every': 4}), tmp_path)
  assert steps(tmp_path) == [4, 8, 10, 12]


def test_load_finds_the_newest_or_the_step_asked_for(unbroken):
  made = {}

  def abstract(config):
    made['mesh'] = common.mesh_of(1, 2, 2)
    with jax.sharding.use_abstract_mesh(made['mesh'].abstract_mesh):
      return kinds.abstract_params(config.model), made['mesh']
  step, config, tokenizer, params = load(unbroken, abstract)
  assert step == 12 and config.batch == 8 and 'endoftext' in tokenizer
  common.assert_trees_equal(params, state_of(unbroken, 12)['params'])
  assert load(unbroken, abstract, 6)[0] == 6
  with pytest.raises(UsageError, match=r'step=7.*\[3, 6, 9, 12\]'):
    load(unbroken, abstract, 7)


def test_a_run_of_three_devices_and_three_microbatches_is_loaded_on_its_mesh_and_on_others(texts, tmp_path, monkeypatch):
  """Of a step's batch nothing has to fit: rows are what is asked for. What fits no mesh is said of the model, not of a batch."""
  tokens_BL = np.arange(4 * 8).reshape(4, 8)
  with monkeypatch.context() as three:
    three.setattr(jax, 'devices', lambda devices=jax.devices(): devices[:3])
    training.train(run_config(texts, steps=1, batch=9, microbatches=3, **{'model.D': 48, 'mesh.fsdp': 3, 'mesh.tensor': 1}), tmp_path)
    own = lms.load(tmp_path)
    assert own.rows_multiple == 3
    there_BLV = own.logits(tokens_BL)
  np.testing.assert_allclose(there_BLV, lms.load(tmp_path, mesh=MeshConfig(2, 2, 2)).logits(tokens_BL), atol=1e-5)
  with pytest.raises(UsageError, match='^model.G=4: mesh.tensor=8 does not divide it'):
    lms.load(tmp_path, mesh=MeshConfig(1, 1, 8))


def test_what_travels_with_the_state(unbroken, texts):
  meta = Checkpoints(unbroken, read_only=True).read_meta(9)
  assert meta['examples'] == 9 * 8
  assert configs.from_json(json.dumps(meta['config'])) == run_config(texts)
  assert meta['versions']['jax'] == jax.__version__


def test_a_workdir_that_cannot_be_made_is_storage(texts, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(StorageError, match='file'):
    training.train(run_config(texts), tmp_path / 'file' / 'run')


def test_a_loss_that_is_not_finite_stops_the_run_unsaved(texts, tmp_path):
  with pytest.raises(JaxlmError, match='step .* updates in a row were skipped'):
    training.train(run_config(texts, save_every=100, **{'optimizer.lr': 1e30, 'optimizer.clip': 0.,
                                                        'optimizer.warmup': 0}), tmp_path)
  assert steps(tmp_path) == []


def test_held_out_loss_in_training_is_the_mean_over_its_windows(texts, tmp_path):
  c = run_config(texts, eval_every=6, eval_windows=10)
  training.train(c, tmp_path)
  found = {m['step']: m['heldout_loss'] for m in metrics(tmp_path) if 'heldout_loss' in m}
  assert set(found) == {6, 12}
  model = lms.load(tmp_path, mesh=MeshConfig(1, 8, 1))
  from jaxlm.data import examples, packing, windows
  cache = packing.open_cache(c.data, tmp_path / 'data')
  batch = windows.causal(examples.Task(c, cache.tokenizer), cache.streams['heldout'], np.arange(10), np.arange(10))
  with jax.set_mesh(model.mesh):
    args = common.put({k: np.pad(batch[k], ((0, 6), (0, 0))) for k in ('tokens', 'positions', 'segments')})
    logits = np.asarray(kinds.logits(c.model, model.params, args))[:10]
  log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
  nll = -np.take_along_axis(log_p, batch['targets'][..., None], -1)[..., 0]
  np.testing.assert_allclose(found[12], (nll * batch['weights']).sum() / batch['weights'].sum(), rtol=1e-5)
