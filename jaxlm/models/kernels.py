"""Attention kernels, one signature: (how, q_BLHK, k_BLGK, v_BLGK, segments_BL) → o_BLHK, causal within a segment.

A new one is a function and a line of ATTENTION. Kernels see what one device holds of the batch and the heads, and know
nothing of the mesh (`attend` puts them under shard_map). Values may have another head dim than queries and keys. They
agree with each other in tests/test_decoder.py.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxlm import layout

BLOCKS = 4  # of 'blocked': with 4, 10 of 16 blocks of scores are computed


@dataclasses.dataclass(frozen=True)
class How:
  """scale: × scores; window: tokens seen, itself included, 0 for all; cap: scores become cap · tanh(score / cap)."""
  scale: float
  window: int = 0
  cap: float = 0.


def mix(how: How, q_BLHK, k_BMGK, v_BMGK, allowed_BLM):
  """Softmax attention over the keys that `allowed_BLM` (bool) lets each query see; scores in float32."""
  B, L, H, K = q_BLHK.shape
  G = k_BMGK.shape[2]
  q_BLGRK = (q_BLHK * how.scale).reshape(B, L, G, H // G, K)  # head h reads key-value head h // (H/G)
  s_BGRLM = jnp.einsum('BLGRK,BMGK->BGRLM', q_BLGRK, k_BMGK).astype(jnp.float32)
  if how.cap:
    s_BGRLM = how.cap * jnp.tanh(s_BGRLM / how.cap)
  p_BGRLM = jax.nn.softmax(jnp.where(allowed_BLM[:, None, None], s_BGRLM, -1e30), -1).astype(q_BLHK.dtype)
  return jnp.einsum('BGRLM,BMGK->BLGRK', p_BGRLM, v_BMGK).reshape(B, L, H, v_BMGK.shape[-1])


def visible(how: How, L: int, M: int, start, first):
  """bool [L, M]: query start + l may see key first + m, for its place."""
  ahead_LM = (start + jnp.arange(L))[:, None] - (first + jnp.arange(M))[None]
  return (ahead_LM >= 0) & (ahead_LM < how.window) if how.window else ahead_LM >= 0


def plain(how: How, q_BLHK, k_BLGK, v_BLGK, segments_BL):
  """All scores at once: the reference."""
  L = q_BLHK.shape[1]
  same_BLM = segments_BL[:, :, None] == segments_BL[:, None]
  return mix(how, q_BLHK, k_BLGK, v_BLGK, same_BLM & visible(how, L, L, 0, 0)[None])


def dot_product(how: How, q_BLHK, k_BLGK, v_BLGK, segments_BL):
  """jax.nn.dot_product_attention: XLA's own, on every platform. It knows no cap: with one, `plain` is the same."""
  if how.cap:
    return plain(how, q_BLHK, k_BLGK, v_BLGK, segments_BL)
  same_B1LM = segments_BL[:, None, :, None] == segments_BL[:, None, None, :]
  short = q_BLHK.shape[-1] - v_BLGK.shape[-1]
  o_BLHK = jax.nn.dot_product_attention(
      q_BLHK, k_BLGK, jnp.pad(v_BLGK, ((0, 0),) * 3 + ((0, short),)), mask=same_B1LM, is_causal=True, scale=how.scale,
      local_window_size=(how.window - 1, 0) if how.window else None)
  return o_BLHK[..., :v_BLGK.shape[-1]]


def blocked(how: How, q_BLHK, k_BLGK, v_BLGK, segments_BL):
  """Blocks of queries against only the keys that causality and the window let them see: for CPUs, where it saves the
  matmuls and the softmax elsewhere (ratios to dot_product in benchmarks/)."""
  B, L, H, K = q_BLHK.shape
  G = k_BLGK.shape[2]
  blocks = BLOCKS if L % BLOCKS == 0 else 1
  q_BHLK = jnp.swapaxes(q_BLHK * how.scale, 1, 2)
  if G < H:
    k_BLGK, v_BLGK = (jnp.repeat(a, H // G, axis=2) for a in (k_BLGK, v_BLGK))
  k_BHMK, v_BHMK = jnp.swapaxes(k_BLGK, 1, 2), jnp.swapaxes(v_BLGK, 1, 2)
  size, out = L // blocks, []
  for start in range(0, L, size):
    end, first = start + size, max(0, start - how.window + 1) if how.window else 0
    s_BHLM = jnp.einsum('BHLK,BHMK->BHLM', q_BHLK[:, :, start:end], k_BHMK[:, :, first:end]).astype(jnp.float32)
    if how.cap:
      s_BHLM = how.cap * jnp.tanh(s_BHLM / how.cap)
    same_BLM = segments_BL[:, start:end, None] == segments_BL[:, None, first:end]
    seen_BLM = same_BLM & visible(how, size, end - first, start, first)[None]
    p_BHLM = jax.nn.softmax(jnp.where(seen_BLM[:, None], s_BHLM, -1e30), -1)
    out.append(jnp.einsum('BHLM,BHMK->BHLK', p_BHLM.astype(q_BLHK.dtype), v_BHMK[:, :, first:end]))
  return jnp.swapaxes(jnp.concatenate(out, 2), 1, 2)


ATTENTION = {'dot_product': dot_product, 'blocked': blocked, 'plain': plain}


def attend(name: str, how: How, q_BLHK, k_BLGK, v_BLGK, segments_BL):
  """The kernel called `name` on the mesh; 'auto' is the fastest known for the mesh's platform."""
  if name == 'auto':
    name = 'blocked' if layout.platform() == 'cpu' else 'dot_product'
  in_specs = tuple(layout.spec(dims) for dims in ('BLHK', 'BLGK', 'BLGK', 'BL'))
  arrays = (jax.sharding.reshard(a, s) for a, s in zip((q_BLHK, k_BLGK, v_BLGK, segments_BL), in_specs))
  kernel = functools.partial(ATTENTION[name], how)
  return jax.shard_map(kernel, in_specs=in_specs, out_specs=layout.spec('BLHK'))(*arrays)
