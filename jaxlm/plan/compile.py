"""A run's step compiled for a pod that is not here: the real compiler, given the pod's topology, runs on this machine's CPU.

Nothing is allocated and no chip is touched. It wants the compilers: for TPUs the package libtpu, for GPUs XLA's CUDA plugin with
ptxas and cuDNN (the extra `pods`).
"""
import contextlib
import dataclasses
import importlib.util
import os
import time

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from jaxlm import layout, xla
from jaxlm.errors import UsageError, extra
from jaxlm.optimizer import make_optimizer
from jaxlm.plan import gpus, hlo
from jaxlm.plan.topology import Topology, parse
from jaxlm.schema import Config
from jaxlm.step import abstract_state, make_step
from jaxlm.train import abstract_batch
from jaxlm.validate import check_mesh

GIB = 2 ** 30


class DoesNotFit(Exception):
  """A step that wants more HBM than a chip has, by its compiler's word."""


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


COMPILERS = {'tpu': 'libtpu', 'gpu': 'jax_cuda12_plugin'}  # modules that bring them


def check_installed(pod: Topology) -> None:
  """UsageError if this machine has not the compiler for a pod."""
  module = COMPILERS['gpu' if pod.is_gpu else 'tpu']
  if importlib.util.find_spec(module) is None:
    raise UsageError(f'--topology={pod.name}: its compiler ({module}) is not installed; {extra("pods")}')


def devices(pod: Topology):
  """The devices of a pod, as the compiler describes them. UsageError if it is not installed or knows no such topology."""
  check_installed(pod)
  try:
    return _gpus(pod) if pod.is_gpu else _tpus(pod)
  except RuntimeError as e:
    raise UsageError(f'--topology={pod.name}: {str(e).splitlines()[0]}') from e


def _tpus(pod: Topology):
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # else libtpu asks a cloud's metadata server what machine this is
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # a job that has this machine's chips has libtpu too; none is touched here
  more = {'chip_config_name': 'megacore'} if pod.kind == 'v4' else {}  # both cores of a chip as one device, as its runtime has them
  return topologies.get_topology_desc(platform='tpu', topology_name=pod.name, num_slices=pod.slices, **more).devices


def _gpus(pod: Topology):
  hosts, each = pod.shape
  return topologies.get_topology_desc(pod.name, platform='cuda', target_config=gpus.target(pod.kind), topology=f'1x{hosts}x{each}').devices


def step(config: Config, topology: str, slices: int = 1) -> Compiled:
  """The train step of a config on its mesh over all chips of the pod, as a run there would have it. DoesNotFit if it does not."""
  pod = parse(topology, slices)
  mesh = layout.make_mesh(config.mesh, devices(pod))
  check_mesh(config, dict(mesh.shape))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    tx, schedule = make_optimizer(config.optimizer, config.steps)
    state = layout.named(abstract_state(config, tx), mesh)
    lowered = jax.jit(make_step(config, tx, schedule), donate_argnums=0).trace(state, abstract_batch(config, mesh)).lower(
        lowering_platforms=('cuda' if pod.is_gpu else 'tpu',))
  with _uncached():
    options = xla.options(config.compiler_options, mesh)
  return of(lowered, mesh, options)


@contextlib.contextmanager
def _uncached():
  """Without JAX's cache of compiled programs: what it would keep cannot be loaded where there is no chip. JAX decides only once whether
  it has one, so it is made to decide anew."""
  cached = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    jax.config.update('jax_enable_compilation_cache', cached)
    compilation_cache.reset_cache()


def of(lowered, mesh, options: dict[str, str] | None = None) -> Compiled:
  """What the compiler makes of any step that was lowered for devices of this mesh. DoesNotFit."""
  start = time.monotonic()
  try:
    with _uncached():
      compiled = lowered.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' in str(e):
      raise DoesNotFit(str(e).splitlines()[0]) from e
    raise
  seconds, memory, text = time.monotonic() - start, compiled.memory_analysis(), compiled.as_text()
  return Compiled(dict(mesh.shape), memory.argument_size_in_bytes / GIB, memory.temp_size_in_bytes / GIB,
                  memory.peak_memory_in_bytes / GIB, seconds, text, hlo.read(text))
