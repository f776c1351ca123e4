"""What an elastic run asks before it becomes a smaller one; runs that do are in tests/faults/test_elastic.py."""
import jax
import pytest

from jaxlm import elastic, layout
from jaxlm.errors import UsageError
from tests import common


def test_fits_is_what_a_mesh_divides():
  c = common.config(**{'batch': 12, 'model.D': 48, 'mesh.fsdp': -1, 'mesh.tensor': 2})
  assert [n for n in range(1, 13) if layout.fits(c, n)] == [n for n in range(1, 13) if n % 2 == 0 and 12 % (n // 2) == 0]
  assert not layout.fits(common.config(**{'mesh.fsdp': 4}), 2)


def test_tpus_are_refused(monkeypatch):
  monkeypatch.setattr(elastic, '_watching', True)
  monkeypatch.setattr(elastic, '_fits', None)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  with pytest.raises(UsageError, match='--elastic: a TPU slice is lost with its host; leave it out'):
    elastic.fits(lambda processes: True)
