"""What experts make of rows (experts.py), by products of int8 or fp8 values (model.matmul; the recipe of quantised.py).

Both sides of a product are quantised along the letter that it sums, anew for each: rows get a scale each, and a weight one for each
expert and channel. A weight is quantised where it is cut over fsdp, and then gathered, at a byte a value.

The gradient of a weight is a product of rows as they came, in model.dtype. It sums over whatever rows of an expert a device has; their
largest would depend on the mesh, and so would what it is rounded to.
"""
import functools

import jax
import jax.numpy as jnp

from jaxlm import layout
from jaxlm.kernels import grouped, grouped_scaled
from jaxlm.models import experts
from jaxlm.models.quantised import FORMATS
from jaxlm.remat import tag


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def say(mlp: str, how: str, specs, rows_TD, sizes_E, gate_EDF, up_EDF, down_EDF):
  """experts.say of weights that are cut as specs say, quantised; how: a key of FORMATS. Under shard_map."""
  return _forward(mlp, how, specs, rows_TD, sizes_E, gate_EDF, up_EDF, down_EDF)[0]


def _forward(mlp, how, specs, rows_TD, sizes_E, gate_EDF, up_EDF, down_EDF):
  dtype, _ = FORMATS[how]
  of_gate, of_up, of_down = specs
  rows_TD = tag(rows_TD, 'experts_in')
  gate_TF = tag(_product(how, dtype, of_gate, False, rows_TD, gate_EDF, sizes_E), 'gate')
  up_TF = tag(_product(how, dtype, of_up, False, rows_TD, up_EDF, sizes_E), 'up')
  out_TD = _product(how, dtype, of_down, True, experts.gated(mlp)(gate_TF, up_TF), down_EDF, sizes_E)
  return out_TD, (rows_TD, sizes_E, gate_TF, up_TF, gate_EDF, up_EDF, down_EDF)


def _backward(mlp, how, specs, saved, g_TD):
  rows_TD, sizes_E, gate_TF, up_TF, gate_EDF, up_EDF, down_EDF = saved
  _, dtype = FORMATS[how]
  of_gate, of_up, of_down = specs
  hidden_TF, back = jax.vjp(experts.gated(mlp), gate_TF, up_TF)
  d_gate_TF, d_up_TF = back(_product(how, dtype, of_down, False, g_TD, down_EDF, sizes_E))
  d_rows_TD = (_product(how, dtype, of_gate, True, d_gate_TF, gate_EDF, sizes_E)
               + _product(how, dtype, of_up, True, d_up_TF, up_EDF, sizes_E))
  return (d_rows_TD, None, _outer(of_gate, rows_TD, d_gate_TF, sizes_E), _outer(of_up, rows_TD, d_up_TF, sizes_E),
          _outer(of_down, g_TD, hidden_TF, sizes_E))


say.defvjp(_forward, _backward)


def _product(how: str, dtype, spec, transposed: bool, rows, w_EDF, sizes_E):
  """grouped.product, quantised: of rows to values of dtype, of a weight that is cut as spec says to those of weights."""
  def local(rows, w_EDF, sizes_E):
    summed = 2 if transposed else 1
    rows_q, of_row_T1 = quantise(rows, 1, dtype, layout.axes('F') if transposed else ())
    w_q, of_column = quantise(w_EDF, summed, FORMATS[how][0], layout.axes_of(spec[summed]))
    w_q = experts.whole(w_q, 'EDF', spec)
    of_column = experts.whole(of_column, 'EDF', [None if n == summed else cut for n, cut in enumerate(spec)])
    return (grouped_scaled.product(rows_q, of_row_T1, w_q, of_column, sizes_E, rows.dtype, transposed),)
  return experts.by_stage(local)(rows, w_EDF, sizes_E)[0]


def _outer(spec, rows_TD, g_TF, sizes_E):
  """The gradient of a weight, cut as spec says."""
  return experts.by_stage(lambda *arrays: (experts.scattered(grouped.outer(*arrays), 'EDF', spec),))(rows_TD, g_TF, sizes_E)[0]


def quantise(a, axis: int, dtype, cut: tuple[str, ...] = ()):
  """(q, scale), a = q · scale up to rounding, with one float32 scale for all along an axis, which is cut over axes of the mesh: the
  largest |a| ÷ the largest of dtype. As quantised.py has it of Qwix, whose scales know nothing of other devices under a shard_map."""
  a = a.astype(jnp.float32)
  most = jnp.max(jnp.abs(a), axis, keepdims=True)
  most = jax.lax.pmax(most, cut) if cut else most
  largest = float(jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).max)
  scale = jnp.where(most > 0, most / largest, 1.)
  q = a / scale
  return (jnp.round(q) if jnp.issubdtype(dtype, jnp.integer) else q).astype(dtype), scale
