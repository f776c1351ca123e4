"""Attention layers: projections, norms and positions. Which keys a query sees, and where keys are kept, is the caller's
`attend(where, q_BLHK, k_BMGK, v_BMGK) → (o_BLHK, kept)`: training has a kernel there (kernels/), generation a cache."""
import jax.numpy as jnp
from flax import linen as nn

from jaxlm import layout
from jaxlm.models import rope
from jaxlm.kernels.patterns import How
from jaxlm.models.layers import Einsum, RMSNorm
from jaxlm.remat import tag
from jaxlm.schema import ModelConfig

MEMORY = 'memory'  # the `where` of attention to what an encoder made


def how(cfg: ModelConfig, where: str) -> How:
  """What the config says of a layer's scores."""
  scale = cfg.attention_scale or cfg.K ** -0.5
  if where == MEMORY:
    return How(scale, cap=cfg.attention_cap, causal=False)
  return How(scale, where, cfg.window, cfg.first, cfg.attention_cap, cfg.kind != 'encoder')


class Attention(nn.Module):
  """Multi-head and grouped-query attention (Vaswani et al. 2017; Ainslie et al. 2023) → (y_BLD, kept).

  where: a word of the config's pattern, or MEMORY: then keys and values are made from memory_BMD, or, where it is None,
  are those that `attend` has kept.
  """
  cfg: ModelConfig
  where: str

  @nn.compact
  def __call__(self, x_BLD, positions_BL, attend, memory_BMD=None):
    cfg, across = self.cfg, self.where == MEMORY
    q_BLHK = tag(Einsum('BLD,DHK->BLHK', cfg, name='q')(x_BLD), 'q')
    if across and memory_BMD is None:
      k_BMGK = v_BMGK = None
    else:
      k_BMGK, v_BMGK = (tag(Einsum('BMD,DGK->BMGK', cfg, name=name)(memory_BMD if across else x_BLD), name) for name in 'kv')
    if cfg.qk_norm != 'none':
      q_dims, k_dims = ('K', 'K') if cfg.qk_norm == 'head' else ('HK', 'GK')
      q_BLHK = RMSNorm(cfg, q_dims, name='q_norm')(q_BLHK)
      k_BMGK = k_BMGK if k_BMGK is None else RMSNorm(cfg, k_dims, name='k_norm')(k_BMGK)
    if cfg.position == 'rope' and not across:
      turn = lambda a: rope.turn(a, positions_BL, cfg.rope, self.where == 'local', int(cfg.K * cfg.rope.share))
      q_BLHK, k_BMGK = turn(q_BLHK), turn(k_BMGK)
    o_BLHK, kept = attend(self.where, q_BLHK, k_BMGK, v_BMGK)
    return Einsum('BLHK,HKD->BLD', cfg, out=True, name='o')(o_BLHK), kept


class LatentAttention(nn.Module):
  """Multi-head latent attention (DeepSeek-V2, §2.1): keys and values come from one vector of rank mla.kv, queries from
  one of rank mla.q; the last mla.rope dims of K carry the position, and all heads share those of the key."""
  cfg: ModelConfig
  where: str

  @nn.compact
  def __call__(self, x_BLD, positions_BL, attend):
    cfg, mla = self.cfg, self.cfg.mla
    plain = cfg.K - mla.rope
    turn = lambda a: rope.turn(a, positions_BL, cfg.rope, self.where == 'local', mla.rope)
    if mla.q:
      q_BLR = Einsum('BLD,DR->BLR', cfg, sizes={'R': mla.q}, name='q_down')(x_BLD)
      q_BLR = RMSNorm(cfg, 'R', name='q_norm')(tag(q_BLR, 'latent'))
      q_BLHK = Einsum('BLR,RHK->BLHK', cfg, sizes={'R': mla.q}, name='q')(q_BLR)
    else:
      q_BLHK = Einsum('BLD,DHK->BLHK', cfg, name='q')(x_BLD)
    q_BLHK = tag(q_BLHK, 'q')
    q_BLHK = jnp.concatenate([q_BLHK[..., :plain], turn(q_BLHK[..., plain:])], -1)
    both_BLR = tag(Einsum('BLD,DR->BLR', cfg, sizes={'R': mla.kv + mla.rope}, name='kv_down')(x_BLD), 'latent')
    kv_BLR = RMSNorm(cfg, 'R', name='kv_norm')(both_BLR[..., :mla.kv])
    kv_BLHK = Einsum('BLR,RHK->BLHK', cfg, sizes={'R': mla.kv, 'K': plain + mla.v}, name='kv')(kv_BLR)
    shared_BL1K = turn(both_BLR[:, :, None, mla.kv:])
    shared_BLHK = jnp.broadcast_to(shared_BL1K, (*kv_BLHK.shape[:3], mla.rope), out_sharding=layout.spec('BLHK'))
    k_BLHK, v_BLHK = tag(kv_BLHK[..., :plain], 'k'), tag(kv_BLHK[..., plain:], 'v')
    o_BLHK, kept = attend(self.where, q_BLHK, jnp.concatenate([k_BLHK, shared_BLHK], -1), v_BLHK)
    return Einsum('BLHK,HKD->BLD', cfg, out=True, sizes={'K': mla.v}, name='o')(o_BLHK), kept
