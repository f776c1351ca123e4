"""The train state and the pure train step."""
import jax
import jax.numpy as jnp
import optax

from jaxlm import layout
from jaxlm.schema import Config, MoeConfig
from jaxlm.models.decoder import init_params
from jaxlm.objectives import causal_lm


def init_state(config: Config, tx, key) -> dict:
  """A fresh state {'params', 'opt', 'step'}, sharded as its letters say."""
  params = init_params(config.model, key)
  return {'params': params, 'opt': tx.init(params), 'step': jnp.int32(0)}


def abstract_state(config: Config, tx):
  """init_state's shapes, dtypes and shardings under the current mesh; nothing is allocated."""
  return jax.eval_shape(lambda: init_state(config, tx, jax.random.key(0)))


def _microbatches(count: int, batch):
  """[B, …] → [count, B/count, …]. Rows are dealt out in turn, so that each piece lies on all devices evenly."""
  def deal(a):
    rows = jnp.moveaxis(a.reshape(a.shape[0] // count, count, *a.shape[1:]), 1, 0)
    return jax.sharding.reshard(rows, jax.P(None, *layout.spec('BL')))
  return jax.tree.map(deal, batch)


def even_out(moe: MoeConfig, params, sums):
  """The routers' biases, moved towards equal loads of the experts (DeepSeek-V3, §2.1.2); no gradient reaches them."""
  if not moe.bias_rate:
    return params
  load_NE, mixtures = sums['load'], params['layers']['moe']
  moved_NE = mixtures['bias'] + moe.bias_rate * jnp.sign(load_NE.mean(-1, keepdims=True) - load_NE)
  return {**params, 'layers': {**params['layers'], 'moe': {**mixtures, 'bias': moved_NE}}}


def make_step(config: Config, tx, schedule, objective=causal_lm):
  """(state, batch) → (state, sums): one update, to be jitted with the state donated.

  The gradient is Σ gradients / Σ tokens over all microbatches, so their number changes nothing but memory. An update
  whose loss or gradient is not finite is not applied: the state stays, and sums['finite'] is 0.
  """
  def train_step(state, batch):
    key = jax.random.fold_in(jax.random.key(config.seed), state['step']) if config.model.dropout else None

    def gradient(index, micro):
      micro_key = jax.random.fold_in(key, index) if key is not None else None
      loss_fn = lambda params: objective(config, params, micro, micro_key)
      (loss, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(state['params'])
      return grads, {'loss': loss, **sums}

    count = config.microbatches
    if count == 1:
      grads, sums = gradient(0, batch)
    else:
      pieces = (jnp.arange(count), _microbatches(count, batch))
      shapes = jax.eval_shape(gradient, *jax.tree.map(lambda a: a[0], pieces))[1]
      zeros = (jax.tree.map(jnp.zeros_like, state['params']), jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes))
      (grads, sums), _ = jax.lax.scan(lambda carry, piece: (jax.tree.map(jnp.add, carry, gradient(*piece)), None),
                                      zeros, pieces)
    grads = jax.tree.map(lambda g: g / jnp.maximum(sums['tokens'], 1), grads)

    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(sums['loss']) & jnp.isfinite(grad_norm)
    updates, opt = tx.update(grads, state['opt'], state['params'])
    params = even_out(config.model.moe, optax.apply_updates(state['params'], updates), sums)
    new = {'params': params, 'opt': opt, 'step': state['step'] + 1}
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    return new, {**sums, 'grad_norm': grad_norm, 'param_norm': optax.tree.norm(new['params']),
                 'learning_rate': schedule(state['step']), 'finite': finite.astype(jnp.float32)}

  return train_step
