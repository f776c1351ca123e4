"""What stands on an encoder (Devlin et al. 2019, §3.1, §4): BERT's transform before its logits, its pooler, its classifiers of
pairs, texts, tokens and spans. RoBERTa's classifier of texts has a pooler of its own."""
import dataclasses

import jax
import jax.numpy as jnp

from jaxlm.models import output
from jaxlm.models.layers import MLPS, NORMS, Einsum
from jaxlm.models.output import Hidden
from jaxlm.models.stack import some_input
from jaxlm.schema import ModelConfig

NEVER = -1e30  # the score of what cannot be chosen


def _dense(cfg: ModelConfig, eqn: str, name: str) -> Einsum:
  cfg = dataclasses.replace(cfg, matmul='full')  # only what the layers multiply is quantised
  return Einsum(eqn, cfg, sizes={'K': cfg.D, 'C': cfg.C}, name=name, parent=None)


def init(cfg: ModelConfig, key) -> dict:
  """Fresh parameters of what the config says there is: transform, pooler, classify."""
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
  """float32 [B, C] of what the pooler made; of BERT's pairs: whether the second text follows the first (0) or not (1)."""
  return classify(cfg, params, pooled_BD[:, None])[:, 0]


def class_nll(scores_BSC, labels_BS):
  """−log p of the right class, float32 [B, …]."""
  return jax.nn.logsumexp(scores_BSC, -1) - jnp.take_along_axis(scores_BSC, labels_BS[..., None], -1)[..., 0]


def choices(cfg: ModelConfig, params: dict, hidden: Hidden, segments_BL):
  """float32 scores of what each of S choices of a row is among: of C classes, [B, 1, C] (head classify) or [B, L, C] (tag);
  of the places where an answer may begin and end, [B, 2, L] (span), which are never padding."""
  scores = outputs(cfg, params, hidden)
  if cfg.head == 'classify':
    return scores[:, None]
  return jnp.where(segments_BL[:, None] > 0, scores.transpose(0, 2, 1), NEVER) if cfg.head == 'span' else scores


def outputs(cfg: ModelConfig, params: dict, hidden: Hidden):
  """float32, what the model is for: logits [B, L, V] (lm, mlm), hidden states [B, L, D] (none), scores of C classes of the text
  [B, C] (classify) or of each token [B, L, C] (tag; span: that an answer begins there, that it ends there)."""
  if cfg.head in ('lm', 'mlm'):
    return output.logits(cfg, hidden)
  if cfg.head == 'none':
    return hidden.x_BLD.astype(jnp.float32)
  return of_pairs(cfg, params, hidden.pooled_BD) if cfg.head == 'classify' else classify(cfg, params, hidden.x_BLD)


def vectors(cfg: ModelConfig, x_BLD, real_BL):
  """float32 [B, D], as cfg.pool and cfg.normalize say: the mean of the hidden states of real tokens, or the first one's
  (Reimers & Gurevych 2019, §3)."""
  x_BLD = x_BLD.astype(jnp.float32)
  x_BD = x_BLD[:, 0] if cfg.pool == 'first' else (
      jnp.sum(jnp.where(real_BL[..., None], x_BLD, 0), 1) / jnp.maximum(real_BL.sum(1), 1)[:, None])
  return x_BD / jnp.maximum(jnp.linalg.norm(x_BD, axis=-1, keepdims=True), 1e-12) if cfg.normalize else x_BD
