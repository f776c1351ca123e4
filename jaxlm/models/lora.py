"""Low-rank adaptation (LoRA, Hu et al. 2021): a frozen weight W is used as W + α/r · A·B, and only A and B are trained.

params['lora'] has a pair {'a': [N, in…, R], 'b': [N, R, out…]} for each stacked weight [N, in…, out…] whose path matches
model.lora.targets; B starts at 0, so that nothing is changed at first. The sum is taken where the model is run: every kind
of model, mesh and objective is used as it is, and merging for good is the same sum.
"""
import math
import re

import jax
import jax.numpy as jnp

from jaxlm.schema import ModelConfig

STACKED = re.compile(r'(encoder/)?(layers|backward)/.*/w$')


def flat(tree: dict, prefix: str = '') -> dict:
  """{'layers/attention/q/w': array} of nested parameters."""
  out = {}
  for name, value in tree.items():
    out |= flat(value, f'{prefix}{name}/') if isinstance(value, dict) else {prefix + name: value}
  return out


def nested(values: dict) -> dict:
  """The inverse of `flat`."""
  tree: dict = {}
  for path, value in values.items():
    *parents, leaf = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return tree


def inputs_of(path: str, axes: int) -> int:
  """How many of the `axes` of a stacked weight [N, in…, out…] are its inputs: an output projection has heads and head dim."""
  return axes - 2 if path.endswith('/o/w') else 1


def pair_shapes(path: str, shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Shapes of the A and the B of a stacked weight."""
  split = 1 + inputs_of(path, len(shape))
  return (*shape[:split], rank), (shape[0], rank, *shape[split:])


def targets(cfg: ModelConfig, params: dict) -> dict:
  """The weights that get a pair, by path. ValueError if the config's pattern matches none."""
  found = {path: w for path, w in flat({k: v for k, v in params.items() if k != 'lora'}).items()
           if STACKED.match(path) and re.search(cfg.lora.targets, path)}
  if not found:
    raise ValueError(f'model.lora.targets={cfg.lora.targets!r} matches no weight of the layers')
  return found


def init(cfg: ModelConfig, params: dict, key) -> dict:
  """Fresh pairs for `params`: A normal of deviation 1/√in, B zeros."""
  out = {}
  for n, (path, w) in enumerate(sorted(targets(cfg, params).items())):
    split = 1 + inputs_of(path, w.ndim)
    spec = jax.typeof(w).sharding.spec
    a_shape, b_shape = pair_shapes(path, w.shape, cfg.lora.rank)
    std = math.prod(w.shape[1:split]) ** -0.5
    a = std * jax.random.normal(jax.random.fold_in(key, n), a_shape, jnp.float32, out_sharding=jax.P(*spec[:split], None))
    out[path] = {'a': a, 'b': jnp.zeros(b_shape, out_sharding=jax.P(spec[0], None, *spec[split:]))}
  return nested(out)


def merged(cfg: ModelConfig, params: dict) -> dict:
  """The parameters with their pairs added in, and no pairs; no gradient goes to what was there before."""
  if 'lora' not in params:
    return params
  base = flat({k: jax.lax.stop_gradient(v) for k, v in params.items() if k != 'lora'})
  pairs = flat(params['lora'])
  for path in {p.rpartition('/')[0] for p in pairs}:
    w, a, b = base[path], pairs[f'{path}/a'], pairs[f'{path}/b']
    low = a.reshape(a.shape[0], -1, a.shape[-1]), b.reshape(b.shape[0], b.shape[1], -1)
    product = jnp.einsum('NIR,NRO->NIO', *(jax.sharding.reshard(x, jax.P(None, None, None)) for x in low))
    product = jax.sharding.reshard(product.reshape(w.shape), jax.typeof(w).sharding.spec)
    base[path] = w + cfg.lora.alpha / cfg.lora.rank * product
  return nested(base)
