"""Attention kernels, one signature: (how, q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows, bias_HLM) → o_BLHK.

A new one is a function and a line of ATTENTION. Kernels see what one device holds of the batch and the heads, and know
nothing of the mesh (`attend` puts them under shard_map). Values may have another head dim than queries and keys. They
agree with each other in tests/test_kernels.py.
"""
import dataclasses
import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm import layout

BLOCKS = 4  # of 'blocked': with 4, 10 of 16 blocks of scores are computed


@dataclasses.dataclass(frozen=True)
class How:
  """scale: × scores; where: which keys are seen, words of SEEN joined by + (any of them); window, first: their sizes;
  cap: scores become cap · tanh(score / cap); causal: no key after the query is seen."""
  scale: float
  where: str = 'global'
  window: int = 0
  first: int = 0
  cap: float = 0.
  causal: bool = True


class Rows(NamedTuple):
  """Where tokens stand: segments int32 (only equal ones see each other), positions int32 in their document."""
  segments_BL: jax.Array
  positions_BL: jax.Array


# May the query at position i of a document see the key at j? (Sparse Transformer, Child et al. 2019, §4.3: its strided
# attention is local+stride, its fixed one block+summary; Longformer's, Beltagy et al. 2020, is local+first.)
SEEN = {
    'global': lambda how, i, j: jnp.bool_(True),
    'local': lambda how, i, j: (i - j < how.window) & (j - i < how.window),
    'stride': lambda how, i, j: (i - j) % how.window == 0,
    'block': lambda how, i, j: i // how.window == j // how.window,
    'summary': lambda how, i, j: j % how.window >= how.window - how.first,
    'first': lambda how, i, j: (j < how.first) | (i < how.first),
}
BY_DISTANCE = {'global', 'local', 'stride'}  # depend on i − j only, so that places in the row will do


def visible(how: How, i, j):
  """bool, broadcast over i and j: the query at position i may see the key at position j of its document."""
  seen = functools.reduce(operator.or_, (SEEN[word](how, i, j) for word in how.where.split('+')))
  return seen & (i >= j) if how.causal else seen


def _allowed(how: How, q: Rows, k: Rows, queries: slice = slice(None), keys: slice = slice(None)):
  """bool [B, L, M], of these queries and keys."""
  same_BLM = q.segments_BL[:, queries, None] == k.segments_BL[:, None, keys]
  if not how.causal and how.where == 'global':
    return same_BLM
  if BY_DISTANCE.issuperset(how.where.split('+')):
    i, j = jnp.arange(q.segments_BL.shape[1])[queries, None], jnp.arange(k.segments_BL.shape[1])[None, keys]
    return same_BLM & visible(how, i, j)[None]
  return same_BLM & visible(how, q.positions_BL[:, queries, None], k.positions_BL[:, None, keys])


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
  return mix(how, q_BLHK, k_BMGK, v_BMGK, _allowed(how, q_rows, k_rows), bias_HLM)


def dot_product(how: How, q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows, bias_HLM=None):
  """jax.nn.dot_product_attention: XLA's own, on every platform. It knows no cap: with one, `plain` is the same."""
  if how.cap:
    return plain(how, q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows, bias_HLM)
  known = how.causal and how.where in ('global', 'local')  # said in its own words, which its fused kernels know
  allowed_BLM = _allowed(dataclasses.replace(how, causal=False, where='global') if known else how, q_rows, k_rows)
  short = q_BLHK.shape[-1] - v_BMGK.shape[-1]
  o_BLHK = jax.nn.dot_product_attention(
      q_BLHK, k_BMGK, jnp.pad(v_BMGK, ((0, 0),) * 3 + ((0, short),)), None if bias_HLM is None else bias_HLM[None],
      mask=allowed_BLM[:, None], is_causal=known, scale=how.scale,
      local_window_size=(how.window - 1, 0) if known and how.where == 'local' else None)
  return o_BLHK[..., :v_BMGK.shape[-1]]


def blocked(how: How, q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows, bias_HLM=None):
  """Blocks of queries against only the keys that causality and the window let them see: for CPUs, where it saves the
  matmuls and the softmax elsewhere (ratios to dot_product in benchmarks/)."""
  B, L, H, K = q_BLHK.shape
  G, M = k_BMGK.shape[2], k_BMGK.shape[1]
  blocks = BLOCKS if L % BLOCKS == 0 and (how.causal or how.where == 'local') else 1
  q_BHLK = jnp.swapaxes(q_BLHK * how.scale, 1, 2)
  if G < H:
    k_BMGK, v_BMGK = (jnp.repeat(a, H // G, axis=2) for a in (k_BMGK, v_BMGK))
  k_BHMK, v_BHMK = jnp.swapaxes(k_BMGK, 1, 2), jnp.swapaxes(v_BMGK, 1, 2)
  size, out = L // blocks, []
  for start in range(0, L, size):
    beside = how.window - 1 if how.where == 'local' else M
    first, end = max(0, start - beside), min(M, start + size + (0 if how.causal else beside))
    queries, keys = slice(start, start + size), slice(first, end)
    s_BHLM = jnp.einsum('BHLK,BHMK->BHLM', q_BHLK[:, :, queries], k_BHMK[:, :, keys]).astype(jnp.float32)
    if bias_HLM is not None:
      s_BHLM += bias_HLM[None, :, queries, keys]
    if how.cap:
      s_BHLM = how.cap * jnp.tanh(s_BHLM / how.cap)
    seen_BLM = _allowed(how, q_rows, k_rows, queries, keys)
    p_BHLM = jax.nn.softmax(jnp.where(seen_BLM[:, None], s_BHLM, -1e30), -1)
    out.append(jnp.einsum('BHLM,BHMK->BHLK', p_BHLM.astype(q_BLHK.dtype), v_BHMK[:, :, keys]))
  return jnp.swapaxes(jnp.concatenate(out, 2), 1, 2)


ATTENTION = {'dot_product': dot_product, 'blocked': blocked, 'plain': plain}


def attend(name: str, how: How, q_BLHK, k_BMGK, v_BMGK, q_rows: Rows, k_rows: Rows, bias_HLM=None):
  """The kernel called `name` on the mesh; 'auto' is the fastest known for the mesh's platform."""
  if name == 'auto':
    name = 'blocked' if layout.platform() == 'cpu' else 'dot_product'

  def kernel(q_BLHK, k_BMGK, v_BMGK, q, k, *bias):
    o_BLHK = ATTENTION[name](how, q_BLHK, k_BMGK, v_BMGK, q, k, *bias)
    if q_rows is k_rows:  # a token sees at least itself
      return o_BLHK
    some_BL = (q.segments_BL[:, :, None] == k.segments_BL[:, None]).any(-1)
    return jnp.where(some_BL[..., None, None], o_BLHK, 0)
  return _on_mesh(kernel, layout.spec('BLHK'), q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows, bias_HLM)


def shown(how: How, q_BLHK, k_BMGK, v_BMGK, q_rows: Rows, k_rows: Rows, bias_HLM=None):
  """(o_BLHK, p_BHLM float32): what `attend` by 'plain' makes on the mesh, and the weights it makes it with; those of a
  query that sees no key are 0."""
  def kernel(q_BLHK, k_BMGK, v_BMGK, q, k, *bias):
    allowed_BLM = _allowed(how, q, k)
    p_BGRLM = weights(how, q_BLHK, k_BMGK, allowed_BLM, *bias) * allowed_BLM.any(-1)[:, None, None, :, None]
    return weigh(p_BGRLM, v_BMGK), p_BGRLM.reshape(p_BGRLM.shape[0], -1, *p_BGRLM.shape[3:])
  specs = (layout.spec('BLHK'), layout.spec('BHLM'))
  return _on_mesh(kernel, specs, q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows, bias_HLM)


def _on_mesh(kernel, out_specs, q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows, bias_HLM):
  """`kernel` on what each device holds of the batch and the heads."""
  arrays = (q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows) + (() if bias_HLM is None else (bias_HLM,))
  rows = Rows(layout.spec('BL'), layout.spec('BL'))
  in_specs = (layout.spec('BLHK'), layout.spec('BMGK'), layout.spec('BMGK'), rows, rows, layout.spec('HLM'))[:len(arrays)]
  arrays = jax.tree.map(jax.sharding.reshard, arrays, in_specs)
  return jax.shard_map(kernel, in_specs=in_specs, out_specs=out_specs)(*arrays)
