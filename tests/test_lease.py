"""One job at a time in a workdir; a dead holder is no obstacle, whatever clocks say."""
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxlm import elastic, lease, train as training
from jaxlm.errors import UsageError
from jaxlm.lease import Lease
from tests import matrix
from tests.test_checkpoint import run_config

HOLD = '''
import pathlib, sys, time
from jaxlm.lease import Lease
with Lease(pathlib.Path(sys.argv[1])):
  print('held', flush=True)
  time.sleep(100)
'''


@pytest.fixture
def holder(tmp_path):
  """Another process that holds the lease of tmp_path."""
  with subprocess.Popen([sys.executable, '-c', HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
    assert child.stdout.readline() == 'held\n'
    yield child
    child.kill()


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(lease, 'REFRESH', 0.1)
  monkeypatch.setattr(lease, 'QUIET', 1.)


def written(workdir) -> dict:
  return json.loads((workdir / 'lease.json').read_text())


def edit(workdir, **changes):
  (workdir / 'lease.json').write_text(json.dumps({**written(workdir), **changes}))


def test_a_second_job_is_refused_and_told_who_holds_it(holder, texts, tmp_path):
  with pytest.raises(UsageError, match=rf'--workdir={tmp_path}: is in use by process {holder.pid} on .*use another') as e:
    training.train(run_config(texts), tmp_path)
  assert e.value.code == 2 and '\n' not in str(e.value)
  assert not (tmp_path / 'config.json').exists() and not (tmp_path / 'data').exists()
  assert written(tmp_path)['pid'] == holder.pid
  matrix.record('F20', 'a second job in the workdir', 'exit code 2, the holder is named', lost=0)


def test_a_killed_holder_is_no_obstacle(holder, tmp_path):
  holder.kill()
  holder.wait()
  start = time.monotonic()
  with Lease(tmp_path):
    assert written(tmp_path)['pid'] == os.getpid()
  assert time.monotonic() - start < 1
  assert [p.name for p in tmp_path.iterdir()] == ['lease.lock']  # released


def test_one_that_was_killed_and_not_yet_waited_for_is_dead_too(holder, tmp_path):
  holder.send_signal(signal.SIGKILL)
  time.sleep(0.5)
  with Lease(tmp_path):
    pass


def test_a_survivor_that_began_anew_keeps_its_lease(tmp_path, monkeypatch):
  with Lease(tmp_path):
    with pytest.raises(UsageError, match='is in use by process'), Lease(tmp_path):
      pass
    monkeypatch.setenv(elastic.SURVIVOR, '1')
    with Lease(tmp_path) as own:
      own.check()


def test_another_process_with_its_number_is_not_the_holder(holder, tmp_path):
  edit(tmp_path, began=written(tmp_path)['began'] - 1)
  with Lease(tmp_path):
    assert written(tmp_path)['pid'] == os.getpid()


@pytest.mark.parametrize('key', ['host', 'boot', 'pids'])
def test_a_holder_elsewhere_is_dead_once_it_has_been_quiet(key, quick, tmp_path):
  """Its number means nothing here; times that it wrote are of no weight, be they of the past or the future."""
  for refreshed in (0., 1e12):
    with Lease(tmp_path):
      left = (tmp_path / 'lease.json').read_text()
    (tmp_path / 'lease.json').write_text(left)
    edit(tmp_path, refreshed=refreshed, since=refreshed, **{key: 'another'})
    start, said = time.monotonic(), []
    with Lease(tmp_path, said.append):
      assert 1 <= time.monotonic() - start < 3
    assert len(said) == 1 and f'process {os.getpid()}' in said[0]


def test_a_holder_elsewhere_that_lives_is_not_disturbed(quick, tmp_path, monkeypatch):
  with monkeypatch.context() as elsewhere:
    elsewhere.setattr(lease, '_place', lambda: {'host': 'elsewhere', 'boot': 'b', 'pids': 'p'})
    other = Lease(tmp_path)
  with other:
    with pytest.raises(UsageError, match='on elsewhere'):
      with Lease(tmp_path, print):
        pass
    other.check()
    assert written(tmp_path)['host'] == 'elsewhere'


def test_who_was_taken_for_dead_and_is_not_stops_before_it_writes(quick, tmp_path, monkeypatch):
  first = Lease(tmp_path)
  with first:
    edit(tmp_path, nonce='of another')
    time.sleep(0.5)
    with pytest.raises(UsageError, match='another job has taken it over'):
      first.check()
  assert written(tmp_path)['nonce'] == 'of another'  # it does not release what is not its own


@pytest.mark.parametrize('left', [b'', b'{', b'[]', b'{"pid": "x"}', b'\xff'])
def test_a_lease_that_cannot_be_read_belongs_to_somebody_who_may_be_dead(left, quick, tmp_path):
  (tmp_path / 'lease.json').write_bytes(left)
  said = []
  with Lease(tmp_path, said.append):
    assert 'has not said' in said[0]


def test_a_clock_that_is_set_changes_nothing(quick, tmp_path, monkeypatch):
  with Lease(tmp_path) as held:
    for jump in (1e9, -1e9):
      monkeypatch.setattr(time, 'time', lambda jump=jump: 1e9 + jump)
      time.sleep(0.3)
      held.check()
      with pytest.raises(UsageError, match='in use'):
        with Lease(tmp_path):
          pass
  matrix.record('F23', 'a clock that is set by 30 years, either way', 'the lease holds')


def test_of_many_that_find_a_dead_holder_one_gets_it(holder, tmp_path):
  holder.kill()
  holder.wait()
  got, start = [], threading.Barrier(16)

  def contend():
    start.wait()
    try:
      Lease(tmp_path).__enter__()
      got.append('held')
    except UsageError:
      got.append('refused')
  threads = [threading.Thread(target=contend) for _ in range(16)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(got) == ['held'] + ['refused'] * 15
  matrix.record('F20', '16 find a dead holder at once', 'one gets the lease', 16)
  assert pathlib.Path(tmp_path / 'lease.json').exists()
