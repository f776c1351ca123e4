"""Cross entropy over a vocabulary that may be sharded, a piece of the length at a time.

The gradient of each piece is taken at once, while its logits are there, and only [B, L, D] and [V, D] leave the loop:
neither the forward nor the backward pass holds [B, L, V], and nothing is computed twice (a checkpointed loop would
redo the largest matmul of a small model).
"""
import functools
import math

import jax
import jax.numpy as jnp

from jaxlm.models.output import UNEMBED, Hidden, finish, gathered, unembed
from jaxlm.models.layers import contract_gradients, use
from jaxlm.schema import LossConfig, ModelConfig


def token_nll(logits_BLV, targets_BL):
  """(−log p(target), log Z), both [B, L] float32. An iota select, because a gather cannot cross a sharded V."""
  iota_BLV = jax.lax.broadcasted_iota(jnp.int32, logits_BLV.shape, 2, out_sharding=jax.typeof(logits_BLV).sharding)
  picked_BL = jnp.sum(jnp.where(iota_BLV == targets_BL[..., None], logits_BLV, 0.), -1)
  log_z_BL = jax.nn.logsumexp(logits_BLV, -1)
  return log_z_BL - picked_BL, log_z_BL


def _piece(cfg, how, by_row, logits_BLV, targets_BL, weights_BL):
  logits_BLV = finish(cfg, logits_BLV)
  nll_BL, log_z_BL = token_nll(logits_BLV, targets_BL)
  nll = jnp.sum(nll_BL * weights_BL)
  loss = nll + how.z_loss * jnp.sum(log_z_BL ** 2 * weights_BL)
  if how.smoothing:
    real = cfg.vocab or cfg.V
    iota_BLV = jax.lax.broadcasted_iota(jnp.int32, logits_BLV.shape, 2, out_sharding=jax.typeof(logits_BLV).sharding)
    mean_BL = jnp.sum(jnp.where(iota_BLV < real, logits_BLV, 0.), -1) / real
    loss += how.smoothing * (jnp.sum((log_z_BL - mean_BL) * weights_BL) - nll)
  return loss, jnp.sum(nll_BL * weights_BL, 1) if by_row else nll


def _zero(by_row, weights_BL):
  """Where sums of nll start: a scalar, or [B] that lies as the batch does."""
  return jnp.zeros_like(weights_BL[:, 0]) if by_row else jnp.float32(0)


def pieces(chunks, unroll, body, carry, arrays):
  """scan `body` over arrays [B, L, …] cut into `chunks` along L → (carry, ys [B, L, …]); `unroll` makes the loop
  straight-line code, which is faster on CPU."""
  cut = tuple(jnp.moveaxis(a.reshape(a.shape[0], chunks, -1, *a.shape[2:]), 1, 0) for a in arrays)
  carry, ys = jax.lax.scan(body, carry, cut, unroll=chunks if unroll else 1)
  if ys is None:
    return carry, None
  y = jnp.moveaxis(ys, 0, 1)
  return carry, y.reshape(y.shape[0], -1, *y.shape[3:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 6))
def cross_entropy(cfg: ModelConfig, how: LossConfig, x_BLD, unembedding: dict, targets_BL, weights_BL, by_row: bool = False):
  """(loss, nll): Σ weights · (nll + z_loss · log²Z), and Σ weights · nll, in nats, float32 scalars; by_row: nll a row, [B].

  x_BLD hidden states (any float dtype), unembedding as in output.Hidden, targets_BL int32 in [0, V), weights_BL float32.
  how.chunks divides L. With how.smoothing ε, the loss's nll is of a target that is spread over the vocabulary by ε
  (Szegedy et al. 2016, §7). Differentiable in x and the unembedding, through `loss` only.
  """
  unembedding = gathered(Hidden(x_BLD, unembedding, {}))

  def body(sums, piece):
    x, targets, weights = piece
    loss, nll = _piece(cfg, how, by_row, unembed(unembedding, x), targets, weights)
    return (sums[0] + loss, sums[1] + nll), None
  sums, _ = pieces(how.chunks, not cfg.scan, body, (jnp.float32(0), _zero(by_row, weights_BL)), (x_BLD, targets_BL, weights_BL))
  return sums


def _forward(cfg, how, x_BLD, unembedding, targets_BL, weights_BL, by_row):
  def body(carry, piece):
    x, targets, weights = piece
    (loss, nll), g_BLV = jax.value_and_grad(functools.partial(_piece, cfg, how, by_row), has_aux=True)(
        unembed(whole, x), targets, weights)
    dx, d = contract_gradients(UNEMBED, 'gathered', x, whole['w'], g_BLV)
    d = {'w': d, 'bias': g_BLV.sum((0, 1))} if 'bias' in whole else {'w': d}
    return (carry[0] + loss, carry[1] + nll, jax.tree.map(jnp.add, carry[2], d)), dx
  whole = gathered(Hidden(x_BLD, unembedding, {}))  # once, not a piece at a time
  zeros = jax.tree.map(lambda a: jnp.zeros_like(a, jnp.float32), whole)
  (loss, nll, d), dx_BLD = pieces(how.chunks, not cfg.scan, body, (jnp.float32(0), _zero(by_row, weights_BL), zeros),
                                  (x_BLD, targets_BL, weights_BL))
  scatter = jax.linear_transpose(lambda w_VD: use(w_VD, 'VD', jnp.float32), unembedding['w'])
  return (loss, nll), (dx_BLD, {**d, 'w': scatter(d['w'])[0]})


def _backward(cfg, how, by_row, gradients, cotangents):
  del cfg, how, by_row
  dx_BLD, d = gradients
  g = cotangents[0]  # nll is reported, never differentiated
  return (dx_BLD * g).astype(dx_BLD.dtype), jax.tree.map(lambda a: a * g, d), None, None


cross_entropy.defvjp(_forward, _backward)


def per_token_nll(cfg: ModelConfig, how: LossConfig, x_BLD, unembedding: dict, targets_BL):
  """−log p(target) of each token, float32 [B, L], a piece at a time as in cross_entropy; for evaluation,
  whose length how.chunks need not divide."""
  unembedding = gathered(Hidden(x_BLD, unembedding, {}))

  def body(carry, piece):
    x, targets = piece
    return carry, token_nll(finish(cfg, unembed(unembedding, x)), targets)[0]
  chunks = math.gcd(how.chunks, x_BLD.shape[1])
  return pieces(chunks, not cfg.scan, body, None, (x_BLD, targets_BL))[1]
