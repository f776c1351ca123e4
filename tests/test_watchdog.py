"""A run that hangs ends with 12 and says where; one that is only slow, or was stopped for a while, goes on."""
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxlm.schema import WatchdogConfig
from jaxlm.watchdog import Watchdog
from tests import matrix

ENV = {**os.environ, 'XLA_FLAGS': '', 'JAX_NUM_CPU_DEVICES': '2'}
# `jaxlm train` whose data source stands still at batch 5.
STUCK = '''
import sys, threading, time
from jaxlm import cli
from jaxlm.data import pipeline
rows = pipeline.Pipeline.rows
def rows_of_a_source_that_is_stuck(self, step, start, stop):
  if step == 5:
    print('stuck at', time.time(), file=sys.stderr, flush=True)
    threading.Event().wait()
  return rows(self, step, start, stop)
pipeline.Pipeline.rows = rows_of_a_source_that_is_stuck
sys.argv = ['jaxlm', *sys.argv[1:]]
cli.main()
'''


@matrix.slow
def test_a_data_source_that_is_stuck(texts, tmp_path):
  words = ['train', f'--config=tests/configs/tiny.py:{texts}/*.txt', f'--workdir={tmp_path}', '--config.watchdog.seconds=6']
  out = subprocess.run([sys.executable, '-c', STUCK, *words], capture_output=True, text=True, env=ENV, check=False, timeout=120)
  seconds = time.time() - float(out.stderr.partition('stuck at ')[2].split()[0])
  assert out.returncode == 12 and seconds < 20, out.stderr
  stacks = (tmp_path / 'stacks-0.txt').read_text()
  for text in (stacks, out.stderr):
    assert 'rows_of_a_source_that_is_stuck' in text and text.count('hread 0x') > 1  # of all threads
  assert out.stderr.splitlines()[-1].startswith('jaxlm: no step for 6 seconds (watchdog.seconds)')
  assert 'step      3/' in out.stdout and 'step      5/' not in out.stdout
  case = 'a data source that is stuck, watchdog.seconds=6'
  matrix.record('F16', case, 'stacks of all threads, exit code 12', lost=5, detect=round(seconds, 1))


CHILD = '''
import ctypes, pathlib, sys, time
from jaxlm.schema import WatchdogConfig
from jaxlm.watchdog import Watchdog
def stuck():
  {how}
with Watchdog(WatchdogConfig(seconds=1., start=1.), pathlib.Path(sys.argv[1]), 3):
  print('watched', flush=True)
  stuck()
print('went on')
'''
STUCK_IN = {  # what the main thread does, and the exit code
    'native code': ('ctypes.CDLL(None).sleep(100)', 12), 'python': ('\n  while True: pass', 12),
    "native code that keeps the interpreter's lock": ('ctypes.PyDLL(None).sleep(100)', 1), 'nothing': ('pass', 0),
}


@pytest.mark.parametrize('how', STUCK_IN)
def test_stuck_in(how, tmp_path):
  body, code = STUCK_IN[how]
  if code:
    (tmp_path / 'stacks-3.txt').write_text('of an earlier run')
  start = time.monotonic()
  words = [sys.executable, '-c', CHILD.format(how=body), str(tmp_path)]
  out = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
  assert out.returncode == code and time.monotonic() - start < 20, out.stderr
  assert ('went on' in out.stdout) == (code == 0)
  if code:
    stacks = (tmp_path / 'stacks-3.txt').read_text()
    assert stacks.startswith('of an earlier run') and 'in stuck' in stacks
  else:
    assert not list(tmp_path.iterdir())


def test_a_process_that_was_stopped_is_not_taken_for_one_that_hangs(tmp_path):
  code = CHILD.format(how='[time.sleep(0.1) for _ in range(6)]')
  with subprocess.Popen([sys.executable, '-c', code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
    assert child.stdout.readline() == 'watched\n'
    child.send_signal(signal.SIGSTOP)
    time.sleep(0.95)  # of the 1 s; what it does itself takes it beyond that
    child.send_signal(signal.SIGCONT)
    out, err = child.communicate(timeout=60)
  assert child.returncode == 0 and 'went on' in out, err


def test_what_is_fed_lives_and_the_start_may_take_longer(tmp_path):
  with Watchdog(WatchdogConfig(seconds=0.5, start=30.), tmp_path, 0) as watchdog:
    time.sleep(0.8)
    for _ in range(8):
      watchdog.fed()
      time.sleep(0.1)
    watchdog.starts()
    time.sleep(0.8)
  with Watchdog(WatchdogConfig(seconds=0., start=1.), tmp_path, 0):
    assert not list(tmp_path.iterdir())
