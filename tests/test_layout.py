"""The sharding tables and the mesh."""
import jax
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType

from jaxlm import layout
from jaxlm.kernels import context
from jaxlm.schema import MeshConfig
from jaxlm.errors import UsageError


def test_specs_follow_from_letters():
  assert layout.spec('BLD') == P(('data', 'fsdp', 'expert'), 'context', None)
  assert layout.spec('BLHK') == P(('data', 'fsdp', 'expert'), 'context', 'tensor', None)
  assert layout.spec('DHK', 'weight') == P(('fsdp', 'stage', 'expert'), 'tensor', None)
  assert layout.spec('EDF', 'weight') == P('expert', ('fsdp', 'stage'), 'tensor')
  assert layout.spec('DR', 'weight') == P(('fsdp', 'stage', 'expert'), None)
  assert layout.spec('RHK', 'weight') == P(('fsdp', 'stage', 'expert'), 'tensor', None)
  assert layout.spec('BLD', 'residual') == P(('data', 'fsdp', 'expert'), ('context', 'tensor'), None)
  assert layout.spec('DHK', 'gathered') == P(None, 'tensor', None)


def test_zigzag_is_its_own_list_of_places_and_comes_back():
  with jax.set_mesh(layout.make_mesh(MeshConfig(1, 2, 1, 4), jax.devices())):
    a_BL = jax.device_put(np.arange(2 * 32).reshape(2, 32), layout.spec('BL'))
    there_BL = jax.jit(context.zigzag)(a_BL)
    places_L = context.places(32, 4)
    np.testing.assert_array_equal(there_BL, np.asarray(a_BL)[:, places_L])
    np.testing.assert_array_equal(context.PlaceOf(32, 4)(np.arange(32)), places_L)
    np.testing.assert_array_equal(jax.jit(lambda a: context.zigzag(a, back=True))(there_BL), a_BL)
  assert places_L[:8].tolist() == [0, 1, 2, 3, 28, 29, 30, 31]  # as many keys before it as any other device's


def test_serving_needs_no_context_and_no_stages():
  assert layout.serving(MeshConfig(2, 4, 1, context=2, stage=3)) == MeshConfig(2, 24, 1)
  assert layout.serving(MeshConfig(2, -1, 2, context=2)) == layout.serving(MeshConfig(2, 4, 2, context=-1)) == MeshConfig(2, -1, 2)


def test_an_axis_cannot_cut_two_dimensions():
  with pytest.raises(ValueError, match='twice'):
    layout.spec('BLHF')


def test_minus_one_fills_and_axes_are_explicit():
  mesh = layout.make_mesh(MeshConfig(2, -1, 2))
  assert {axis: size for axis, size in mesh.shape.items() if size > 1} == {'data': 2, 'fsdp': 2, 'tensor': 2}
  assert set(mesh.axis_types) == {AxisType.Explicit}


@pytest.mark.parametrize('sizes, says', [((0, 1, 1), 'mesh.data=0: wants a count'), ((1, -2, 1), 'mesh.fsdp=-2: wants a count'),
                                         ((-1, 1, -1), 'mesh.tensor=-1: only one axis may be what is left, and mesh.data is')])
def test_sizes_that_are_none_are_refused_wherever_they_come_from(sizes, says):
  """A config's, or those of --mesh, which no config has checked."""
  with pytest.raises(UsageError, match=says):
    layout.make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize('sizes', [(1, 1, 1), (3, -1, 1), (1, 16, 1), (2, 2, 1)])
def test_a_mesh_that_leaves_devices_idle_is_refused(sizes):
  with pytest.raises(UsageError, match='8 devices'):
    layout.make_mesh(MeshConfig(*sizes), jax.devices())
