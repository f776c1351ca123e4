"""Two processes skip, go back, find the bad device and end a hang as one."""
import json
import os
import socket
import subprocess
import sys

import pytest

from jaxlm.checkpoint import Checkpoints
from tests import matrix

pytestmark = matrix.slow

ENV = {**os.environ, 'JAX_NUM_CPU_DEVICES': '4', 'PYTHONPATH': '.'}


def port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def run(what, texts, workdir, *more, processes=2, seconds=150):
  """[(exit code, stdout, stderr) of each process]."""
  words = [sys.executable, '-m', 'tests.watch_worker', what, 'train', f'--config=tests/configs/tiny.py:{texts}/*.txt',
           f'--workdir={workdir}', '--config.steps=12', '--config.save_every=3', '--config.guard.patience=3',
           '--config.optimizer.schedule=constant', *more]
  where = [f'--coordinator=127.0.0.1:{port()}', f'--processes={processes}'] if processes > 1 else ['--processes=1']
  env = {**ENV, 'JAX_NUM_CPU_DEVICES': str(8 // processes)}
  children = [subprocess.Popen([*words, *where, f'--process={n}', '--heartbeat_seconds=8'], env=env, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True) for n in range(processes)]
  try:
    said = [child.communicate(timeout=seconds) for child in children]
  finally:
    for child in children:
      child.kill()
  return [(child.returncode, *each) for child, each in zip(children, said)]


def lines(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


MESH = ('--config.mesh.data=8', '--config.mesh.fsdp=1')


def test_they_skip_and_go_back_together(texts, tmp_path):
  for name, processes in (('one', 1), ('two', 2)):
    for code, _, err in run('poisoned', texts, tmp_path / name, *MESH, '--config.guard.spike=20', '--config.guard.window=8',
                            processes=processes):
      assert code == 0, err
  one, two = ([(l['step'], l['loss']) for l in lines(tmp_path / name) if 'loss' in l] for name in ('one', 'two'))
  assert [step for step, _ in two] == list(range(1, 13))
  assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-5)
  assert [(l['step'], l['jumped']) for l in lines(tmp_path / 'two') if 'jumped' in l] == [(7, 4)]
  meta = Checkpoints(tmp_path / 'two', read_only=True).read_meta(12)
  assert meta['jumps'] == [[6, 4]] and meta['examples'] == 16 * 8 and meta['guard']['seen'] == 8


def test_the_device_of_another_process_is_named(texts, tmp_path):
  found = run('flipped', texts, tmp_path, *MESH, '--config.guard.replicas_every=3')
  assert [code for code, *_ in found] == [14, 14], found
  err = ''.join(err for *_, err in found)
  assert 'jaxlm: step 6: ' in err and 'of process 1 is not what its replicas hold' in err, err
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()) == ['3']
  matrix.record('F15', 'a bit on a device of the other of 2 processes', 'both exit with 14, device and process are named', lost=3)


def test_who_waits_for_one_that_is_stuck_ends_too(texts, tmp_path):
  found = run('stuck', texts, tmp_path, *MESH, '--config.watchdog.seconds=10', seconds=100)
  codes = [code for code, *_ in found]
  assert 12 in codes and set(codes) <= {12, 11, -6}, found  # -6: ended by the coordination service, as the other was gone
  stacks = [path.read_text() for path in sorted(tmp_path.glob('stacks-*.txt'))]
  assert any('rows_of_a_source_that_is_stuck' in text or 'in read' in text or 'fetch' in text for text in stacks)
  matrix.record('F16', 'one of 2 processes is stuck in its data', 'both end, with stacks', lost=3)


def test_a_second_run_of_two_is_refused_by_both(texts, tmp_path):
  from jaxlm.lease import Lease
  with Lease(tmp_path):
    for code, _, err in run('alone', texts, tmp_path, *MESH, seconds=60):
      assert code == 2 and 'Traceback' not in err, err
  assert not (tmp_path / 'checkpoints').exists()
