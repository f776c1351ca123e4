"""The layers that every model shares. A weight is declared once, by the letters of its einsum."""
import functools
import math
from collections.abc import Mapping

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlm import layout
from jaxlm.models import quantised
from jaxlm.remat import tag
from jaxlm.schema import GATED, ModelConfig


def use(w, dims: str, dtype):
  """A master weight as the compute wants it: cast first, so that half the bytes are gathered, then over fsdp."""
  return jax.sharding.reshard(w.astype(dtype), layout.spec(dims, 'gathered'))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 4))
def contract(eqn: str, dtype, x, w, reduce_dtype: str = 'float32'):
  """einsum of activations x with a weight w, as 'BLD,DHK->BLHK', with a backward pass of its own.

  A master weight, cut over fsdp, is gathered here and again in the backward pass, so that only the cut one is kept between
  them, and its gradient is reduce-scattered (ZeRO-3, Rajbhandari et al. 2020), in reduce_dtype. A weight that is gathered already,
  for loops that use it more than once, has a gradient that is so too. dtype: of the result, None for x's.
  In the gradient of w the smaller operand comes first: on CPU that makes a SwiGLU's step 1.5 × as fast as JAX's own order.
  """
  return _contract(eqn, dtype, x, w)


def _contract(eqn, dtype, x, w):
  _, w_dims, out_dims = _split(eqn)
  return _einsum(eqn, x, use(w, w_dims, x.dtype), layout.spec(out_dims), dtype or x.dtype)


def _einsum(eqn: str, a, b, spec, dtype):
  """XLA's CPU backend cannot run every bfloat16 dot with a float32 result ("DotThunk: BF16 x BF16 = F32"); there the
  operands are widened first, which changes no product."""
  if layout.platform() == 'cpu':
    a, b = (o.astype(dtype) for o in (a, b))
  return jnp.einsum(eqn, a, b, out_sharding=spec, preferred_element_type=dtype)


def _split(eqn: str) -> tuple[str, str, str]:
  operands, out_dims = eqn.split('->')
  return *operands.split(','), out_dims


def _contract_forward(eqn, dtype, x, w, reduce_dtype):
  del reduce_dtype
  return _contract(eqn, dtype, x, w), (x, w)  # not by `contract`, whose inside no policy of what is kept (remat.py) would see


def _contract_backward(eqn, dtype, reduce_dtype, saved, g):
  del dtype
  dx, dw = contract_gradients(eqn, *saved, g, reduce_dtype)
  return dx, dw.astype(saved[1].dtype)


def contract_gradients(eqn: str, x, w, g, reduce_dtype: str = 'float32'):
  """The gradients (dx in x's dtype, dw in reduce_dtype, in which it is summed over devices) of `contract` where its result has the
  gradient g."""
  x_dims, w_dims, out_dims = _split(eqn)
  g = g.astype(x.dtype)
  dx = jnp.einsum(f'{out_dims},{w_dims}->{x_dims}', g, use(w, w_dims, x.dtype), out_sharding=jax.typeof(x).sharding.spec)
  both = ''.join(d for d in w_dims if d in x_dims and d in out_dims)  # as E in 'BECD,EDF->BECF'
  sides = [(''.join(d for d in w_dims if d in dims and d not in both), dims, a) for dims, a in ((x_dims, x), (out_dims, g))]
  size = dict(zip(w_dims, w.shape))
  (dims1, in1, a1), (dims2, in2, a2) = sorted(sides, key=lambda side: math.prod(size[d] for d in side[0]))
  dims, axes = both + dims1 + dims2, dict(zip(w_dims, jax.typeof(w).sharding.spec))
  dw = _einsum(f'{in1},{in2}->{dims}', a1, a2, jax.P(*(axes[d] for d in dims)), jnp.dtype(reduce_dtype))
  return dx, jnp.transpose(dw, [dims.index(d) for d in w_dims])


contract.defvjp(_contract_forward, _contract_backward)


def normal(std: float, dims: str):
  return functools.partial(nn.initializers.normal(std), out_sharding=layout.spec(dims, 'weight'))


class Einsum(nn.Module):
  """`x` times a weight whose letters name its shape and sharding, as 'BLD,DHK->BLHK'; plus a bias if the model has
  one here. Weights that write into the residual stream (`out=True`) start smaller by √(2N) (GPT-2, §2.3).
  `sizes` gives letters another size than the model's, as {'F': 256}."""
  eqn: str
  cfg: ModelConfig
  out: bool = False
  sizes: Mapping[str, int] = flax.core.FrozenDict()

  @nn.compact
  def __call__(self, x):
    cfg = self.cfg
    size = lambda d: self.sizes[d] if d in self.sizes else getattr(cfg, d)
    _, w_dims, out_dims = _split(self.eqn)
    std = cfg.init_std / (2 * cfg.N) ** 0.5 if self.out else cfg.init_std
    w = self.param('w', normal(std, w_dims), tuple(map(size, w_dims)))
    y = contract(self.eqn, None, x, w, cfg.reduce_dtype) if cfg.matmul == 'full' else quantised.contract(self.eqn, cfg.matmul, x, w)
    if cfg.bias == 'all' or (cfg.bias != 'none' and (cfg.bias == 'qkv') == (self.name in ('q', 'k', 'v'))):
      b_dims = ''.join(d for d in out_dims if d in w_dims)
      b = self.param('bias', functools.partial(nn.initializers.zeros, out_sharding=layout.spec(b_dims, 'weight')),
                     tuple(map(size, b_dims)))
      y += jnp.expand_dims(use(b, b_dims, x.dtype), (0, 1))
    return y


class RMSNorm(nn.Module):
  """x / rms(x) · (offset + scale), in float32 (Zhang & Sennrich 2019), over the last axes of x, which `dims` names."""
  cfg: ModelConfig
  dims: str = 'D'

  @nn.compact
  def __call__(self, x):
    count = len(self.dims)
    init = nn.initializers.constant(1. - self.cfg.norm_offset)
    spec = layout.spec(self.dims, 'gathered')
    scale = self.param('scale', lambda key, shape: jax.sharding.reshard(init(key, shape), spec), x.shape[-count:])
    scale = jnp.expand_dims(scale + self.cfg.norm_offset, tuple(range(x.ndim - count)))
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32 * x32, tuple(range(-count, 0)), keepdims=True)
    return (x32 * jax.lax.rsqrt(mean + self.cfg.norm_eps) * scale).astype(x.dtype)


class LayerNorm(nn.Module):
  """(x − mean) / std · scale + bias, in float32 (Ba et al. 2016)."""
  cfg: ModelConfig

  @nn.compact
  def __call__(self, x_BLD):
    scale = self.param('scale', nn.initializers.ones, x_BLD.shape[-1:])
    x32_BLD = x_BLD.astype(jnp.float32)
    x32_BLD -= jnp.mean(x32_BLD, -1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(x32_BLD * x32_BLD, -1, keepdims=True) + self.cfg.norm_eps)
    y_BLD = x32_BLD * inverse * scale[None, None]
    if self.cfg.bias != 'none':
      y_BLD += self.param('bias', nn.initializers.zeros, x_BLD.shape[-1:])[None, None]
    return y_BLD.astype(x_BLD.dtype)


NORMS = {'rms': RMSNorm, 'layer': LayerNorm}

_gelu = functools.partial(jax.nn.gelu, approximate=True)
# A gated mlp is (f(x·gate) ⊙ x·up)·down (Shazeer 2020), the others f(x·up)·down; schema.GATED says which are.
MLPS = {'swiglu': jax.nn.silu, 'geglu': _gelu, 'gelu': _gelu, 'relu': jax.nn.relu, 'silu': jax.nn.silu,
        'gelu_exact': functools.partial(jax.nn.gelu, approximate=False)}


class Mlp(nn.Module):
  """The feed-forward layer that cfg.mlp names, of width F."""
  cfg: ModelConfig
  F: int

  @nn.compact
  def __call__(self, x_BLD):
    cfg, f, sizes = self.cfg, MLPS[self.cfg.mlp], {'F': self.F}
    up_BLF = tag(Einsum('BLD,DF->BLF', cfg, sizes=sizes, name='up')(x_BLD), 'up')
    if cfg.mlp in GATED:
      hidden_BLF = f(tag(Einsum('BLD,DF->BLF', cfg, sizes=sizes, name='gate')(x_BLD), 'gate')) * up_BLF
    else:
      hidden_BLF = f(up_BLF)
    return Einsum('BLF,FD->BLD', cfg, out=True, sizes=sizes, name='down')(hidden_BLF)


class Dropout(nn.Module):
  """Zeroes a share `rate` and scales up the rest; does nothing unless `train` (Srivastava et al. 2014)."""
  rate: float
  train: bool

  @nn.compact
  def __call__(self, x_BLD):
    if not self.train or self.rate == 0:
      return x_BLD
    keep_BLD = jax.random.bernoulli(self.make_rng('dropout'), 1 - self.rate, x_BLD.shape,
                                    out_sharding=jax.typeof(x_BLD).sharding.spec)
    return jnp.where(keep_BLD, x_BLD / (1 - self.rate), 0).astype(x_BLD.dtype)

