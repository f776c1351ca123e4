"""Mixtures of experts (Shazeer et al. 2017): a router sends each token to top_k of E gated mlps.

A new way to send them is a function and a line of DISPATCH: (cfg, x_BLD, weights_BLS, experts_BLS, gate_EDF, up_EDF,
down_EFD) → (y_BLD, choices that no expert took, float32), S being the top_k choices. Both agree with a loop over experts in tests/test_moe.py.
"""
import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlm import layout
from jaxlm.models import exchange, experts, quantised_experts, sorting
from jaxlm.models.layers import MLPS, Mlp, contract, normal
from jaxlm.remat import tag
from jaxlm.schema import ModelConfig, MoeConfig


class Moe(nn.Module):
  """Returns (y_BLD, aux): what the layer says of its router, over real tokens only (real_BL, bool):

  balance  E · Σ_e share of choices · mean score (Switch Transformer, eq. 4), 1 when even
  z        mean log²Σexp of the router's logits (ST-MoE, eq. 5)
  load_E   choices an expert got, a count
  dropped  choices that no expert took, for want of room; those of padding too
  """
  cfg: ModelConfig

  @nn.compact
  def __call__(self, x_BLD, real_BL):
    cfg, moe = self.cfg, self.cfg.moe
    router_DE = self.param('router', normal(cfg.init_std, 'DE'), (cfg.D, moe.E))
    bias_E = self.param('bias', nn.initializers.zeros, (moe.E,)) if moe.bias else None
    weight = lambda name, dims, std: self.param(name, normal(std, dims), tuple({'E': moe.E, 'F': moe.F, 'D': cfg.D}[d]
                                                                               for d in dims))
    gate_EDF, up_EDF = weight('gate', 'EDF', cfg.init_std), weight('up', 'EDF', cfg.init_std)
    down_EFD = weight('down', 'EFD', cfg.init_std / (2 * cfg.N) ** 0.5)

    router_DE = jax.sharding.reshard(router_DE, jax.P(None, None))  # whole, in use: every token looks at all experts
    logits_BLE = jnp.einsum('BLD,DE->BLE', x_BLD.astype(jnp.float32), router_DE, out_sharding=jax.P(*layout.spec('BL'), None))
    scores_BLE = SCORES[moe.score](logits_BLE)
    weights_BLS, experts_BLS = choose(moe, scores_BLE, bias_E)
    y_BLD, dropped = DISPATCH[moe.dispatch](cfg, x_BLD, weights_BLS, experts_BLS, gate_EDF, up_EDF, down_EFD)
    if moe.shared:
      y_BLD += Mlp(cfg, moe.shared, name='shared')(x_BLD)
    return y_BLD, {**_report(moe, logits_BLE, scores_BLE, experts_BLS, real_BL), 'dropped': dropped}


SCORES = {'softmax': functools.partial(jax.nn.softmax, axis=-1), 'sigmoid': jax.nn.sigmoid}


def choose(moe: MoeConfig, scores_BLE, bias_E=None):
  """The top_k experts of each token, int32 [B, L, S], and the weights of what they say, float32 [B, L, S]."""
  rank_BLE = scores_BLE if bias_E is None else scores_BLE + jax.lax.stop_gradient(bias_E)[None, None]
  if moe.groups > 1:  # DeepSeek: a group is as good as its two best experts together; with no bias, as its best
    rank_BLGE = rank_BLE.reshape(*rank_BLE.shape[:2], moe.groups, -1)
    best = jax.lax.top_k(rank_BLGE, 2 if moe.bias else 1)[0].sum(-1)
    _, groups_BLS = jax.lax.top_k(best, moe.top_groups)
    allowed_BLG = (groups_BLS[..., None] == jnp.arange(moe.groups)[None, None, None]).any(-2)
    rank_BLE = jnp.where(allowed_BLG[..., None], rank_BLGE, -jnp.inf).reshape(rank_BLE.shape)
  _, experts_BLS = jax.lax.top_k(rank_BLE, moe.top_k)
  weights_BLS = jnp.sum(jnp.where(experts_BLS[..., None] == jnp.arange(moe.E)[None, None, None],
                                  scores_BLE[:, :, None], 0.), -1)
  if moe.normalize:
    weights_BLS /= jnp.sum(weights_BLS, -1, keepdims=True) + 1e-20
  return weights_BLS * moe.scale, experts_BLS


def _report(moe: MoeConfig, logits_BLE, scores_BLE, experts_BLS, real_BL):
  count = jnp.maximum(real_BL.sum(), 1)
  hits_BLE = (experts_BLS[..., None] == jnp.arange(moe.E)[None, None, None]).sum(2) * real_BL[..., None]
  load_E = hits_BLE.sum((0, 1)).astype(jnp.float32)
  share_BLE = scores_BLE / (scores_BLE.sum(-1, keepdims=True) + 1e-20)
  mean_E = (share_BLE * real_BL[..., None]).sum((0, 1)) / count
  log_z_BL = jax.nn.logsumexp(logits_BLE, -1)
  return {'balance': moe.E * jnp.sum(load_E / (count * moe.top_k) * mean_E),
          'z': jnp.sum(log_z_BL ** 2 * real_BL) / count, 'load_E': load_E}


def dropless(cfg: ModelConfig, x_BLD, weights_BLS, experts_BLS, gate_EDF, up_EDF, down_EFD):
  """Every token reaches its experts: choices are sorted by expert on each device, and each run of rows is multiplied with its expert's
  matrix (MegaBlocks, Gale et al. 2022; kernels/grouped.py). Over mesh.expert, choices go to the device that has their expert, and what
  it says comes back (exchange.py).

  Weights are gathered inside the shard_map, so that their gradients are scattered over the devices that share them; gathered outside,
  they would be summed whole on every device. `down` is turned before it is gathered: joined along their last axis, its pieces would
  have to be copied."""
  weights = (gate_EDF, up_EDF, jnp.swapaxes(down_EFD, 1, 2))
  specs = tuple(jax.typeof(w).sharding.spec for w in weights)

  def local(x_BLD, weights_BLS, experts_BLS, *cut):
    S, (B, L, D) = experts_BLS.shape[-1], x_BLD.shape
    order_T = jnp.argsort(experts_BLS.reshape(-1), stable=True)
    sizes_E = jnp.bincount(experts_BLS.reshape(-1), length=cfg.moe.E).astype(jnp.int32)
    rows_TD = sorting.to_experts(x_BLD.reshape(-1, D), order_T, S)
    if cfg.matmul == 'full':
      whole = [experts.gathered(w_EDF, 'EDF', spec) for w_EDF, spec in zip(cut, specs)]
      say = lambda rows_TD, sizes_E: experts.say(cfg.mlp, rows_TD, sizes_E, *whole)
    else:
      say = lambda rows_TD, sizes_E: quantised_experts.say(cfg.mlp, cfg.matmul, specs, rows_TD, sizes_E, *cut)
    dropped = 0
    if jax.lax.axis_size('expert') > 1:
      out_TD, dropped = exchange.at_experts(say, rows_TD, sizes_E, S, cfg.moe.room)
    else:
      out_TD = say(rows_TD, sizes_E)
    out_TD = tag(out_TD, 'experts_out')
    out_TD *= weights_BLS.reshape(-1)[order_T][:, None].astype(out_TD.dtype)
    y_BLD = sorting.from_experts(out_TD, order_T, S).reshape(B, L, D)
    dropped = jax.lax.psum(jnp.float32(dropped), (*layout.ACT['B'], 'context'))
    return jax.lax.psum(y_BLD, 'tensor'), dropped

  in_specs = (*map(layout.spec, ('BLD', 'BLS', 'BLS')), *specs)
  # check_vma: kernels do not say along which axes their results vary
  return jax.shard_map(local, in_specs=in_specs, out_specs=(layout.spec('BLD'), jax.P()), check_vma=False)(
      x_BLD, weights_BLS, experts_BLS, *(w_EDF.astype(x_BLD.dtype) for w_EDF in weights))


def capacity(cfg: ModelConfig, x_BLD, weights_BLS, experts_BLS, gate_EDF, up_EDF, down_EFD):
  """Each expert takes at most C tokens of a row, the first choices first, then the earlier tokens; the others pass by
  on the residual stream (GShard, Lepikhin et al. 2020; Switch Transformer). All shapes are static."""
  moe, (B, L, S) = cfg.moe, experts_BLS.shape
  x_BLD, weights_BLS, experts_BLS = (jax.sharding.reshard(a, layout.spec('B')) for a in (x_BLD, weights_BLS, experts_BLS))
  C = min(L * S, math.ceil(moe.capacity * L * S / moe.E))
  hit_BSLE = jax.nn.one_hot(jnp.swapaxes(experts_BLS, 1, 2), moe.E, dtype=jnp.int32)
  before_BSLE = jnp.cumsum(hit_BSLE.reshape(B, S * L, moe.E), 1).reshape(hit_BSLE.shape) - hit_BSLE
  dropped = jnp.sum(hit_BSLE * (before_BSLE >= C)).astype(jnp.float32)
  slot_BSLEC = jax.nn.one_hot(before_BSLE, C) * hit_BSLE[..., None]  # places from C on are no place
  send_BLEC = slot_BSLEC.sum(1).astype(x_BLD.dtype)
  back_BLEC = jnp.sum(slot_BSLEC * jnp.swapaxes(weights_BLS, 1, 2)[..., None, None], 1).astype(x_BLD.dtype)
  rows_BECD = jnp.einsum('BLEC,BLD->BECD', send_BLEC, x_BLD, out_sharding=layout.spec('B'))
  rows_BECD = tag(jax.sharding.reshard(rows_BECD, layout.spec('BECD')), 'experts_in')  # over mesh.expert, rows go to their experts …
  in_BECF = lambda w_EDF: contract('BECD,EDF->BECF', None, rows_BECD, w_EDF, cfg.reduce_dtype)
  hidden_BECF = MLPS[cfg.mlp](tag(in_BECF(gate_EDF), 'gate')) * tag(in_BECF(up_EDF), 'up')
  out_BECD = contract('BECF,EFD->BECD', None, hidden_BECF, down_EFD, cfg.reduce_dtype)
  out_BECD = tag(jax.sharding.reshard(out_BECD, layout.spec('B')), 'experts_out')  # … and come back
  return jnp.einsum('BLEC,BECD->BLD', back_BLEC, out_BECD, out_sharding=layout.spec('BLD')), dropped


DISPATCH = {'dropless': dropless, 'capacity': capacity}
