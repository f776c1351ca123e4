"""Decoding with a cache of keys and values: a forward pass over some tokens after those that the cache holds.

Rows are aligned at their right ends: row b has pad_B[b] empty places before its first token, so that all rows write at
the same place. The cache is a list over layers of {'k': [B, M, G, K], 'v': [B, M, G, K]}, the layers' weights a list too
(stack.unstack): each is an array of its own, updated in place when donated. Training has none of this.
"""
import functools

import jax
import jax.numpy as jnp

from jaxlm import layout
from jaxlm.models import attention, decoder, kernels
from jaxlm.models.stack import Block, unstack
from jaxlm.schema import ModelConfig, layer_kinds


def prepare(cfg: ModelConfig, params: dict) -> dict:
  """Parameters as `forward` takes them: the layers apart, and in the compute dtype what is cast to it at every use."""
  def cast(path, a):
    return a if path[-1].key in ('scale', 'bias', 'router') else a.astype(cfg.dtype)

  def apart(params):
    params = jax.tree_util.tree_map_with_path(cast, params)
    return {**params, 'layers': unstack(cfg, params['layers'])}
  return jax.jit(apart)(params)


def empty(cfg: ModelConfig, B: int, M: int) -> list[dict]:
  """A cache of M places for B rows."""
  dtype, v_dim = jnp.dtype(cfg.dtype), cfg.mla.v or cfg.K
  zeros = lambda K: jnp.zeros((B, M, cfg.G, K), dtype, out_sharding=layout.spec('BMGK'))
  return [{'k': zeros(cfg.K), 'v': zeros(v_dim)} for _ in range(cfg.N)]


def forward(cfg: ModelConfig, params: dict, cache: list[dict], tokens_BL, at, pad_B):
  """(float32 logits_BV of the last token, the cache with tokens_BL in places at … at + L). `at`: int32 scalar."""
  L = tokens_BL.shape[1]
  places_BL = jnp.broadcast_to((at + jnp.arange(L))[None], tokens_BL.shape, out_sharding=layout.spec('BL'))
  positions_BL = jnp.maximum(places_BL - pad_B[:, None], 0)
  real_BL = places_BL >= pad_B[:, None]
  x_BLD = decoder.embed(cfg, params, tokens_BL, positions_BL)
  out = []
  for kind, weights, kept in zip(layer_kinds(cfg), params['layers'], cache):
    attend = functools.partial(_attend, cfg, kept, at, pad_B)
    x_BLD, kept, _ = Block(cfg, kind).apply({'params': weights}, x_BLD, positions_BL, real_BL, attend)
    out.append(kept)
  x_B1D = decoder.final_norm(cfg, params, x_BLD[:, -1:])
  logits_B1V = decoder.finish_logits(cfg, decoder.unembed(x_B1D, decoder.unembedding(cfg, params)))
  return jax.sharding.reshard(logits_B1V, layout.spec('BL') + (None,))[:, 0], out


def _attend(cfg: ModelConfig, kept: dict, at, pad_B, local, q_BLHK, k_BLGK, v_BLGK):
  how = attention.how(cfg, local)

  def on_device(q_BLHK, k_BLGK, v_BLGK, k_BMGK, v_BMGK, pad_B, at):
    k_BMGK = jax.lax.dynamic_update_slice(k_BMGK, k_BLGK, (0, at, 0, 0))
    v_BMGK = jax.lax.dynamic_update_slice(v_BMGK, v_BLGK, (0, at, 0, 0))
    L, M = q_BLHK.shape[1], k_BMGK.shape[1]
    seen_BLM = kernels.visible(how, L, M, at, 0)[None] & (jnp.arange(M)[None] >= pad_B[:, None])[:, None]
    return kernels.mix(how, q_BLHK, k_BMGK, v_BMGK, seen_BLM), k_BMGK, v_BMGK

  dims = ('BLHK', 'BLGK', 'BLGK', 'BMGK', 'BMGK', 'B')
  in_specs = (*map(layout.spec, dims), jax.P())
  out_specs = tuple(map(layout.spec, ('BLHK', 'BMGK', 'BMGK')))
  arrays = (q_BLHK, k_BLGK, v_BLGK, kept['k'], kept['v'], pad_B, jnp.asarray(at))
  arrays = (jax.sharding.reshard(a, s) for a, s in zip(arrays, in_specs))
  o_BLHK, k_BMGK, v_BMGK = jax.shard_map(on_device, in_specs=in_specs, out_specs=out_specs)(*arrays)
  return o_BLHK, {'k': k_BMGK, 'v': v_BMGK}
