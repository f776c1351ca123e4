"""More steps than a schedule was made for; runs that branch off another; what is kept before a decay; a config that only checkpoints have."""
import json
import shutil

import pytest

from jaxlm import cli, config as configs, lm as lms, train as training
from jaxlm.checkpoint import steps as saved_steps
from jaxlm.errors import UsageError
from jaxlm.optimizer import decay_begins
from tests import common

WSD = {'steps': 4, 'save_every': 1, 'log_every': 1, 'optimizer.schedule': 'wsd', 'optimizer.decay': .5, 'optimizer.warmup': 1, 'mesh.fsdp': 8}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('texts')
  for n in range(8):
    (folder / f'{n}.txt').write_text(f'{n} and so on, ' * 90)
  return {'data.source': f'text:{folder}/*.txt', 'data.heldout': 0., 'data.tokenizer': 'bytes', 'checkpoint.keep': 9}


@pytest.fixture(scope='module')
def decayed(data, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('decayed')
  training.train(common.config(**WSD, **data), workdir)
  return workdir


def losses(workdir):
  return [(line['step'], line['loss'], line['data']) for line in map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())]


def test_a_rate_that_would_rise_is_refused_and_may_be_allowed(data, decayed, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(decayed, workdir)
  longer = common.config(**{**WSD, **data, 'steps': 8})
  with pytest.raises(UsageError, match=r'^steps was 4 and is now 8: the learning rate of checkpoint 4, .* would rise to .*--allow_change=steps'
                     r'.*--from=.*/run --from_step=N$'):
    training.train(longer, workdir)
  training.train(longer, workdir, ('steps',))
  assert max(saved_steps(workdir)) == 8


@pytest.mark.parametrize('changes', [{'optimizer.schedule': 'constant'}, {'optimizer.schedule': 'inverse_sqrt'}], ids=str)
def test_level_schedules_take_more_steps(data, tmp_path, changes):
  for steps in (1, 2):
    training.train(common.config(**{**WSD, **data, **changes, 'steps': steps}), tmp_path)
  assert max(saved_steps(tmp_path)) == 2


def test_fewer_steps_lower_the_rate_and_are_taken(data, decayed, tmp_path):
  shutil.copytree(decayed, tmp_path / 'run')
  for step in (3, 4):
    shutil.rmtree(tmp_path / f'run/checkpoints/{step}')
  (tmp_path / 'run/checkpoints/.newest').write_text('2')
  training.train(common.config(**{**WSD, **data, 'steps': 3}), tmp_path / 'run')
  assert max(saved_steps(tmp_path / 'run')) == 3


def test_a_branch_before_the_decay_is_the_longer_run_bit_for_bit(data, decayed, tmp_path):
  longer = common.config(**{**WSD, **data, 'steps': 8})
  training.train(longer, tmp_path / 'unbroken')
  training.train(longer, tmp_path / 'branch', branch=training.Branch(decayed, decay_begins(longer.optimizer, 4)))
  assert losses(tmp_path / 'branch') == losses(tmp_path / 'unbroken')[2:]
  common.assert_trees_equal(*(lms.load(tmp_path / name).params for name in ('branch', 'unbroken')))
  assert max(saved_steps(decayed)) == 4  # which was only read


@pytest.mark.parametrize('step, says', [(7, r'--from=.*: has the steps \[1, 2, 3, 4\]; set --from_step to one of them'), (None, 'steps was 4 and is now 8')])
def test_a_branch_that_cannot_be_is_refused(data, decayed, tmp_path, step, says):
  with pytest.raises(UsageError, match=says):
    training.train(common.config(**{**WSD, **data, 'steps': 8}), tmp_path, branch=training.Branch(decayed, step))


def test_the_last_step_before_a_decay_is_kept(data, tmp_path):
  training.train(common.config(**{**WSD, **data, 'steps': 6, 'checkpoint.keep': 1}), tmp_path)
  assert saved_steps(tmp_path) == [3, 6]


def test_where_only_checkpoints_are_left_the_newest_says_what_the_config_was(decayed, tmp_path, monkeypatch):
  shutil.copytree(decayed / 'checkpoints', tmp_path / 'run/checkpoints')
  found = configs.of_run(tmp_path / 'run')
  assert found.endswith('checkpoints/4/run.json') and configs.load(found) == configs.load(configs.of_run(decayed))
  seen = []
  monkeypatch.setattr(training, 'train', lambda config, *args: seen.append((config.steps, args)))
  monkeypatch.setattr(cli, 'restart_with_kept_memory', lambda *args: None)
  cli.run(['train', f'--workdir={tmp_path}/run'])
  cli.run(['train', f'--workdir={tmp_path}/new', f'--from={tmp_path}/run', '--from_step=2', '--config.steps=8'])
  assert [steps for steps, _ in seen] == [4, 8] and seen[1][1][-1] == training.Branch(tmp_path / 'run', 2)


@pytest.mark.parametrize('flags, says', [(['--from_step=2'], '--from_step=2: of which run'), (['--from=x', '--from_step=0'], '--from_step=0: wants a step that was saved'), (['--from={workdir}'], 'is the --workdir itself')])
def test_flags_of_a_branch_that_do_not_fit(decayed, flags, says):
  with pytest.raises(UsageError, match=says):
    cli.run(['train', f'--workdir={decayed}', *(flag.format(workdir=decayed) for flag in flags)])
