"""F18: of several processes one is lost, and the others go on on a smaller mesh."""
import os
import pathlib
import signal
import time

import pytest

from tests import matrix
from tests.faults import running
from tests.test_hosts import pid_of

pytestmark = matrix.slow
RUN = ('--config.model.D=48', '--config.batch=12', '--config.mesh.fsdp=-1', '--config.mesh.tensor=1', '--config.eval_every=0',
       '--config.optimizer.lr=1e-3')  # at which rounding does not grow
LONG = (*RUN, '--config.steps=240', '--config.save_every=20')


@pytest.fixture(scope='module')
def unbroken(texts, tmp_path_factory):
  """Runs of one process with four devices, long and short."""
  workdir = tmp_path_factory.mktemp('unbroken')
  for name, more in (('long', LONG), ('short', RUN)):
    code, out, _ = running.done(1, texts, workdir / name, *more)
    assert code == 0, out
  return workdir


def assert_same(workdir, other):
  """The same data, exactly, and the same losses but for what the mesh rounds."""
  found, wanted = running.curve(workdir), running.curve(other)
  assert [(step, data) for step, _, _, data in found] == [(step, data) for step, _, _, data in wanted]
  assert [loss for _, loss, _, _ in found] == pytest.approx([loss for _, loss, _, _ in wanted], rel=1e-4)


def begun_anew(pid: int) -> int:
  """How often a process has replaced itself."""
  return pathlib.Path(f'/proc/{pid}/cmdline').read_text(encoding='utf-8').count('--coordinator') - 1


def test_three_then_two_then_one(texts, unbroken, tmp_path):
  """Process 2 is killed, and later process 1; the launcher sees the processes that it started, and does nothing."""
  lost, seen, again = 0, 0., 0.
  with running.start(3, texts, tmp_path, *LONG, '--elastic', JAX_NUM_CPU_DEVICES=1) as child:
    running.until(lambda: running.last_step(tmp_path), child)
    pids = [pid_of(child.pid, n) for n in range(3)]
    for n, victim in enumerate((2, 1)):
      at = running.last_step(tmp_path) + 50
      running.until(lambda at=at: running.last_step(tmp_path) >= at, child)
      os.kill(pids[victim], signal.SIGKILL)
      killed, at = time.monotonic(), running.last_step(tmp_path)
      running.until(lambda n=n: begun_anew(pids[0]) > n, child)
      seen = max(seen, time.monotonic() - killed)
      lost = max(lost, at - max(running.good_steps(tmp_path)))
      running.until(lambda at=at: running.last_step(tmp_path) > at + 1, child)
      again = max(again, time.monotonic() - killed - seen)
    code, out = running.ended(child)
  assert code == 0 and lost <= 40, out
  assert 'process 2 of 3 is lost; 2 go on, from the newest checkpoint' in out
  assert 'process 1 of 2 is lost; 1 go on, from the newest checkpoint' in out
  assert out.count('starts at step 0') == 1 and out.count('goes on from step') == 2
  assert_same(tmp_path, unbroken / 'long')
  matrix.record('F18', 'a process is lost: 3 → 2 → 1 on a smaller mesh', 'the survivors go on; the same data, losses within rounding', 2,
                lost=lost, detect=seen, recover=again)


@pytest.mark.parametrize('phase', ['transfer', 'write', 'rename', 'restore'])
def test_lost_in_a_phase(texts, unbroken, tmp_path, phase):
  if phase == 'restore':
    code, out, _ = running.done(3, texts, tmp_path, *RUN, '--config.steps=20', JAX_NUM_CPU_DEVICES=1)
    assert code == 0, out
  code, out, seconds = running.done(3, texts, tmp_path, *RUN, '--elastic', JAX_NUM_CPU_DEVICES=1, FAULT=f'kill:{phase}', FAULT_PROCESS=2)
  assert code == 0 and 'process 2 of 3 is lost; 2 go on' in out, out
  running.visible_and_good(tmp_path)
  assert_same(tmp_path, unbroken / 'short')
  matrix.record('F18', f'one of three is lost: {phase}', 'the survivors go on; the same data', recover=seconds)


def test_those_that_a_mesh_cannot_use_end(texts, unbroken, tmp_path):
  """Three of four are left, and rows and widths want a divisor of four of them."""
  more = (*RUN, '--config.model.D=32', '--config.batch=8', '--elastic')
  code, out, _ = running.done(4, texts, tmp_path, *more, JAX_NUM_CPU_DEVICES=1, FAULT='kill:train', FAULT_PROCESS=1)
  assert code == 0 and 'process 1 of 4 is lost; 2 go on' in out and 'process 3 is not needed' in out, out
  assert running.last_step(tmp_path) == running.STEPS


def test_where_fewer_do_not_fit_all_end(texts, tmp_path):
  more = (*RUN, '--config.mesh.fsdp=2', '--elastic')
  code, out, _ = running.done(2, texts, tmp_path, *more, JAX_NUM_CPU_DEVICES=1, FAULT='kill:train', FAULT_PROCESS=1)
  assert code == 11 and 'no mesh and batch of this config fit fewer' in out, out


@pytest.mark.parametrize('victim', [0, 2])
def test_told_to_end(texts, unbroken, tmp_path, victim):
  """An elastic run is preempted as any other."""
  how = {'JAX_NUM_CPU_DEVICES': 1}
  code, out, _ = running.done(3, texts, tmp_path, *RUN, '--elastic', **how, FAULT='term:train', FAULT_PROCESS=victim)
  assert code == 10 and running.visible_and_good(tmp_path) == [running.last_step(tmp_path)], out
  code, out, _ = running.done(3, texts, tmp_path, *RUN, '--elastic', **how)
  assert code == 0, out
  assert_same(tmp_path, unbroken / 'short')


def test_process_0_takes_all_with_it(texts, tmp_path):
  code, out, _ = running.done(3, texts, tmp_path, *RUN, '--elastic', JAX_NUM_CPU_DEVICES=1, FAULT='kill:train', FAULT_PROCESS=0)
  assert code == 137, out
