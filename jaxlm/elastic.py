"""Elastic runs (train --elastic, experimental): once a process is lost, the others go on without it, on a smaller mesh.

1. Processes join as recoverable ones (jax_enable_recoverability): the coordination service does not end the others of one that died.
2. In each a thread asks, in step with those of the others, who is alive, as jax's live_devices does; it needs no collective to fail,
   so that it sees a loss whatever the main thread waits in: a step, a barrier, a save.
3. If one is missing, process 0 names another port, all agree on it, and each replaces its own program (exec) by the same command as
   one of fewer processes. Nothing that knew of the dead is left, no communicator and no half of a save; a launcher sees the process
   it started. What follows is any start: the newest good checkpoint, on the mesh that the devices left can make.
4. As many go on as the mesh and the batch allow; the rest end, with the code of PeerLost, and so do all if none can.

Process 0 must live: it hosts the service, without which the others end at once and the launcher starts all again. A TPU slice is lost
with its host, so there it is refused.
"""
import os
import socket
import sys
import threading

import jax
from jax._src import distributed

from jaxlm.cluster import Job
from jaxlm.errors import PeerLost, UsageError

ASKS = 1.       # seconds between two questions
AGREEMENT = 60  # seconds for the survivors to agree
SURVIVOR = 'JAXLM_SURVIVOR'  # in the environment of a process that took its own place

_fits = lambda processes: True
_watching = False


def fits(test) -> None:
  """test(processes) → whether so many of the job's can make a mesh. Until this is called, any number can. UsageError on TPUs."""
  global _fits
  if _watching and jax.default_backend() == 'tpu':
    raise UsageError('--elastic: a TPU slice is lost with its host; leave it out, the launcher starts all again')
  _fits = test


class Watch:
  """Of a process that has joined."""

  def __init__(self, job: Job, heartbeat: int):
    global _watching
    _watching = True
    self._job, self._heartbeat = job, heartbeat
    self._client = distributed.global_state.client
    self._over, self._thread = threading.Event(), threading.Thread(target=self._watch, name='elastic', daemon=True)
    self._thread.start()

  def over(self) -> None:
    """This process ends with an error: who is lost is no longer its concern."""
    self._over.set()

  def end(self) -> None:
    """This process has done all: returns when each has, and so may leave."""
    self._client.key_value_set(f'jaxlm/end/{self._job.process}', '')
    self._thread.join()
    if self._job.process == 0:
      self.last()

  def verdict(self) -> None:
    """A peer may be lost: returns only if none is, or nobody can go on."""
    self._thread.join(2 * self._heartbeat + AGREEMENT)

  def last(self) -> None:
    """Of process 0: waits until the others have left the service that it hosts, without which they would be aborted."""
    while len(self._live()) > 1:
      pass

  def _live(self) -> list[int]:
    """Who is alive; waits until each of them asks."""
    return sorted(self._client.get_live_nodes(list(range(self._job.processes))))

  def _watch(self) -> None:
    try:
      while not self._over.wait(ASKS):
        live = self._live()
        if self._over.is_set() or len(self._client.key_value_dir_get('jaxlm/end')) == self._job.processes:
          return  # who is not there has left, all being done
        if len(live) < self._job.processes:
          self._go_on(live)
    except jax.errors.JaxRuntimeError as e:
      if not self._over.is_set():
        _end(f'the survivors of {self._job.processes} processes do not agree: {str(e).splitlines()[0][:200]}')

  def _go_on(self, live: list[int]) -> None:
    """Does not return."""
    own, lost = self._job.process, [n for n in range(self._job.processes) if n not in live]
    text = f'process {", ".join(map(str, lost))} of {self._job.processes} is lost'
    count = next((n for n in range(len(live), 0, -1) if _fits(n)), 0)
    if not count:
      _end(f'{text}, and no mesh and batch of this config fit fewer')
    if own == 0:
      host, _, port = self._job.coordinator.rpartition(':')
      self._client.key_value_set('jaxlm/survivors', f'{host}:{_port_after(int(port))}')
      print(f'jaxlm: {text}; {count} go on, from the newest checkpoint', file=sys.stderr, flush=True)
    address = self._client.blocking_key_value_get('jaxlm/survivors', AGREEMENT * 1000)
    self._client.wait_at_barrier('jaxlm/survivors', AGREEMENT * 1000, live)
    if own == 0:
      self.last()
    else:
      self._client.shutdown()
    place = live.index(own)
    if place >= count:
      _end(f'{text}, and a mesh of this config takes {count} of the {len(live)} that are left; process {own} is not needed')
    self._become([f'--coordinator={address}', f'--processes={count}', f'--process={place}'])

  def _become(self, words: list[str]) -> None:
    sys.stdout.flush()
    for fd in os.listdir('/dev/fd'):
      if int(fd) > 2:
        try:
          os.set_inheritable(int(fd), False)  # so that no connection of the old program stays open
        except OSError:  # the folder's own, already closed
          continue
    if self._job.devices is not None:
      os.environ['JAX_LOCAL_DEVICE_IDS'] = ','.join(map(str, self._job.devices))
    os.environ[SURVIVOR] = '1'
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *words])


def _port_after(port: int) -> int:
  """The next that is free on this machine: the old one may be taken for some time yet."""
  for other in range(port + 1, 65536):
    with socket.socket() as probe:
      try:
        probe.bind(('', other))
        return other
      except OSError:
        continue
  return _port_after(1023)


def _end(text: str) -> None:
  print(f'jaxlm: {text}', file=sys.stderr, flush=True)
  os._exit(PeerLost.code)  # the main thread may be in a collective that never ends
