"""A run's step compiled for a pod that is not here: the real compiler, given the pod's topology, runs on this machine's CPU.

Nothing is allocated and no chip is touched. It wants the package libtpu (`pip install 'jaxlm[tpu]'`).
"""
import dataclasses
import os
import time

import jax
from jax.experimental import topologies

from jaxlm import layout
from jaxlm.errors import UsageError
from jaxlm.optimizer import make_optimizer
from jaxlm.plan import hlo
from jaxlm.schema import Config
from jaxlm.step import abstract_state, make_step
from jaxlm.train import abstract_batch
from jaxlm.validate import check_mesh

GIB = 2 ** 30


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler made of a step, for one chip of the pod. Memory is in GiB; `peak` is the most that is there at once, which
  differs less between compilers than `temporaries`, their sum with what is reused counted as it is laid out."""
  mesh: dict[str, int]
  arguments: float
  temporaries: float
  peak: float
  seconds: float         # of compiling
  text: str              # the scheduled program
  ops: list[hlo.Op]


def devices(topology: str, slices: int = 1):
  """The chips of 'v5p:4x4x8', as many slices of them. UsageError if the compiler knows no such topology."""
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # else libtpu asks a cloud's metadata server what machine this is
  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=topology, num_slices=slices).devices
  except RuntimeError as e:
    raise UsageError(f'--topology={topology}: {str(e).splitlines()[0]}') from e


def step(config: Config, topology: str, slices: int = 1, options: dict[str, str] | None = None) -> Compiled:
  """The train step of a config on its mesh over all chips of the pod. options: the compiler's own."""
  mesh = layout.make_mesh(config.mesh, devices(topology, slices))
  check_mesh(config, dict(mesh.shape))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    tx, schedule = make_optimizer(config.optimizer, config.steps)
    state = layout.named(abstract_state(config, tx), mesh)
    lowered = jax.jit(make_step(config, tx, schedule), donate_argnums=0).lower(state, abstract_batch(config, mesh))
  start = time.monotonic()
  cached = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)  # what it would keep cannot be loaded where there is no chip
  try:
    compiled = lowered.compile(compiler_options=options)
  finally:
    jax.config.update('jax_enable_compilation_cache', cached)
  seconds, memory, text = time.monotonic() - start, compiled.memory_analysis(), compiled.as_text()
  return Compiled(dict(mesh.shape), memory.argument_size_in_bytes / GIB, memory.temp_size_in_bytes / GIB,
                  memory.peak_memory_in_bytes / GIB, seconds, text, hlo.read(text))
