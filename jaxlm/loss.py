"""Cross entropy over a vocabulary that may be sharded, a piece at a time, so that [B, L, V] never exists.

Pieces of the length: the gradient of each is taken at once, while its logits are there, and only [B, L, D] and [V, D] leave
the loop. Nothing is computed twice (a checkpointed loop would redo the largest matmul of a small model), but the whole output
matrix and its whole float32 gradient are there, on every device of mesh.fsdp.
Pieces of the vocabulary: each is gathered, used, and its gradient scattered, so that neither ever is whole. The first pass over
them finds log Z, the second computes their logits again. For large vocabularies cut over many devices: Llama-3-8B on 128 chips
of v5p needs 3 GiB less of them.
"""
import functools
import math

import jax
import jax.numpy as jnp

from jaxlm import layout
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


def pieces(chunks, unroll, body, carry, arrays, axis=1, letter='L'):
  """scan `body` over arrays cut into `chunks` along `axis`, which `letter` names → (carry, ys put together likewise); where
  the mesh cuts it, each device's part is cut. `unroll` makes the loop straight-line code, which is faster on CPU."""
  S = layout.shards(letter)

  def cut(a, *sizes):  # `axis` becomes len(sizes) of them, the first of which stays on the mesh
    spec = jax.typeof(a).sharding.spec
    spec = jax.P(*spec[:axis + 1], *[None] * (len(sizes) - 1), *spec[axis + 1:])
    return jnp.reshape(a, (*a.shape[:axis], *sizes, *a.shape[axis + 1:]), out_sharding=spec)

  def merged(a, count):
    spec = jax.typeof(a).sharding.spec
    return jnp.reshape(a, (*a.shape[:axis], -1, *a.shape[axis + count:]), out_sharding=jax.P(*spec[:axis + 1], *spec[axis + count:]))

  def on_piece(carry, piece):
    carry, y = body(carry, tuple(merged(a, 2) for a in piece))
    return carry, jax.tree.map(lambda y: cut(y, S, y.shape[axis] // S), y)
  stacked = tuple(jnp.moveaxis(cut(a, S, chunks, a.shape[axis] // S // chunks), axis + 1, 0) for a in arrays)
  carry, ys = jax.lax.scan(on_piece, carry, stacked, unroll=chunks if unroll else 1)
  return carry, jax.tree.map(lambda y: merged(jnp.moveaxis(y, 0, axis + 1), 3), ys)


def cross_entropy(cfg: ModelConfig, how: LossConfig, x_BLD, unembedding: dict, targets_BL, weights_BL, by_row: bool = False):
  """(loss, nll): Σ weights · (nll + z_loss · log²Z), and Σ weights · nll, in nats, float32 scalars; by_row: nll a row, [B].

  x_BLD hidden states (any float dtype), unembedding as in output.Hidden, targets_BL int32 in [0, V), weights_BL float32.
  how.chunks divides what it cuts. With how.smoothing ε, the loss's nll is of a target that is spread over the vocabulary by ε
  (Szegedy et al. 2016, §7). Differentiable in x and the unembedding, through `loss` only.
  """
  return OVER[how.over](cfg, how, x_BLD, unembedding, targets_BL, weights_BL, by_row)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 6))
def _over_length(cfg: ModelConfig, how: LossConfig, x_BLD, unembedding: dict, targets_BL, weights_BL, by_row: bool):
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
    dx, d = contract_gradients(UNEMBED, x, whole['w'], g_BLV)
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


_over_length.defvjp(_forward, _backward)


def _pieces_of_vocabulary(cfg: ModelConfig, how: LossConfig, unembedding: dict, body, carry):
  """scan body(carry, (piece of the unembedding, its ids_V)) over it."""
  ids_V = jnp.arange(cfg.V, dtype=jnp.int32, out_sharding=layout.spec('V'))
  names = sorted(unembedding)

  def on_piece(carry, piece):
    *arrays, ids_V = piece
    return body(carry, (dict(zip(names, arrays)), ids_V))
  arrays = (*(unembedding[name] for name in names), ids_V)
  carry, ys = pieces(how.chunks, not cfg.scan, on_piece, carry, arrays, axis=0, letter='V')
  return carry, ys and dict(zip(names, ys))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 6))
def _over_vocabulary(cfg: ModelConfig, how: LossConfig, x_BLD, unembedding: dict, targets_BL, weights_BL, by_row: bool):
  return _first_pass(cfg, how, x_BLD, unembedding, targets_BL, weights_BL, by_row)[0]


def _first_pass(cfg, how, x_BLD, unembedding, targets_BL, weights_BL, by_row):
  """((loss, nll), what the second pass needs)."""
  real = cfg.vocab or cfg.V

  def body(sums, piece):
    top_BL, rest_BL, picked_BL, total_BL = sums
    own, ids_V = piece
    logits_BLV = finish(cfg, unembed(own, x_BLD), ids_V)
    ids_BLV = ids_V[None, None]
    new_BL = jnp.maximum(top_BL, logits_BLV.max(-1))
    rest_BL = rest_BL * jnp.exp(top_BL - new_BL) + jnp.exp(logits_BLV - new_BL[..., None]).sum(-1)
    picked_BL += jnp.where(ids_BLV == targets_BL[..., None], logits_BLV, 0.).sum(-1)
    if how.smoothing:
      total_BL += jnp.where(ids_BLV < real, logits_BLV, 0.).sum(-1)
    return (new_BL, rest_BL, picked_BL, total_BL), None
  zeros_BL = jnp.zeros_like(weights_BL)
  (top_BL, rest_BL, picked_BL, total_BL), _ = _pieces_of_vocabulary(
      cfg, how, unembedding, body, (jnp.full_like(weights_BL, -jnp.inf), zeros_BL, zeros_BL, zeros_BL))
  log_z_BL = top_BL + jnp.log(rest_BL)
  nll_BL = (log_z_BL - picked_BL) * weights_BL
  smooth_BL = nll_BL + how.smoothing * (picked_BL - total_BL / real) * weights_BL
  loss = jnp.sum(smooth_BL + how.z_loss * log_z_BL ** 2 * weights_BL)
  return (loss, jnp.sum(nll_BL, 1) if by_row else jnp.sum(nll_BL)), (x_BLD, unembedding, targets_BL, weights_BL, log_z_BL)


def _second_pass(cfg, how, by_row, saved, cotangents):
  del by_row
  x_BLD, unembedding, targets_BL, weights_BL, log_z_BL = saved
  real = cfg.vocab or cfg.V
  weights_BL1 = (weights_BL * cotangents[0])[..., None]  # nll is reported, never differentiated
  of_p_BL1 = 1 + 2 * how.z_loss * log_z_BL[..., None]

  def body(dx_BLD, piece):
    own, ids_V = piece
    logits_BLV, back = jax.vjp(lambda a: finish(cfg, a, ids_V), unembed(own, x_BLD))
    ids_BLV = ids_V[None, None]
    g_BLV = jnp.exp(logits_BLV - log_z_BL[..., None]) * of_p_BL1 - (1 - how.smoothing) * (ids_BLV == targets_BL[..., None])
    g_BLV -= how.smoothing / real * (ids_BLV < real) if how.smoothing else 0.
    g_BLV, = back(g_BLV * weights_BL1)
    dx, d_w = contract_gradients(UNEMBED, x_BLD, own['w'], g_BLV)
    return dx_BLD + dx, tuple({'w': d_w, 'bias': g_BLV.sum((0, 1))}[name] for name in sorted(own))
  dx_BLD, d = _pieces_of_vocabulary(cfg, how, unembedding, body, jnp.zeros_like(x_BLD, jnp.float32))
  return dx_BLD.astype(x_BLD.dtype), d, None, None


_over_vocabulary.defvjp(_first_pass, _second_pass)

OVER = {'length': _over_length, 'vocabulary': _over_vocabulary}


def per_token_nll(cfg: ModelConfig, how: LossConfig, x_BLD, unembedding: dict, targets_BL):
  """−log p(target) of each token, float32 [B, L], a piece at a time as in cross_entropy; for evaluation,
  whose length how.chunks need not divide."""
  unembedding = gathered(Hidden(x_BLD, unembedding, {}))

  def body(carry, piece):
    x, targets = piece
    return carry, token_nll(finish(cfg, unembed(unembedding, x)), targets)[0]
  chunks = math.gcd(how.chunks, x_BLD.shape[1] // layout.shards('L'))
  return pieces(chunks, not cfg.scan, body, None, (x_BLD, targets_BL))[1]
