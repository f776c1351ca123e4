"""Rows sorted by group, each group times its own matrix: jax.lax.ragged_dot, and on TPU JAX's megablox kernels (Gale et al. 2022),
which visit only the rows that are of a group. XLA's TPU compiler makes about four times the work of a ragged_dot (docs/pods.md).

Where a platform's kernel cannot take the rows, ragged_dot is used: it is right for all.
"""
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from jaxlm import layout
from jaxlm.kernels.splash import LANES

# Tiles of (rows, what is summed over, results) and of (rows, both sides of a matrix): of those that the 16 MiB of a kernel's memory
# hold in bfloat16, those with the most products a byte from HBM.
PRODUCT = (512, 512, 2048)
OUTER = (256, 1024, 1024)

# Mapped over stages, the mesh of a shard_map has one Explicit axis left, and shardings must be said; elsewhere it changes nothing.
_SPEC = jax.P()
_OUTER = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])


def has_kernel(rows: int) -> bool:
  """Whether there is one for so many rows on the platform of this trace."""
  return layout.platform() == 'tpu' and rows % LANES == 0


def product(rows_TD, w_EDF, sizes_E):
  """[T, F]: the first sizes[0] rows times w[0], and so on. Rows beyond the sum of sizes are of none: what is said of them may be
  anything, NaN too."""
  if not has_kernel(len(rows_TD)):
    return jax.lax.ragged_dot(rows_TD, w_EDF, sizes_E, out_sharding=_SPEC)
  return by_megablox(rows_TD, w_EDF, sizes_E)


def slopes(rows_TD, w_EDF, sizes_E, g_TF):
  """Of product(rows, w, sizes) where its result has the gradient g: (those of rows, those of w). Rows beyond the sum of sizes touch
  no weight; of them the first may be anything."""
  if not has_kernel(len(rows_TD)):
    return (jax.lax.ragged_dot(g_TF, jnp.swapaxes(w_EDF, 1, 2), sizes_E, out_sharding=_SPEC),
            jax.lax.ragged_dot_general(rows_TD, g_TF, sizes_E, _OUTER, out_sharding=_SPEC))
  return by_megablox(g_TF, w_EDF, sizes_E, transposed=True), outer_by_megablox(rows_TD, g_TF, sizes_E)


def by_megablox(rows_TD, w_EDF, sizes_E, transposed: bool = False, interpret: bool = False):
  """`product`, or with transposed of w_EFD. T a multiple of 128."""
  T, D = rows_TD.shape
  F = w_EDF.shape[1 if transposed else 2]
  return gmm(rows_TD, w_EDF, sizes_E, rows_TD.dtype, _tiles(PRODUCT, T, D, F, rows_TD.dtype), transpose_rhs=transposed, interpret=interpret)


def outer_by_megablox(rows_TD, g_TF, sizes_E, interpret: bool = False):
  """w_EDF: Σ over each group's rows of row ⊗ g. T a multiple of 128."""
  (T, D), F = rows_TD.shape, g_TF.shape[1]
  return tgmm(rows_TD.T, g_TF, sizes_E, rows_TD.dtype, _tiles(OUTER, T, D, F, rows_TD.dtype), interpret=interpret)


def _tiles(most, T: int, D: int, F: int, dtype) -> tuple[int, int, int]:
  """Rows: the largest power of two that divides T. D and F: what fills their last tile best, and of these the largest."""
  def side(size, upper):
    sizes = range(LANES, upper * 2 // jnp.dtype(dtype).itemsize + 1, LANES)
    return min(sizes, key=lambda tile: (-size % tile, -tile))
  return next(t for t in (512, 256, LANES) if t <= most[0] and T % t == 0), side(D, most[1]), side(F, most[2])
