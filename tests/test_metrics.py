"""What people see of a run first: its lines and their rates."""
import dataclasses
import io
import json
from inspect import signature

import numpy as np
import pytest
from rich.console import Console

from jaxlm import evaluate, metrics, report, train as training
from jaxlm.data import inspect, mixture
from jaxlm.errors import UsageError
from tests import common

SUMS = {name: np.float64(2.) for name in ('loss', 'nll', 'tokens', 'grad_norm', 'param_norm', 'learning_rate')}


@pytest.fixture(params=[False, True], ids=['piped', 'terminal'])
def console(request, monkeypatch):
  """What is printed, on a terminal (with its progress bar) and without one."""
  out = io.StringIO()
  monkeypatch.setattr(metrics, 'console', Console(file=out, force_terminal=request.param, highlight=False, soft_wrap=True, color_system=None))
  return out


def logged(tmp_path, monkeypatch, config, *made):
  """Lines of metrics.jsonl of steps that were done at these seconds; the first began at 0."""
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: 0.)
  log = metrics.Log(tmp_path, config, 100, 0)
  for step, at in enumerate(made, 1):
    log.add(step, SUMS, '', at)
  log.write(len(made), {'heldout_loss': 2.25, 'heldout_loss/spell': 1.5})
  log.close()
  return [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines() if '"loss"' in line]


def test_each_line_has_the_time_of_its_own_steps(console, tmp_path, monkeypatch):
  """Of the last, however soon after the line before it was written."""
  del console
  c = common.config(steps=5, log_every=2)
  lines = logged(tmp_path, monkeypatch, c, 3., 4., 6., 10., 10.5)
  assert [line['step_seconds'] for line in lines] == [2., 3., .5]
  assert [line['tokens_per_second'] for line in lines] == [c.batch * c.length / seconds for seconds in (2., 3., .5)]


def test_every_line_stays_and_held_out_losses_are_among_them(console, tmp_path, monkeypatch):
  logged(tmp_path, monkeypatch, common.config(steps=5, log_every=2), 3., 4., 6., 10., 10.5)
  said = console.getvalue()
  for text in ('step      2/5  loss 1.0000', 'step      4/5  loss 1.0000', 'step      5/5  loss 1.0000',
               'step      5/5  held-out loss 2.2500  spell 1.5000'):
    assert said.count(text) == 1


def test_rates_of_a_run_are_those_of_its_clock(tmp_path, monkeypatch):
  """Where a device runs a step while it is dispatched, as CPUs may, the line of one step does not have the next one's time."""
  texts = tmp_path / 'texts'
  texts.mkdir()
  for n in range(8):
    (texts / f'{n}.txt').write_text(f'{n} and so on, ' * 90)
  c = common.config(**{'data.source': f'text:{texts}/*.txt', 'steps': 4, 'log_every': 1, 'mesh.fsdp': 8, 'data.heldout': 0.})
  made = []
  add = metrics.Log.add
  monkeypatch.setattr(metrics.Log, 'add', lambda self, step, sums, data, at: (made.append(at), add(self, step, sums, data, at)))
  training.train(c, tmp_path / 'run')
  lines = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
  assert made == sorted(made)
  np.testing.assert_allclose([line['step_seconds'] for line in lines[1:-1]], np.diff(made)[:-1], atol=1e-6)  # the last has a save before it


def test_what_a_run_trains_on_is_asked_for_before_anything_is_done(tmp_path):
  with pytest.raises(UsageError, match='^data.source: the config does not say what to train on; set --config.data.source=text:GLOB'):
    training.train(common.config(**{'data.source': ''}), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
  with pytest.raises(UsageError, match='^tasks.a.data.source: .* set --config.tasks.a.data.source='):
    training.train(common.config(**{'tasks.a.weight': 1., 'tasks.b.weight': 1., 'tasks.b.data.source': 'stdlib', 'tasks.a.data.source': ''}), tmp_path)
  with pytest.raises(UsageError, match='^--data=heldout: the config of the run has no data.source'):
    evaluate.resolve('heldout', common.config(**{'data.source': ''}))


def test_text_that_is_seen_too_often_is_warned_of(tmp_path):
  """From five epochs on; of a mixture by its tasks."""
  (tmp_path / 'a.txt').write_text('some text, ' * 400)
  c = common.config(**{'data.source': f'text:{tmp_path}/*.txt', 'data.heldout': 0., 'data.tokenizer': 'bytes', 'steps': 1})
  made = mixture.make(c, mixture.prepare(c, tmp_path / 'run'))
  often = lambda steps: dataclasses.replace(made, config=dataclasses.replace(c, steps=steps)).repeats()
  an_epoch = made.windows / c.batch
  assert not often(int(4 * an_epoch)) and often(int(5 * an_epoch)).startswith('each document is seen 5 times')


@pytest.mark.parametrize('console', [False], indirect=True, ids=['piped'])
def test_long_work_shows_progress_where_no_bar_can_be_drawn(console, monkeypatch):
  monkeypatch.setattr(report, 'console', metrics.console)
  clock = iter((0., 4., 12., 13., 25., 40.))
  monkeypatch.setattr(report.time, 'monotonic', lambda: next(clock))
  with report.progress('scoring', 100) as tick:
    for _ in range(5):
      tick(20)
  assert console.getvalue().splitlines() == ['scoring 40%, 18 s left', 'scoring 80%, 6 s left']


def test_what_nothing_is_held_out_of_has_a_line(tmp_path, capsys, one_device):
  del one_device
  for n in range(3):
    (tmp_path / f'{n}.txt').write_text('some text, ' * 40)
  inspect.stats(common.config(**{'data.source': f'text:{tmp_path}/*.txt', 'data.heldout': 0.}), tmp_path / 'run', 0)
  assert 'heldout  0 documents  0 bytes  0 tokens  nothing, of data.heldout=0.0' in capsys.readouterr().out


def test_a_process_that_does_not_write_has_a_log_of_the_same_form():
  for name, method in vars(metrics.NoLog).items():
    if not name.startswith('_'):
      assert list(signature(method).parameters) == list(signature(getattr(metrics.Log, name)).parameters)
