"""The train state and the pure train step."""
import jax
import jax.numpy as jnp
import optax

from jaxlm import digest, guard, layout, objectives, optimizer
from jaxlm.schema import Config, MoeConfig
from jaxlm.models import kinds
from jaxlm.models.output import Training


def init_state(config: Config, tx, key) -> dict:
  """A fresh state {'params', 'opt', 'step'}, sharded as its letters say; where rows of the data go on from step to step, also
  {'carry'}: what a recurrent model remembers of them; with guard.spike, {'guard'}: what the last good steps were like."""
  params = kinds.init_params(config.model, key)
  state = {'params': params, 'opt': fresh_opt(config, tx, params), 'step': jnp.int32(0)}
  if config.guard.spike:
    state['guard'] = guard.fresh(config.guard)
  return {**state, 'carry': kinds.empty_carry(config.model, config.batch)} if config.data.order == 'contiguous' else state


def fresh_opt(config: Config, tx, params):
  """The optimizer's state before the first step."""
  return optimizer.at_rest(config.optimizer, tx.init(params))


def abstract_state(config: Config, tx):
  """init_state's shapes, dtypes and shardings under the current mesh; nothing is allocated."""
  state = jax.eval_shape(lambda: init_state(config, tx, jax.random.key(0)))
  return {**state, 'opt': optimizer.abstract_at_rest(config.optimizer, state['opt'])}


def even_out(moe: MoeConfig, params, sums):
  """The routers' biases, moved towards equal loads of the experts (DeepSeek-V3, §2.1.2); no gradient reaches them."""
  if not moe.bias_rate:
    return params
  load_NE, mixtures = sums['load'], params['layers']['moe']
  moved_NE = mixtures['bias'] + moe.bias_rate * jnp.sign(load_NE.mean(-1, keepdims=True) - load_NE)
  return {**params, 'layers': {**params['layers'], 'moe': {**mixtures, 'bias': moved_NE}}}


def make_step(config: Config, tx, schedule):
  """(state, batch) → (state, sums): one update, to be jitted with the state donated.

  The gradient is Σ gradients / Σ tokens over all microbatches, so their number changes nothing but memory. An update
  that guard.py does not let pass is not applied: the state stays, and sums['applied'] is 0.
  """
  objective = objectives.of(config)

  def train_step(state, batch):
    key = jax.random.fold_in(jax.random.key(config.seed), state['step'])

    def gradient(index, micro, carry):
      micro_key = jax.random.fold_in(key, index)
      training = Training(micro_key if config.model.dropout else None, micro_key, state['step'])
      loss_fn = lambda params: objective(config, params, micro, training, carry)
      (loss, (sums, carry)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state['params'])
      return (grads, {'loss': loss, **sums}), carry

    count = config.microbatches
    if count == 1:
      (grads, sums), carry = gradient(0, batch, state.get('carry'))
    else:
      pieces = (jnp.arange(count), *layout.deal(count, (batch, state.get('carry'))))
      shapes = jax.eval_shape(gradient, *jax.tree.map(lambda a: a[0], pieces))[0]
      zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, out_sharding=a.sharding.spec), shapes)

      def add(sums, piece):
        more, carry = gradient(*piece)
        return jax.tree.map(jnp.add, sums, more), carry
      (grads, sums), carry = jax.lax.scan(add, zeros, pieces)
      carry = layout.collect(carry)
    grads = jax.tree.map(lambda g: g / jnp.maximum(sums['tokens'], 1), grads)

    grad_norm = optax.tree.norm(grads)
    finite, applied, history = guard.judge(config.guard, state.get('guard'), sums['loss'] / jnp.maximum(sums['tokens'], 1), grad_norm)
    state = {**state, 'opt': optimizer.in_use(config.optimizer, state['opt'])}
    updates, opt = tx.update(grads, state['opt'], state['params'])
    params = even_out(config.model.moe, optax.apply_updates(state['params'], updates), sums)
    new = {'params': params, 'opt': opt, 'step': state['step'] + 1, 'carry': carry, 'guard': history}
    new = jax.tree.map(lambda a, b: jnp.where(applied, a, b), {name: new[name] for name in state}, state)
    new['opt'] = optimizer.at_rest(config.optimizer, new['opt'])
    return new, {**sums, 'grad_norm': grad_norm, 'param_norm': optax.tree.norm(new['params']),
                 'learning_rate': schedule(state['step']), 'finite': finite.astype(jnp.float32),
                 'applied': applied.astype(jnp.float32), 'ids': jnp.stack([digest.of_array(batch[name]) for name in ('tokens', 'inputs') if name in batch])}

  return train_step
