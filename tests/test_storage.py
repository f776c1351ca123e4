"""Disks that are full, read-only or gone; a run that goes on with another config, on other devices, with another batch (F8, F9, F11 – F13)."""
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxlm import checkpoint, train as training
from jaxlm.checkpoint import Checkpoints, steps
from jaxlm.data import pipeline
from jaxlm.errors import StorageError, UsageError
from tests import matrix
from tests.test_checkpoint import losses, metrics, run_config

ENV = {**os.environ, 'XLA_FLAGS': '', 'JAX_NUM_CPU_DEVICES': '1'}
# `jaxlm` that does not look for room before it saves.
BLIND = '''
import sys
from jaxlm import cli
from jaxlm.checkpoint import Checkpoints
Checkpoints._has_room = lambda self, step, state: True
sys.argv = ['jaxlm', *sys.argv[1:]]
cli.main()
'''


def on_disk(size, texts, folder, *more, script=None, then='true', options='rw'):
  """(exit code, stderr, stdout, seconds) of a run whose workdir is a file system of its own, of `size`; what it left is copied out."""
  disk, left = folder / 'disk', folder / 'left'
  disk.mkdir()
  words = [sys.executable, *(['-c', script] if script else ['-m', 'jaxlm']), 'train', f'--config=tests/configs/tiny.py:{texts}/*.txt',
           f'--workdir={disk}/run', f'--config.data.cache={folder}/data', '--config.steps=200', '--config.save_every=10',
           '--config.checkpoint.keep=100', *more]
  inside = (f'mount -t tmpfs -o size={size} none {disk} && mkdir {disk}/run && mount -o remount,{options},size={size} {disk} || exit 99; '
            f'"$@"; code=$?; {then}; cp -r {disk}/run {left}; exit $code')
  begun = time.monotonic()
  out = subprocess.run(['unshare', '--user', '--map-root-user', '--mount', 'sh', '-c', inside, 'sh', *words], env=ENV, capture_output=True,
                       text=True, check=False, timeout=300)
  assert out.returncode != 99, out.stderr
  return out.returncode, out.stderr, out.stdout, time.monotonic() - begun


def all_good(workdir):
  """Its steps, all of which are good, and no trace of a save that failed."""
  found = Checkpoints(workdir, read_only=True)
  for step in found.found:
    found.read_meta(step)
  found.close()
  assert not [p.name for p in (workdir / 'checkpoints').iterdir() if not p.name.isdecimal() and p.name != checkpoint.NEWEST]
  return found.found


@pytest.mark.parametrize('how', ['seen before', 'met while saving'])
def test_a_disk_that_fills_up_ends_the_run_by_name_and_tears_nothing(texts, tmp_path, how):
  more = ('--config.model.V=4096',) if how == 'seen before' else ()  # a state that is large beside the rest of a step
  code, err, _, _ = on_disk('8m' if more else '1m', texts, tmp_path, *more, script=None if more else BLIND)
  assert code == 13, err
  assert ('has room for' if more else 'cannot be written (the disk is full)') in err.splitlines()[-1]
  kept = all_good(tmp_path / 'left')
  assert kept and kept[-1] < 200 and f'checkpoint {kept[-1] + 10}: ' in err
  matrix.record('F8', how, 'exit code 13 at the save or a step later, older steps good', lost=10)


@matrix.slow
def test_a_run_may_go_on_unsaved(texts, tmp_path):
  code, err, out, _ = on_disk('1m', texts, tmp_path, '--config.checkpoint.when_full=skip', script=BLIND)
  assert code == 13 and 'trained to step 200, and there was no room to save it' in err, err
  assert 'cannot be written' in out and 'not saved' in out and 'step    200/200' in out
  assert all_good(tmp_path / 'left')[-1] < 200
  matrix.record('F8', 'checkpoint.when_full=skip', 'trains on, and says so')


def test_a_disk_that_cannot_be_written_is_found_before_anything_else(texts, tmp_path):
  code, err, out, seconds = on_disk('8m', texts, tmp_path, options='ro')
  assert code == 13 and 'cannot be written' in err and 'Read-only' in err and 'data:' not in out
  matrix.record('F9', 'read-only', 'exit code 13 before the data and the compiler', detect=seconds)


def test_a_workdir_that_vanishes(texts, tmp_path, monkeypatch):
  monkeypatch.setattr('jaxlm.storage.FIRST_WAIT', .01)
  rows = pipeline.Pipeline.rows

  def gone(self, step, start, stop):
    if step == 4:
      (tmp_path / 'run').rename(tmp_path / 'gone')
    return rows(self, step, start, stop)
  monkeypatch.setattr(pipeline.Pipeline, 'rows', gone)
  with pytest.raises(StorageError, match='was the workdir moved|cannot be written') as e:
    training.train(run_config(texts), tmp_path / 'run')
  assert e.value.code == 13
  matrix.record('F9', 'the workdir vanishes', 'exit code 13 at the next save', lost=3)


def test_a_bad_writer_is_told_at_the_next_step_not_at_the_next_save(texts, tmp_path, monkeypatch):
  def torn(*args):
    raise OSError(5, 'Input/output error')
  monkeypatch.setattr('jaxlm.checkpoint.write_sealed', torn)
  with pytest.raises(StorageError, match='checkpoint 2: cannot be written .*Input/output error'):
    training.train(run_config(texts, save_every=2, steps=400, **{'optimizer.schedule': 'constant'}), tmp_path)
  assert steps(tmp_path) == [] and metrics(tmp_path)[-1]['step'] < 100
  matrix.record('F10', 'a save that errs in the background', 'exit code 13, a few steps later', lost=2)


@pytest.fixture(scope='module')
def run(texts, tmp_path_factory):
  """Stopped at step 6 of 12."""
  workdir = tmp_path_factory.mktemp('changed')
  training.train(run_config(texts, steps=6, **{'optimizer.schedule': 'constant'}), workdir)
  return workdir


CHANGES = {'model.D': 64, 'model.F': 128, 'model.N': 2, 'model.dtype': 'bfloat16', 'model.H': 16, 'model.K': 16, 'model.rope.base': 500.,
           'model.V': 280, 'model.mlp': 'gelu', 'optimizer.b2': 0.9, 'optimizer.lr': 0.1, 'optimizer.name': 'muon', 'seed': 7,
           'batch': 16, 'length': 64}


def test_a_foreign_config_is_refused_by_its_first_field(texts, run):
  for key, value in CHANGES.items():
    with pytest.raises(UsageError, match=rf'{key} was .* and is now {value!r}.*--allow_change={key}') as e:
      training.train(run_config(texts, **{'optimizer.schedule': 'constant', key: value}), run)
    assert e.value.code == 2
  assert steps(run) == [3, 6]
  matrix.record('F11', ', '.join(CHANGES), 'refused by field, exit code 2', trials=len(CHANGES))


def test_a_change_that_is_allowed_is_taken_and_one_of_shapes_is_refused_by_array(texts, run, tmp_path):
  shutil.copytree(run, tmp_path / 'run')
  changed = run_config(texts, **{'optimizer.schedule': 'constant', 'optimizer.lr': 0.001})
  training.train(changed, tmp_path / 'run', allow=('optimizer.lr',))
  assert steps(tmp_path / 'run') == [3, 6, 9, 12] and metrics(tmp_path / 'run')[-1]['learning_rate'] == pytest.approx(0.001)
  with pytest.raises(UsageError, match=r'checkpoint 12: opt/.*/w is float32 \[3, 64, 32\], and here float32 \[3, 128, 32\]'):
    training.train(run_config(texts, steps=20, **{'optimizer.schedule': 'constant', 'optimizer.lr': 0.001, 'model.F': 128}), tmp_path / 'run',
                   allow=('model.F',))
  matrix.record('F11', '--allow_change', 'taken; of other shapes, refused by array')


def read_by(monkeypatch):
  """Numbers of the examples that are made from here on."""
  seen, examples = [], pipeline.Pipeline.examples

  def noted(self, numbers):
    seen.extend(numbers.tolist())
    return examples(self, numbers)
  monkeypatch.setattr(pipeline.Pipeline, 'examples', noted)
  return seen


def test_another_batch_goes_on_at_the_very_example(texts, run, tmp_path, monkeypatch):
  """6 steps of 8, then of 16, then of 4, over the end of an epoch: each example once."""
  shutil.copytree(run, tmp_path / 'run')
  seen, at = read_by(monkeypatch), 48
  for batch, end in ((16, 9), (4, 12), (8, 15)):
    del seen[:]
    changed = run_config(texts, steps=end, batch=batch, **{'optimizer.schedule': 'constant', 'mesh.data': 2, 'mesh.fsdp': 2, 'eval_every': 0})
    training.train(changed, tmp_path / 'run', allow=('batch',))
    taken = [n for n in seen if n < at + 3 * batch]
    assert sorted(taken) == list(range(at, at + 3 * batch))
    at += 3 * batch
    checkpoints = Checkpoints(tmp_path / 'run', read_only=True)
    assert checkpoints.read_meta(end)['examples'] == at
  matrix.record('F13', 'batch 8 → 16 → 4 → 8', 'the examples are those that follow, each once', trials=3)


@matrix.slow
def test_other_devices_see_the_same_data(texts, tmp_path):
  """8 → 4 → 1 devices: the hash of all data seen is the unbroken run's at each step, and so are, nearly, the losses."""
  c = {'optimizer.schedule': 'constant', 'length': 512, 'steps': 12}  # an epoch is 63 windows: it ends in step 8
  training.train(run_config(texts, **c), tmp_path / 'whole')
  for end, sizes in ((4, (1, 4, 2)), (8, (2, 2, 1)), (12, (1, 1, 1))):
    mesh = dict(zip(('mesh.data', 'mesh.fsdp', 'mesh.tensor'), sizes))
    env = {**os.environ, 'JAX_NUM_CPU_DEVICES': str(np.prod(sizes))}
    config = run_config(texts, **{**c, 'steps': end, **mesh})
    file = tmp_path / f'{end}.json'
    from jaxlm import config as configs  # pylint: disable=g-import-not-at-top
    file.write_text(configs.to_json(config))
    out = subprocess.run([sys.executable, '-m', 'jaxlm', 'train', f'--config={file}', f'--workdir={tmp_path}/parts'], env=env,
                         capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
  whole, parts = ([json.loads(line) for line in (tmp_path / name / 'metrics.jsonl').read_text().splitlines()] for name in ('whole', 'parts'))
  assert [m['data'] for m in parts] == [m['data'] for m in whole] and len(set(m['data'] for m in whole)) == 12
  np.testing.assert_allclose([l[1] for l in losses(tmp_path / 'parts')], [l[1] for l in losses(tmp_path / 'whole')], rtol=1e-5)
  matrix.record('F12', '8 → 4 → 1 devices, over the end of an epoch', 'the same data, losses within 1e-5', trials=3)
