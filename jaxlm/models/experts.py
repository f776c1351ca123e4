"""What experts make of rows that are sorted by expert, on one device: gated mlps by kernels/grouped.py, forward and backward; and their
weights, gathered from the devices that share them.

Backward passes are written out, because neither grouped products nor gathers can be mapped (jax.vmap) under an Explicit mesh, as the
stages of a pipeline are: here each device calls them on its own stage.
"""
import functools

import jax
import jax.numpy as jnp

from jaxlm import layout
from jaxlm.kernels import grouped
from jaxlm.models.layers import MLPS
from jaxlm.remat import tag


def by_stage(f):
  """f(*arrays) → a tuple of arrays, which a vmap over an axis of the mesh calls on each device, with what is its own."""
  out = jax.custom_batching.custom_vmap(f)

  @out.def_vmap
  def rule(size, mapped, *args):
    del size
    axis = next(jax.typeof(a).sharding.spec[0] for a, is_mapped in zip(args, mapped) if is_mapped)
    own = lambda args: (a[0] if is_mapped else a for a, is_mapped in zip(args, mapped))
    on_device = jax.shard_map(lambda *args: tuple(a[None] for a in f(*own(args))), axis_names={axis}, out_specs=jax.P(axis), check_vma=False,
                              in_specs=tuple(jax.P(axis) if is_mapped else jax.P() for is_mapped in mapped))
    found = on_device(*args)
    return found, (True,) * len(found)
  return out


def gathered(w, dims: str, spec):
  """What a device has of a weight, cut as `spec` says → what it uses of it, under shard_map. Its gradient is scattered."""
  return _gathered(dims, spec, w) if _shared(dims, spec) else w


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(dims: str, spec, w):
  return by_stage(lambda w: (whole(w, dims, spec),))(w)[0]


def _back(dims, spec, _, g):
  return by_stage(lambda g: (scattered(g, dims, spec),))(g)


_gathered.defvjp(lambda dims, spec, w: (_gathered(dims, spec, w), None), _back)


def whole(w, dims: str, spec):
  """`gathered`, of what has no gradient."""
  for n, over in _shared(dims, spec):
    w = jax.lax.all_gather(w, over, axis=n, tiled=True)
  return w


def scattered(w, dims: str, spec):
  """The sum over devices of a weight's gradient, cut as `spec` says."""
  for n, over in _shared(dims, spec):
    w = jax.lax.psum_scatter(w, over, scatter_dimension=n, tiled=True)
  return w


def _shared(dims: str, spec):
  """[(dimension, axes of the mesh)] that cut a weight where it rests and not where it is used."""
  over = [tuple(a for a in layout.axes_of(cut) if a not in layout.axes(d, 'gathered')) for d, cut in zip(dims, spec)]
  return [(n, cut) for n, cut in enumerate(over) if cut]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def say(mlp: str, rows_TD, sizes_E, gate_EDF, up_EDF, down_EDF):
  """[T, D]: (f(rows·gate) ⊙ rows·up)·downᵀ of each row's expert, f as `mlp` names it; the first sizes[0] rows are of expert 0, and
  so on. Rows beyond their sum are of none, and what is said of them may be anything. Under shard_map."""
  return _forward(mlp, rows_TD, sizes_E, gate_EDF, up_EDF, down_EDF)[0]


@by_stage
def _dots(rows_TD, sizes_E, gate_EDF, up_EDF):
  return tuple(grouped.product(rows_TD, w_EDF, sizes_E) for w_EDF in (gate_EDF, up_EDF))


@by_stage
def _dot(rows_TF, sizes_E, down_EDF):
  return (grouped.product(rows_TF, down_EDF, sizes_E, transposed=True),)


@by_stage
def _slopes_in(rows_TD, sizes_E, w_EDF, g_TF):
  return grouped.product(g_TF, w_EDF, sizes_E, transposed=True), grouped.outer(rows_TD, g_TF, sizes_E)


@by_stage
def _slopes_out(rows_TF, sizes_E, down_EDF, g_TD):
  return grouped.product(g_TD, down_EDF, sizes_E), grouped.outer(g_TD, rows_TF, sizes_E)


def gated(mlp: str):
  return lambda gate_TF, up_TF: MLPS[mlp](gate_TF) * up_TF


def _forward(mlp, rows_TD, sizes_E, gate_EDF, up_EDF, down_EDF):
  rows_TD = tag(rows_TD, 'experts_in')
  gate_TF, up_TF = _dots(rows_TD, sizes_E, gate_EDF, up_EDF)
  gate_TF, up_TF = tag(gate_TF, 'gate'), tag(up_TF, 'up')
  out_TD, = _dot(gated(mlp)(gate_TF, up_TF), sizes_E, down_EDF)
  return out_TD, (rows_TD, sizes_E, gate_TF, up_TF, gate_EDF, up_EDF, down_EDF)


def _backward(mlp, saved, g_TD):
  rows_TD, sizes_E, gate_TF, up_TF, gate_EDF, up_EDF, down_EDF = saved
  hidden_TF, back = jax.vjp(gated(mlp), gate_TF, up_TF)
  d_hidden_TF, d_down_EDF = _slopes_out(hidden_TF, sizes_E, down_EDF, g_TD)
  of_gate_TF, of_up_TF = back(d_hidden_TF)
  rows1_TD, d_gate_EDF = _slopes_in(rows_TD, sizes_E, gate_EDF, of_gate_TF)
  rows2_TD, d_up_EDF = _slopes_in(rows_TD, sizes_E, up_EDF, of_up_TF)
  return rows1_TD + rows2_TD, None, d_gate_EDF, d_up_EDF, d_down_EDF


say.defvjp(_forward, _backward)
