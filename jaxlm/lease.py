"""One job at a time in a workdir: lease.json says whose it is.

    {nonce, host, boot, pids, pid, began, since, refreshed, beat}    boot and pids name the running kernel and its table of processes

Who finds a lease there, decides so: 1. A holder of this kernel and table of processes is asked for by its number and the time at
which it began, both in the kernel's own count: alive, the job is refused; dead, be it by SIGKILL, its lease is taken over at once.
2. Any other holder is watched for QUIET seconds: if its lease changes, the job is refused; if not, it is taken over. No two clocks
are compared, so that none need be right. 3. A holder that was taken for dead, and was not, finds another's lease in place of its own
and ends before it writes a checkpoint.
"""
import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
import uuid

import psutil

from jaxlm import elastic
from jaxlm.errors import StorageError, UsageError

REFRESH = 10.  # seconds between two signs of life
QUIET = 60.  # seconds without one, and a holder elsewhere is dead


def _text(path: str) -> str:
  try:
    return pathlib.Path(path).read_text(encoding='utf-8').strip()
  except OSError:
    return ''


def _place() -> dict:
  """Of this process: where numbers of processes mean the same."""
  pids = os.readlink('/proc/self/ns/pid') if os.path.exists('/proc/self/ns/pid') else ''
  return {'host': socket.gethostname(), 'boot': _text('/proc/sys/kernel/random/boot_id'), 'pids': pids}


def _began(pid: int) -> float | None:
  """When a process began, in ticks since the boot where there are such; None if there is none, or it is dead and not yet buried."""
  if not os.path.exists('/proc/self/stat'):
    return psutil.Process(pid).create_time() if psutil.pid_exists(pid) else None
  state, *fields = _text(f'/proc/{pid}/stat').rpartition(')')[2].split() or ('X',)
  return None if state in 'ZX' else float(fields[18])


class Lease:
  """Holds the lease of a workdir, within a `with`. UsageError if another job has it."""

  def __init__(self, workdir: pathlib.Path, say=print):
    self._workdir, self._path, self._say = workdir, workdir / 'lease.json', say
    self._own = {'nonce': uuid.uuid4().hex, **_place(), 'pid': os.getpid(), 'began': _began(os.getpid()),
                 'since': time.time()}
    self._beat, self._over, self._lost = 0, threading.Event(), False

  def __enter__(self):
    watched = None
    while (found := self._take(watched)) is not None:
      self._refuse_living(found)
      watched = found
    self._thread = threading.Thread(target=self._refresh, name='lease', daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *exception):
    self._over.set()
    self._thread.join()
    with contextlib.suppress(OSError):
      if self._nonce(self._path.read_bytes()) == self._own['nonce']:
        self._path.unlink()

  def check(self) -> None:
    """UsageError if another job took the lease, having seen no sign of life."""
    if self._lost:
      raise UsageError(f'--workdir={self._workdir}: another job has taken it over, as this one gave no sign of life for {QUIET:g} '
                       'seconds; nothing more is written')

  def _take(self, dead: bytes | None) -> bytes | None:
    """Takes the lease if there is none, or the one that is known to be dead → None, or the one that is there."""
    try:
      with open(self._path.with_suffix('.lock'), 'wb') as lock:
        with contextlib.suppress(OSError):  # a file system without locks: then _refresh finds out
          fcntl.flock(lock, fcntl.LOCK_EX)
        found = self._path.read_bytes() if self._path.exists() else None
        if found is not None and found != dead:
          return found
        for left in self._path.parent.glob('lease-*.tmp'):  # by a job that was killed
          left.unlink()
        self._write()
        return None
    except OSError as e:
      raise StorageError(f'{self._path}: cannot be written ({e.strerror})') from e

  def _write(self) -> None:
    self._beat += 1
    fresh = self._path.with_name(f'lease-{self._own["nonce"]}.tmp')
    fresh.write_text(json.dumps({**self._own, 'refreshed': time.time(), 'beat': self._beat}), encoding='utf-8')
    os.replace(fresh, self._path)

  def _refuse_living(self, found: bytes) -> None:
    """Returns once the holder is known to be dead."""
    try:
      holder = json.loads(found)
      began = holder['began']
      who = f'process {holder["pid"]} on {holder["host"]}, which began at {time.strftime("%F %T", time.localtime(holder["since"]))}'
    except (ValueError, TypeError, KeyError, OverflowError, OSError):
      holder, began, who = {}, None, 'a job that has not said whose it is'
    mend = 'stop it, or use another --workdir'
    if all(holder.get(key) == value for key, value in _place().items()):
      if holder['pid'] == os.getpid() and elastic.SURVIVOR in os.environ:
        return  # this very process, before it began anew
      if began == _began(holder['pid']):
        raise UsageError(f'--workdir={self._workdir}: is in use by {who}; {mend}')
      return
    self._say(f'{self._path}: was left by {who}; watching for {QUIET:g} seconds whether it is alive')
    end = time.monotonic() + QUIET
    while time.monotonic() < end:
      time.sleep(min(REFRESH / 4, 1.))
      if not self._path.exists() or self._path.read_bytes() != found:
        if self._path.exists():
          raise UsageError(f'--workdir={self._workdir}: is in use by {who}; {mend}')
        return

  @staticmethod
  def _nonce(raw: bytes) -> str:
    try:
      return json.loads(raw)['nonce']
    except (ValueError, TypeError, KeyError):
      return ''

  def _refresh(self) -> None:
    while not self._over.wait(REFRESH):
      try:
        if self._path.exists() and self._nonce(self._path.read_bytes()) != self._own['nonce']:
          self._lost = True
          return
        self._write()
      except OSError:  # storage that is away for a while is not this thread's to judge
        continue
