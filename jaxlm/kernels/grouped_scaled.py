"""Products of kernels/grouped.py of int8 or fp8 values that have scales: a Pallas kernel for TPU, as JAX's megablox (Gale et al. 2022),
which takes floats alone; elsewhere jax.lax.ragged_dot of the same values as floats.

A tile's sum is multiplied with the scales of its rows and of its group's columns before it is written.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata

from jaxlm import layout
from jaxlm.kernels import grouped
from jaxlm.kernels.splash import LANES

SMALL, LARGE = (512, 512, 1024), (512, 2048, 4096)  # for vector memory of 16 MiB (TPU v4) and of 64; rows, summed over, results
_SPEC = jax.P()  # as in grouped.py


def product(rows_TD, of_row_T1, w_EDF, of_column_E1F, sizes_E, dtype, transposed: bool = False):
  """[T, F] in dtype: grouped.product of rows · of_row and w · of_column, float32 scales; with transposed, [T, D] of rows_TF,
  and of_column_ED1. What is said of rows of no group may be anything."""
  if grouped.has_kernel(len(rows_TD)):
    return by_kernel(rows_TD, of_row_T1, w_EDF, of_column_E1F, sizes_E, dtype, transposed)
  w_EDF, of_column_E1F = (jnp.swapaxes(a, 1, 2) if transposed else a for a in (w_EDF, of_column_E1F))
  wide = jnp.float32 if layout.platform() == 'cpu' else jnp.bfloat16  # both have every value of int8 and fp8
  out_TF = jax.lax.ragged_dot(rows_TD.astype(wide), w_EDF.astype(wide), sizes_E, preferred_element_type=jnp.float32, out_sharding=_SPEC)
  group_T = (jnp.arange(len(rows_TD))[:, None] >= jnp.cumsum(sizes_E)[None]).sum(-1)
  of_column_TF = of_column_E1F.at[group_T, 0].get(mode='clip', out_sharding=_SPEC)
  return (out_TF * of_row_T1 * of_column_TF).astype(dtype)


@functools.partial(jax.jit, static_argnames=('dtype', 'transposed', 'interpret'))
def by_kernel(rows_TD, of_row_T1, w_EDF, of_column_E1F, sizes_E, dtype, transposed: bool = False, interpret: bool = False):
  """`product`. T a multiple of 128."""
  T, D = rows_TD.shape
  F = w_EDF.shape[1 if transposed else 2]
  if transposed:
    of_column_E1F = jnp.swapaxes(of_column_E1F, 1, 2)
  high, deep, wide = tiles(T, D, F)
  widen = (lambda a: a.astype(jnp.bfloat16)) if layout.device_kind() == 'TPU v4' else lambda a: a  # whose units multiply floats alone
  acc = jnp.int32 if widen(rows_TD).dtype == jnp.int8 else jnp.float32
  (ends_E, group_N, row_N), count = make_group_metadata(
      group_sizes=sizes_E, m=T, tm=high, start_group=jnp.int32(0), num_nonzero_groups=len(sizes_E), visit_empty_groups=False)

  def kernel(ends_E, group_N, row_N, rows, of_row, w, of_column, out, sums):
    n, k = pl.program_id(1), pl.program_id(2)

    @pl.when(k == 0)
    def _():
      sums[...] = jnp.zeros_like(sums)
    shared = (1,), (1 if transposed else 0,)
    sums[...] += jax.lax.dot_general(widen(rows[...]), widen(w[...]), (shared, ((), ())), preferred_element_type=acc)

    @pl.when(k == D // deep - 1)
    def _():  # rows of other groups that the tile has are left to their own visits
      row = jax.lax.broadcasted_iota(jnp.int32, (high, wide), 0) + row_N[n] * high
      own = (ends_E[group_N[n]] <= row) & (row < ends_E[group_N[n] + 1])
      scaled = sums[...].astype(jnp.float32) * of_row[...] * of_column[...]
      out[...] = jnp.where(own, scaled, out[...].astype(jnp.float32)).astype(dtype)

  of_w = (lambda f, n, k, ends, group, row: (group[n], f, k)) if transposed else (lambda f, n, k, ends, group, row: (group[n], k, f))
  return pl.pallas_call(
      kernel, out_shape=jax.ShapeDtypeStruct((T, F), dtype), interpret=interpret, name='gmm_scaled',
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=3, grid=(pl.cdiv(F, wide), count, D // deep),
          in_specs=[
              pl.BlockSpec((high, deep), lambda f, n, k, ends, group, row: (row[n], k)),
              pl.BlockSpec((high, 1), lambda f, n, k, ends, group, row: (row[n], 0)),
              pl.BlockSpec((None, wide, deep) if transposed else (None, deep, wide), of_w),
              pl.BlockSpec((None, 1, wide), lambda f, n, k, ends, group, row: (group[n], 0, f))],
          out_specs=pl.BlockSpec((high, wide), lambda f, n, k, ends, group, row: (row[n], f)),
          scratch_shapes=[pltpu.VMEM((high, wide), acc)]),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary', 'arbitrary')),
  )(ends_E, group_N, row_N, rows_TD, of_row_T1, w_EDF, of_column_E1F)


def tiles(T: int, D: int, F: int) -> tuple[int, int, int]:
  """Of rows, of what is summed over, and of results. D is cut evenly, or not at all: a last tile would have to be masked."""
  high, deep, wide = SMALL if layout.device_kind() in ('TPU v4', '') else LARGE
  even = [tile for tile in range(LANES, deep + 1, LANES) if D % tile == 0]
  return next(t for t in (512, 256, LANES) if t <= high and T % t == 0), max(even, default=D), min(wide, -(-F // LANES) * LANES)
