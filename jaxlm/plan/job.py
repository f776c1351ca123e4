"""A run's step as the planner sees it: a config on a mesh of a pod, and how much of everything one device has."""
import collections
import dataclasses
import functools
import math

import jax
from jax.sharding import AbstractMesh, AxisType

from jaxlm import layout
from jaxlm.optimizer import make_optimizer, path_of
from jaxlm.plan.topology import Topology
from jaxlm.schema import Config, MeshConfig, layer_kinds
from jaxlm.step import abstract_state

ITEM = {'float32': 4, 'bfloat16': 2}


@dataclasses.dataclass(frozen=True)
class Arrays:
  """Those of the state that lie alike: how much they are as wholes, and the axes of the mesh that cut them."""
  of: str            # 'params' | 'opt'
  where: str         # 'layers' | 'unembed' | 'other'
  gathered: tuple[str, ...]  # axes that cut their width D: over these a weight is gathered while it is in use
  kept: tuple[str, ...]      # all other axes that cut them
  on_host: bool
  size: int = 0      # elements
  bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Job:
  config: Config
  mesh: dict[str, int]  # devices of each axis, all filled
  pod: Topology
  arrays: tuple[Arrays, ...]

  def shards(self, letter: str, kind: str = 'act') -> int:
    """Into how many pieces the mesh cuts a letter."""
    return layout.shards(letter, kind, self.mesh)

  @property
  def rows(self) -> float:
    """Sequences of a device in a microbatch."""
    return self.config.batch / self.config.microbatches / self.shards('B')

  @property
  def tokens(self) -> float:
    """Of a device in a microbatch; devices of mesh.tensor and mesh.stage work on the same ones."""
    return self.rows * self.config.length / self.mesh['context']

  def own(self, arrays: Arrays) -> float:
    """The share of arrays that a device has at rest."""
    return 1 / self.cut(arrays.gathered + arrays.kept)

  def cut(self, axes) -> int:
    return math.prod(self.mesh[a] for a in axes)

  @functools.cached_property
  def feeds(self) -> dict[str, int]:
    """'mlp' | 'moe' → layers that have it."""
    return dict(collections.Counter(feed for _, feed in layer_kinds(self.config.model)))


def job(config: Config, mesh: dict[str, int], pod: Topology, traced: tuple[Arrays, ...] | None = None) -> Job:
  """The step of a config, on a mesh in place of its own. traced: its arrays, if they are known."""
  config = dataclasses.replace(config, mesh=MeshConfig(**mesh))
  return Job(config, {axis: mesh[axis] for axis in layout.AXES}, pod, traced or arrays(config))


def arrays(config: Config) -> tuple[Arrays, ...]:
  """Those of a config's state, whatever its mesh: it is only traced."""
  mesh = AbstractMesh((1,) * len(layout.AXES), layout.AXES, axis_types=(AxisType.Explicit,) * len(layout.AXES))
  with jax.sharding.use_abstract_mesh(mesh):
    state = abstract_state(config, make_optimizer(config.optimizer, config.steps)[0])
  found: dict[Arrays, list[int]] = {}
  for section in ('params', 'opt'):
    for path, a in jax.tree_util.tree_flatten_with_path(state[section])[0]:
      spec = [(e,) if isinstance(e, str) else e or () for e in (a.sharding.spec if a.sharding is not None else ())]
      path = path_of(path)
      where = 'layers' if 'layers/' in path else 'unembed' if 'unembed' in path else 'other'
      key = Arrays(section, where, sum((e for e in spec if 'fsdp' in e), ()), sum((e for e in spec if 'fsdp' not in e), ()),
                   a.sharding is not None and a.sharding.memory_kind == 'pinned_host')
      sums = found.setdefault(key, [0, 0])
      sums[0] += a.size
      sums[1] += a.size * a.dtype.itemsize
  return tuple(dataclasses.replace(key, size=size, bytes=total) for key, (size, total) in found.items())
