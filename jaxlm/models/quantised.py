"""Projections whose three matmuls, of the forward and the backward pass, are of int8 or fp8 values (model.matmul).

The recipe is quantised training as Qwix has it (github.com/google/qwix, docs/source/qt.md), after AQT (github.com/google/aqt).
Qwix quantises and multiplies; what is here is where scales go and what crosses the mesh. An array becomes q · s: s, float32, is
max|a| ÷ the largest q over the letters that a matmul sums, made anew at every use. So each token and each channel has its own, and
the matmul is of q alone. What varies along a sum goes into the gradient g before g is quantised:

    y  = (x_q · w_q) · s_x · s_w
    dx = ((g · s_w)_q · w_q) · s
    dw = Σ_B (x_q · (g · s_x)_q) · s_B    of each row B of the batch apart; rows and devices are added in float32

int8: all are. fp8: x and w are e4m3; gradients e5m2, less precise and with more range (Micikevicius et al. 2022). All is rounded to
nearest. No scale depends on the mesh: a max over a letter that is cut is an all-reduce, and the tile of dw (Qwix's
bwd_weight_grad_tile_size) is a row and not what a device has; so losses do not either, up to what float32 sums in another order
tip over to the next q. Rows of up to 131,072 tokens a device cannot overflow int32; validate.py refuses longer ones.
"""
import functools

import jax
import jax.numpy as jnp

from jaxlm import layout

FORMATS = {'int8': (jnp.int8, jnp.int8), 'fp8': (jnp.float8_e4m3fn, jnp.float8_e5m2)}  # of x and w, of gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def contract(eqn: str, how: str, x, w):
  """layers.contract, quantised; how: a key of FORMATS. The letters of w are first those that it shares with x.

  w is quantised where it is cut over fsdp and then gathered, at a byte a weight, in the forward and again in the backward pass; x is
  kept between them as it came. The gradient of w is reduce-scattered in float32."""
  return _forward(eqn, how, x, w)[0]


def _forward(eqn, how, x, w):
  x_dims, w_dims, out_dims = _split(eqn)
  x_q, w_q = _operands(eqn, how, x, w)
  return _product(_dot, f'{x_dims},{w_dims}', x_q, w_q, layout.spec(out_dims), x.dtype), (x, w)


def _backward(eqn, how, saved, g):
  (x, w), (x_dims, w_dims, out_dims) = saved, _split(eqn)
  x_q, w_q = _operands(eqn, how, x, w)
  g, dtype, tokens = g.astype(jnp.float32), FORMATS[how][1], [d for d in x_dims if d not in w_dims]
  g_q = _quantise(g * _along(w_q.scale, w_dims, out_dims), out_dims, w_dims, dtype)
  dx = _product(_dot, f'{out_dims},{w_dims}', g_q, w_q.qvalue, jax.typeof(x).sharding.spec, x.dtype)
  g_q = _quantise(g * _along(x_q.scale, x_dims, out_dims), out_dims, tokens[1:], dtype)
  dw = _product(_dot_by_rows, f'{x_dims},{out_dims}', x_q.qvalue, g_q, jax.typeof(w).sharding.spec, jnp.float32)
  return dx, dw.astype(w.dtype)


contract.defvjp(_forward, _backward)


def _split(eqn: str) -> tuple[str, str, str]:
  operands, out_dims = eqn.split('->')
  return *operands.split(','), out_dims


def _quantise(a, dims: str, over, dtype):
  """A QArray of `a` with one scale for all of the letters `over`."""
  import qwix  # pylint: disable=g-import-not-at-top  # an extra
  # Qwix takes the max of int8 to 127.5, where the last bit decides between 127 and 128; to 127, nothing hangs on it.
  headroom = 127.5 / 127 if dtype == jnp.int8 else 1.
  axes = [n for n, d in enumerate(dims) if d not in over]
  return qwix.quantize(a.astype(jnp.float32), dtype, channelwise_axes=axes, calibration_method=f'absmax,{headroom}')


def _operands(eqn, how, x, w):
  """x quantised, and w quantised and gathered."""
  x_dims, w_dims, _ = _split(eqn)
  dtype, whole = FORMATS[how][0], layout.spec(w_dims, 'gathered')
  w_q = _quantise(w, w_dims, x_dims, dtype)
  scales = jax.P(*(None if d in x_dims else cut for d, cut in zip(w_dims, whole)))
  w_q = w_q.replace(qvalue=jax.sharding.reshard(w_q.qvalue, whole), scale=jax.sharding.reshard(w_q.scale, scales))
  return _quantise(x, x_dims, w_dims, dtype), w_q


def _along(scale, dims: str, to: str):
  """Scales of an array of the letters `dims`, to be multiplied with one of the letters `to`."""
  scale = jnp.squeeze(scale, tuple(n for n, d in enumerate(dims) if d not in to))
  return jnp.expand_dims(scale, tuple(n for n, d in enumerate(to) if d not in dims))


def _dot(dims: str, a, b):
  """a · b over the letters that they share, QArrays or values alone, scales applied: float32."""
  import qwix  # pylint: disable=g-import-not-at-top  # an extra
  a_dims, b_dims = dims.split(',')
  shared = [d for d in a_dims if d in b_dims]
  axes = tuple(tuple(of.index(d) for d in shared) for of in (a_dims, b_dims))
  return qwix.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)


def _dot_by_rows(dims: str, a, b):
  """The sum of _dot over the first letter of both."""
  rows, dims = jax.tree.leaves(a)[0].shape[0], dims.replace(dims[0], '')
  of_row = lambda n: _dot(dims, *jax.tree.map(lambda v: jax.lax.dynamic_index_in_dim(v, n, keepdims=False), (a, b)))
  return jax.lax.fori_loop(1, rows, lambda n, total: total + of_row(n), of_row(0))


def _product(dot, dims: str, a, b, spec, dtype):
  """dot(dims, a, b) of what each device has, then the sum over devices, in dtype: of int32, before the scales, it would be twice the
  bytes of bfloat16. Where `spec` cuts the result over axes that are summed, they are reduce-scattered."""
  a_dims, b_dims = dims.split(',')
  cuts = zip(a_dims, jax.typeof(jax.tree.leaves(a)[0]).sharding.spec)
  summed = [axis for d, cut in cuts if d in b_dims for axis in layout.axes_of(cut)]

  def local(a, b):
    y, left = dot(dims, a, b).astype(dtype), list(summed)
    for n, cut in enumerate(spec):
      if scattered := tuple(axis for axis in layout.axes_of(cut) if axis in left):
        y = jax.lax.psum_scatter(y, scattered, scatter_dimension=n, tiled=True)
        left = [axis for axis in left if axis not in scattered]
    return jax.lax.psum(y, tuple(left)) if left else y

  product = jax.custom_batching.custom_vmap(jax.shard_map(local, out_specs=spec))

  @product.def_vmap
  def of_stages(size, mapped, a, b):  # JAX 0.10, in the rules of a custom_vjp, would map a shard_map to one that is not cut
    del size, mapped
    own = lambda arrays: jax.tree.map(lambda v: v[0], arrays)
    return jax.shard_map(lambda a, b: local(own(a), own(b))[None], out_specs=jax.P('stage', *spec))(a, b), True
  return product(a, b)
