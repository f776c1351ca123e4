"""What test_watch_hosts.py starts several of: WHAT and the words of `jaxlm train`."""
import sys
import threading

from jaxlm import cluster


def alone(own: int) -> None:
  pass


def poisoned(own: int) -> None:
  """Batches 7 to 9 make the loss NaN."""
  from tests import test_guard  # pylint: disable=g-import-not-at-top
  test_guard.tampered(setattr).poison = {n: float('nan') for n in (7, 8, 9)}


def flipped(own: int) -> None:
  """A bit of an array flips on the second device of process 1, after step 4."""
  import jax  # pylint: disable=g-import-not-at-top
  from jaxlm import loop
  from tests import test_replicas
  read = loop.Loop._read

  def read_and_flip(self):
    if own == 1 and self._pending and self._pending[0] == 4:
      with jax.transfer_guard('allow'):
        device = jax.local_devices()[1]
        self._state['params']['norm'] = jax.tree.map(lambda a: test_replicas.flipped(a, device, 40), self._state['params']['norm'])
    read(self)
  loop.Loop._read = read_and_flip


def stuck(own: int) -> None:
  """The data of process 1 comes to a stop."""
  from jaxlm.data import pipeline  # pylint: disable=g-import-not-at-top
  rows = pipeline.Pipeline.rows

  def rows_of_a_source_that_is_stuck(self, step, start, stop):
    if own == 1 and step == 6:
      threading.Event().wait()
    return rows(self, step, start, stop)
  pipeline.Pipeline.rows = rows_of_a_source_that_is_stuck


def main():
  what, *words = sys.argv[1:]
  own = next(int(word.partition('=')[2]) for word in words if word.startswith('--process='))
  find = cluster.find

  def find_and_patch(*args):
    {'alone': alone, 'poisoned': poisoned, 'flipped': flipped, 'stuck': stuck}[what](own)
    return find(*args)
  cluster.find = find_and_patch
  from jaxlm import cli  # pylint: disable=g-import-not-at-top
  sys.argv = ['jaxlm', *words]
  cli.main()


if __name__ == '__main__':
  main()
