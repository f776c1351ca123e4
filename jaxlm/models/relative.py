"""T5's relative positions (Raffel et al. 2020, §2.1): a bias of the scores for each head and bucket of distances, shared by
all layers of a stack."""
import math

import jax
import jax.numpy as jnp

from jaxlm import layout
from jaxlm.models.layers import normal
from jaxlm.schema import ModelConfig, RelativeConfig


def init(cfg: ModelConfig, key):
  return normal(cfg.init_std, 'PH')(key, (cfg.relative.buckets, cfg.H))


def bucket(cfg: RelativeConfig, ahead, causal: bool):
  """int32 bucket of key position − query position. Half of them hold one distance each, the others grow in width up to
  cfg.distance; for keys on both sides, each side has half of all."""
  buckets = cfg.buckets if causal else cfg.buckets // 2
  side = 0 if causal else jnp.where(ahead > 0, buckets, 0)
  distance = jnp.maximum(-ahead, 0) if causal else jnp.abs(ahead)
  exact = buckets // 2
  log = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(cfg.distance / exact) * (buckets - exact)
  return side + jnp.where(distance < exact, distance, jnp.minimum(exact + log.astype(jnp.int32), buckets - 1))


def bias(cfg: ModelConfig, table_PH, i_L, j_M):
  """float32 [H, L, M] for queries at places i_L and keys at places j_M of a row, cut over mesh.tensor and mesh.context: distances in a
  document are those in its row, however it is packed."""
  bucket_LM = bucket(cfg.relative, j_M[None] - i_L[:, None], cfg.kind != 'encoder')
  table_PH = jax.sharding.reshard(table_PH, layout.spec('PH'))
  bias_LMH = table_PH.at[bucket_LM].get(out_sharding=jax.P(*layout.spec('L'), None, *layout.spec('H')))
  return jnp.moveaxis(bias_LMH, -1, 0)
