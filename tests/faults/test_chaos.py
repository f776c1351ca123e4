"""Twenty faults of all kinds, drawn at random, happen to one run: its loss curve at the end is the unbroken run's, bit for bit."""
import os
import random
import shutil
import signal
import time

import pytest

from tests import matrix
from tests.faults import running

pytestmark = matrix.slow
STEPS, FAULTS = 4000, 20
MORE = (f'--config.steps={STEPS}', '--config.save_every=100', '--config.eval_every=0', '--config.checkpoint.keep=4',
        '--config.watchdog.seconds=8', '--config.watchdog.start=120')


def newest(workdir):
  return workdir / 'checkpoints' / str(max(int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdecimal()))


def some_file(workdir, rng):
  files = sorted(p for p in newest(workdir).rglob('*') if p.is_file() and p.stat().st_size)
  return rng.choice(files)


def flip(workdir, rng):
  path = some_file(workdir, rng)
  raw = bytearray(path.read_bytes())
  raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
  path.write_bytes(raw)


def cut(workdir, rng):
  path = some_file(workdir, rng)
  path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def torn(workdir, rng):
  """What a kill in a save leaves, and a metrics line that was cut short."""
  del rng
  shutil.copytree(newest(workdir), workdir / 'checkpoints' / '999.orbax-checkpoint-tmp')
  with open(workdir / 'metrics.jsonl', 'a', encoding='utf-8') as file:
    file.write('{"step": 12')


def stale(workdir, rng):
  """The state of an older step in the newest."""
  del rng
  steps = sorted((p for p in (workdir / 'checkpoints').iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))
  if len(steps) > 1:
    shutil.rmtree(steps[-1] / 'state')
    shutil.copytree(steps[-2] / 'state', steps[-1] / 'state')


AT_REST = {'a bit flips': flip, 'a file is cut': cut, 'leftovers of a kill': torn, 'the state of another step': stale}
SIGNALS = {'SIGKILL': signal.SIGKILL, 'SIGTERM': signal.SIGTERM, 'SIGINT': signal.SIGINT}
IN_PHASE = [f'kill:{phase}' for phase in ('transfer', 'write', 'seal', 'rename', 'restore')] + ['term:save', 'stuck']


def test_twenty_random_faults(texts, tmp_path, tmp_path_factory):
  whole = tmp_path_factory.mktemp('whole')
  assert running.done(1, texts, whole, *MORE)[0] == 0
  rng, seen, workdir = random.Random(int(os.environ.get('JAXLM_SEED', 0))), [], tmp_path / 'run'
  kinds = [*AT_REST, *SIGNALS, *IN_PHASE, 'a stop of 2 s', 'a second job']
  drawn = [kinds[n % len(kinds)] for n in range(FAULTS)]
  rng.shuffle(drawn)
  begun = time.monotonic()
  for kind in drawn:
    at = running.last_step(workdir)
    assert at < STEPS, 'the run ended before all faults had happened'
    if kind in AT_REST:
      if len(running.good_steps(workdir) if at else []) < 2:  # of the only one damaged, nothing could be left
        with running.start(1, texts, workdir, *MORE) as child:
          running.until(lambda: running.last_step(workdir) >= at + 250, child)
          os.kill(child.pid, signal.SIGTERM)
          assert running.ended(child)[0] == 10
      AT_REST[kind](workdir, rng)
      seen.append(kind)
      continue
    env = {'FAULT': kind} if kind in IN_PHASE else {}
    with running.start(1, texts, workdir, *MORE, **env) as child:
      if kind in IN_PHASE:
        code, out = running.ended(child)
        assert code in (10, 12, -9, 0), (kind, code, out)
      else:
        running.until(lambda: running.last_step(workdir) >= min(at + rng.randrange(20, 150), STEPS - 1), child)
        if kind == 'a second job':
          code, out, _ = running.done(1, texts, workdir, *MORE)
          assert code == 2 and 'is in use by' in out, out
        if kind == 'a stop of 2 s':
          os.kill(child.pid, signal.SIGSTOP)
          time.sleep(2)
          os.kill(child.pid, signal.SIGCONT)
        os.kill(child.pid, SIGNALS.get(kind, signal.SIGKILL))
        code, out = running.ended(child)
        assert code in (10, -9), (kind, code, out)
    seen.append(kind)
  code, out, again = running.done(1, texts, workdir, *MORE)
  assert code == 0, out
  assert running.curve(workdir) == running.curve(whole) and len(running.curve(workdir)) == STEPS
  assert running.digests(workdir, STEPS) == running.digests(whole, STEPS)
  assert len(seen) == FAULTS
  print(f'{time.monotonic() - begun:.0f} s')
  matrix.record('all', f'{FAULTS} random faults in one run of {STEPS} steps: {", ".join(sorted(set(seen)))}',
                'the loss curve of the unbroken run, bit for bit', trials=FAULTS, recover=again)
