"""Recurrent language models: LSTM (Hochreiter & Schmidhuber 1997) and GRU (Cho et al. 2014), stacked.

The product with a layer's input is taken for all of its tokens at once; only the product with its own state is a loop over
time. So is the backward pass: what the loop leaves is the gradient of each token's gates, and that of the weights is one
contraction after it, where differentiating the loop would add up a [D, J, D] gradient at every token.
"""
import functools

import jax
import jax.numpy as jnp

from jaxlm import layout
from jaxlm.models import embedding
from jaxlm.models.layers import Dropout, contract, normal, use
from jaxlm.models.output import Hidden, Training
from jaxlm.remat import remat
from jaxlm.schema import ModelConfig


def _lstm(of_x_BJK, of_h_BJK, state):
  """Gates input, forget, cell, output, as torch has them."""
  i, f, g, o = jnp.split((of_x_BJK + of_h_BJK).astype(jnp.float32), 4, 1)
  c_BD = jax.nn.sigmoid(f[:, 0]) * state['c'] + jax.nn.sigmoid(i[:, 0]) * jnp.tanh(g[:, 0])
  return {'h': (jax.nn.sigmoid(o[:, 0]) * jnp.tanh(c_BD)).astype(of_x_BJK.dtype), 'c': c_BD}


def _gru(of_x_BJK, of_h_BJK, state):
  """Gates reset, update, new, as torch has them: the reset gate is applied after the product."""
  (rx, zx, nx), (rh, zh, nh) = (jnp.split(a.astype(jnp.float32), 3, 1) for a in (of_x_BJK, of_h_BJK))
  r, z = jax.nn.sigmoid(rx + rh), jax.nn.sigmoid(zx + zh)
  n = jnp.tanh(nx + r * nh)
  return {'h': ((1 - z) * n + z * state['h'][:, None].astype(jnp.float32))[:, 0].astype(of_x_BJK.dtype)}


CELLS = {'lstm': (4, _lstm), 'gru': (3, _gru)}  # name → (gates J, (of x, of h, state) → state)


def init_layer(cfg: ModelConfig, key) -> dict:
  """One layer: {'x': {'w': [D, J, D], 'bias'}, 'h': the same}. The forget gate starts open (Jozefowicz et al. 2015, §2)."""
  J, std = CELLS[cfg.rnn.cell][0], cfg.init_std
  keys = dict(zip('xh', jax.random.split(key)))
  zeros = jnp.zeros((J, cfg.D))
  open_gate = zeros.at[1].set(1.) if cfg.rnn.cell == 'lstm' else zeros
  return {name: {'w': normal(std, 'DJK')(keys[name], (cfg.D, J, cfg.D)), 'bias': bias}
          for name, bias in (('x', open_gate), ('h', zeros))}


def init_params(cfg: ModelConfig, key) -> dict:
  vocabulary, layers = jax.random.split(key)
  return {**embedding.init_vocabulary(cfg, vocabulary), 'layers': init_layers(cfg, layers)}


def init_layers(cfg: ModelConfig, key) -> dict:
  return jax.lax.scan(lambda _, k: (None, init_layer(cfg, k)), None, jax.random.split(key, cfg.N))[1]


def empty_carry(cfg: ModelConfig, B: int) -> dict:
  """The state before a document: zeros. {'h': [B, N, D]} and, of an LSTM, {'c': [B, N, D] float32}."""
  zeros = lambda dtype: jnp.zeros((B, cfg.N, cfg.D), dtype, out_sharding=layout.spec('BND'))
  return {'h': zeros(cfg.dtype), 'c': zeros(jnp.float32)} if cfg.rnn.cell == 'lstm' else {'h': zeros(cfg.dtype)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recur(cell: str, x_LBJK, w_DJK, bias_JK, keep_LB, real_LB, state):
  """(h_LBD, the last state): the loop over time. x: what the tokens add to the gates; keep: False where the state starts
  from zeros; real: False where it passes by a token unchanged."""
  return _recur_forward(cell, x_LBJK, w_DJK, bias_JK, keep_LB, real_LB, state)[0]


def gates(h_BD, w_DJK, bias_JK):
  return jnp.einsum('BD,DJK->BJK', h_BD, w_DJK) + bias_JK[None]


def _where(which_B, a, b):
  return jax.tree.map(lambda a, b: jnp.where(which_B[:, None], a, b), a, b)


def _recur_forward(cell, x_LBJK, w_DJK, bias_JK, keep_LB, real_LB, state):
  def step(state, now):
    x_BJK, keep_B, real_B = now
    before = _where(keep_B, state, jax.tree.map(jnp.zeros_like, state))
    h_BJK = gates(before['h'], w_DJK, bias_JK)
    after = _where(real_B, CELLS[cell][1](x_BJK, h_BJK, before), before)
    return after, (after['h'], before, h_BJK)
  state, (h_LBD, before, gates_LBJK) = jax.lax.scan(step, state, (x_LBJK, keep_LB, real_LB))
  return (h_LBD, state), (x_LBJK, w_DJK, keep_LB, real_LB, before, gates_LBJK)


def _recur_backward(cell, saved, cotangents):
  x_LBJK, w_DJK, keep_LB, real_LB, before, gates_LBJK = saved
  dh_LBD, dstate = cotangents

  def step(dafter, now):
    dh_BD, x_BJK, keep_B, real_B, state, h_BJK = now
    dafter = {**dafter, 'h': dafter['h'] + dh_BD}
    zeros = jax.tree.map(jnp.zeros_like, dafter)
    _, vjp = jax.vjp(CELLS[cell][1], x_BJK, h_BJK, state)
    dx_BJK, dgates_BJK, dbefore = vjp(_where(real_B, dafter, zeros))
    dbefore['h'] += jnp.einsum('BJK,DJK->BD', dgates_BJK, w_DJK)
    dbefore = jax.tree.map(jnp.add, dbefore, _where(real_B, zeros, dafter))
    return _where(keep_B, dbefore, zeros), (dx_BJK, dgates_BJK)
  dstate, (dx_LBJK, dgates_LBJK) = jax.lax.scan(step, dstate, (dh_LBD, x_LBJK, keep_LB, real_LB, before, gates_LBJK),
                                                reverse=True)
  dw_DJK = jnp.einsum('LBD,LBJK->DJK', before['h'], dgates_LBJK, out_sharding=jax.P(None, None, None))
  return dx_LBJK, dw_DJK, dgates_LBJK.sum((0, 1)), None, None, dstate


recur.defvjp(_recur_forward, _recur_backward)


def layer(cfg: ModelConfig, params: dict, x_BLD, keep_LB, real_LB, state: dict):
  """(h_BLD, the last state {'h': [B, D], …}) of one layer."""
  x_BLJK = contract('BLD,DJK->BLJK', None, x_BLD, params['x']['w'])
  x_BLJK += params['x']['bias'].astype(x_BLD.dtype)[None, None]
  w_DJK = use(params['h']['w'], 'DJK', x_BLD.dtype)
  bias_JK = params['h']['bias'].astype(x_BLD.dtype)
  h_LBD, state = recur(cfg.rnn.cell, jnp.moveaxis(x_BLJK, 1, 0), w_DJK, bias_JK, keep_LB, real_LB, state)
  return jnp.moveaxis(h_LBD, 0, 1), state


def layers(cfg: ModelConfig, params: dict, x_BLD, keep_BL, carry: dict, dropout_key=None, real_BL=None):
  """(h_BLD of the last layer, the state after the last token [B, N, D]); dropout on what goes up, not on what goes on
  (Zaremba et al. 2014). keep and real: see recur; all are real if it is None."""
  keep_LB, real_LB = keep_BL.T, (jnp.ones_like(keep_BL) if real_BL is None else real_BL).T
  run, after = remat(cfg, functools.partial(layer, cfg)), []
  for n in range(cfg.N):
    own, state = jax.tree.map(lambda a, n=n: a[n], params), jax.tree.map(lambda a, n=n: a[:, n], carry)
    x_BLD, state = run(own, x_BLD, keep_LB, real_LB, state)
    if dropout_key is not None:
      x_BLD = Dropout(cfg.dropout, True).apply({}, x_BLD, rngs={'dropout': jax.random.fold_in(dropout_key, n)})
    after.append(state)
  return x_BLD, jax.tree.map(lambda *a: jnp.stack(a, 1), *after)


def forward(cfg: ModelConfig, params: dict, batch: dict, training: Training | None = None, carry=None) -> Hidden:
  """batch: tokens and positions int32 [B, L]; the state starts anew where a position is 0, and otherwise from carry (zeros
  if None), to which no gradient goes (truncated backpropagation through time)."""
  key = training and training.dropout
  x_BLD = embedding.embed(cfg, params['embed'], {}, batch, key)
  carry = empty_carry(cfg, x_BLD.shape[0]) if carry is None else jax.lax.stop_gradient(carry)
  x_BLD, carry = layers(cfg, params['layers'], x_BLD, batch['positions'] > 0, carry, key)
  return Hidden(x_BLD, embedding.unembedding(cfg, params), {}, carry)
