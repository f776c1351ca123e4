"""Encoders: BERT, RoBERTa and MiniLM are settings of the config. Every token sees all others of its segment."""
import jax
import jax.numpy as jnp

from jaxlm import layout
from jaxlm.models import decoder, embedding, heads, stack
from jaxlm.models.output import Hidden, Training
from jaxlm.schema import ModelConfig


def init_params(cfg: ModelConfig, key) -> dict:
  """Fresh parameters; see decoder.init_params."""
  vocabulary, around, layers, head = jax.random.split(key, 4)
  return {**embedding.init_vocabulary(cfg, vocabulary), **embedding.init_around(cfg, around),
          'layers': stack.init(cfg, layers), **heads.init(cfg, head)}


def forward(cfg: ModelConfig, params: dict, batch: dict, training: Training | None = None, carry=None) -> Hidden:
  """batch: tokens, positions, segments, as decoder.forward; types int32 [B, L] where the model has any; at int32 [B, S]:
  only the hidden states of these places go on to the head, and are x."""
  key = training and training.dropout
  x_BLD = embedding.embed(cfg, params['embed'], params, batch, key)
  x_BLD, reports = decoder.through(cfg, params, x_BLD, batch['positions'], batch['segments'], key)
  pooled_BD = heads.pool(cfg, params, x_BLD)
  if 'at' in batch:
    x_BLD = select(x_BLD, batch['at'])
  return Hidden(heads.transform(cfg, params, x_BLD), embedding.unembedding(cfg, params), reports, carry, pooled_BD)


def select(x_BLD, at_BS):
  """x_BSD: the hidden states at some places of each row."""
  pick = lambda x_BLD, at_BS: jnp.take_along_axis(x_BLD, at_BS[..., None], 1)
  specs = (layout.spec('BLD'), layout.spec('BS'))
  return jax.shard_map(pick, in_specs=specs, out_specs=layout.spec('BSD'))(x_BLD, at_BS)
