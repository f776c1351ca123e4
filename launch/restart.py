#!/usr/bin/env python3
"""Starts a run again when it ends for no fault of its own. What every launcher here uses; the standard library alone.

    restart.py [--workdir=DIR | --newest=COMMAND] [--processes=N] [--once] [--stop-when-preempted] [--state=FILE] [--backoff=5]
               [--grace=30] [--dry-run] -- COMMAND …

1. Exit codes 0 (done), 2 (usage) and 3 (no good checkpoint) are final, and so is any that is not known here.
2. After 10 (preempted, saved), 11 (a peer is lost), 12 (hang), 13 (storage) and death by a signal COMMAND starts again, after
   --backoff seconds, doubled by each start since the newest checkpoint's step last went up.
3. After three starts in a row at the same newest checkpoint there is no fourth: exit code 4.
4. SIGTERM or SIGINT to this program goes on to COMMAND, whose exit code is then final.

--workdir: whose checkpoints/ has the steps; by default COMMAND's own --workdir. --newest: a shell command that prints the newest step
instead. --processes: N processes of COMMAND on this machine, each told its --coordinator, --processes and --process; once one ends
with an error, the others have --grace seconds; if COMMAND has --elastic, once the first has ended, whose exit code counts. --once: one
start; the next is another's to make. --state: a file in which starts are counted from one of these programs to the next. --stop-when-preempted: 10 is final too.
"""
import argparse
import json
import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

AGAIN = {10: 'preempted, saved', 11: 'a peer is lost', 12: 'hang', 13: 'storage'}
GAVE_UP, STARTS = 4, 3
LONGEST = 600  # seconds between starts


def reason(code: int) -> str | None:
  """Why a run that ended with this code is to start again; None: it is not. A shell says 128 + N of death by signal N."""
  number = -code if code < 0 else code - 128 if 128 < code < 193 else 0
  if number:
    return f'killed by {signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"}'
  return AGAIN.get(code)


def newest_in(workdir: pathlib.Path) -> int:
  """The newest step in a workdir's checkpoints; −1: none."""
  folder = workdir / 'checkpoints'
  return max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=-1) if folder.is_dir() else -1


def newest_by(command: str) -> int:
  """What a shell command prints; −1 if that is no number."""
  words = subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True, check=False).stdout.split()
  return int(words[-1]) if words and words[-1].isdigit() else -1


def commands(command: list[str], processes: int) -> list[list[str]]:
  """COMMAND, or as many of it as there are processes, which meet at a free port of this machine."""
  if processes == 1:
    return [command]
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  return [[*command, f'--coordinator=127.0.0.1:{port}', f'--processes={processes}', f'--process={i}'] for i in range(processes)]


def environment(process: int, processes: int) -> dict[str, str]:
  """Of one process: of several that share a machine with GPUs, each has the GPU of its number."""
  env = dict(os.environ)
  if processes > 1 and env.get('JAX_PLATFORMS') != 'cpu' and pathlib.Path('/dev/nvidia0').exists():
    env.setdefault('JAX_LOCAL_DEVICE_IDS', str(process))
  return env


class Runner:
  """Runs commands, and is told to stop."""

  def __init__(self, grace: float):
    self.grace = grace
    self.stopped = False
    self._children = []
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._stop)

  def _stop(self, number, frame):
    del number, frame
    self.stopped = True
    for child in self._children:
      if child.poll() is None:
        child.terminate()

  def run(self, each: list[list[str]]) -> int:
    """The exit code of the first of them that ended with an error; 0 if all ended well. Of an elastic run that of process 0, without
    which the others cannot go on."""
    elastic = '--elastic' in each[0]
    self._children = []
    for i, words in enumerate(each):
      self._children.append(subprocess.Popen(words, env=environment(i, len(each))))
    if self.stopped:  # while they were started
      self._stop(None, None)
    failed, end = 0, None
    while None in [child.poll() for child in self._children]:
      failed = failed or next((c.returncode for c in self._children if c.returncode), 0)
      if end is None and (self._children[0].returncode is not None if elastic else failed):
        end = time.monotonic() + self.grace
      if end is not None and time.monotonic() > end:
        for child in self._children:
          child.kill()
      time.sleep(0.05)
    return self._children[0].returncode if elastic else failed or next((c.returncode for c in self._children if c.returncode), 0)

  def sleep(self, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not self.stopped and time.monotonic() < end:
      time.sleep(min(0.1, seconds))


def count_start(state: dict, step: int) -> dict:
  """The starts so far, and one more now that the newest checkpoint is of `step`."""
  return {'step': step, 'starts': state['starts'] + 1 if state and step <= state['step'] else 1}


def say(text: str) -> None:
  print(f'restart: {text}', file=sys.stderr, flush=True)


def supervise(args, command: list[str], newest) -> int:
  """The exit code that is final."""
  runner, state, code = Runner(args.grace), {}, None
  file = pathlib.Path(args.state) if args.state else None
  if file and file.exists():
    state = json.loads(file.read_text(encoding='utf-8'))
  while True:
    state = count_start(state, newest())
    if state['starts'] > STARTS:
      say(f'{STARTS} starts in a row made no progress (newest checkpoint: {state["step"] if state["step"] >= 0 else "none"})'
          + (f', the last ended with {code}' if code is not None else '') + '; not started again')
      code = GAVE_UP
      break
    wait = min(LONGEST, args.backoff * 2 ** (state['starts'] - 1))
    if code is not None or state['starts'] > 1:
      say(f'starts again in {wait:g} s, the newest checkpoint is {state["step"] if state["step"] >= 0 else "none"}')
      runner.sleep(wait)
    if runner.stopped:
      return 128 + signal.SIGTERM if code is None else code
    if file:
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_text(json.dumps(state), encoding='utf-8')
    code = runner.run(commands(command, args.processes))
    code = 128 - code if code < 0 else code
    why = reason(code)
    if why is None:
      break
    say(f'exit code {code}: {why}')
    if runner.stopped or args.once or (code == 10 and args.stop_when_preempted):
      return code
  if file:
    file.unlink(missing_ok=True)  # the end: whoever starts this again begins anew
  return code


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog='restart.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                   allow_abbrev=False)
  parser.add_argument('--workdir')
  parser.add_argument('--newest')
  parser.add_argument('--processes', type=int, default=1)
  parser.add_argument('--once', action='store_true')
  parser.add_argument('--stop-when-preempted', action='store_true')
  parser.add_argument('--state')
  parser.add_argument('--backoff', type=float, default=5)
  parser.add_argument('--grace', type=float, default=30)
  parser.add_argument('--dry-run', action='store_true')
  own, dashes, command = (argv[:argv.index('--')], True, argv[argv.index('--') + 1:]) if '--' in argv else (argv, False, [])
  args = parser.parse_args(own)  # exits with 2
  if not dashes or not command:
    parser.error('wants -- COMMAND')
  if shutil.which(command[0]) is None:
    parser.error(f'{command[0]}: no such program')
  if args.processes < 1:
    parser.error(f'--processes={args.processes}: wants 1 or more')
  workdir = args.workdir or next((w.partition('=')[2] for w in command if w.startswith('--workdir=')), None)
  if not workdir and not args.newest:
    parser.error('wants --workdir=DIR, here or in COMMAND, or --newest=COMMAND: it starts again while checkpoints are made')
  if args.dry_run:
    for i, words in enumerate(commands(command, args.processes)):
      print(shlex.join(w if not w.startswith('--coordinator=') else '--coordinator=127.0.0.1:PORT' for w in words)
            + (' &' if i < args.processes - 1 else ''))
    return 0
  return supervise(args, command, (lambda: newest_by(args.newest)) if args.newest else lambda: newest_in(pathlib.Path(workdir)))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
