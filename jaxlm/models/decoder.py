"""One decoder: GPT-2, Llama, Gemma, DeepSeek and the others are settings of its config."""
import functools

import jax
import jax.numpy as jnp

from jaxlm import layout
from jaxlm.models import attention, kernels, layers, stack
from jaxlm.models.layers import NORMS, Dropout, normal
from jaxlm.schema import ModelConfig

UNEMBED = 'BLD,VD->BLV'


def init_params(cfg: ModelConfig, key) -> dict:
  """Fresh parameters, born sharded: a nested dict, layers stacked (stack.py). Their values do not depend on the mesh."""
  keys = dict(zip(('embed', 'positions', 'layers', 'unembed'), jax.random.split(key, 4)))
  table = lambda name, dims: normal(cfg.init_std, dims)(keys[name], tuple(getattr(cfg, d) for d in dims))
  x_BLD = stack.some_input(cfg)
  params = {'embed': table('embed', 'VD'), 'layers': stack.init(cfg, keys['layers']),
            'norm': NORMS[cfg.norm](cfg).init(key, x_BLD)['params']}
  if cfg.position == 'learned':
    params['positions'] = table('positions', 'PD')
  return params if cfg.tied else {**params, 'unembed': table('unembed', 'VD')}


def forward(cfg: ModelConfig, params, tokens_BL, positions_BL, segments_BL, dropout_key=None):
  """tokens → (the last hidden states x_BLD, the matrix that turns them into logits, reports of the mixtures).

  Logits themselves are not made here: loss.py makes them a piece at a time, so that [B, L, V] never exists.
  tokens_BL int32 in [0, V), positions_BL int32 (from 0 in each document), segments_BL int32 (which document of the row;
  equal = may attend; 0 is padding). Dropout only with a key. x_BLD has the compute dtype, unembed_VD is float32.
  """
  def attend(local, kept, q_BLHK, k_BLGK, v_BLGK):
    return kernels.attend(cfg.attention, attention.how(cfg, local), q_BLHK, k_BLGK, v_BLGK, segments_BL), kept
  x_BLD = embed(cfg, params, tokens_BL, positions_BL)
  if dropout_key is not None:
    x_BLD = Dropout(cfg.dropout, True).apply({}, x_BLD, rngs={'dropout': jax.random.fold_in(dropout_key, cfg.N)})
  x_BLD, reports = stack.run(cfg, params['layers'], x_BLD, positions_BL, segments_BL > 0, attend, dropout_key)
  return final_norm(cfg, params, x_BLD), unembedding(cfg, params), reports


def embed(cfg: ModelConfig, params, tokens_BL, positions_BL):
  dtype = jnp.dtype(cfg.dtype)
  x_BLD = look_up(params['embed'], tokens_BL, dtype)
  if cfg.scale_embedding:
    x_BLD *= jnp.asarray(cfg.D ** 0.5, dtype)
  return x_BLD + look_up(params['positions'], positions_BL, dtype) if cfg.position == 'learned' else x_BLD


def final_norm(cfg: ModelConfig, params, x_BLD):
  return NORMS[cfg.norm](cfg).apply({'params': params['norm']}, x_BLD)


def unembedding(cfg: ModelConfig, params):
  return params['embed' if cfg.tied else 'unembed']


def look_up(table_VD, index_BL, dtype):
  """Rows of a table whose width is cut over fsdp: the table is gathered whole, then indexed where the batch is."""
  return jax.sharding.reshard(table_VD.astype(dtype), jax.P(None, None)).at[index_BL].get(out_sharding=layout.spec('BLD'))


def abstract_params(cfg: ModelConfig):
  """Shapes, dtypes and shardings of the parameters under the current mesh; nothing is allocated."""
  return jax.eval_shape(functools.partial(init_params, cfg), jax.eval_shape(lambda: jax.random.key(0)))


def logits(cfg: ModelConfig, params, tokens_BL, positions_BL, segments_BL):
  """float32 logits_BLV, for those who want all of them (generation, parity); training and evaluation do not."""
  x_BLD, unembed_VD, _ = forward(cfg, params, tokens_BL, positions_BL, segments_BL)
  return finish_logits(cfg, unembed(x_BLD, unembed_VD))


def unembed(x_BLD, unembed_VD):
  """float32 products of hidden states with the output matrix, cut over V where it is; it may be gathered or not."""
  w_VD = layers.use(unembed_VD, 'VD', x_BLD.dtype)
  return layers.contract(UNEMBED, 'gathered', jnp.float32, x_BLD, w_VD)


def finish_logits(cfg: ModelConfig, logits_BLV):
  """The config's cap on the logits, and −1e30 for rows that only pad the vocabulary."""
  if cfg.logit_cap:
    logits_BLV = cfg.logit_cap * jnp.tanh(logits_BLV / cfg.logit_cap)
  if cfg.vocab and cfg.vocab < cfg.V:
    iota_BLV = jax.lax.broadcasted_iota(jnp.int32, logits_BLV.shape, 2, out_sharding=jax.typeof(logits_BLV).sharding)
    logits_BLV = jnp.where(iota_BLV < cfg.vocab, logits_BLV, -1e30)
  return logits_BLV
