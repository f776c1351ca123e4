"""Optimizers and learning-rate schedules. A new one is a function and a line of OPTIMIZERS or SCHEDULES."""
import math
import re

import jax
import jax.numpy as jnp
import optax

from jaxlm.schema import Config, OptimizerConfig

# Each: (t, T, config) → the share of lr at step t of T, t from 1, both float32; warmup is applied on top.
SCHEDULES = {
    'constant': lambda t, T, c: jnp.ones_like(t),
    'cosine': lambda t, T, c: c.final + (1 - c.final) * (1 + jnp.cos(jnp.pi * _progress(t, c.warmup, T))) / 2,
    'linear': lambda t, T, c: 1 - (1 - c.final) * _progress(t, c.warmup, T),
    'wsd': lambda t, T, c: 1 - (1 - c.final) * _progress(t, T - c.decay * T, T),  # Hu et al. 2024 (MiniCPM)
    'inverse_sqrt': lambda t, T, c: jnp.sqrt(max(c.warmup, 1) / jnp.maximum(t, max(c.warmup, 1))),  # Vaswani 2017
}


def _progress(t, start, end):
  return jnp.clip((t - start) / max(end - start, 1), 0, 1)


def make_schedule(c: OptimizerConfig, steps: int):
  """count of updates done so far → learning rate of the next one, float32. The first step is not at zero."""
  def schedule(count):
    t = jnp.asarray(count + 1, jnp.float32)
    return c.lr * jnp.minimum(1, t / max(c.warmup, 1)) * SCHEDULES[c.schedule](t, float(steps), c)
  return schedule


def decay_begins(c: OptimizerConfig, steps: int) -> int:
  """After how many updates a schedule that is level before it begins to come down; `steps`, if it has no such part."""
  return int(steps - c.decay * steps) if c.schedule == 'wsd' else steps


def risen(saved: Config, config: Config, step: int) -> tuple[float, float] | None:
  """(learning rate that a checkpoint of `step` updates has come to, the next one by this config), if another number of steps makes it
  rise. A rate that was to go up all the same, as in a warmup, is not meant."""
  before, now = (make_schedule(c.optimizer, c.steps) for c in (saved, config))
  come_to = max(float(before(max(step - 1, 0))), float(before(step)))
  return (come_to, float(now(step))) if saved.steps != config.steps and float(now(step)) > come_to * 1.001 else None


def path_of(path) -> str:
  """A tree path as people write it: layers/attention/q/w."""
  return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path)


def decay_mask(c: OptimizerConfig):
  """params → True where weight decay applies: every path that c.no_decay does not match; '' matches none."""
  exempt = lambda path: bool(c.no_decay and re.search(c.no_decay, path))
  return lambda params: jax.tree_util.tree_map_with_path(lambda p, _: not exempt(path_of(p)), params)


def _adamw(c: OptimizerConfig, schedule):
  return optax.adamw(schedule, c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=decay_mask(c))


def _muon(c: OptimizerConfig, schedule):
  """Muon for the matrices of the layers, `_adamw` for the rest. optax.contrib.muon cannot say this: its Adam part is Nadam unless
  Muon's momentum is plain, and decays either nothing or norms and biases too."""
  def rms(updates, _):  # Liu et al. 2025, §2.2
    sides = lambda u, axes: (math.prod(u.shape[a] for a in axes.reduction_axis), math.prod(u.shape[a] for a in axes.output_axis))
    return jax.tree.map(lambda u, axes: 0.2 * max(sides(u, axes)) ** 0.5 * u, updates, _matrices(updates))

  muon = optax.chain(
      optax.contrib.scale_by_muon(ns_steps=c.ns_steps, beta=c.momentum, eps=c.eps, nesterov=c.nesterov,
                                  weight_dimension_numbers=_matrices),
      optax.stateless(rms), optax.add_decayed_weights(c.weight_decay, decay_mask(c)), optax.scale_by_learning_rate(schedule))
  is_axes = lambda x: x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)
  labels = lambda params: jax.tree.map(lambda axes: 'adam' if axes is None else 'muon', _matrices(params), is_leaf=is_axes)
  return _auto(optax.partition({'muon': muon, 'adam': _adamw(c, schedule)}, labels))


OPTIMIZERS = {'adamw': _adamw, 'muon': _muon}


def _matrices(params):
  """Which axes of each stacked weight [N, in…, out…] make its matrix; None for what Adam updates."""
  def axes(path, w):
    name = path_of(path)
    if re.match(r'(encoder/)?layers/moe/(gate|up|down)$', name):  # [N, E, in, out]
      return optax.contrib.MuonDimensionNumbers((2,), (3,))
    if not re.match(r'(encoder/)?(layers|backward)/.*/w$', name):
      return None
    split = w.ndim - 1 if name.endswith('/o/w') else 2  # o is [N, H, K, D]; all others [N, in, out…]
    return optax.contrib.MuonDimensionNumbers(tuple(range(1, split)), tuple(range(split, w.ndim)))
  return jax.tree_util.tree_map_with_path(axes, params)


def _auto(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """tx for a transformation whose own code knows no Explicit mesh: XLA chooses the shardings inside of its update."""
  spec = lambda a: jax.typeof(a).sharding.spec

  def init(params):  # constants in the state get the spec that they will have after an update, so that nothing recompiles
    return jax.tree.map(lambda a: jax.sharding.reshard(a, spec(a)), tx.init(params))

  def update(grads, state, params):
    out = jax.tree.map(spec, (grads, state))
    return jax.sharding.auto_axes(tx.update, out_sharding=out)(grads, state, params)
  return optax.GradientTransformation(init, update)


def make_optimizer(c: OptimizerConfig, steps: int):
  """(tx, schedule): clip by the global norm, then the optimizer, over `steps` updates. Where params have pairs of low rank
  (models/lora.py), only these are updated, and only they have moments."""
  schedule = make_schedule(c, steps)
  tx = OPTIMIZERS[c.name](c, schedule)
  tx = optax.chain(optax.clip_by_global_norm(c.clip), tx) if c.clip else tx
  return _only_pairs(tx), schedule


def at_rest(c: OptimizerConfig, state):
  """An optimizer's state as it is between steps: with c.offload its moments in the host's memory. Counts stay on the device."""
  return _brought(jax.memory.Space.Host, state) if c.offload else state


def in_use(c: OptimizerConfig, state):
  """The inverse of `at_rest`."""
  return _brought(jax.memory.Space.Device, state) if c.offload else state


def _brought(space, state):
  return jax.tree.map(lambda a: jax.device_put(a, space) if a.ndim else a, state)


def abstract_at_rest(c: OptimizerConfig, state):
  """at_rest of abstract arrays, which know of memory by their shardings alone."""
  def one(a):
    mesh, spec = jax.sharding.get_abstract_mesh(), a.sharding.spec if a.sharding is not None else jax.P()
    sharding = jax.sharding.NamedSharding(mesh, spec, memory_kind='pinned_host')
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) if a.ndim else a
  return jax.tree.map(one, state) if c.offload else state


def _only_pairs(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """tx for params['lora'] if there is one, no update for the rest; tx itself if there is none."""
  def init(params):
    return tx.init({'lora': params['lora']} if 'lora' in params else params)

  def update(grads, state, params):
    if 'lora' not in params:
      return tx.update(grads, state, params)
    updates, state = tx.update({'lora': grads['lora']}, state, {'lora': params['lora']})
    return {**jax.tree.map(jnp.zeros_like, params), **updates}, state
  return optax.GradientTransformation(init, update)
