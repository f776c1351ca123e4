"""F12: a run that goes on with other processes sees each example once, and restores the same bits."""
import pytest

from tests import matrix
from tests.faults import running

pytestmark = matrix.slow


def test_two_processes_then_one_then_four(texts, tmp_path):
  more = ('--config.length=512', '--config.eval_every=0')  # an epoch is 63 windows: it ends in step 8
  assert running.done(2, texts, tmp_path / 'whole', *more)[0] == 0
  for processes, end in ((2, 10), (1, 20), (4, 30)):
    code, out, _ = running.done(processes, texts, tmp_path / 'parts', *more, f'--config.steps={end}')
    assert code == 0, out
  whole, parts = ([(l['data'], l['loss']) for l in running.lines(tmp_path / name)] for name in ('whole', 'parts'))
  assert [data for data, _ in parts] == [data for data, _ in whole] and len(parts) == 30
  assert [loss for _, loss in parts] == pytest.approx([loss for _, loss in whole], rel=1e-5)
  matrix.record('F12', '2 → 1 → 4 processes, over the end of an epoch', 'the same data, losses within 1e-5', trials=3)
