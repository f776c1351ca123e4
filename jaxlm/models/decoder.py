"""One decoder: GPT-2 and Llama are two settings of its config."""
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlm import layout
from jaxlm.config import ModelConfig
from jaxlm.models import attention, layers
from jaxlm.models.layers import MLPS, NORMS, Dropout, Einsum, normal, rope

UNEMBED = 'BLD,VD->BLV'
REMAT = {  # name → policy of what the backward pass may keep; None keeps everything, without remat
    'none': None,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'full': jax.checkpoint_policies.nothing_saveable,
}


class Attention(nn.Module):
  cfg: ModelConfig

  @nn.compact
  def __call__(self, x_BLD, positions_BL, segments_BL):
    cfg = self.cfg
    q_BLHK = Einsum('BLD,DHK->BLHK', cfg, name='q')(x_BLD)
    k_BLGK = Einsum('BLD,DGK->BLGK', cfg, name='k')(x_BLD)
    v_BLGK = Einsum('BLD,DGK->BLGK', cfg, name='v')(x_BLD)
    if cfg.position == 'rope':
      q_BLHK, k_BLGK = (rope(a, positions_BL, cfg.rope_base) for a in (q_BLHK, k_BLGK))
    o_BLHK = attention.attend(cfg.attention, q_BLHK, k_BLGK, v_BLGK, segments_BL)
    return Einsum('BLHK,HKD->BLD', cfg, out=True, name='o')(o_BLHK)


class Block(nn.Module):
  """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""
  cfg: ModelConfig
  train: bool

  @nn.compact
  def __call__(self, x_BLD, positions_BL, segments_BL):
    cfg, norm = self.cfg, NORMS[self.cfg.norm]
    y_BLD = Attention(cfg, name='attention')(norm(cfg, name='norm1')(x_BLD), positions_BL, segments_BL)
    x_BLD += Dropout(cfg.dropout, self.train)(y_BLD)
    y_BLD = MLPS[cfg.mlp](cfg, name='mlp')(norm(cfg, name='norm2')(x_BLD))
    return x_BLD + Dropout(cfg.dropout, self.train)(y_BLD), None


class Decoder(nn.Module):
  """tokens → the last hidden states and the matrix that turns them into logits.

  Logits themselves are not made here: loss.py makes them a piece at a time, so that [B, L, V] never exists.

  Call with tokens_BL int32 in [0, V), positions_BL int32 (from 0 in each document), segments_BL int32 (which
  document of the row; equal = may attend), train: dropout on (needs the rng 'dropout').
  Returns (x_BLD in the compute dtype, unembed_VD float32 master weight). Params: a nested dict, layers stacked [N, …].
  """
  cfg: ModelConfig

  @nn.compact
  def __call__(self, tokens_BL, positions_BL, segments_BL, train: bool = False):
    cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
    embed_VD = self.param('embed', normal(cfg.init_std, 'VD'), (cfg.V, cfg.D))
    x_BLD = look_up(embed_VD, tokens_BL, dtype)
    if cfg.position == 'learned':
      positions_PD = self.param('positions', normal(cfg.init_std, 'PD'), (cfg.P, cfg.D))
      x_BLD += look_up(positions_PD, positions_BL, dtype)
    x_BLD = Dropout(cfg.dropout, train)(x_BLD)

    block = Block
    if REMAT[cfg.remat] is not None:
      block = nn.remat(Block, policy=REMAT[cfg.remat], prevent_cse=False)
    blocks = nn.scan(block, variable_axes={'params': 0}, split_rngs={'params': True, 'dropout': True}, length=cfg.N,
                     in_axes=nn.broadcast, unroll=1 if cfg.scan else cfg.N)
    x_BLD, _ = blocks(cfg, train, name='layers')(x_BLD, positions_BL, segments_BL)

    x_BLD = NORMS[cfg.norm](cfg, name='norm')(x_BLD)
    unembed_VD = embed_VD if cfg.tied else self.param('unembed', normal(cfg.init_std, 'VD'), (cfg.V, cfg.D))
    return x_BLD, unembed_VD


def look_up(table_VD, index_BL, dtype):
  """Rows of a table whose width is cut over fsdp: the table is gathered whole, then indexed where the batch is."""
  return jax.sharding.reshard(table_VD.astype(dtype), jax.P(None, None)).at[index_BL].get(out_sharding=layout.spec('BLD'))


def abstract_params(cfg: ModelConfig):
  """Shapes, dtypes and shardings of the parameters under the current mesh; nothing is allocated."""
  return jax.eval_shape(functools.partial(init_params, cfg), jax.eval_shape(lambda: jax.random.key(0)))


def init_params(cfg: ModelConfig, key):
  """Fresh parameters, born sharded. Their values do not depend on the mesh."""
  shards = jax.sharding.get_abstract_mesh().shape
  B = shards['data'] * shards['fsdp']
  zeros_BL = jnp.zeros((B, 1), jnp.int32, out_sharding=layout.spec('BL'))
  return Decoder(cfg).init(key, zeros_BL, zeros_BL, zeros_BL)['params']


def count_params(cfg: ModelConfig) -> int:
  return sum(a.size for a in jax.tree.leaves(abstract_params(cfg)))


def logits(cfg: ModelConfig, params, tokens_BL, positions_BL, segments_BL):
  """float32 logits_BLV, for those who want all of them (generation, parity); training and evaluation do not."""
  x_BLD, unembed_VD = Decoder(cfg).apply({'params': params}, tokens_BL, positions_BL, segments_BL)
  return unembed(x_BLD, unembed_VD)


def unembed(x_BLD, unembed_VD):
  """float32 logits_BLV of hidden states, cut over V where the matrix is; the matrix may be gathered or not."""
  w_VD = layers.use(unembed_VD, 'VD', x_BLD.dtype)
  return layers.contract(UNEMBED, 'gathered', jnp.float32, x_BLD, w_VD)
