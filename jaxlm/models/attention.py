"""Attention layers: projections, norms and positions. Which keys a query sees, and where keys are kept, is the caller's
`attend(local, q_BLHK, k_BLGK, v_BLGK) → (o_BLHK, kept)`: training has a kernel there (kernels.py), generation a cache."""
import jax.numpy as jnp
from flax import linen as nn

from jaxlm import layout
from jaxlm.models import rope
from jaxlm.models.kernels import How
from jaxlm.models.layers import Einsum, RMSNorm
from jaxlm.schema import ModelConfig


def how(cfg: ModelConfig, local: bool) -> How:
  """What the config says of a layer's scores."""
  return How(cfg.attention_scale or cfg.K ** -0.5, cfg.window if local else 0, cfg.attention_cap)


class Attention(nn.Module):
  """Multi-head and grouped-query attention (Vaswani et al. 2017; Ainslie et al. 2023) → (y_BLD, kept)."""
  cfg: ModelConfig
  local: bool

  @nn.compact
  def __call__(self, x_BLD, positions_BL, attend):
    cfg = self.cfg
    q_BLHK = Einsum('BLD,DHK->BLHK', cfg, name='q')(x_BLD)
    k_BLGK = Einsum('BLD,DGK->BLGK', cfg, name='k')(x_BLD)
    v_BLGK = Einsum('BLD,DGK->BLGK', cfg, name='v')(x_BLD)
    if cfg.qk_norm != 'none':
      q_dims, k_dims = ('K', 'K') if cfg.qk_norm == 'head' else ('HK', 'GK')
      q_BLHK = RMSNorm(cfg, q_dims, name='q_norm')(q_BLHK)
      k_BLGK = RMSNorm(cfg, k_dims, name='k_norm')(k_BLGK)
    if cfg.position == 'rope':
      turn = lambda a: rope.turn(a, positions_BL, cfg.rope, self.local, int(cfg.K * cfg.rope.share))
      q_BLHK, k_BLGK = turn(q_BLHK), turn(k_BLGK)
    o_BLHK, kept = attend(self.local, q_BLHK, k_BLGK, v_BLGK)
    return Einsum('BLHK,HKD->BLD', cfg, out=True, name='o')(o_BLHK), kept


class LatentAttention(nn.Module):
  """Multi-head latent attention (DeepSeek-V2, §2.1): keys and values come from one vector of rank mla.kv, queries from
  one of rank mla.q; the last mla.rope dims of K carry the position, and all heads share those of the key."""
  cfg: ModelConfig
  local: bool

  @nn.compact
  def __call__(self, x_BLD, positions_BL, attend):
    cfg, mla = self.cfg, self.cfg.mla
    plain = cfg.K - mla.rope
    turn = lambda a: rope.turn(a, positions_BL, cfg.rope, self.local, mla.rope)
    if mla.q:
      q_BLR = Einsum('BLD,DR->BLR', cfg, sizes={'R': mla.q}, name='q_down')(x_BLD)
      q_BLR = RMSNorm(cfg, 'R', name='q_norm')(q_BLR)
      q_BLHK = Einsum('BLR,RHK->BLHK', cfg, sizes={'R': mla.q}, name='q')(q_BLR)
    else:
      q_BLHK = Einsum('BLD,DHK->BLHK', cfg, name='q')(x_BLD)
    q_BLHK = jnp.concatenate([q_BLHK[..., :plain], turn(q_BLHK[..., plain:])], -1)
    both_BLR = Einsum('BLD,DR->BLR', cfg, sizes={'R': mla.kv + mla.rope}, name='kv_down')(x_BLD)
    kv_BLR = RMSNorm(cfg, 'R', name='kv_norm')(both_BLR[..., :mla.kv])
    kv_BLHK = Einsum('BLR,RHK->BLHK', cfg, sizes={'R': mla.kv, 'K': plain + mla.v}, name='kv')(kv_BLR)
    shared_BL1K = turn(both_BLR[:, :, None, mla.kv:])
    shared_BLHK = jnp.broadcast_to(shared_BL1K, (*kv_BLHK.shape[:3], mla.rope), out_sharding=layout.spec('BLHK'))
    k_BLHK = jnp.concatenate([kv_BLHK[..., :plain], shared_BLHK], -1)
    o_BLHK, kept = attend(self.local, q_BLHK, k_BLHK, kv_BLHK[..., plain:])
    return Einsum('BLHK,HKD->BLD', cfg, out=True, sizes={'K': mla.v}, name='o')(o_BLHK), kept
