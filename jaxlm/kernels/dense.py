"""Attention in XLA's own operations: the reference, and what is fastest on CPU. See on_mesh.py for the signature."""
import dataclasses

import jax
import jax.numpy as jnp

from jaxlm.kernels.patterns import How, allowed
from jaxlm.remat import tag

BLOCKS = 4  # of 'blocked': with 4, 10 of 16 blocks of scores are computed


def weights(how: How, q_BLHK, k_BMGK, allowed_BLM, bias_HLM=None):
  """float32 p_BGRLM: softmax over the keys that `allowed_BLM` (bool) lets each query see; head h = g · H/G + r."""
  B, L, H, K = q_BLHK.shape
  G = k_BMGK.shape[2]
  q_BLGRK = (q_BLHK * how.scale).reshape(B, L, G, H // G, K)  # head h reads key-value head h // (H/G)
  s_BGRLM = jnp.einsum('BLGRK,BMGK->BGRLM', q_BLGRK, k_BMGK).astype(jnp.float32)
  if bias_HLM is not None:
    s_BGRLM += bias_HLM.reshape(1, G, H // G, *bias_HLM.shape[1:])
  if how.cap:
    s_BGRLM = how.cap * jnp.tanh(s_BGRLM / how.cap)
  return jax.nn.softmax(jnp.where(allowed_BLM[:, None, None], s_BGRLM, -1e30), -1)


def weigh(p_BGRLM, v_BMGK):
  """o_BLHK: values by their weights."""
  o_BLGRK = jnp.einsum('BGRLM,BMGK->BLGRK', p_BGRLM.astype(v_BMGK.dtype), v_BMGK)
  return o_BLGRK.reshape(*o_BLGRK.shape[:2], -1, v_BMGK.shape[-1])


def mix(how: How, q_BLHK, k_BMGK, v_BMGK, allowed_BLM, bias_HLM=None):
  """Softmax attention over the keys that `allowed_BLM` (bool) lets each query see; scores in float32."""
  return weigh(weights(how, q_BLHK, k_BMGK, allowed_BLM, bias_HLM), v_BMGK)


def plain(how: How, q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows, bias_HLM=None):
  """All scores at once: the reference."""
  return tag(mix(how, q_BLHK, k_BMGK, v_BMGK, allowed(how, q_rows, k_rows), bias_HLM), 'attention')


def dot_product(how: How, q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows, bias_HLM=None):
  """jax.nn.dot_product_attention: XLA's own, on every platform. It knows no cap: with one, `plain` is the same."""
  if how.cap:
    return plain(how, q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows, bias_HLM)
  known = how.in_order and how.causal and how.where in ('global', 'local')  # said in its own words, which its fused kernels know
  allowed_BLM = allowed(dataclasses.replace(how, causal=False, where='global') if known else how, q_rows, k_rows)
  short = q_BLHK.shape[-1] - v_BMGK.shape[-1]
  o_BLHK = jax.nn.dot_product_attention(
      q_BLHK, k_BMGK, jnp.pad(v_BMGK, ((0, 0),) * 3 + ((0, short),)), None if bias_HLM is None else bias_HLM[None],
      mask=allowed_BLM[:, None], is_causal=known, scale=how.scale,
      local_window_size=(how.window - 1, 0) if known and how.where == 'local' else None)
  return tag(o_BLHK[..., :v_BMGK.shape[-1]], 'attention')


def blocked(how: How, q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows, bias_HLM=None):
  """Blocks of queries against only the keys that causality and the window let them see: for CPUs, where it saves the
  matmuls and the softmax elsewhere (ratios to dot_product in benchmarks/)."""
  B, L, H, K = q_BLHK.shape
  G, M = k_BMGK.shape[2], k_BMGK.shape[1]
  blocks = BLOCKS if L % BLOCKS == 0 and how.in_order and (how.causal or how.where == 'local') else 1
  q_BHLK = jnp.swapaxes(q_BLHK * how.scale, 1, 2)
  if G < H:
    k_BMGK, v_BMGK = (jnp.repeat(a, H // G, axis=2) for a in (k_BMGK, v_BMGK))
  k_BHMK, v_BHMK = jnp.swapaxes(k_BMGK, 1, 2), jnp.swapaxes(v_BMGK, 1, 2)
  size, out = L // blocks, []
  for start in range(0, L, size):
    beside = how.window - 1 if how.where == 'local' else M
    first, end = max(0, start - beside), min(M, start + size + (0 if how.causal else beside))
    first, end = (first, end) if how.in_order else (0, M)
    queries, keys = slice(start, start + size), slice(first, end)
    s_BHLM = jnp.einsum('BHLK,BHMK->BHLM', q_BHLK[:, :, queries], k_BHMK[:, :, keys]).astype(jnp.float32)
    if bias_HLM is not None:
      s_BHLM += bias_HLM[None, :, queries, keys]
    if how.cap:
      s_BHLM = how.cap * jnp.tanh(s_BHLM / how.cap)
    seen_BLM = allowed(how, q_rows, k_rows, queries, keys)
    p_BHLM = jax.nn.softmax(jnp.where(seen_BLM[:, None], s_BHLM, -1e30), -1)
    out.append(jnp.einsum('BHLM,BHMK->BHLK', p_BHLM.astype(q_BLHK.dtype), v_BHMK[:, :, keys]))
  return tag(jnp.swapaxes(jnp.concatenate(out, 2), 1, 2), 'attention')
