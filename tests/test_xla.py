"""Options of the compiler: which each generation of chip gets, and that what a user says wins."""
import jax
import pytest

from jaxlm import xla
from jaxlm.errors import UsageError
from tests import common

SPARSE = 'xla_tpu_enable_sparse_core_collective_offload_all_gather'
FUSED = 'xla_tpu_enable_async_collective_fusion_fuse_all_gather'


@pytest.fixture
def chips(monkeypatch):
  """A function (kind, slices) → a mesh of devices that say they are of it. Which names the compiler knows is not asked."""
  class Device:
    platform = 'tpu'

    def __init__(self, kind, slice_index):
      self.device_kind, self.slice_index = kind, slice_index

  class Mesh:
    def __init__(self, kind, slices):
      import numpy as np
      self.devices = np.array([Device(kind, n) for n in range(slices)])
  monkeypatch.setattr(xla, '_known', lambda ours, theirs, mesh: ours | theirs)
  monkeypatch.setattr('os.environ', {})
  return Mesh


@pytest.mark.parametrize('kind', ['TPU v4', 'TPU v5', 'TPU v5p', 'TPU v6 lite', 'TPU7x'])
def test_only_v5e_fuses_gathers_into_products(chips, kind):
  """The compiler says of any other: "not supported … might lead to incorrect results, hang, SDC"."""
  assert xla.options('', chips('TPU v5 lite', 1))[FUSED] is True
  assert xla.options('', chips(kind, 1)).get(FUSED, False) is False
  assert (SPARSE in xla.options('', chips(kind, 1))) == (kind != 'TPU v4')


def test_what_the_user_says_wins(chips, monkeypatch):
  mesh = chips('TPU v5p', 1)
  assert xla.options(f'{SPARSE}=false xla_new=3', mesh) == {**xla.TPU['TPU v5p'], SPARSE: False, 'xla_new': 3}
  assert SPARSE not in xla.options(f'{SPARSE}=default', mesh)
  for variable in ('LIBTPU_INIT_ARGS', 'XLA_FLAGS'):
    monkeypatch.setattr('os.environ', {variable: f'--xla_other=1 --{SPARSE}=false'})
    assert SPARSE not in xla.options('', mesh)


def test_slices_sum_gradients_beside_the_backward_pass(chips):
  assert xla.BETWEEN_SLICES.items() <= xla.options('', chips('TPU v6 lite', 2)).items()
  assert not xla.BETWEEN_SLICES.keys() & xla.options('', chips('TPU v6 lite', 1)).keys()


def test_an_option_that_this_compiler_does_not_know_is_left_out_or_refused(monkeypatch, capsys):
  mesh = common.mesh_of(2, 1, 1)
  monkeypatch.setitem(xla.TPU, mesh.devices.flat[0].device_kind, {'xla_of_another_version': True, 'xla_embed_ir_in_executable': False})
  assert xla.options('', mesh) == {'xla_embed_ir_in_executable': False}
  assert 'xla_of_another_version' in capsys.readouterr().out
  with pytest.raises(UsageError, match='compiler_options: xla_mine=1: the compiler says'):
    xla.options('xla_mine=1', mesh)
