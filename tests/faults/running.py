"""Runs of several processes or one, to which things happen, and the run that nothing happened to."""
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from jaxlm import seal
from jaxlm.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
HEARTBEAT = 8
SAVE_EVERY, STEPS = 10, 30
KEEP = 100


def environment(devices: int, **more) -> dict:
  return {**os.environ, 'XLA_FLAGS': '', 'PYTHONPATH': str(ROOT), **{k: str(v) for k, v in {'JAX_NUM_CPU_DEVICES': devices, **more}.items()}}


def words(texts, workdir, *more) -> list[str]:
  return ['train', f'--config=tests/configs/tiny.py:{texts}/*.txt', f'--workdir={workdir}', f'--config.steps={STEPS}',
          f'--config.save_every={SAVE_EVERY}', '--config.eval_every=12', '--config.optimizer.schedule=constant', '--config.mesh.fsdp=2', '--config.mesh.tensor=2', '--config.model.G=2',
          f'--config.checkpoint.keep={KEEP}', *more]


def command(processes: int, texts, workdir, *more) -> list[str]:
  worker = [sys.executable, '-m', 'tests.faults.worker', *words(texts, workdir, *more)]
  if processes == 1:
    return worker
  return [sys.executable, 'launch/restart.py', f'--processes={processes}', '--once', '--grace=20', '--', *worker, f'--heartbeat_seconds={HEARTBEAT}']


def start(processes: int, texts, workdir, *more, **env) -> subprocess.Popen:
  return subprocess.Popen(command(processes, texts, workdir, *more), env=environment(4 // processes, **env), cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def ended(child: subprocess.Popen, seconds: float = 180) -> tuple[int, str]:
  """(exit code, output); whatever is left of the job is killed."""
  try:
    out, _ = child.communicate(timeout=seconds)
  finally:
    kill_all(child)
  return child.returncode, out


def kill_all(child: subprocess.Popen) -> None:
  try:
    os.killpg(child.pid, signal.SIGKILL)
  except ProcessLookupError:
    pass
  child.wait()


def done(processes: int, texts, workdir, *more, **env) -> tuple[int, str, float]:
  """(exit code, output, seconds) of a run."""
  begun = time.monotonic()
  code, out = ended(start(processes, texts, workdir, *more, **env))
  return code, out, time.monotonic() - begun


def lines(workdir) -> list[dict]:
  path = workdir / 'metrics.jsonl'
  found = []
  for text in path.read_text(encoding='utf-8').splitlines() if path.exists() else ():
    try:
      found.append(json.loads(text))
    except ValueError:  # cut short by a kill
      continue
  return found


def curve(workdir) -> list[tuple]:
  """Of each step what must be the same, bit for bit."""
  return [(l['step'], l['loss'], l['grad_norm'], l['data']) if 'loss' in l else (l['step'], l['heldout_loss']) for l in lines(workdir)]


def last_step(workdir) -> int:
  return max((l['step'] for l in lines(workdir)), default=0)


def digests(workdir, step: int) -> dict:
  """Of a good step, those of all arrays."""
  return seal.read(workdir / 'checkpoints' / str(step), step)['arrays']


def good_steps(workdir) -> list[int]:
  """Steps that are good, of those that are visible."""
  checkpoints, found = Checkpoints(workdir, read_only=True), []
  for step in checkpoints.found:
    try:
      checkpoints.sealed(step)
      found.append(step)
    except seal.Damaged:
      continue
  checkpoints.close()
  return found


def visible_and_good(workdir) -> list[int]:
  """Steps that are visible; all must be good."""
  checkpoints = Checkpoints(workdir, read_only=True)
  for step in checkpoints.found:
    checkpoints.sealed(step)
  checkpoints.close()
  return checkpoints.found


def until(condition, child: subprocess.Popen, seconds: float = 120) -> None:
  end = time.monotonic() + seconds
  while not condition():
    assert child.poll() is None and time.monotonic() < end, child.communicate()[0]
    time.sleep(.01)


def went_on_from(out: str) -> int:
  """The step that a run said it goes on from."""
  return int(out.split('goes on from step ')[1].split()[0]) if 'goes on from step ' in out else 0
