"""Ends a run that hangs: if no step is done for some time, the stacks of all threads are written down and the exit code is 12.

A thread looks now and then at when the loop last said that it goes on. It counts only time in which it ran itself, so that neither
a clock that is set nor a process that was stopped for a while looks like a hang. Where native code never gives the interpreter's
lock back, that thread cannot run either: then faulthandler's own, which needs no lock, writes the stacks and exits with 1 (as it does
after a process was stopped for longer than the whole limit, which it cannot tell from that).
"""
import faulthandler
import os
import pathlib
import sys
import threading
import time

from jaxlm.errors import HangError
from jaxlm.schema import WatchdogConfig


class Watchdog:
  """Watches, within a `with`, until its end. watchdog.seconds = 0: does nothing."""

  def __init__(self, c: WatchdogConfig, workdir: pathlib.Path, process: int):
    self._config, self._path = c, workdir / f'stacks-{process}.txt'
    self._limit, self._signs = c.start, 0
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)

  def __enter__(self):
    if self._config.seconds:
      self._file = open(self._path, 'a', encoding='utf-8')  # now: later the disk may be what hangs. Of an earlier hang it is kept
      self._tick = min(self._config.seconds / 10, 5.)
      self._backstop()
      self._thread.start()
    return self

  def __exit__(self, *exception):
    self._over.set()
    if self._config.seconds:
      self._thread.join()
      self._file.close()
      if self._path.exists() and not self._path.stat().st_size:  # the workdir may be gone
        self._path.unlink()

  def fed(self) -> None:
    """The loop goes on."""
    self._limit = self._config.seconds
    self._signs += 1

  def starts(self) -> None:
    """What comes now may take as long as the start of a run."""
    self._limit = self._config.start
    self._signs += 1

  def _backstop(self) -> None:
    faulthandler.dump_traceback_later(self._limit + 2 * self._tick, exit=True, file=self._file)

  def _watch(self) -> None:
    last, seen, quiet = time.monotonic(), self._signs, 0.
    try:
      while not self._over.wait(self._tick):
        now, signs = time.monotonic(), self._signs
        quiet = quiet + min(now - last, 2 * self._tick) if signs == seen else 0.
        last, seen = now, signs
        self._backstop()
        if quiet > self._limit:
          self._end()
    finally:
      faulthandler.cancel_dump_traceback_later()

  def _end(self) -> None:
    last = threading.Timer(10., os._exit, (HangError.code,))  # should writing hang too, or another thread keep stdout's lock
    last.daemon = True
    last.start()
    for file in (2, self._file.fileno()):
      faulthandler.dump_traceback(file)
    text = f'jaxlm: no step for {self._limit:g} seconds (watchdog.seconds): stacks of all threads are above and in {self._path}'
    print(text, file=sys.__stderr__, flush=True)
    sys.stdout.flush()
    os._exit(HangError.code)  # nothing else could be relied on to run
