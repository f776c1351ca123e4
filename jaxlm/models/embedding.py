"""What stands around a stack of layers: tables of tokens, positions and types before it, the last norm after it."""
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import layout
from jaxlm.models import relative
from jaxlm.models.layers import NORMS, Dropout, normal
from jaxlm.models.stack import some_input
from jaxlm.schema import ModelConfig


def init_around(cfg: ModelConfig, key) -> dict:
  """Fresh parameters that a stack has besides its layers and the table of tokens, as the config says."""
  keys = dict(zip(('positions', 'types', 'relative'), jax.random.split(key, 3)))
  table = lambda name, dims: normal(cfg.init_std, dims)(keys[name], tuple(getattr(cfg, d) for d in dims))
  norm = lambda: NORMS[cfg.norm](cfg).init(key, some_input(cfg))['params']
  params = {}
  if cfg.position == 'learned':
    params['positions'] = table('positions', 'PD')
  if cfg.position == 'relative':
    params['relative'] = relative.init(cfg, keys['relative'])
  if cfg.T:
    params['types'] = table('types', 'TD')
  if cfg.embed_norm:
    params['embed_norm'] = norm()
  if _ends_in_norm(cfg):
    params['norm'] = norm()
  return params


def init_vocabulary(cfg: ModelConfig, key) -> dict:
  """The table of tokens, and the output matrix where it is another."""
  tables = zip(('embed',) if cfg.tied else ('embed', 'unembed'), jax.random.split(key))
  params = {name: normal(cfg.init_std, 'VD')(key, (cfg.V, cfg.D)) for name, key in tables}
  if cfg.output_bias:
    params['unembed_bias'] = jnp.zeros(cfg.V, out_sharding=layout.spec('V', 'weight'))
  return params


def embed(cfg: ModelConfig, table_VD, around: dict, batch: dict, dropout_key=None):
  """x_BLD of batch['tokens'] at batch['positions'] (int32 from 0 in each document), of batch['types'] if the model has any."""
  dtype, positions_BL = jnp.dtype(cfg.dtype), batch['positions']
  x_BLD = look_up(table_VD, batch['tokens'], dtype)
  if cfg.scale_embedding:
    x_BLD *= jnp.asarray(cfg.D ** 0.5, dtype)
  if cfg.position == 'learned':
    x_BLD += look_up(around['positions'], positions_BL + cfg.first_position, dtype)
  if cfg.position == 'sinusoidal':
    x_BLD += sinusoids(positions_BL, cfg.D).astype(dtype)
  if cfg.T:
    types_BL = batch['types'] if 'types' in batch else jnp.zeros_like(positions_BL)
    x_BLD += look_up(around['types'], types_BL, dtype)
  if cfg.embed_norm:
    x_BLD = NORMS[cfg.norm](cfg).apply({'params': around['embed_norm']}, x_BLD)
  if dropout_key is not None:
    x_BLD = Dropout(cfg.dropout, True).apply({}, x_BLD, rngs={'dropout': jax.random.fold_in(dropout_key, cfg.N)})
  return x_BLD


def sinusoids(positions_BL, D: int):
  """sin, then cos, of position ÷ 10,000^(k / (D/2)) (Vaswani et al. 2017, §3.5; the halves as in tensor2tensor)."""
  frequencies_K = 10_000. ** -(np.arange(0, D, 2, dtype=np.float64) / D)
  angles_BLK = positions_BL[..., None].astype(jnp.float32) * jnp.asarray(frequencies_K, jnp.float32)[None, None]
  return jnp.concatenate([jnp.sin(angles_BLK), jnp.cos(angles_BLK)], -1)


def look_up(table_VD, index_BL, dtype):
  """x_BLD, rows of a table whose width is cut over fsdp. Each device looks up its columns for the tokens of all who share the
  table, and these are exchanged; so neither the table nor its gradient ever is whole. Only where a device has more tokens than the
  table has rows, it is the table that is gathered."""
  of_B, of_L, _ = layout.spec('BLD')
  tokens = index_BL.size // (layout.shards('B') * layout.shards('L'))
  columns = jax.typeof(table_VD).sharding.spec[1] if tokens < len(table_VD) else None
  cutting = columns if isinstance(columns, tuple) else (columns,)
  rows = jax.P(tuple(a for a in of_B if a not in cutting), of_L)
  table_VD = jax.sharding.reshard(table_VD.astype(dtype), jax.P(None, columns))
  x_BLD = table_VD.at[jax.sharding.reshard(index_BL, rows)].get(out_sharding=jax.P(*rows, columns))
  return jax.sharding.reshard(x_BLD, layout.spec('BLD'))


def final_norm(cfg: ModelConfig, around: dict, x_BLD):
  return NORMS[cfg.norm](cfg).apply({'params': around['norm']}, x_BLD) if _ends_in_norm(cfg) else x_BLD


def _ends_in_norm(cfg: ModelConfig) -> bool:
  return cfg.norm_place != 'after'  # there each layer ends in its own


def unembedding(cfg: ModelConfig, params: dict) -> dict:
  """The output matrix, and its bias if there is one (output.Hidden)."""
  w = {'w': params['embed' if cfg.tied else 'unembed']}
  return {**w, 'bias': params['unembed_bias']} if cfg.output_bias else w
