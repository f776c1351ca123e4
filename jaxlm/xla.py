"""What XLA's compilers are asked for beyond their defaults, in a train step: the same for runs and for plans of pods.

The options differ by generation of chip, because the compiler hides collectives by different means on each, and refuses, or
miscompiles, those of another (libtpu 0.0.52 on v5p: "Continuation fusion for AllGather … might lead to incorrect results, hang,
SDC"). What a user sets in LIBTPU_INIT_ARGS, XLA_FLAGS or config.compiler_options wins over these tables.
"""
import os
import re

import jax

from jaxlm.errors import UsageError
from jaxlm.metrics import say

Options = dict[str, str | int | bool]

# v5e: the weights of the next layer are gathered inside the matrix products of this one. By its defaults the compiler waits for most
# gathers. Source: MaxText's benchmarks/xla_flags_library.py (CF_FOR_ALL_GATHER). Only v5e's compiler supports it.
_CONTINUATION_FUSION = {
    'xla_enable_async_all_gather': True,
    'xla_tpu_enable_async_collective_fusion': True,
    'xla_tpu_enable_async_collective_fusion_fuse_all_gather': True,
    'xla_tpu_enable_async_collective_fusion_multiple_steps': True,
    'xla_tpu_overlap_compute_collective_tc': True,
}
# v5p and later: the SparseCores run collectives while the TensorCores compute. Sources: MaxText's xla_flags_library.py
# (ENABLE_SPARSECORE_OFFLOADING_FOR_RS_AG_AR, without xla_sc_disjoint_spmem, which the compilers here do not know), and Google's
# training recipes for TPU7x (github.com/AI-Hypercomputer/tpu-recipes, training/ironwood).
_SPARSE_CORE = {
    'xla_enable_async_all_gather': True,
    'xla_tpu_enable_async_collective_fusion_fuse_all_gather': False,
    'xla_tpu_enable_sparse_core_collective_offload_all_gather': True,
    'xla_tpu_enable_sparse_core_collective_offload_2d_all_gather': True,
    'xla_tpu_enable_sparse_core_collective_offload_3d_all_gather': True,
    'xla_tpu_enable_sparse_core_collective_offload_reduce_scatter': True,
    'xla_tpu_enable_sparse_core_collective_offload_all_reduce': True,
    'xla_tpu_use_tc_device_shape_on_sc': True,
    'xla_sc_disable_megacore_partitioning': True,
}


def _vmem(kib: int) -> Options:
  """How much of a core's vector memory a fusion may use, 16 MiB by default. With more, a matrix product reads its operands from HBM
  less often: of Llama-3-8B on v5p:4x4x8 (full remat, libtpu 0.0.52) a step's fusions fall from 1.379 s to 1.151 s, its peak memory not
  at all; compiling takes three times the CPU."""
  return {'xla_tpu_scoped_vmem_limit_kib': kib}


# device_kind, as JAX names it → options.
TPU = {
    'TPU v4': {'xla_enable_async_all_gather': True},  # has neither of the two
    'TPU v5 lite': _CONTINUATION_FUSION,
    'TPU v5': _SPARSE_CORE | _vmem(65_472),       # a v5p core has 64 MiB
    'TPU v6 lite': _SPARSE_CORE | _vmem(98_304),  # of 128 MiB: MaxText's DENSE_VMEM_LIMIT for Trillium
    'TPU7x': _SPARSE_CORE | _vmem(65_536),        # as the recipes for TPU7x have it
}
TPU |= {'TPU v5e': TPU['TPU v5 lite'], 'TPU v5p': TPU['TPU v5'], 'TPU v6e': TPU['TPU v6 lite']}  # names of other versions of JAX
# Several slices: sums of gradients cross the network of the hosts beside the backward pass. Source: as above (DATA_PARALLEL_OVERLAP).
BETWEEN_SLICES = {
    'xla_tpu_enable_data_parallel_all_reduce_opt': True,
    'xla_tpu_data_parallel_opt_different_sized_ops': True,
}
DEFAULT = 'default'  # as a value in config.compiler_options: what the compiler has by itself


def options(stated: str, mesh) -> Options:
  """The compiler's options for a train step on the devices of a mesh, which need not be here. stated: config.compiler_options.
  UsageError if the compiler does not know one of those."""
  device = mesh.devices.flat[0]
  slices = {getattr(d, 'slice_index', 0) for d in mesh.devices.flat} if device.platform == 'tpu' else {0}
  ours = {**TPU.get(device.device_kind, {}), **(BETWEEN_SLICES if len(slices) > 1 else {})}
  set_outside = re.findall(r'--(?:no)?(xla_\w+)', f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {os.environ.get('XLA_FLAGS', '')}")
  theirs = dict(map(_option, stated.split()))  # validate.py saw to their form
  ours = {name: value for name, value in ours.items() if name not in set_outside and name not in theirs}
  return _known(ours, {name: value for name, value in theirs.items() if value != DEFAULT}, mesh)


def _option(word: str) -> tuple[str, str | int | bool]:
  name, value = word.split('=', 1)
  return name, {'true': True, 'false': False}.get(value, int(value) if re.fullmatch(r'-?\d+', value) else value)


def _known(ours: Options, theirs: Options, mesh) -> Options:
  """Both, without those of ours that this version of the compiler has no option for: it is asked with a program that does nothing."""
  nothing = jax.jit(lambda: 0., out_shardings=jax.sharding.NamedSharding(mesh, jax.P())).trace().lower(
      lowering_platforms=({'gpu': 'cuda'}.get(mesh.devices.flat[0].platform, mesh.devices.flat[0].platform),))
  while ours or theirs:
    try:
      nothing.compile(compiler_options=ours | theirs)
      break
    except jax.errors.JaxRuntimeError as e:
      unknown = re.search(r"No such compile option: '(\w+)'", str(e))
      bad = re.search(r"'?(xla_\w+)'?", str(e))
      if unknown and unknown[1] in ours:
        say(f'this version of the compiler does not know {unknown[1]}: left out')
        ours = {name: value for name, value in ours.items() if name != unknown[1]}
      elif bad and bad[1] in theirs:
        raise UsageError(f'compiler_options: {bad[1]}={theirs[bad[1]]}: the compiler says {str(e).splitlines()[0]}') from e
      else:
        raise
  return ours | theirs
