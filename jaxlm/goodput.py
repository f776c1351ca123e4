"""Where a run's time went, over all its starts: a clock, the log that it keeps, and what that log says.

    workdir/goodput.jsonl    a line at each start (`begins`: the step it goes on from), save and return to an earlier step, at an end that
                             was meant (`ends`: finished, or SIGINT), and now and then between: time, start (the number of it), step,
                             seconds of each kind since that start

Kinds: import, trace, data, init, compile, restore, step, save, eval, replicas; and what only the log as a whole says: `lost`, data and steps that
were run again after a crash or a return, and `down`, from the last line of one start to the beginning of the next. The hours after an
end that was meant are nobody's loss.
"""
import json
import pathlib
import time

import psutil

from jaxlm.storage import Lines

EVERY = 10.  # seconds between lines, at least; a crash loses that much of the account
AGAIN = ('data', 'step')  # kinds that are lost when steps are run again


class Clock:
  """All time since the process began is of the kind that the next mark names."""

  def __init__(self):
    self._born = psutil.Process().create_time()
    self._last = time.monotonic()
    self.seconds = {'import': max(0., time.time() - self._born)}
    self._log = None

  def mark(self, kind: str) -> None:
    """The time since the last mark went there."""
    now = time.monotonic()
    self.seconds[kind] = self.seconds.get(kind, 0.) + now - self._last
    self._last = now

  def __str__(self):
    split = ' · '.join(f'{kind} {seconds:.1f}' for kind, seconds in self.seconds.items())
    return f'first step after {sum(self.seconds.values()):.1f} s: {split}'

  def keep(self, workdir: pathlib.Path, step: int) -> None:
    """From here on a log is kept, of a run that goes on from `step`."""
    path = workdir / 'goodput.jsonl'
    self._start = 1 + max((line['start'] for line in read(path)), default=0)
    self._log = Lines(path)
    self.write(step, begins=step)

  def write(self, step: int, **more) -> None:
    """A line. Nothing if no log is kept (on all processes but the first)."""
    if self._log:
      self._wrote = time.monotonic()
      line = {'time': time.time(), 'start': self._start, 'step': step, **more, 'seconds': {k: round(s, 3) for k, s in self.seconds.items()}}
      self._log.write(json.dumps(line))

  def tick(self, step: int) -> None:
    """A line, if the last one is some time ago."""
    if self._log and time.monotonic() - self._wrote > EVERY:
      self.write(step)

  def close(self) -> None:
    if self._log:
      self._log.close()
    self._log = None


def read(path: pathlib.Path) -> list[dict]:
  """The lines that are whole."""
  lines = []
  for text in path.read_text(encoding='utf-8', errors='replace').splitlines() if path.exists() else ():
    try:
      lines.append(json.loads(text))
    except ValueError:
      continue
  return lines


def summary(lines: list[dict]) -> dict[str, float]:
  """Lines of the log → seconds of each kind, in all."""
  total: dict[str, float] = {}
  done: list[tuple[int, dict[str, float]]] = []  # (step, what of AGAIN it took to come there), of steps that count
  before = None
  for line in lines:
    seconds = line['seconds']
    if before and before['start'] == line['start']:
      new = {kind: value - before['seconds'].get(kind, 0.) for kind, value in seconds.items()}
    else:
      new = dict(seconds)
      if before and 'ends' not in before:  # no clock but the wall's goes on while nothing runs, and that one may be set
        total['down'] = total.get('down', 0.) + max(0., line['time'] - sum(seconds.values()) - before['time'])
    for kind, value in new.items():
      total[kind] = total.get(kind, 0.) + value
    if 'begins' in line:
      again = [took for step, took in done if step > line['begins']]
      done = [(step, took) for step, took in done if step <= line['begins']]
      for took in again:
        for kind, value in took.items():
          total[kind] -= value
          total['lost'] = total.get('lost', 0.) + value
    else:
      done.append((line['step'], {kind: new.get(kind, 0.) for kind in AGAIN}))
    before = line
  return total
