"""The sharding tables and the mesh."""
import jax
import pytest
from jax import P
from jax.sharding import AxisType

from jaxlm import layout
from jaxlm.schema import MeshConfig
from jaxlm.errors import UsageError


def test_specs_follow_from_letters():
  assert layout.spec('BLD') == P(('data', 'fsdp', 'expert'), 'context', None)
  assert layout.spec('BLHK') == P(('data', 'fsdp', 'expert'), 'context', 'tensor', None)
  assert layout.spec('DHK', 'weight') == P(('fsdp', 'stage', 'expert'), 'tensor', None)
  assert layout.spec('EDF', 'weight') == P('expert', ('fsdp', 'stage'), 'tensor')
  assert layout.spec('BLD', 'residual') == P(('data', 'fsdp', 'expert'), ('context', 'tensor'), None)
  assert layout.spec('DHK', 'gathered') == P(None, 'tensor', None)


def test_an_axis_cannot_cut_two_dimensions():
  with pytest.raises(ValueError, match='twice'):
    layout.spec('BLHF')


def test_minus_one_fills_and_axes_are_explicit():
  mesh = layout.make_mesh(MeshConfig(2, -1, 2))
  assert {axis: size for axis, size in mesh.shape.items() if size > 1} == {'data': 2, 'fsdp': 2, 'tensor': 2}
  assert set(mesh.axis_types) == {AxisType.Explicit}


@pytest.mark.parametrize('sizes', [(1, 1, 1), (3, -1, 1), (1, 16, 1), (2, 2, 1)])
def test_a_mesh_that_leaves_devices_idle_is_refused(sizes):
  with pytest.raises(UsageError, match='8 devices'):
    layout.make_mesh(MeshConfig(*sizes), jax.devices())
