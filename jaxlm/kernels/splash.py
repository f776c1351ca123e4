"""Attention on TPU by JAX's splash kernel (jax.experimental.pallas.ops.tpu.splash_attention): blocks of scores stay in the
chip's own memory, and blocks that the mask empties are not visited. Elsewhere it runs as an interpreted program, for tests.

`forward` and `backward` are its two halves, for kernels that go over keys a piece at a time (ring.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from jaxlm import layout
from jaxlm.kernels.patterns import BY_DISTANCE, How, visible

LANES = 128  # of a TPU's vector unit: blocks, and the head dims of keys and values, are multiples
BLOCK = 512  # of queries and of keys


def refusal(how: How, queries: int, keys: int, bias_HLM=None) -> str:
  """Why the kernel cannot do this, or ''."""
  if bias_HLM is not None:
    return 'knows no bias of relative positions'
  if not BY_DISTANCE.issuperset(how.where.split('+')):
    return f'knows patterns by distance alone ({", ".join(sorted(BY_DISTANCE))}), not {how.where}'
  if queries % LANES or keys % LANES:
    return f'wants lengths that are multiples of {LANES}, not {queries} and {keys}'
  return ''


class Mask(masks._ComputableMask):  # pylint: disable=protected-access  # the kernel knows those that it can compute by this class
  """`visible` of queries at places queries_L and of keys, computed in the kernel and never stored. place_of: of the n-th key."""

  def __init__(self, how: How, queries_L: np.ndarray, keys: int, place_of):
    self._shape, self.q_sequence, self.how, self.place_of = (len(queries_L), keys), np.asarray(queries_L, np.int32), how, place_of
    self.mask_function = lambda i, n: visible(how, i, place_of(n))

  def _key(self):
    return self._shape, self.how, self.place_of, self.q_sequence.tobytes()

  def __eq__(self, other):
    return isinstance(other, Mask) and self._key() == other._key()

  def __hash__(self):
    return hash(self._key())


def _sizes(queries: int, keys: int) -> kernel.BlockSizes:
  largest = lambda size: next(b for b in (BLOCK, BLOCK // 2, LANES) if size % b == 0)
  q, k = largest(queries), largest(keys)
  return kernel.BlockSizes(block_q=q, block_kv=k, block_kv_compute=k, block_q_dkv=q, block_kv_dkv=k, block_kv_dkv_compute=k,
                           block_q_dq=q, block_kv_dq=k)


def itself(n):
  return n


def make(how: How, heads: int, queries_L: np.ndarray, keys: int, place_of=itself, shards: int = 1, save_residuals: bool = False):
  """The kernel (q_HLK, k_GMK, v_GMK, segments) → o_HLK of queries at places queries_L; under shard_map each of `shards`
  devices has its own part of the queries. Such a kernel is an argument of the mapped function: see `cut`."""
  masked = how.causal or how.where != 'global'
  mask = Mask(how, queries_L, keys, place_of) if masked else masks.FullMask((len(queries_L), keys))
  return kernel.make_splash_mha(
      masks.MultiHeadMask([mask] * heads), block_sizes=_sizes(len(queries_L) // shards, keys), head_shards=1, q_seq_shards=shards,
      save_residuals=save_residuals, residual_checkpoint_name=None if save_residuals else 'attention',
      attn_logits_soft_cap=how.cap or None, interpret=layout.platform() != 'tpu')


def heads_first(how: How, q_BLHK, k_BMGK, v_BMGK):
  """As the kernel wants them: scaled, heads before places, head dims padded with zeros, which change no product."""
  wide = lambda a: jnp.pad(a, ((0, 0),) * 3 + ((0, -a.shape[-1] % LANES),))
  return tuple(jnp.swapaxes(wide(a), 1, 2) for a in (q_BLHK * how.scale, k_BMGK, v_BMGK))


def apply(how: How, q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows, of_row):
  """o_BLHK of a kernel of a row."""
  arrays = heads_first(how, q_BLHK, k_BMGK, v_BMGK)
  o_BHLK = jax.vmap(of_row)(*arrays, kernel.SegmentIds(q_rows.segments_BL, k_rows.segments_BL))
  return jnp.swapaxes(o_BHLK, 1, 2)[..., :v_BMGK.shape[-1]]


def splash(how: How, q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows, bias_HLM=None):
  """One device has whole rows. See on_mesh.py for the signature."""
  del bias_HLM  # `refusal` saw to it
  of_row = make(how, q_BLHK.shape[2], np.arange(q_BLHK.shape[1]), k_BMGK.shape[1])
  return apply(how, q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows, of_row)


def cut(of_row, axis: str):
  """(kernel, its specs) as an argument of shard_map, for queries that `axis` cuts."""
  mesh = jax.sharding.get_abstract_mesh()
  specs = of_row.manual_sharding_spec(jax.sharding.NamedSharding(mesh, jax.P(None, axis)))
  return jax.tree.map(jax.sharding.reshard, of_row, specs), specs


def forward(how: How, q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows):
  """(o_BLHK of these keys alone, log Z_BHL), float32, in the order of the text, the first query beside the first key."""
  of_row = make(how, q_BLHK.shape[2], np.arange(q_BLHK.shape[1]), k_BMGK.shape[1], save_residuals=True)
  arrays = heads_first(how, q_BLHK, k_BMGK, v_BMGK)
  o_BHLK, (log_z_BHL,) = jax.vmap(of_row)(*arrays, kernel.SegmentIds(q_rows.segments_BL, k_rows.segments_BL))
  return jnp.swapaxes(o_BHLK, 1, 2)[..., :v_BMGK.shape[-1]].astype(jnp.float32), log_z_BHL


def backward(how: How, q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows, o_BLHK, log_z_BHL, do_BLHK):
  """The gradients of q, k and v through these keys, float32, where o and log Z are of all keys.

  The kernel's own backward pass takes o and log Z from its forward pass over the same keys; that it takes those of more of them
  just as well (p = exp(s − log Z) is then their share) is not said by its public face, so its inner function is called.
  """
  of_row = make(how, q_BLHK.shape[2], np.arange(q_BLHK.shape[1]), k_BMGK.shape[1])
  q, k, v = heads_first(how, q_BLHK, k_BMGK, v_BMGK)
  _, o, do = heads_first(How(1.), q_BLHK, o_BLHK.astype(q_BLHK.dtype), do_BLHK.astype(q_BLHK.dtype))
  said = of_row.kwargs

  def row(q, k, v, segments, o, log_z, do):
    saved = (q, k, v, segments, None, o, log_z, of_row.dq_mask_info, of_row.dkv_mask_info)
    return kernel._splash_attention_bwd(  # pylint: disable=protected-access
        False, said['mask_value'], False, said['block_sizes'], None, said['mask_function'], said['attn_logits_soft_cap'],
        said['interpret'], saved, do)[3:6]
  dq, dk, dv = jax.vmap(row)(q, k, v, kernel.SegmentIds(q_rows.segments_BL, k_rows.segments_BL), o, log_z_BHL, do)
  back = lambda a, like: jnp.swapaxes(a, 1, 2)[..., :like.shape[-1]].astype(jnp.float32)
  return back(dq, q_BLHK) * how.scale, back(dk, k_BMGK), back(dv, v_BMGK)
