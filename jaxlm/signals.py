"""SIGINT and SIGTERM, as a training job wants them."""
import os
import signal

from jaxlm.errors import Preempted


class Signals:
  """Inside a `with`: before `in_loop` is set a signal ends the command at once (there is nothing to save); after that
  it is only noted in `received`, for the loop to save and stop. More signals change nothing.

  Of several processes, all must stop at the same step, which is arranged for SIGTERM elsewhere (hosts.py): `numbers` is then
  SIGINT alone, and a SIGINT in the loop becomes a SIGTERM.
  """

  def __init__(self, numbers=(signal.SIGINT, signal.SIGTERM)):
    self._numbers = numbers
    self.received = None
    self.in_loop = False

  def __enter__(self):
    self._old = {s: signal.signal(s, self._receive) for s in self._numbers}
    return self

  def __exit__(self, *exception):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _receive(self, number, frame):
    del frame
    if self.in_loop and signal.SIGTERM not in self._numbers:
      os.kill(os.getpid(), signal.SIGTERM)
      return
    self.received = signal.Signals(number).name
    if not self.in_loop:
      raise Preempted(f'{self.received} before the first step: there was nothing to save; the same command starts again')
