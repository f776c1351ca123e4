"""What stands on an encoder: BERT's transform before its logits, its pooler, its classifier of pairs."""
import jax
import jax.numpy as jnp

from jaxlm.models.layers import MLPS, NORMS, Einsum
from jaxlm.models.stack import some_input
from jaxlm.schema import ModelConfig


def _dense(cfg: ModelConfig, eqn: str, name: str) -> Einsum:
  return Einsum(eqn, cfg, sizes={'K': cfg.D, 'C': cfg.C}, name=name, parent=None)


def init(cfg: ModelConfig, key) -> dict:
  """Fresh parameters of what the config says there is: transform, pooler, pairs."""
  x_BLD, keys = some_input(cfg), jax.random.split(key, 3)
  params = {}
  if cfg.head == 'mlm':
    params['transform'] = {**_dense(cfg, 'BLD,DK->BLK', 'transform').init(keys[0], x_BLD)['params'],
                           'norm': NORMS[cfg.norm](cfg).init(key, x_BLD)['params']}
  if cfg.pooler:
    params['pooler'] = _dense(cfg, 'BLD,DK->BLK', 'pooler').init(keys[1], x_BLD)['params']
  if cfg.C:
    params['classify'] = _dense(cfg, 'BLD,DC->BLC', 'classify').init(keys[2], x_BLD)['params']
  return params


def transform(cfg: ModelConfig, params: dict, x_BLD):
  """BERT's, before the logits: a dense layer, the mlp's activation, a norm."""
  if cfg.head != 'mlm':
    return x_BLD
  own = dict(params['transform'])
  norm = own.pop('norm')
  x_BLD = MLPS[cfg.mlp](_dense(cfg, 'BLD,DK->BLK', 'transform').apply({'params': own}, x_BLD))
  return NORMS[cfg.norm](cfg).apply({'params': norm}, x_BLD)


def pool(cfg: ModelConfig, params: dict, x_BLD):
  """pooled_BD: tanh of a dense layer of the first token, or None if the model has no pooler."""
  if not cfg.pooler:
    return None
  return jnp.tanh(_dense(cfg, 'BLD,DK->BLK', 'pooler').apply({'params': params['pooler']}, x_BLD[:, :1]))[:, 0]


def classify(cfg: ModelConfig, params: dict, x_BLD):
  """float32 scores of the classes [B, L, C] of hidden states."""
  return _dense(cfg, 'BLD,DC->BLC', 'classify').apply({'params': params['classify']}, x_BLD).astype(jnp.float32)


def of_pairs(cfg: ModelConfig, params: dict, pooled_BD):
  """float32 [B, 2]: whether the second text follows the first (0) or not (1)."""
  return classify(cfg, params, pooled_BD[:, None])[:, 0]
