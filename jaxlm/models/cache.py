"""Decoding with a cache: a forward pass over some tokens after those that the cache holds.

Rows are aligned at their right ends: row b has pad_B[b] empty places before its first token, so that all rows write at
the same place. The cache of attention is a list over layers of {'k': [B, M, G, K], 'v': [B, M, G, K]}, the layers' weights a
list too (stack.unstack): each is an array of its own, updated in place when donated. Beside an encoder each also has
{'memory_k', 'memory_v'}, made once, and 'seen' [B, M]: which of them are real. A recurrent model's is its carry. Training
has none of this.
"""
import functools

import jax
import jax.numpy as jnp

from jaxlm import layout
from jaxlm.kernels import dense, patterns
from jaxlm.models import attention, embedding, kinds, output, relative, rnn, rnn_seq2seq, seq2seq
from jaxlm.models.layers import Einsum
from jaxlm.models.stack import Block, unstack
from jaxlm.schema import ModelConfig, layer_kinds

EXACT = ('scale', 'bias', 'router', 'relative', 'unembed_bias')  # not cast to the compute dtype at every use


def prepare(cfg: ModelConfig, params: dict) -> dict:
  """Parameters as `forward` takes them: the layers apart, and in the compute dtype what is cast to it at every use."""
  def cast(path, a):
    return a if path[-1].key in EXACT else a.astype(cfg.dtype)

  def apart(params):
    params = jax.tree_util.tree_map_with_path(cast, params)
    return {**params, 'layers': unstack(cfg, params['layers'])} if cfg.kind in ('decoder', 'seq2seq') else params
  return jax.jit(apart)(params)


def empty(cfg: ModelConfig, B: int, M: int):
  """A cache of M places for B rows."""
  if cfg.kind == 'rnn':
    return kinds.empty_carry(cfg, B)
  if cfg.kind == 'rnn_seq2seq':
    return {}  # `remember` makes it
  dtype, v_dim = jnp.dtype(cfg.dtype), cfg.mla.v or cfg.K
  zeros = lambda K: jnp.zeros((B, M, cfg.G, K), dtype, out_sharding=layout.spec('BMGK'))
  return [{'k': zeros(cfg.K), 'v': zeros(v_dim)} for _ in range(cfg.N)]


def remember(cfg: ModelConfig, params: dict, cache, inputs_BM, segments_BM, positions_BM):
  """The cache with what an encoder makes of its inputs."""
  batch = {'inputs': inputs_BM, 'input_segments': segments_BM, 'input_positions': positions_BM}
  if cfg.kind == 'rnn_seq2seq':
    source = rnn_seq2seq.remember(cfg, params, {**batch, 'segments': jnp.ones_like(segments_BM)})
    return {'state': source.pop('state'), 'source': source}
  memory_BMD, _ = seq2seq.encode(cfg, params, batch)

  def of(weights, name):
    layer = Einsum('BMD,DGK->BMGK', cfg, name=name, parent=None)
    return layer.apply({'params': weights['memory_attention'][name]}, memory_BMD)
  return [{**kept, 'memory_k': of(weights, 'k'), 'memory_v': of(weights, 'v'), 'seen': segments_BM > 0}
          for kept, weights in zip(cache, params['layers'])]


def forward(cfg: ModelConfig, params: dict, cache, tokens_BL, at, pad_B):
  """(float32 logits_BV of the last token, the cache with tokens_BL in places at … at + L). `at`: int32 scalar."""
  places_BL = jnp.broadcast_to((at + jnp.arange(tokens_BL.shape[1]))[None], tokens_BL.shape, out_sharding=layout.spec('BL'))
  positions_BL = jnp.maximum(places_BL - pad_B[:, None], 0)
  x_BLD, cache = FORWARD[cfg.kind](cfg, params, cache, tokens_BL, positions_BL, at, pad_B)
  logits_B1V = output.finish(cfg, output.unembed(embedding.unembedding(cfg, params), x_BLD[:, -1:]))
  return jax.sharding.reshard(logits_B1V, layout.spec('BL') + (None,))[:, 0], cache


def _recurrent(cfg: ModelConfig, params, carry, tokens_BL, positions_BL, at, pad_B):
  """Padding has position 0, where the state starts anew."""
  del at, pad_B
  hidden = rnn.forward(cfg, params, {'tokens': tokens_BL, 'positions': positions_BL}, carry=carry)
  return hidden.x_BLD, hidden.carry


def _beside_recurrent(cfg: ModelConfig, params, cache, tokens_BL, positions_BL, at, pad_B):
  """One token a row: the prompt of such a decoder is no longer."""
  del positions_BL, at, pad_B
  has_B = cache['source']['seen'].any(-1)
  x_B1D = embedding.look_up(params['embed'], tokens_BL[:, -1:], jnp.dtype(cfg.dtype))
  weights = rnn_seq2seq.gathered(params, jnp.dtype(cfg.dtype))
  state, _, x_BD = rnn_seq2seq.step(cfg, weights, cache['source'], cache['state'], has_B, x_B1D[:, 0], has_B | True)
  return x_BD[:, None], {**cache, 'state': state}


def _attentive(cfg: ModelConfig, params, cache, tokens_BL, positions_BL, at, pad_B):
  L, M = tokens_BL.shape[1], cache[0]['k'].shape[1]
  x_BLD = embedding.embed(cfg, params['embed'], params, {'tokens': tokens_BL, 'positions': positions_BL})
  real_BL = (at + jnp.arange(L))[None] >= pad_B[:, None]
  bias_HLM = (relative.bias(cfg, params['relative'], at + jnp.arange(L), jnp.arange(M)) if cfg.position == 'relative' else None)
  out = []
  for kind, weights, kept in zip(layer_kinds(cfg), params['layers'], cache):
    attend = functools.partial(_attend, cfg, kept, at, pad_B, bias_HLM)
    block = Block(cfg, kind, across='memory_k' in kept)
    x_BLD, (own, *_), _ = block.apply({'params': weights}, x_BLD, positions_BL, real_BL, attend)
    out.append({**kept, **own})
  return embedding.final_norm(cfg, params, x_BLD), out


FORWARD = {'decoder': _attentive, 'seq2seq': _attentive, 'rnn': _recurrent, 'rnn_seq2seq': _beside_recurrent}


def _attend(cfg: ModelConfig, kept: dict, at, pad_B, bias_HLM, where, q_BLHK, k_BLGK, v_BLGK):
  how = attention.how(cfg, where)
  if where == attention.MEMORY:
    def look(q_BLHK, k_BMGK, v_BMGK, seen_BM):
      seen_BLM = jnp.broadcast_to(seen_BM[:, None], (len(seen_BM), q_BLHK.shape[1], seen_BM.shape[1]))
      o_BLHK = dense.mix(how, q_BLHK, k_BMGK, v_BMGK, seen_BLM)
      return jnp.where(seen_BM.any(-1)[:, None, None, None], o_BLHK, 0)
    return _on_devices(look, ('BLHK', 'BMGK', 'BMGK', 'BM'), 'BLHK', q_BLHK, kept['memory_k'], kept['memory_v'], kept['seen']), None

  def write_and_look(q_BLHK, k_BLGK, v_BLGK, k_BMGK, v_BMGK, pad_B, at, *bias):
    k_BMGK = jax.lax.dynamic_update_slice(k_BMGK, k_BLGK, (0, at, 0, 0))
    v_BMGK = jax.lax.dynamic_update_slice(v_BMGK, v_BLGK, (0, at, 0, 0))
    i_BL = at + jnp.arange(q_BLHK.shape[1])[None] - pad_B[:, None]
    j_BM = jnp.arange(k_BMGK.shape[1])[None] - pad_B[:, None]
    seen_BLM = patterns.visible(how, i_BL[:, :, None], j_BM[:, None]) & (j_BM >= 0)[:, None]
    return dense.mix(how, q_BLHK, k_BMGK, v_BMGK, seen_BLM, *bias), k_BMGK, v_BMGK
  dims = ('BLHK', 'BLGK', 'BLGK', 'BMGK', 'BMGK', 'B', '') + (() if bias_HLM is None else ('H',))
  arrays = (q_BLHK, k_BLGK, v_BLGK, kept['k'], kept['v'], pad_B, jnp.asarray(at)) + (() if bias_HLM is None else (bias_HLM,))
  o_BLHK, k_BMGK, v_BMGK = _on_devices(write_and_look, dims, ('BLHK', 'BMGK', 'BMGK'), *arrays)
  return o_BLHK, {'k': k_BMGK, 'v': v_BMGK}


def _on_devices(f, dims, out_dims, *arrays):
  """f on what each device holds of arrays, whose letters `dims` says."""
  in_specs = tuple(map(layout.spec, dims))
  out_specs = layout.spec(out_dims) if isinstance(out_dims, str) else tuple(map(layout.spec, out_dims))
  arrays = (jax.sharding.reshard(a, s) for a, s in zip(arrays, in_specs))
  return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs)(*arrays)
