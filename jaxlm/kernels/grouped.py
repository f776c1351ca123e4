"""Rows sorted by group, each group times its own matrix: jax.lax.ragged_dot, and on TPU JAX's megablox kernels (Gale et al. 2022),
which visit only the rows that are of a group. XLA's TPU compiler makes about four times the work of a ragged_dot (docs/pods.md).

Where a platform's kernel cannot take the rows, ragged_dot is used: it is right for all.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from jaxlm import layout
from jaxlm.kernels.splash import LANES



class Tiles(NamedTuple):
  """In bfloat16: of a product (rows, what is summed over, results), and of an outer product (rows, both sides of the matrix)."""
  product: tuple[int, int, int]
  outer: tuple[int, int, int]


# Those with the most products a byte from HBM, of what fits the vector memory that a kernel may use: 16 MiB on v4, and on later TPUs
# the 64 MiB or more that xla.py asks for. More rows than 512 would visit too many tiles twice, once for each of two experts.
SMALL, LARGE = Tiles((512, 512, 2048), (256, 1024, 1024)), Tiles((512, 1024, 4096), (512, 2048, 2048))

# Mapped over stages, the mesh of a shard_map has one Explicit axis left, and shardings must be said; elsewhere it changes nothing.
_SPEC = jax.P()
_OUTER = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])


def tiles(kind: str) -> Tiles:
  """For a kind of device, as JAX names it."""
  return SMALL if kind in ('TPU v4', '') else LARGE


def has_kernel(rows: int) -> bool:
  """Whether there is one for so many rows on the platform of this trace."""
  return layout.platform() == 'tpu' and rows % LANES == 0


def product(rows_TD, w_EDF, sizes_E, transposed: bool = False):
  """[T, F]: the first sizes[0] rows times w[0], and so on; with transposed, [T, D] of rows_TF: times the transpose of each. Rows beyond
  the sum of sizes are of none: what is said of them may be anything, NaN too."""
  if not has_kernel(len(rows_TD)):
    return jax.lax.ragged_dot(rows_TD, jnp.swapaxes(w_EDF, 1, 2) if transposed else w_EDF, sizes_E, out_sharding=_SPEC)
  return by_megablox(rows_TD, w_EDF, sizes_E, transposed)


def outer(rows_TD, g_TF, sizes_E):
  """w_EDF: Σ over each group's rows of row ⊗ g: the gradient of w in `product`. Rows beyond the sum of sizes touch none."""
  if not has_kernel(len(rows_TD)):
    return jax.lax.ragged_dot_general(rows_TD, g_TF, sizes_E, _OUTER, out_sharding=_SPEC)
  return outer_by_megablox(rows_TD, g_TF, sizes_E)


def by_megablox(rows_TD, w_EDF, sizes_E, transposed: bool = False, interpret: bool = False):
  """`product`, or with transposed of w_EFD. T a multiple of 128."""
  T, D = rows_TD.shape
  F = w_EDF.shape[1 if transposed else 2]
  return gmm(rows_TD, w_EDF, sizes_E, rows_TD.dtype, _tiles(tiles(layout.device_kind()).product, T, D, F, rows_TD.dtype), transpose_rhs=transposed, interpret=interpret)


def outer_by_megablox(rows_TD, g_TF, sizes_E, interpret: bool = False):
  """`outer`. T a multiple of 128."""
  (T, D), F = rows_TD.shape, g_TF.shape[1]
  return tgmm(rows_TD.T, g_TF, sizes_E, rows_TD.dtype, _tiles(tiles(layout.device_kind()).outer, T, D, F, rows_TD.dtype), interpret=interpret)


def _tiles(most, T: int, D: int, F: int, dtype) -> tuple[int, int, int]:
  """Rows: the largest power of two that divides T. D and F: what fills their last tile best, and of these the largest."""
  def side(size, upper):
    sizes = range(LANES, upper * 2 // jnp.dtype(dtype).itemsize + 1, LANES)
    return min(sizes, key=lambda tile: (-size % tile, -tile))
  return next(t for t in (512, 256, LANES) if t <= most[0] and T % t == 0), side(D, most[1]), side(F, most[2])
