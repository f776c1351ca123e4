"""SIGINT and SIGTERM, as a training job wants them."""
import signal

from jaxlm.errors import Preempted


class Signals:
  """Inside a `with`: before `in_loop` is set a signal ends the command at once (there is nothing to save); after that
  it is only noted in `received`, for the loop to save and stop. More signals change nothing.
  """

  def __init__(self):
    self.received = None
    self.in_loop = False

  def __enter__(self):
    self._old = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
    return self

  def __exit__(self, *exception):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _receive(self, number, frame):
    del frame
    self.received = signal.Signals(number).name
    if not self.in_loop:
      raise Preempted(f'{self.received} before the first step: there was nothing to save; the same command starts again')
