"""`jaxlm`, to which something happens: FAULT=what:when, and of several processes FAULT_PROCESS says to which.

    kill:train, transfer, write, seal, rename, restore    SIGKILL in this phase
    term:compile, save, eval                              SIGTERM in this phase, which goes on
    stuck, slow                                           its data source stands still at the sixth batch, or takes a second from there on
"""
import os
import signal
import sys
import threading
import time

from jaxlm import cli, evaluate, hosts
from jaxlm.checkpoint import Checkpoints
from jaxlm.data import pipeline

WHAT, _, WHEN = os.environ.get('FAULT', '').partition(':')
BATCH = 5


def mine() -> bool:
  return hosts.process() == int(os.environ.get('FAULT_PROCESS', 0))


def strike() -> None:
  os.kill(os.getpid(), {'kill': signal.SIGKILL, 'term': signal.SIGTERM}[WHAT])


def before(owner, name, happens) -> None:
  """happens(*args) whenever `name` is called in this process, first."""
  f = getattr(owner, name)

  def wrapped(*args, **kwargs):
    if mine():
      happens(*args)
    return f(*args, **kwargs)
  setattr(owner, name, wrapped)


def once(happens):
  done = []

  def f(*args):
    if not done:
      done.append(1)
      happens(*args)
  return f


def from_batch(happens):
  """From the sixth batch on that this process makes."""
  made = []

  def f(*args):
    made.append(1)
    if len(made) > BATCH:
      happens()
  return f


def arrange() -> None:
  if WHAT in ('kill', 'term'):
    if WHEN == 'train':
      before(pipeline.Pipeline, 'rows', from_batch(once(strike)))
    elif WHEN == 'transfer':
      import orbax.checkpoint as ocp  # pylint: disable=g-import-not-at-top
      before(ocp.AsyncCheckpointer, 'save', once(lambda *args: strike()))
    elif WHEN == 'write':
      before(Checkpoints, 'check', lambda self: strike() if self._saving else None)  # pylint: disable=protected-access
    elif WHEN in ('seal', 'rename', 'restore', 'save'):
      name = {'seal': '_finish_files', 'rename': '_settle', 'restore': 'read_state', 'save': 'save'}[WHEN]
      before(Checkpoints, name, once(lambda *args: strike()))
    elif WHEN == 'compile':
      threading.Timer(float(os.environ['FAULT_SECONDS']), strike).start()
    elif WHEN == 'eval':
      before(evaluate.HeldOut, 'run', once(lambda *args: strike()))
  elif WHAT == 'stuck':
    before(pipeline.Pipeline, 'rows', from_batch(threading.Event().wait))
  elif WHAT == 'slow':
    before(pipeline.Pipeline, 'rows', from_batch(lambda: time.sleep(1.)))


if __name__ == '__main__':
  arrange()
  sys.argv[0] = 'jaxlm'
  cli.main()
