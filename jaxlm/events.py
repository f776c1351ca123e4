"""TensorBoard's event files, written by who calls: a thread that writes them, as libraries have it, dies unseen when the disk is full,
and the queue before it then waits for ever."""
import pathlib
import socket
import struct
import time

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from jaxlm.errors import StorageError
from jaxlm.storage import Log


class Events:
  """An event file of a run that goes on after `step`: what earlier ones have of later steps is not shown. StorageError."""

  def __init__(self, folder: pathlib.Path, step: int, say=print):
    try:
      folder.mkdir(exist_ok=True)
    except OSError as e:
      raise StorageError(f'{folder}: cannot be made ({e.strerror})') from e
    self._log = Log(folder / f'events.out.tfevents.{int(time.time())}.{socket.gethostname()}', say)
    self._write(file_version='brain.Event:2')
    self._write(step=step, session_log=SessionLog(status=SessionLog.START))

  def add(self, step: int, values: dict[str, float]) -> None:
    """Scalars of a step."""
    scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    self._write(step=step, summary=Summary(value=scalars))

  def _write(self, **what) -> None:
    """A TFRecord: length, its checksum, data, its checksum."""
    data = Event(wall_time=time.time(), **what).SerializeToString()
    length = struct.pack('<Q', len(data))
    self._log.write(length + struct.pack('<I', masked_crc32c(length)) + data + struct.pack('<I', masked_crc32c(data)))

  def close(self) -> None:
    self._log.close()
