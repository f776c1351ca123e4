"""What every kind of model ends in: hidden states, and the matrix that makes logits of them."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.models import layers
from jaxlm.schema import ModelConfig

UNEMBED = 'BLD,VD->BLV'


class Training(NamedTuple):
  """What `forward` gets only in training. dropout: a key, None without dropout; noise: a key for scheduled sampling, and
  step: of the run, int32, which its schedule follows."""
  dropout: jax.Array | None
  noise: jax.Array
  step: jax.Array


class Hidden(NamedTuple):
  """What `forward` of a kind returns. Logits are not made there: loss.py makes them a piece at a time, so that [B, L, V]
  never exists. x_BLD has the compute dtype; unembed is {'w': [V, D]} and, with output_bias, {'bias': [V]}, float32."""
  x_BLD: jax.Array
  unembed: dict
  reports: dict     # of mixtures, stacked over them; {} if there is none
  carry: Any = None # of recurrent models: their state after the last token
  pooled_BD: Any = None  # of encoders with a pooler


def gathered(hidden: Hidden) -> dict:
  """hidden.unembed with its matrix as the compute wants it, gathered once, for loops over pieces of x."""
  return {**hidden.unembed, 'w': layers.use(hidden.unembed['w'], 'VD', hidden.x_BLD.dtype)}


def unembed(unembedding: dict, x_BLD):
  """float32 products of hidden states with the output matrix, cut over V where it is; it may be gathered or not."""
  w_VD = layers.use(unembedding['w'], 'VD', x_BLD.dtype)
  logits_BLV = layers.contract(UNEMBED, jnp.float32, x_BLD, w_VD)
  return logits_BLV + unembedding['bias'][None, None] if 'bias' in unembedding else logits_BLV


def finish(cfg: ModelConfig, logits_BLV, ids_V=None):
  """The config's scale and cap of the logits, and −1e30 for rows that only pad the vocabulary. ids_V: which rows these are, if
  not all."""
  if cfg.logit_scale != 1:
    logits_BLV *= cfg.logit_scale
  if cfg.logit_cap:
    logits_BLV = cfg.logit_cap * jnp.tanh(logits_BLV / cfg.logit_cap)
  if cfg.vocab and cfg.vocab < cfg.V:
    iota = lambda: jax.lax.broadcasted_iota(jnp.int32, logits_BLV.shape, 2, out_sharding=jax.typeof(logits_BLV).sharding)
    logits_BLV = jnp.where((iota() if ids_V is None else ids_V[None, None]) < cfg.vocab, logits_BLV, -1e30)
  return logits_BLV


def logits(cfg: ModelConfig, hidden: Hidden):
  """float32 logits_BLV, for those who want all of them (generation, parity); training and evaluation do not."""
  return finish(cfg, unembed(hidden.unembed, hidden.x_BLD))
