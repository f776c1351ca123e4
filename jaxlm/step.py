"""The train state and the pure train step."""
import jax
import jax.numpy as jnp
import optax

from jaxlm import layout
from jaxlm.config import Config
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


def make_step(config: Config, tx, schedule, objective=causal_lm):
  """(state, batch) → (state, sums): one update, to be jitted with the state donated.

  The gradient is Σ gradients / Σ tokens over all microbatches, so their number changes nothing but memory. An update
  whose loss or gradient is not finite is not applied: the state stays, and sums['finite'] is 0.
  """
  def train_step(state, batch):
    key = jax.random.fold_in(jax.random.key(config.seed), state['step']) if config.model.dropout else None

    def gradient(carry, piece):
      index, micro = piece
      micro_key = jax.random.fold_in(key, index) if key is not None else None
      loss_fn = lambda params: objective(config, params, micro, micro_key)
      (loss, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(state['params'])
      return jax.tree.map(jnp.add, carry, (grads, {'loss': loss, **sums})), None

    zeros = (jax.tree.map(jnp.zeros_like, state['params']), {k: jnp.float32(0) for k in ('loss', 'nll', 'tokens')})
    count = config.microbatches
    if count == 1:
      (grads, sums), _ = gradient(zeros, (0, batch))
    else:
      (grads, sums), _ = jax.lax.scan(gradient, zeros, (jnp.arange(count), _microbatches(count, batch)))
    grads = jax.tree.map(lambda g: g / jnp.maximum(sums['tokens'], 1), grads)

    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(sums['loss']) & jnp.isfinite(grad_norm)
    updates, opt = tx.update(grads, state['opt'], state['params'])
    new = {'params': optax.apply_updates(state['params'], updates), 'opt': opt, 'step': state['step'] + 1}
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    return new, {**sums, 'grad_norm': grad_norm, 'param_norm': optax.tree.norm(new['params']),
                 'learning_rate': schedule(state['step']), 'finite': finite.astype(jnp.float32)}

  return train_step
