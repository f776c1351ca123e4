"""TensorBoard's event files, written by who calls: a thread that writes them, as libraries have it, dies unseen when the disk is full,
and the queue before it then waits for ever."""
import pathlib
import time

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary


class Events:
  """An event file of a run that goes on after `step`: what earlier ones have of later steps is not shown."""

  def __init__(self, folder: pathlib.Path, step: int):
    folder.mkdir(exist_ok=True)
    self._writer = EventsWriter(str(folder / 'events'))
    self._writer.write_event(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))

  def add(self, step: int, values: dict[str, float]) -> None:
    """Scalars of a step. OSError."""
    scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    self._writer.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()
