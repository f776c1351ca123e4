"""`jaxlm`, to which something happens: FAULT=what:when, and of several processes FAULT_PROCESS says to which.

    kill:train, transfer, write, seal, rename, restore    SIGKILL in this phase
    term:compile, save, eval                              SIGTERM in this phase, which goes on
    stuck, slow                                           its data source stands still at step 5, or takes a second from there on
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
STEP = 5


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


def at_step(happens):
  return lambda self, step, *rest: happens() if step == STEP else None


def arrange() -> None:
  if WHAT in ('kill', 'term'):
    if WHEN == 'train':
      before(pipeline.Pipeline, 'rows', at_step(once(strike)))
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
    before(pipeline.Pipeline, 'rows', at_step(lambda: threading.Event().wait()))
  elif WHAT == 'slow':
    before(pipeline.Pipeline, 'rows', lambda self, step, *rest: time.sleep(1.) if step >= STEP else None)


if __name__ == '__main__':
  arrange()
  sys.argv[0] = 'jaxlm'
  cli.main()
