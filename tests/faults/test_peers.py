"""F16: peers that are stuck, stopped or slow, and a network that is cut: no process waits for ever."""
import os
import signal
import subprocess
import sys
import time

import pytest

from tests import matrix
from tests.faults import running

pytestmark = matrix.slow
LIMIT = 10
WATCHED = (f'--config.watchdog.seconds={LIMIT}', '--config.watchdog.start=120')


def test_a_stuck_peer_ends_all_with_stacks(texts, tmp_path):
  code, out, _ = running.done(2, texts, tmp_path, *WATCHED, FAULT='stuck', FAULT_PROCESS=1)
  assert code == 12 and 'no step for 10 seconds (watchdog.seconds)' in out, out
  stacks = [path.read_text() for path in tmp_path.glob('stacks-*.txt')]
  assert any('worker.py' in text and 'wait' in text for text in stacks)
  code, out, again = running.done(2, texts, tmp_path)
  assert code == 0, out
  matrix.record('F16', 'a peer is stuck', 'exit code 12, stacks of all threads', lost=5, detect=LIMIT, recover=again)


def test_a_slow_peer_is_waited_for(texts, tmp_path):
  code, out, _ = running.done(2, texts, tmp_path, *WATCHED, '--config.steps=12', FAULT='slow', FAULT_PROCESS=1)
  assert code == 0, out
  matrix.record('F16', 'a peer is slow, a second a step', 'waited for', lost=0)


def children(pid: int) -> list[int]:
  return [int(n) for n in open(f'/proc/{pid}/task/{pid}/children', encoding='ascii').read().split()]


@pytest.mark.parametrize('seconds', [3, 60])
def test_a_peer_that_is_stopped(texts, tmp_path, seconds):
  """SIGSTOP: for a moment, it is waited for; for long, the others end."""
  more = (*WATCHED, '--config.steps=2000', '--config.save_every=50', '--config.eval_every=0')
  with running.start(2, texts, tmp_path, *more) as child:
    running.until(lambda: running.last_step(tmp_path) >= 60, child)
    victim = children(child.pid)[1]
    os.kill(victim, signal.SIGSTOP)
    begun = time.monotonic()
    if seconds < LIMIT:
      time.sleep(seconds)
      os.kill(victim, signal.SIGCONT)
      at = running.last_step(tmp_path)
      running.until(lambda: running.last_step(tmp_path) >= at + 20, child)
      running.kill_all(child)
      matrix.record('F16', f'a peer is stopped for {seconds} s', 'waited for', lost=0)
      return
    code, out = running.ended(child, 120)
  waited = time.monotonic() - begun
  assert code in (11, 12, 134, 137) and waited < LIMIT + running.HEARTBEAT + 30, (code, waited, out)
  good = running.visible_and_good(tmp_path)
  assert running.last_step(tmp_path) - max(good) <= 100
  matrix.record('F16', 'a peer is stopped for good', f'the others end, exit code {code}', lost=running.last_step(tmp_path) - max(good),
                detect=waited)


NET = '''
set -e
ip netns add a$$; ip netns add b$$
for n in 1 2; do  # gloo's own address is what the host's name means there
  folder=/etc/netns/$(echo ab | cut -c$n)$$; mkdir -p $folder
  printf "127.0.0.1 localhost\\n10.77.0.$n $(hostname)\\n" > $folder/hosts
done
ip link add va$$ netns a$$ type veth peer name vb$$ netns b$$
ip -n a$$ addr add 10.77.0.1/24 dev va$$; ip -n b$$ addr add 10.77.0.2/24 dev vb$$
ip -n a$$ link set va$$ up; ip -n b$$ link set vb$$ up; ip -n a$$ link set lo up; ip -n b$$ link set lo up
echo $$
read cut
ip -n b$$ link set vb$$ down
read over
ip netns del a$$; ip netns del b$$; rm -r /etc/netns/[ab]$$
'''


def test_a_network_that_is_cut(texts, tmp_path):
  """Two hosts, each a network namespace of its own, joined by a wire, which is cut."""
  net = subprocess.Popen(['bash', '-c', NET], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  name = net.stdout.readline().strip()
  assert name, net.communicate()[1]
  both = []
  try:
    more = ('--config.steps=2000', '--config.save_every=50', '--config.eval_every=0', *WATCHED, f'--heartbeat_seconds={running.HEARTBEAT}')
    for n, space in enumerate('ab'):
      both.append(subprocess.Popen(
          ['ip', 'netns', 'exec', f'{space}{name}', sys.executable, '-m', 'tests.faults.worker', *running.words(texts, tmp_path, *more),
           '--coordinator=10.77.0.1:8476', '--processes=2', f'--process={n}'], env=running.environment(2), cwd=running.ROOT,
          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    running.until(lambda: running.last_step(tmp_path) >= 60, both[0])
    print('cut', file=net.stdin, flush=True)
    begun = time.monotonic()
    out = [child.communicate(timeout=120)[0] for child in both]
    waited = time.monotonic() - begun
    codes = [child.returncode for child in both]
    assert all(code in (11, 12, -6, 134) for code in codes), (codes, out)
    good = running.visible_and_good(tmp_path)
    matrix.record('F16', 'the network between two hosts is cut', f'both end, exit codes {codes}', lost=running.last_step(tmp_path) - max(good),
                  detect=waited)
  finally:
    for child in both:
      child.kill()
    print('over', file=net.stdin, flush=True)
    net.communicate(timeout=20)
