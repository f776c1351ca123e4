"""launch/slurm.sh under a real Slurm of this machine: submitted, preempted, requeued, killed, it ends as the run of one process.

`make slurm` installs slurm-wlm and munge (Debian) if they are not here, and runs this; it wants root."""
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from jaxlm.checkpoint import steps
from tests import slurm_cluster
from tests.test_hosts import STEPS, alone, assert_same_run, command, lines  # noqa: F401  pylint: disable=unused-import  # fixtures

pytestmark = pytest.mark.skipif('JAXLM_SLURM' not in os.environ, reason='make slurm')


@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
  with slurm_cluster.cluster(tmp_path_factory.mktemp('slurm')) as env:
    yield {**env, 'PYTHON': sys.executable, 'JAX_NUM_CPU_DEVICES': '4', 'BACKOFF': '0.1'}


def tell(text: str) -> None:
  print(f'slurm: {text}', flush=True)


def field(env, job: str, name: str) -> str:
  shown = subprocess.run(['scontrol', 'show', 'job', '--oneliner', job], env=env, capture_output=True, text=True, check=True).stdout
  return next(word.partition('=')[2] for word in shown.split() if word.startswith(f'{name}='))


def until(condition, log, seconds=180):
  end = time.time() + seconds
  while not condition():
    assert time.time() < end, log.read_text()[-3000:] if log.exists() else 'no output'
    time.sleep(0.1)


def last(workdir) -> int:
  found = lines(workdir)
  return found[-1]['step'] if found else 0


def submit(env, log, *words) -> str:
  out = subprocess.run(['launch/slurm.sh', '--ntasks=2', f'--output={log}', '--time=20', '--parsable', '--', *words], env=env,
                       capture_output=True, text=True, check=False)
  assert out.returncode == 0, out.stderr
  return out.stdout.split()[-1]


def test_preempted_requeued_killed_and_finished(slurm, texts, alone, tmp_path):  # noqa: F811
  workdir, log = tmp_path / 'run', tmp_path / 'log'
  job = submit(slurm, log, *command(texts, workdir), '--heartbeat_seconds=10')
  tell(f'job {job} of 2 processes with 4 devices each was submitted')
  until(lambda: last(workdir) >= 4, log)

  subprocess.run(['scancel', '--signal=TERM', job], env=slurm, check=True)
  tell(f'SIGTERM at step {last(workdir)}')
  until(lambda: 'slurm: requeues' in log.read_text(), log)
  saved = max(steps(workdir))
  tell(f'saved step {saved}, the job requeues itself')
  assert 4 <= saved < 10
  until(lambda: field(slurm, job, 'Restarts') == '1' and last(workdir) > saved + 1, log, 300)
  assert f'goes on from step {saved}' in log.read_text()
  assert json.loads((workdir / f'restart-{job}.json').read_text()) == {'step': saved, 'starts': 1}
  tell(f'it goes on from step {saved}')

  until(lambda: last(workdir) >= 12, log)
  subprocess.run(['scancel', '--signal=KILL', f'{job}.0'], env=slurm, check=True)
  tell(f'SIGKILL to its processes at step {last(workdir)}')
  until(lambda: field(slurm, job, 'JobState') == 'COMPLETED', log, 300)
  assert 'goes on from step 10' in log.read_text() and field(slurm, job, 'Restarts') == '1', 'started again in the same job'
  assert not (workdir / f'restart-{job}.json').exists()
  assert_same_run(workdir, alone)
  tell(f'it went on in the same job, and ended at step {STEPS} with the losses of one process')


def test_an_elastic_run_goes_on_without_a_process(slurm, texts, alone, tmp_path):  # noqa: F811
  workdir, log = tmp_path / 'run', tmp_path / 'log'
  job = submit(slurm, log, *command(texts, workdir), '--config.mesh.fsdp=-1', '--heartbeat_seconds=10', '--elastic')
  until(lambda: last(workdir) >= 12, log)
  victim = subprocess.run(['pgrep', '--full', f'jaxlm train.*--workdir={workdir}'], capture_output=True, text=True, check=True).stdout.split()
  victim = next(int(pid) for pid in victim if b'SLURM_PROCID=1\0' in pathlib.Path(f'/proc/{pid}/environ').read_bytes())
  os.kill(victim, signal.SIGKILL)
  tell(f'SIGKILL to process 1 of 2 of an elastic run at step {last(workdir)}')
  until(lambda: field(slurm, job, 'JobState') == 'COMPLETED', log, 300)
  assert 'process 1 of 2 is lost; 1 go on, from the newest checkpoint' in log.read_text()
  assert log.read_text().count(f'trained to step {STEPS}') == 1
  assert_same_run(workdir, alone)
  tell(f'process 0 went on alone, and ended at step {STEPS} with the losses of one process')


def test_a_config_that_is_wrong_is_not_started_again_and_a_cancelled_job_is_not_requeued(slurm, texts, tmp_path):  # noqa: F811
  log = tmp_path / 'log'
  job = submit(slurm, log, *command(texts, tmp_path / 'wrong'), '--config.no_such_key=1')
  until(lambda: field(slurm, job, 'JobState') == 'FAILED', log)
  assert field(slurm, job, 'ExitCode') == '2:0' and field(slurm, job, 'Restarts') == '0' and 'starts again' not in log.read_text()
  tell(f'job {job} with a wrong key: FAILED with exit code 2, after one start')

  log = tmp_path / 'log2'
  job = submit(slurm, log, *command(texts, tmp_path / 'run'))
  until(lambda: last(tmp_path / 'run') >= 2, log)
  subprocess.run(['scancel', job], env=slurm, check=True)
  until(lambda: field(slurm, job, 'JobState') == 'CANCELLED', log)
  until(lambda: subprocess.run(['squeue', '--noheader'], env=slurm, capture_output=True, check=True).stdout == b'', log)
  time.sleep(2)
  assert field(slurm, job, 'JobState') == 'CANCELLED' and field(slurm, job, 'Restarts') == '0'
  tell(f'job {job} was cancelled, and stays so')
