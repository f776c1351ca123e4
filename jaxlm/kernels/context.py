"""Attention whose rows are cut over mesh.context.

Of a row cut into 2S pieces, device i of S holds the pieces i and 2S − 1 − i ("zigzag"), so that under a causal mask all devices
have the same number of scores to compute. `zigzag` brings rows into that order and back.

gather: every device gets all keys and values of its rows (all-gather), and any kernel does the rest.
ring: keys and values go round from neighbour to neighbour while the scores of those at hand are computed (Liu et al. 2023, Ring
attention); their sums are put together by their log Z. Memory for keys does not grow with the row.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import layout
from jaxlm.kernels import splash
from jaxlm.kernels.patterns import How, Rows, allowed
from jaxlm.remat import tag

AXIS = 'context'


def zigzag(a, back: bool = False):
  """a [B, L, …], whose L the mesh cuts, from the order of the text into zigzag order, or back."""
  S = layout.shards('L')
  if S == 1:
    return a
  spec = jax.typeof(a).sharding.spec
  piece_of = lambda n: n if n < S else 2 * S - 1 - n  # the device that the n-th piece goes to
  there = [[(n // 2, piece_of(n)) for n in range(start, 2 * S, 2)] for start in (0, 1)]

  def move(a):
    odd = jax.lax.axis_index(AXIS) % 2 == 1  # there the first piece is an odd one
    swap = lambda a, b: (jnp.where(odd, b, a), jnp.where(odd, a, b))
    pieces = jnp.split(a, 2, axis=1)
    if back:
      pieces = swap(*pieces)
    pieces = (jax.lax.ppermute(p, AXIS, [(j, i) for i, j in ways] if back else ways) for p, ways in zip(pieces, there))
    return jnp.concatenate(list(pieces) if back else swap(*pieces), 1)
  return jax.shard_map(move, in_specs=spec, out_specs=spec)(a)


def places(L: int, S: int) -> np.ndarray:
  """Where in the text each place of a row in zigzag order is."""
  if S == 1:
    return np.arange(L, dtype=np.int32)
  half = L // (2 * S)
  order = [n for device in range(S) for n in (device, 2 * S - 1 - device)]
  return np.concatenate([np.arange(n * half, (n + 1) * half) for n in order]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class PlaceOf:
  """places(L, S)[n], computed: what a kernel can ask of numbers it makes itself."""
  L: int
  S: int

  def __call__(self, n):
    half = self.L // (2 * self.S)
    piece = n // half
    return (piece // 2 + piece % 2 * (2 * self.S - 1 - piece // 2 * 2)) * half + n % half


def _whole(a):
  """The pieces that all devices of the axis hold, put together along axis 1."""
  return jax.lax.all_gather(a, AXIS, axis=1, tiled=True)


@jax.custom_vjp
def _whole_on_a_stage(a):
  """_whole whose gradient is exchanged, then added up. What JAX itself would do, a reduce-scatter, fails an assertion (jax 0.10 to
  0.12, _reduce_scatter_lowering) where an axis that is not mapped cuts the array: under a pipeline's vmap over mesh.stage."""
  return _whole(a)


def _exchanged(_, g):
  S = jax.lax.axis_size(AXIS)
  pieces = g.reshape(g.shape[0], S, -1, *g.shape[2:])
  return (jax.lax.all_to_all(pieces, AXIS, 1, 1).sum(1),)


_whole_on_a_stage.defvjp(lambda a: (_whole(a), None), _exchanged)


def gathered(kernel, how: How, q_BLHK, k_BMGK, v_BMGK, q_rows: Rows, k_rows: Rows, *more):
  """What `kernel` makes of all keys, those of a device's queries."""
  k_BMGK, v_BMGK = map(_whole_on_a_stage if layout.stages() > 1 else _whole, (k_BMGK, v_BMGK))
  k_rows = jax.tree.map(_whole, k_rows)
  return kernel(dataclasses.replace(how, in_order=False), q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows, *more)


class _Dense:
  """Scores of a piece of the keys in XLA's own operations: the reference, and what runs where there is no splash kernel."""

  @staticmethod
  def forward(how, after, q_BLHK, k_BMGK, v_BMGK, q, k):
    """(o_BLHK of these keys alone, log Z_BHL), both float32. after: all queries come after all keys."""
    del after  # positions say so too
    s_BHLM, seen_BHLM, _ = _scores(how, q_BLHK, k_BMGK, q, k)
    log_z_BHL = jax.nn.logsumexp(jnp.where(seen_BHLM, s_BHLM, -1e30), -1)
    p_BHLM = jnp.where(seen_BHLM, jnp.exp(s_BHLM - log_z_BHL[..., None]), 0)
    return jnp.einsum('BHLM,BMHK->BLHK', p_BHLM, _each_head(v_BMGK, q_BLHK).astype(jnp.float32)), log_z_BHL

  @staticmethod
  def backward(how, after, q_BLHK, k_BMGK, v_BMGK, q, k, o_BLHK, log_z_BHL, do_BLHK):
    """The gradients of q, k and v through these keys, float32, where o and log Z are of all keys."""
    del after
    s_BHLM, seen_BHLM, slope_BHLM = _scores(how, q_BLHK, k_BMGK, q, k)
    p_BHLM = jnp.where(seen_BHLM, jnp.exp(s_BHLM - log_z_BHL[..., None]), 0)
    do_BLHK = do_BLHK.astype(jnp.float32)
    k_BMHK, v_BMHK = (_each_head(a, q_BLHK).astype(jnp.float32) for a in (k_BMGK, v_BMGK))
    mean_BHL = jnp.einsum('BLHK,BLHK->BHL', do_BLHK, o_BLHK)
    ds_BHLM = p_BHLM * (jnp.einsum('BLHK,BMHK->BHLM', do_BLHK, v_BMHK) - mean_BHL[..., None]) * slope_BHLM * how.scale
    over_group = lambda a, like: a.reshape(*like.shape[:3], -1, a.shape[-1]).sum(3)
    return (jnp.einsum('BHLM,BMHK->BLHK', ds_BHLM, k_BMHK),
            over_group(jnp.einsum('BHLM,BLHK->BMHK', ds_BHLM, q_BLHK.astype(jnp.float32)), k_BMGK),
            over_group(jnp.einsum('BHLM,BLHK->BMHK', p_BHLM, do_BLHK), v_BMGK))


def _each_head(a_BMGK, q_BLHK):
  return jnp.repeat(a_BMGK, q_BLHK.shape[2] // a_BMGK.shape[2], 2)


def _scores(how, q_BLHK, k_BMGK, q, k):
  """(float32 scores, which count, the slope of the cap)."""
  s_BHLM = jnp.einsum('BLHK,BMHK->BHLM', q_BLHK * how.scale, _each_head(k_BMGK, q_BLHK)).astype(jnp.float32)
  slope_BHLM = jnp.ones_like(s_BHLM)
  if how.cap:
    s_BHLM = how.cap * jnp.tanh(s_BHLM / how.cap)
    slope_BHLM = 1 - (s_BHLM / how.cap) ** 2
  return s_BHLM, allowed(dataclasses.replace(how, in_order=False), q, k)[:, None], slope_BHLM


class _Splash:
  """The same by splash's two halves."""

  @staticmethod
  def _how(how, after):
    return dataclasses.replace(how, causal=how.causal and not after)

  @staticmethod
  def forward(how, after, q_BLHK, k_BMGK, v_BMGK, q, k):
    return splash.forward(_Splash._how(how, after), q_BLHK, k_BMGK, v_BMGK, q, k)

  @staticmethod
  def backward(how, after, q_BLHK, k_BMGK, v_BMGK, q, k, o_BLHK, log_z_BHL, do_BLHK):
    return splash.backward(_Splash._how(how, after), q_BLHK, k_BMGK, v_BMGK, q, k, o_BLHK, log_z_BHL, do_BLHK)


PARTS = {'dense': _Dense, 'splash': _Splash}


def ring(part: str, how: How, q_BLHK, k_BMGK, v_BMGK, q_rows: Rows, k_rows: Rows):
  """o_BLHK of a device's queries; causal only, rows in zigzag order."""
  return _ring(part, how, q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(part, how, q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows):
  return _forward(part, how, q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows)[0]


def _halves(tree):
  """(first, second) of the two pieces that a device holds."""
  split = jax.tree.map(lambda a: jnp.split(a, 2, axis=1), tree)
  return tuple(jax.tree.map(lambda pair: pair[n], split, is_leaf=lambda x: isinstance(x, list)) for n in (0, 1))


def _round(tree):
  """What the neighbour before this device holds."""
  S = jax.lax.axis_size(AXIS)
  return jax.tree.map(lambda a: jax.lax.ppermute(a, AXIS, [(n, (n + 1) % S) for n in range(S)]), tree)


def _own_pairs(q1, q2, k1, k2):
  """(which half of the queries, which of the keys, queries, keys, all keys are before) of a device's own pieces."""
  return [(0, 0, q1, k1, False), (1, 0, q2, k1, True), (1, 1, q2, k2, False)]


def _other_pairs(earlier, q1, q2, k1, k2):
  """The two pairs that see each other, of keys of a device before this one (earlier, bool) or after it: the second half of the
  queries always sees the first half of the keys; and either both halves of the queries see it, or it sees both."""
  pick = lambda a, b: jax.tree.map(lambda x, y: jnp.where(earlier, x, y), a, b)
  return (q2, k1), (pick(q1, q2), pick(k1, k2))


def _together(a, b):
  """Sums over two sets of keys as one: each is (o_BLHK, log Z_BHL)."""
  log_z_BHL = jnp.logaddexp(a[1], b[1])
  weigh = lambda o_BLHK, own_BHL: o_BLHK * jnp.swapaxes(jnp.exp(own_BHL - log_z_BHL), 1, 2)[..., None]
  return weigh(*a) + weigh(*b), log_z_BHL


def _forward(part, how, q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows):
  S, me = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
  part = PARTS[part]
  score = lambda after, q, k: part.forward(how, after, q[0], k[0], k[1], q[1], k[2])
  q1, q2 = _halves((q_BLHK, q_rows))
  held = (k_BMGK, v_BMGK, k_rows)
  ahead = _round(held)  # sent while the scores of those at hand are computed
  sums: list = [None, None]
  for n, _, q, k, after in _own_pairs(q1, q2, *_halves(held)):
    own = score(after, q, k)
    sums[n] = own if sums[n] is None else _together(sums[n], own)

  def add(t, held, sums):
    earlier = (me - t) % S < me
    first, second = _other_pairs(earlier, q1, q2, *_halves(held))
    sums = [sums[0], _together(sums[1], score(True, *first))]
    more = score(True, *second)
    pick = lambda yes, a, b: jax.tree.map(lambda x, y: jnp.where(yes, x, y), a, b)
    return [pick(earlier, _together(sums[0], more), sums[0]), pick(earlier, sums[1], _together(sums[1], more))]

  def turn(carry, t):
    held, sums = carry
    return (_round(held), add(t, held, sums)), None
  (held, sums), _ = jax.lax.scan(turn, (ahead, sums), jnp.arange(1, S - 1))
  sums = add(S - 1, held, sums)
  o_BLHK = jnp.concatenate([sums[0][0], sums[1][0]], 1)
  log_z_BHL = jnp.concatenate([sums[0][1], sums[1][1]], 2)
  out_BLHK, log_z_BHL = tag(o_BLHK.astype(v_BMGK.dtype), 'attention'), tag(log_z_BHL, 'attention')
  return out_BLHK, (q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows, out_BLHK, log_z_BHL)


def _backward(part, how, saved, do_BLHK):
  q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows, o_BLHK, log_z_BHL = saved
  S, me = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
  part = PARTS[part]
  z = jnp.split(log_z_BHL, 2, axis=2)
  sides = [(*half, log_z) for half, log_z in zip(_halves((q_BLHK, q_rows, o_BLHK.astype(jnp.float32), do_BLHK)), z)]
  slopes = lambda after, q, k: part.backward(how, after, q[0], k[0], k[1], q[1], k[2], q[2], q[4], q[3])
  held = (k_BMGK, v_BMGK, k_rows)
  ahead = _round(held)
  zeros = lambda a: [jnp.zeros((a.shape[0], a.shape[1] // 2, *a.shape[2:]), jnp.float32) for _ in range(2)]
  dq, dk, dv = zeros(q_BLHK), zeros(k_BMGK), zeros(v_BMGK)
  for n, m, q, k, after in _own_pairs(*sides, *_halves(held)):
    a, b, c = slopes(after, q, k)
    dq[n], dk[m], dv[m] = dq[n] + a, dk[m] + b, dv[m] + c

  def add(t, held, dq, dk, dv):
    earlier = (me - t) % S < me
    first, second = _other_pairs(earlier, *sides, *_halves(held))
    a, b, c = slopes(True, *first)
    x, y, w = slopes(True, *second)
    where = lambda yes, value: jnp.where(yes, value, 0)
    return ([dq[0] + where(earlier, x), dq[1] + a + where(~earlier, x)],
            [dk[0] + b + where(earlier, y), dk[1] + where(~earlier, y)],
            [dv[0] + c + where(earlier, w), dv[1] + where(~earlier, w)])

  def turn(carry, t):
    held, dq, dk, dv = carry
    dq, dk, dv = add(t, held, dq, *_round((dk, dv)))  # they follow their keys
    return (_round(held), dq, dk, dv), None
  (held, dq, dk, dv), _ = jax.lax.scan(turn, (ahead, dq, dk, dv), jnp.arange(1, S - 1))
  dq, dk, dv = add(S - 1, held, dq, *_round((dk, dv)))
  dk, dv = _round((dk, dv))
  joined = lambda pair, like: jnp.concatenate(pair, 1).astype(like.dtype)
  return joined(dq, q_BLHK), joined(dk, k_BMGK), joined(dv, v_BMGK), None, None


_ring.defvjp(_forward, _backward)
