"""Where time went: a stall shows in the right place and nowhere else; so does what a crash made be done again."""
import time

import pytest

from jaxlm import evaluate, goodput, train as training
from jaxlm.checkpoint import Checkpoints
from jaxlm.data import pipeline
from tests import matrix
from tests.test_checkpoint import run_config

STALL = 3.
WHERE = {'data': (pipeline.Pipeline, 'rows'), 'save': (Checkpoints, 'save'), 'eval': (evaluate.HeldOut, 'run'),
         'restore': (Checkpoints, 'read_state')}


def account(workdir) -> dict:
  return goodput.summary(goodput.read(workdir / 'goodput.jsonl'))


@pytest.fixture(scope='module')
def usual(texts, tmp_path_factory):
  """A run that went on once, and its account."""
  workdir = tmp_path_factory.mktemp('usual')
  for steps in (6, 12):
    training.train(run_config(texts, steps=steps, eval_every=6, eval_windows=8), workdir, ('steps',))
  return account(workdir)


@matrix.slow
@pytest.mark.parametrize('kind', WHERE)
def test_a_stall_shows_where_it_was(kind, usual, texts, tmp_path, monkeypatch):
  training.train(run_config(texts, steps=6, eval_every=6, eval_windows=8), tmp_path)
  owner, name = WHERE[kind]
  whole, stalls = getattr(owner, name), [STALL]

  def stalled(*args, **kwargs):
    if stalls:
      time.sleep(stalls.pop())
    return whole(*args, **kwargs)
  monkeypatch.setattr(owner, name, stalled)
  start = time.monotonic()
  training.train(run_config(texts, eval_every=6, eval_windows=8), tmp_path, ('steps',))
  took, lines = time.monotonic() - start, goodput.read(tmp_path / 'goodput.jsonl')
  found = [line['seconds'] for line in lines if line['start'] == 2][-1]
  assert not stalls and STALL <= found[kind] < STALL * 1.1 + 0.5 * usual[kind]
  others = {k: s for k, s in found.items() if k not in (kind, 'import')}
  assert sum(others.values()) < took - 0.95 * STALL
  assert abs(sum(found.values()) - found['import'] - took) < 0.1 * STALL  # all of the time is somewhere
  total = account(tmp_path)
  assert total.get('lost', 0) == 0 and total.get('down', 0) == 0 and set(total) >= set(found)


def line(at, start, done, begins=None, **seconds):
  return {'time': at, 'start': start, 'step': done, 'seconds': seconds, **({} if begins is None else {'begins': begins})}


def test_lost_and_down():
  lines = [
      line(10, 1, 0, init=10, begins=0), line(21, 1, 3, init=10, data=1, step=10),  # a line between two saves
      line(32, 1, 5, init=10, data=2, step=20), line(33, 1, 5, init=10, data=2, step=20, save=1),
      line(44, 1, 8, init=10, data=3, step=30, save=1),  # and killed: steps 6 to 8 are lost
      line(107, 2, 5, init=7, begins=5), line(118, 2, 8, init=7, data=1, step=10), line(119, 2, 8, init=7, data=1, step=10, save=1),
      line(130, 2, 11, init=7, data=2, step=20, save=1), line(133, 2, 8, init=10, data=2, step=20, save=1, begins=8),  # went back
      line(155, 2, 12, init=10, data=4, step=40, save=2)]
  assert goodput.summary(lines) == {'init': 20, 'data': 3 - 1 + 4 - 1, 'step': 30 - 10 + 40 - 10, 'save': 3, 'lost': 22,
                                    'down': 107 - 7 - 44}
  again = [dict(l, time=l['time'] - (50 if l['start'] == 2 else 0)) for l in lines]  # the clock was set back meanwhile
  assert goodput.summary(again)['down'] == 6
  assert goodput.summary([dict(l, time=l['time'] - (90 if l['start'] == 2 else 0)) for l in lines])['down'] == 0
  assert goodput.summary([]) == {}
  for ends, down in (('finished', 0), ('SIGINT', 0), (None, 107 - 7 - 44)):  # what runs again was not waited for, if its end was meant
    meant = [dict(l, **({'ends': ends} if ends and l is lines[4] else {})) for l in lines]
    assert goodput.summary(meant).get('down', 0) == down


def test_a_crash_and_a_line_cut_short(texts, tmp_path, monkeypatch, capsys):
  """A run that dies at batch 8, with checkpoints of steps 3 and 6: step 7 is done again, and that is lost."""
  rows = pipeline.Pipeline.rows

  def dies(self, step, start, stop):
    if step == 8:
      time.sleep(1)
      raise InterruptedError
    return rows(self, step, start, stop)
  monkeypatch.setattr(pipeline.Pipeline, 'rows', dies)
  monkeypatch.setattr(goodput, 'EVERY', 0.)
  with pytest.raises(InterruptedError):
    training.train(run_config(texts), tmp_path)
  monkeypatch.setattr(pipeline.Pipeline, 'rows', rows)
  with open(tmp_path / 'goodput.jsonl', 'a', encoding='utf-8') as file:
    file.write('{"time": 17')
  training.train(run_config(texts), tmp_path)
  lines = goodput.read(tmp_path / 'goodput.jsonl')
  assert [(l['start'], l['begins']) for l in lines if 'begins' in l] == [(1, 0), (2, 6)]
  lost = [l for l in lines if l['start'] == 1 and l['step'] > 6]
  assert lost and goodput.summary(lines)['lost'] > 0
  out = capsys.readouterr().out
  assert 'time went to' in out and ' lost ' in out
