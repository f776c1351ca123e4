"""Updates that are not finite, or spike: the run ends as one whose data never held those batches, bit for bit."""
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import guard, loop, objectives, train as training
from jaxlm.checkpoint import Checkpoints, steps
from jaxlm.data import pipeline
from jaxlm.errors import CheckpointError, JaxlmError, Preempted
from jaxlm.schema import GuardConfig
from tests import common, matrix
from tests.test_checkpoint import damage, losses, metrics, run_config, state_of

NAN, INF = 100, 200  # marks of these two


def tampered(replace):
  """The run's data and loss, to tamper with: `poison` {position: what the loss is multiplied by}, `leave_out` positions,
  `kill` where the run dies, once; `read` lists the positions of batches that were made. replace: setattr, or as it."""
  class Data:
    poison, leave_out, kill, read = {}, (), None, []
  rows, of = pipeline.Pipeline.rows, objectives.of

  def tampered_rows(self, step, start, stop):
    kept = [n for n in range(step + len(Data.leave_out) + 1) if n not in Data.leave_out][step]
    Data.read.append(kept)
    if kept == Data.kill:
      Data.kill = None
      raise InterruptedError
    out = rows(self, kept, start, stop)
    if kept in Data.poison:
      out['weights'][0, 0] = 2 + min(np.nan_to_num(Data.poison[kept], nan=NAN), INF)  # weights are 0 or 1: this is a mark
    return out

  def tampered_of(config):
    objective = of(config)

    def marked(config, params, batch, *rest):
      mark = batch['weights'].max()
      loss, more = objective(config, params, {**batch, 'weights': jnp.minimum(batch['weights'], 1)}, *rest)
      factor = jnp.where(mark == 2 + NAN, jnp.nan, jnp.where(mark == 2 + INF, jnp.inf, mark - 2))
      return loss * jnp.where(mark > 1, factor, 1.), more
    return marked
  replace(pipeline.Pipeline, 'rows', tampered_rows)
  replace(objectives, 'of', tampered_of)
  return Data


@pytest.fixture
def data(monkeypatch):
  return tampered(monkeypatch.setattr)


def guarded(texts, **changes):
  return run_config(texts, **{'optimizer.schedule': 'constant', 'guard.patience': 3, 'data.heldout': 0., **changes})


def clean(data, texts, workdir, leave_out, **changes):
  """The state of a run whose data does not have these batches."""
  data.poison, data.leave_out = {}, leave_out
  c = guarded(texts, **changes)
  training.train(c, workdir)
  return state_of(workdir, c.steps)


@pytest.mark.parametrize('what', [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_as_a_batch_that_was_never_there(texts, data, tmp_path, what, capsys):
  data.poison = {4: what, 8: what}
  training.train(guarded(texts), tmp_path / 'a')
  assert data.read == list(range(12))
  found = state_of(tmp_path / 'a', 12)
  lines = metrics(tmp_path / 'a')
  assert [m['step'] for m in lines if 'skipped' in m] == [5, 9]
  assert [m['step'] for m in lines if 'loss' in m] == [1, 2, 3, 4, 6, 7, 8, 10, 11, 12]
  assert all(np.isfinite(m['loss']) for m in lines if 'loss' in m)
  assert capsys.readouterr().out.count('its update is skipped') == 2
  assert steps(tmp_path / 'a') == [3, 6, 10, 12]  # 9 would have been a save within a streak
  assert found['step'] == 10
  common.assert_trees_equal(found, clean(data, texts, tmp_path / 'b', (4, 8), steps=10))
  matrix.record('F14', f'the loss is {what} at a step', 'skipped, as a batch that was never there, bit for bit', lost=0)


SPIKE = {'guard.spike': 20., 'guard.window': 8, 'steps': 16}


def test_a_spike_is_as_a_batch_that_was_never_there(texts, data, tmp_path):
  data.poison = {10: 10.}
  training.train(guarded(texts, **SPIKE), tmp_path / 'a')
  skipped = [m for m in metrics(tmp_path / 'a') if 'skipped' in m]
  assert [m['step'] for m in skipped] == [11] and skipped[0]['skipped_loss'] > 20
  found = state_of(tmp_path / 'a', 16)
  common.assert_trees_equal(found, clean(data, texts, tmp_path / 'b', (10,), **{**SPIKE, 'steps': 15}))
  matrix.record('F14', 'a loss times 10 at a step', 'skipped, as a batch that was never there, bit for bit', lost=0)
  data.poison, data.leave_out = {10: 10.}, ()
  training.train(guarded(texts, **{**SPIKE, 'guard.spike': 0.}), tmp_path / 'c')  # off: it is applied
  assert state_of(tmp_path / 'c', 16)['step'] == 16


@matrix.slow
@pytest.mark.parametrize('stops', [(9,), (10, 12)])
def test_what_the_good_steps_were_like_is_restored_exactly(texts, data, tmp_path, stops):
  data.poison = {10: 10., 13: 10.}
  training.train(guarded(texts, **SPIKE), tmp_path / 'a')
  for stop in (*stops, 16):
    training.train(guarded(texts, **{**SPIKE, 'steps': stop}), tmp_path / 'b')
  meta = [Checkpoints(tmp_path / name, read_only=True).read_meta(16) for name in 'ab']
  assert meta[0]['guard'] == meta[1]['guard'] and meta[0]['guard']['seen'] == 8
  assert losses(tmp_path / 'a') == losses(tmp_path / 'b')
  common.assert_trees_equal(state_of(tmp_path / 'a', 16), state_of(tmp_path / 'b', 16))


def test_a_checkpoint_from_before_there_was_a_guard(texts, data, tmp_path, monkeypatch):
  run_meta = loop.run_meta

  def old_meta(*args):
    meta = run_meta(*args)
    del meta['config']['guard']
    return meta
  monkeypatch.setattr(loop, 'run_meta', old_meta)
  save = Checkpoints.save
  monkeypatch.setattr(Checkpoints, 'save', lambda self, step, state, meta: save(
      self, step, state, {k: v for k, v in meta.items() if k not in ('jumps', 'guard')}))
  training.train(guarded(texts, steps=6), tmp_path)
  monkeypatch.setattr(Checkpoints, 'save', save)
  training.train(guarded(texts, **{**SPIKE, 'steps': 8}), tmp_path)
  assert Checkpoints(tmp_path, read_only=True).read_meta(8)['guard']['seen'] == 2


def test_patience_ends_and_the_run_goes_back_and_jumps_over_the_data(texts, data, tmp_path, capsys):
  data.poison = {7: np.nan, 8: np.nan, 9: np.nan}
  training.train(guarded(texts), tmp_path / 'a')
  assert 'goes back to step 6, and over the data of 4 steps' in capsys.readouterr().out
  # Steps 1 to 10, of which three are skipped, and a batch made ahead; then step 7 again, with batch 10.
  assert data.read == [*range(11), *range(10, 16)]
  assert steps(tmp_path / 'a') == [3, 6, 9, 12]
  meta = Checkpoints(tmp_path / 'a', read_only=True).read_meta(12)
  assert meta['jumps'] == [[6, 4]] and meta['examples'] == 16 * 8
  lines = metrics(tmp_path / 'a')
  assert [m['step'] for m in lines if 'loss' in m] == list(range(1, 13))
  assert [(m['step'], m['jumped']) for m in lines if 'jumped' in m] == [(7, 4)]
  matrix.record('F14', 'NaN at 3 steps in a row', 'back to the newest good checkpoint and over the data', lost=4)
  found = state_of(tmp_path / 'a', 12)
  common.assert_trees_equal(found, clean(data, texts, tmp_path / 'b', (6, 7, 8, 9)))
  assert losses(tmp_path / 'a') == losses(tmp_path / 'b')


@matrix.slow
def test_a_run_that_jumped_goes_on_where_the_unbroken_one_would(texts, data, tmp_path):
  data.poison = {7: np.nan, 8: np.nan, 9: np.nan, 14: np.nan}
  training.train(guarded(texts), tmp_path / 'a')
  for data.kill in (8, 11, 15):  # before it is known that 7 to 9 are bad; when it is; after the jump is saved
    with pytest.raises(InterruptedError):
      training.train(guarded(texts), tmp_path / 'b')
  training.train(guarded(texts), tmp_path / 'b')
  assert losses(tmp_path / 'a') == losses(tmp_path / 'b')
  common.assert_trees_equal(state_of(tmp_path / 'a', 12), state_of(tmp_path / 'b', 12))
  assert Checkpoints(tmp_path / 'b', read_only=True).read_meta(12)['jumps'] == [[6, 4]]


def test_bad_data_before_the_first_checkpoint_and_at_the_end(texts, data, tmp_path):
  data.poison = {n: np.nan for n in (1, 2, 3, 15)}
  training.train(guarded(texts), tmp_path / 'a')  # back to step 0, over 4; and at step 12, which is batch 15: back to 9, over 3
  meta = Checkpoints(tmp_path / 'a', read_only=True).read_meta(12)
  assert meta['jumps'] == [[0, 4], [9, 3]] and meta['examples'] == 19 * 8
  found = state_of(tmp_path / 'a', 12)
  common.assert_trees_equal(found, clean(data, texts, tmp_path / 'b', (0, 1, 2, 3, 13, 14, 15)))


def test_when_going_back_does_not_help_the_error_names_the_step(texts, data, tmp_path):
  data.poison = {n: np.nan for n in range(7, 100)}
  with pytest.raises(JaxlmError, match=r'step 9: the loss is nan and .*3 updates .* after 2 times back to step 6\. .*--step=15') as e:
    training.train(guarded(texts, **{'guard.rollbacks': 2}), tmp_path)
  assert '\n' not in str(e.value)
  assert steps(tmp_path) == [3, 6]
  assert data.read[-2:] == [15, 16]  # the batch that it says to look at was the last whose step was read


@matrix.slow
def test_where_it_goes_back_to_is_the_newest_that_is_good(texts, data, tmp_path, monkeypatch):
  data.poison = {7: np.nan, 8: np.nan, 9: np.nan}
  rows, bad = pipeline.Pipeline.rows, [6]

  def damaging(self, step, start, stop):
    while step == 10 and bad:
      if bad[0] in steps(tmp_path / 'a'):  # its save may be under way
        damage(tmp_path / 'a', bad.pop(0))
    return rows(self, step, start, stop)
  monkeypatch.setattr(pipeline.Pipeline, 'rows', damaging)
  training.train(guarded(texts), tmp_path / 'a')
  meta = Checkpoints(tmp_path / 'a', read_only=True).read_meta(12)
  assert meta['jumps'] == [[3, 7]] and meta['examples'] == 19 * 8 and data.read == [*range(11), *range(10, 19)]
  found = state_of(tmp_path / 'a', 12)
  common.assert_trees_equal(found, clean(data, texts, tmp_path / 'b', (3, 4, 5, 6, 7, 8, 9)))
  shutil.rmtree(tmp_path / 'a')
  bad[:], data.poison, data.leave_out = [3, 6], {7: np.nan, 8: np.nan, 9: np.nan}, ()
  with pytest.raises(CheckpointError, match=r'none of the steps \[6, 3\]'):
    training.train(guarded(texts), tmp_path / 'a')


@matrix.slow
def test_a_signal_while_updates_are_skipped_saves_nothing(texts, data, tmp_path, monkeypatch):
  data.poison = {7: np.nan, 8: np.nan}
  rows = pipeline.Pipeline.rows

  def signalled(self, step, start, stop):
    if step == 9:
      os.kill(os.getpid(), signal.SIGTERM)
    return rows(self, step, start, stop)
  monkeypatch.setattr(pipeline.Pipeline, 'rows', signalled)
  with pytest.raises(Preempted, match='saved step 6 of 12'):
    training.train(guarded(texts), tmp_path / 'a')
  assert steps(tmp_path / 'a') == [3, 6]
  monkeypatch.setattr(pipeline.Pipeline, 'rows', rows)
  training.train(guarded(texts), tmp_path / 'a')
  found = state_of(tmp_path / 'a', 12)
  common.assert_trees_equal(found, clean(data, texts, tmp_path / 'b', (7, 8), steps=10))


def test_judge_against_numpy():
  c, rng = GuardConfig(spike=3., window=10), np.random.default_rng(0)
  history, good, seen = guard.fresh(c), [], []
  judged = jax.jit(lambda h, l, n: guard.judge(c, h, l, n))
  for n in range(300):
    loss, norm = rng.normal(3, 0.1) + (rng.random() < 0.1), rng.normal(1, 0.1) + (rng.random() < 0.1)
    loss = np.float32(loss if n % 50 else np.inf)
    last = np.array(good[-10:], np.float64)
    expected = np.isfinite(loss) and (len(good) < 5 or bool(([loss, norm] <= last.mean(0) + 3 * last.std(0)).all()))
    finite, applied, after = judged(history, loss, np.float32(norm))
    assert bool(finite) == np.isfinite(loss) and bool(applied) == expected, n
    seen.append(expected)
    if expected:
      good.append([loss, norm])
      history = after
  assert 200 < sum(seen) < 290
  back = guard.from_meta(c, json.loads(json.dumps(guard.to_meta(history))), history)
  common.assert_trees_equal(history, back)
  fewer = guard.from_meta(GuardConfig(window=4), guard.to_meta(history), history)
  np.testing.assert_array_equal(fewer['losses'], history['losses'][-4:])
