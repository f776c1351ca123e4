"""Cross entropy over a vocabulary that may be sharded, a piece of the length at a time.

The gradient of each piece is taken at once, while its logits are there, and only [B, L, D] and [V, D] leave the loop:
neither the forward nor the backward pass holds [B, L, V], and nothing is computed twice (a checkpointed loop would
redo the largest matmul of a small model).
"""
import functools

import jax
import jax.numpy as jnp

from jaxlm import layout
from jaxlm.models.decoder import UNEMBED, finish_logits, unembed
from jaxlm.models.layers import contract_gradients, use
from jaxlm.schema import LossConfig, ModelConfig


def token_nll(logits_BLV, targets_BL):
  """(−log p(target), log Z), both [B, L] float32. An iota select, because a gather cannot cross a sharded V."""
  iota_BLV = jax.lax.broadcasted_iota(jnp.int32, logits_BLV.shape, 2, out_sharding=jax.typeof(logits_BLV).sharding)
  picked_BL = jnp.sum(jnp.where(iota_BLV == targets_BL[..., None], logits_BLV, 0.), -1)
  log_z_BL = jax.nn.logsumexp(logits_BLV, -1)
  return log_z_BL - picked_BL, log_z_BL


def _piece(cfg, z_loss, logits_BLV, targets_BL, weights_BL):
  nll_BL, log_z_BL = token_nll(finish_logits(cfg, logits_BLV), targets_BL)
  nll = jnp.sum(nll_BL * weights_BL)
  return nll + z_loss * jnp.sum(log_z_BL ** 2 * weights_BL), nll


def pieces(chunks, unroll, body, carry, arrays):
  """scan `body` over arrays [B, L, …] cut into `chunks` along L → (carry, ys [B, L, …]); `unroll` makes the loop
  straight-line code, which is faster on CPU."""
  cut = tuple(jnp.moveaxis(a.reshape(a.shape[0], chunks, -1, *a.shape[2:]), 1, 0) for a in arrays)
  carry, ys = jax.lax.scan(body, carry, cut, unroll=chunks if unroll else 1)
  if ys is None:
    return carry, None
  y = jnp.moveaxis(ys, 0, 1)
  return carry, y.reshape(y.shape[0], -1, *y.shape[3:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def cross_entropy(cfg: ModelConfig, how: LossConfig, x_BLD, unembed_VD, targets_BL, weights_BL):
  """(loss, nll): Σ weights · (nll + z_loss · log²Z), and Σ weights · nll, in nats, float32 scalars.

  x_BLD hidden states (any float dtype), unembed_VD float32, targets_BL int32 in [0, V), weights_BL float32.
  how.chunks divides L. Differentiable in x and unembed, through `loss` only.
  """
  w_VD = use(unembed_VD, 'VD', x_BLD.dtype)

  def body(sums, piece):
    x, targets, weights = piece
    loss, nll = _piece(cfg, how.z_loss, unembed(x, w_VD), targets, weights)
    return (sums[0] + loss, sums[1] + nll), None
  sums, _ = pieces(how.chunks, not cfg.scan, body, (jnp.float32(0), jnp.float32(0)), (x_BLD, targets_BL, weights_BL))
  return sums


def _forward(cfg, how, x_BLD, unembed_VD, targets_BL, weights_BL):
  def body(carry, piece):
    x, targets, weights = piece
    (loss, nll), g_BLV = jax.value_and_grad(functools.partial(_piece, cfg, how.z_loss), has_aux=True)(
        unembed(x, w_VD), targets, weights)
    dx, dw_VD = contract_gradients(UNEMBED, 'gathered', x, w_VD, g_BLV)
    return (carry[0] + loss, carry[1] + nll, carry[2] + dw_VD), dx
  w_VD = use(unembed_VD, 'VD', x_BLD.dtype)  # gathered once, not a piece at a time
  zero_VD = jnp.zeros_like(w_VD, jnp.float32)
  (loss, nll, dw_VD), dx_BLD = pieces(how.chunks, not cfg.scan, body, (jnp.float32(0), jnp.float32(0), zero_VD),
                                       (x_BLD, targets_BL, weights_BL))
  scatter = jax.linear_transpose(lambda w_VD: use(w_VD, 'VD', jnp.float32), unembed_VD)
  return (loss, nll), (dx_BLD, *scatter(dw_VD))


def _backward(cfg, how, gradients, cotangents):
  del cfg, how
  dx_BLD, dw_VD = gradients
  g = cotangents[0]  # nll is reported, never differentiated
  return (dx_BLD * g).astype(dx_BLD.dtype), dw_VD * g, None, None


cross_entropy.defvjp(_forward, _backward)


def per_token_nll(cfg: ModelConfig, how: LossConfig, x_BLD, unembed_VD, targets_BL):
  """−log p(target) of each token, float32 [B, L], a piece at a time as in cross_entropy; for evaluation."""
  w_VD = use(unembed_VD, 'VD', x_BLD.dtype)

  def body(carry, piece):
    x, targets = piece
    return carry, token_nll(finish_logits(cfg, unembed(x, w_VD)), targets)[0]
  return pieces(how.chunks, not cfg.scan, body, None, (x_BLD, targets_BL))[1]
