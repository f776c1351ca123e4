"""F1 to F4: processes that are killed, or told to end, in every phase; the run ends as if nothing had happened, bit for bit."""
import os
import random
import signal
import time

import pytest

from jaxlm.checkpoint import steps
from tests import matrix
from tests.faults import running

pytestmark = matrix.slow


@pytest.fixture(scope='module')
def unbroken(texts, tmp_path_factory):
  """processes → the workdir of a run that nothing happened to."""
  made = {}
  for processes in (1, 2):
    made[processes] = tmp_path_factory.mktemp(f'unbroken{processes}')
    code, out, _ = running.done(processes, texts, made[processes])
    assert code == 0, out
  return made


def assert_as_unbroken(workdir, other):
  assert running.curve(workdir) == running.curve(other)
  assert running.digests(workdir, running.STEPS) == running.digests(other, running.STEPS)


PHASES = [(phase, victim) for phase in ('train', 'transfer', 'write', 'seal', 'rename', 'restore') for victim in (0, 1)]


@pytest.mark.parametrize('phase, victim', [each for each in PHASES if each != ('seal', 1)])  # the lead alone seals
def test_one_of_two_is_killed(texts, unbroken, tmp_path, phase, victim):
  if phase == 'restore':
    code, out, _ = running.done(2, texts, tmp_path, '--config.steps=20')
    assert code == 0, out
  code, out, seconds = running.done(2, texts, tmp_path, FAULT=f'kill:{phase}', FAULT_PROCESS=victim)
  assert code == 137, out
  before, good = running.last_step(tmp_path), running.visible_and_good(tmp_path)
  code, out, again = running.done(2, texts, tmp_path)
  assert code == 0, out
  assert running.went_on_from(out) == max(good, default=0)
  assert_as_unbroken(tmp_path, unbroken[2])
  lost = before - max(good, default=0)
  assert lost <= running.SAVE_EVERY
  matrix.record('F3' if victim == 0 else 'F1', f'SIGKILL of process {victim} of 2: {phase}', 'the unbroken run, bit for bit', lost=lost,
                detect=seconds, recover=again)


def test_all_are_killed_at_random_times(texts, tmp_path, tmp_path_factory):
  """Fifty starts; every other is killed whatever it is at, the rest a while after it has saved; nothing bad is ever visible."""
  rng, worst, trials = random.Random(0), 0, int(os.environ.get('JAXLM_TRIALS', 50))
  more = ('--config.steps=100000', '--config.save_every=100', '--config.eval_every=0', '--config.log_every=10', '--config.checkpoint.keep=3')
  for trial in range(trials):
    child, before = running.start(1, texts, tmp_path, *more), set(steps(tmp_path))
    if trial % 2:
      running.until(lambda before=before: set(steps(tmp_path)) - before, child)
    time.sleep(rng.uniform(0, 2) if trial % 2 else rng.uniform(1, 7))
    running.kill_all(child)
    child.stdout.close()
    good = running.visible_and_good(tmp_path) if (tmp_path / 'checkpoints').exists() else []
    worst = max(worst, running.last_step(tmp_path) - max(good, default=0))
  end = max(good) + 100
  assert end > 300
  last = (*more[1:], f'--config.steps={end}')
  code, out, again = running.done(1, texts, tmp_path, *last)
  assert code == 0 and running.went_on_from(out) == max(good), out
  whole = tmp_path_factory.mktemp('whole')
  assert running.done(1, texts, whole, *last)[0] == 0
  assert running.curve(tmp_path)[-5:] == running.curve(whole)[-5:]
  assert running.digests(tmp_path, end) == running.digests(whole, end)
  matrix.record('F2', 'SIGKILL of all at random times, a save every 100 steps', '0 bad steps visible; the unbroken run, bit for bit',
                trials, lost=worst, recover=again)


@pytest.mark.parametrize('phase', ['compile', 'train', 'save', 'eval'])
@pytest.mark.parametrize('processes', [1, 2])
def test_told_to_end(texts, unbroken, tmp_path, phase, processes):
  """SIGTERM to the last process; in one of the cases twice."""
  begun = time.monotonic()
  with running.start(processes, texts, tmp_path, FAULT=f'term:{phase}', FAULT_PROCESS=processes - 1, FAULT_SECONDS=.5) as child:
    if phase == 'train' and processes == 1:
      running.until(lambda: running.last_step(tmp_path) > 3, child)
      os.kill(child.pid, signal.SIGTERM)
    code, out = running.ended(child)
  seconds = time.monotonic() - begun
  assert code == 10, out
  good = running.visible_and_good(tmp_path) if (tmp_path / 'checkpoints').exists() else []
  assert running.last_step(tmp_path) == max(good, default=0)  # nothing is lost
  code, out, again = running.done(processes, texts, tmp_path)
  assert code == 0, out
  assert_as_unbroken(tmp_path, unbroken[processes])
  matrix.record('F4', f'SIGTERM to one of {processes}: {phase}', 'exit code 10, saved; the unbroken run, bit for bit', lost=0, detect=seconds,
                recover=again)
