"""Attention kernels, one signature: (q_BLHK, k_BLGK, v_BLGK, segments_BL) → o_BLHK, causal within a segment.

A new one is a function and a line of ATTENTION. Kernels see what one device holds of the batch and the heads, and know
nothing of the mesh (`attend` puts them under shard_map). They agree with each other in tests/test_decoder.py.
"""
import functools

import jax
import jax.numpy as jnp

from jaxlm import layout

BLOCKS = 4  # of 'blocked': with 4, 10 of 16 blocks of scores are computed


def dot_product(q_BLHK, k_BLGK, v_BLGK, segments_BL):
  """jax.nn.dot_product_attention: XLA's own, on every platform."""
  same_B1LM = segments_BL[:, None, :, None] == segments_BL[:, None, None, :]
  return jax.nn.dot_product_attention(q_BLHK, k_BLGK, v_BLGK, mask=same_B1LM, is_causal=True)


def blocked(q_BLHK, k_BLGK, v_BLGK, segments_BL):
  """Blocks of queries against only the keys that causality lets them see: for CPUs, where it saves the matmuls and
  the softmax above the diagonal (ratios to dot_product in benchmarks/)."""
  B, L, H, K = q_BLHK.shape
  G = k_BLGK.shape[2]
  blocks = BLOCKS if L % BLOCKS == 0 else 1
  q_BHLK = jnp.swapaxes(q_BLHK * K ** -0.5, 1, 2)
  if G < H:
    k_BLGK, v_BLGK = (jnp.repeat(a, H // G, axis=2) for a in (k_BLGK, v_BLGK))
  k_BHMK, v_BHMK = jnp.swapaxes(k_BLGK, 1, 2), jnp.swapaxes(v_BLGK, 1, 2)
  size, out = L // blocks, []
  for start in range(0, L, size):
    end = start + size
    s_BHLM = jnp.einsum('BHLK,BHMK->BHLM', q_BHLK[:, :, start:end], k_BHMK[:, :, :end]).astype(jnp.float32)
    causal_LM = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None]
    same_BLM = segments_BL[:, start:end, None] == segments_BL[:, None, :end]
    p_BHLM = jax.nn.softmax(jnp.where((same_BLM & causal_LM[None])[:, None], s_BHLM, -1e30), -1)
    out.append(jnp.einsum('BHLM,BHMK->BHLK', p_BHLM.astype(q_BLHK.dtype), v_BHMK[:, :, :end]))
  return jnp.swapaxes(jnp.concatenate(out, 2), 1, 2)


ATTENTION = {'dot_product': dot_product, 'blocked': blocked}


def attend(name: str, q_BLHK, k_BLGK, v_BLGK, segments_BL):
  """The kernel called `name` on the mesh; 'auto' is the fastest known for the mesh's platform."""
  if name == 'auto':
    name = 'blocked' if layout.platform() == 'cpu' else 'dot_product'
  in_specs = tuple(layout.spec(dims) for dims in ('BLHK', 'BLGK', 'BLGK', 'BL'))
  q_BLHK, k_BLGK, v_BLGK, segments_BL = (
      jax.sharding.reshard(a, s) for a, s in zip((q_BLHK, k_BLGK, v_BLGK, segments_BL), in_specs))
  local = functools.partial(jax.shard_map, in_specs=in_specs, out_specs=layout.spec('BLHK'))(ATTENTION[name])
  return local(q_BLHK, k_BLGK, v_BLGK, segments_BL)
