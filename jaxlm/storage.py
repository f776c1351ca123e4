"""Storage that does not answer is asked again, and only then an error, never bad bytes; logs on a disk that is full wait for room."""
import errno
import os
import pathlib
import random
import time

from jaxlm.errors import StorageError

TRIES = 6
FIRST_WAIT = .5  # seconds; each wait is twice the one before, and drawn from half of that on: 8 to 16 s in all


def patiently(what: str, f, say=print):
  """f(), asked again while it raises OSError. StorageError naming `what` if it goes on doing so."""
  for n in range(TRIES):
    try:
      return f()
    except OSError as e:
      if n == TRIES - 1:
        raise StorageError(f'{what}: the storage does not answer, after {TRIES} tries ({e})') from e
      wait = FIRST_WAIT * 2 ** n * random.uniform(.5, 1)
      say(f'{what}: {e}; asked again in {wait:.1f} s')
      time.sleep(wait)


def sync(path: pathlib.Path) -> None:
  """A file's bytes, or the names in a folder, survive a loss of power."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def is_full(e: Exception) -> bool:
  """Whether an error says that the disk, or a quota, is full; tensorstore says it in words."""
  return getattr(e, 'errno', 0) in (errno.ENOSPC, errno.EDQUOT) or 'No space left' in str(e)


class Log:
  """A file that grows by records. On a full disk they wait until there is room: it is for checkpoints to say what becomes of the run."""

  def __init__(self, path: pathlib.Path, say=print):
    self._path, self._say, self._waiting, self._told = path, say, b'', False
    try:
      self._file = open(path, 'ab', buffering=0)
    except OSError as e:
      raise StorageError(f'{path}: cannot be written ({e.strerror})') from e

  def write(self, record: bytes) -> None:
    """StorageError, unless it is that the disk is full."""
    self._waiting += record
    try:
      while self._waiting:
        self._waiting = self._waiting[self._file.write(self._waiting):]
    except OSError as e:
      if not is_full(e):
        raise StorageError(f'{self._path}: cannot be written ({e.strerror})') from e
      if not self._told:
        self._say(f'{self._path}: the disk is full; what is to be logged waits for room')
      self._told = True

  def close(self) -> None:
    if self._waiting:
      self._say(f'{self._path}: the disk is full; its last {len(self._waiting)} bytes are lost')
    self._file.close()


class Lines(Log):
  """A log of lines."""

  def __init__(self, path: pathlib.Path, say=print):
    super().__init__(path, say)
    with open(path, 'rb') as file:
      if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read())[1] != b'\n':
        self._waiting = b'\n'  # a line that a kill cut short stays alone

  def write(self, line: str) -> None:
    super().write(line.encode() + b'\n')
