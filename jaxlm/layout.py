"""The mesh, and the two tables that say which of its axes cut which letter.

A weight's and an activation's PartitionSpec follow from the letters of its dimensions: a new parallel axis is an
edit of these tables. Meshes are Explicit: the sharding is part of an array's type, and a wrong combination is an
error with a line number when the step is traced.
"""
import jax
import numpy as np
from jax import P
from jax.sharding import AxisType, Mesh

from jaxlm.schema import Config, MeshConfig
from jaxlm.validate import check_mesh
from jaxlm.errors import UsageError

AXES = ('data', 'fsdp', 'tensor')
WEIGHT = {'D': 'fsdp', 'H': 'tensor', 'G': 'tensor', 'F': 'tensor', 'V': 'tensor'}
ACT = {'B': ('data', 'fsdp'), 'H': 'tensor', 'G': 'tensor', 'F': 'tensor', 'V': 'tensor'}
GATHERED = {letter: axis for letter, axis in WEIGHT.items() if axis != 'fsdp'}  # a weight while it is in use
TABLES = {'weight': WEIGHT, 'act': ACT, 'gathered': GATHERED}


def spec(dims: str, kind: str = 'act') -> P:
  """'BLD' → P(('data', 'fsdp'), None, None). ValueError if an axis would cut two dimensions."""
  axes = [TABLES[kind].get(d) for d in dims]
  used = [a for axis in axes for a in (axis if isinstance(axis, tuple) else (axis,)) if a is not None]
  if len(set(used)) != len(used):
    raise ValueError(f'{kind} {dims!r} would use a mesh axis twice: {axes}')
  return P(*axes)


def platform() -> str:
  """'cpu', 'gpu' or 'tpu': what the current mesh is made of, which need not be what this process runs on; 'unknown'
  for a mesh of sizes only."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else 'unknown'


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """An Explicit mesh (data, fsdp, tensor) over `devices` (all of the job's if None); −1 is filled.

  UsageError if the axes do not use exactly these devices: a run never silently leaves some idle.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {axis: getattr(config, axis) for axis in AXES}
  known = int(np.prod([s for s in sizes.values() if s != -1]))
  text = ' × '.join(f'{a}={s}' for a, s in sizes.items())
  if len(devices) % known or (-1 not in sizes.values() and known != len(devices)):
    raise UsageError(f'mesh {text} does not fit {len(devices)} devices; set one axis to -1 to fill')
  shape = tuple(len(devices) // known if s == -1 else s for s in sizes.values())
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)


def run_mesh(config: Config, devices=None) -> Mesh:
  """make_mesh for a run, with everything checked that the mesh must divide."""
  mesh = make_mesh(config.mesh, devices)
  check_mesh(config, dict(mesh.shape))
  return mesh


def named(tree, mesh: Mesh):
  """Abstract arrays with the shardings that eval_shape found, bound to real devices (Orbax and AOT want that)."""
  def bind(a):
    sharding = jax.sharding.NamedSharding(mesh, a.sharding.spec if a.sharding is not None else P())
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
  return jax.tree.map(bind, tree)
