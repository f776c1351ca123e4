"""The mesh, and the two tables that say which of its axes cut which letter.

A weight's and an activation's PartitionSpec follow from the letters of its dimensions: a new parallel axis is an
edit of these tables. Meshes are Explicit: the sharding is part of an array's type, and a wrong combination is an
error with a line number when the step is traced.
"""
import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import P
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxlm.schema import Config, MeshConfig
from jaxlm.validate import check_mesh, filled
from jaxlm.errors import UsageError

# From the axis whose devices may lie farthest apart to that whose devices must be neighbours.
AXES = ('data', 'stage', 'fsdp', 'expert', 'context', 'tensor')
_WIDE = {'H': 'tensor', 'G': 'tensor', 'F': 'tensor', 'V': ('tensor', 'stage'), 'E': 'expert'}
_SHARED = ('fsdp', 'stage', 'expert')  # the axes whose devices share a weight that all of them use
WEIGHT = {'D': _SHARED, 'R': _SHARED, **_WIDE}
GATHERED = _WIDE  # a weight while it is in use
ACT = {'B': ('data', 'fsdp', 'expert'), 'L': 'context', 'M': 'context', **_WIDE}
RESIDUAL = {**ACT, 'L': ('context', 'tensor')}  # between the blocks of a layer
YIELD = 'DBR'  # letters that leave an axis to others of the same array, and to those before them here: E, not D, cuts 'EDF' over expert
TABLES = {'weight': WEIGHT, 'act': ACT, 'gathered': GATHERED, 'residual': RESIDUAL}


def spec(dims: str, kind: str = 'act') -> P:
  """'BLD' → P(('data', 'fsdp', 'expert'), 'context', None). ValueError if an axis would cut two dimensions."""
  def free(d):  # of the axes that cut d, those that no letter before which it yields has
    first = [other for other in dims if other not in YIELD or other in YIELD[:YIELD.index(d)]] if d in YIELD else []
    return tuple(a for a in axes(d, kind) if not any(a in axes(other, kind) for other in first))
  cut = [free(d) for d in dims]
  if len(set(sum(cut, ()))) != len(sum(cut, ())):
    raise ValueError(f'{kind} {dims!r} would use a mesh axis twice: {cut}')
  return P(*(c if len(c) > 1 else c[0] if c else None for c in cut))


def axes(letter: str, kind: str = 'act') -> tuple[str, ...]:
  """Of the mesh, that cut a letter. 'context' is none of them on a mesh that has one of it: recurrent layers go along L, and
  what is cut, be it into one piece, cannot be gone along."""
  found = TABLES[kind].get(letter, ())
  found = (found,) if isinstance(found, str) else found
  mesh = jax.sharding.get_abstract_mesh()
  return found if mesh.empty or mesh.shape['context'] > 1 else tuple(a for a in found if a != 'context')


def axes_of(cut) -> tuple[str, ...]:
  """Those in a part of a PartitionSpec."""
  return () if cut is None else cut if isinstance(cut, tuple) else (cut,)


def shards(letter: str, kind: str = 'act', sizes=None) -> int:
  """Into how many pieces the current mesh (or one of these sizes) cuts a letter."""
  sizes = jax.sharding.get_abstract_mesh().shape if sizes is None else sizes
  return math.prod(sizes[a] for a in axes(letter, kind))


def stages() -> int:
  """Of the pipeline that the current mesh has; 1 is none."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape['stage']


def deal(count: int, tree):
  """[B, …] → [count, B/count, …]. Rows are dealt out in turn, so that each piece lies on all devices evenly."""
  def one(a):
    rows = jnp.moveaxis(a.reshape(a.shape[0] // count, count, *a.shape[1:]), 1, 0)
    return jax.sharding.reshard(rows, P(None, *jax.typeof(a).sharding.spec))
  return jax.tree.map(one, tree)


def collect(pieces):
  """The inverse of `deal`."""
  def one(a):
    return jax.sharding.reshard(jnp.moveaxis(a, 0, 1).reshape(-1, *a.shape[2:]), P(*jax.typeof(a).sharding.spec[1:]))
  return jax.tree.map(one, pieces)


def platform() -> str:
  """'cpu', 'gpu' or 'tpu': what the current mesh is made of, which need not be what this process runs on; 'unknown'
  for a mesh of sizes only."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else 'unknown'


def device_kind() -> str:
  """What the current mesh is made of, as JAX names it: 'TPU v5'; '' for a mesh of sizes only."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.device_kind if device else ''


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """An Explicit mesh of AXES over `devices` (all of the job's if None); −1 is filled. UsageError if they do not fit."""
  devices = jax.devices() if devices is None else devices
  sizes = filled(config, len(devices))
  shape = tuple(sizes[axis] for axis in AXES)
  types = (AxisType.Explicit,) * len(AXES)
  slices = len({getattr(d, 'slice_index', 0) for d in devices}) if devices[0].platform == 'tpu' else 1
  if slices == 1:
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)  # if need be: fsdp 32 of 16 × 16, say
    return Mesh(grid, AXES, axis_types=types)
  if shape[0] % slices:
    raise UsageError(f'mesh.data={shape[0]}: only this axis may cross the network between the {slices} slices; set a multiple of it')
  across = (slices,) + (1,) * (len(AXES) - 1)
  inside = (shape[0] // slices, *shape[1:])
  return Mesh(mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True), AXES, axis_types=types)


def serving(config: MeshConfig) -> MeshConfig:
  """A run's mesh for generation and scoring, whose rows are short and whose layers go one after another: the devices of
  mesh.context and mesh.stage become fsdp's."""
  fsdp = -1 if config.fsdp == -1 else config.fsdp * abs(config.context * config.stage)
  return dataclasses.replace(config, fsdp=-1 if min(config.context, config.stage) == -1 else fsdp, context=1, stage=1)


def run_mesh(config: Config, devices=None) -> Mesh:
  """make_mesh for a run, with everything checked that the mesh must divide."""
  mesh = make_mesh(config.mesh, devices)
  check_mesh(config, dict(mesh.shape))
  return mesh


def fits(config: Config, devices: int) -> bool:
  """Whether so many devices can make a mesh for a run."""
  try:
    check_mesh(config, filled(config.mesh, devices))
    return True
  except UsageError:
    return False


def named(tree, mesh: Mesh):
  """Abstract arrays with the shardings that eval_shape found, bound to real devices (Orbax and AOT want that)."""
  def bind(a):
    sharding = jax.sharding.NamedSharding(mesh, P())
    if a.sharding is not None:
      sharding = jax.sharding.NamedSharding(mesh, a.sharding.spec, memory_kind=a.sharding.memory_kind)
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
  return jax.tree.map(bind, tree)
