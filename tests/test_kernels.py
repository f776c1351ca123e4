"""Attention kernels against a loop over what each query sees, forward and backward."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UsageError
from jaxlm.kernels import cudnn, grouped, on_mesh, splash
from jaxlm.kernels.patterns import How, Rows
from jaxlm.schema import ModelConfig
from tests import common

B, L, H, G, K = 2, 16, 8, 4, 8
DENSE = sorted(on_mesh.ON_ALL)
HOWS = [How(0.3), How(0.3, 'local', window=5), How(0.3, cap=1.5), How(0.3, 'local', window=1, cap=2.), How(0.3, causal=False),
        How(0.3, 'local', window=4, causal=False), How(0.3, 'stride', window=3), How(0.3, 'local+stride', window=4),
        How(0.3, 'block+summary', window=4, first=1), How(0.3, 'block+summary', window=4, first=2, causal=False),
        How(0.3, 'local+first', window=3, first=2), How(0.3, 'local+first', window=3, first=2, causal=False)]


def sees(how, i, j):
  """Child et al. 2019, §4.3, and Beltagy et al. 2020, §3.1, for one query and key."""
  if how.causal and j > i:
    return False
  w, c = how.window, how.first
  return any({'global': True, 'local': abs(i - j) < w, 'stride': w and (i - j) % w == 0, 'block': w and i // w == j // w,
              'summary': w and w - c <= j % w, 'first': j < c or i < c}[word] for word in how.where.split('+'))


def arrays(M=None, value_dim=K, seed=0, L=L):
  M = M or L
  rng = np.random.default_rng(seed)
  q, k, v = (jnp.asarray(rng.standard_normal(s, np.float32)) for s in ((B, L, H, K), (B, M, G, K), (B, M, G, value_dim)))

  def rows(size):
    segments = np.sort(rng.integers(0, 3, (B, size)), 1).astype(np.int32)
    segments[:, :3] = np.arange(3)  # all are there
    segments.sort(1)
    first = np.argmax(segments[:, :, None] == segments[:, None], 2)
    return Rows(jnp.asarray(segments), jnp.asarray((np.arange(size)[None] - first).astype(np.int32)))
  return q, k, v, rows(L), rows(M), jnp.asarray(rng.standard_normal((H, L, M), np.float32))


def slow(how, q, k, v, q_rows, k_rows, bias):
  out = np.zeros((*q.shape[:3], v.shape[-1]))
  for b, l, h in np.ndindex(B, L, H):
    seen = [m for m in range(k.shape[1]) if q_rows.segments_BL[b, l] == k_rows.segments_BL[b, m]
            and sees(how, int(q_rows.positions_BL[b, l]), int(k_rows.positions_BL[b, m]))]
    s = np.array([q[b, l, h] @ k[b, m, h // 2] for m in seen]) * how.scale + (bias[h, l, seen] if bias is not None else 0)
    s = how.cap * np.tanh(s / how.cap) if how.cap else s
    p = np.exp(s - s.max())
    out[b, l, h] = (p / p.sum()) @ np.array([v[b, m, h // 2] for m in seen])
  return out


def both(name, how, q, k, v, *rest):
  f = lambda q, k, v, bias: jnp.sum(jnp.sin(on_mesh.ATTENTION[name](how, q, k, v, *rest[:2], bias)))
  return jax.jit(lambda *a: (on_mesh.ATTENTION[name](how, *a[:3], *rest[:2], a[3]), jax.grad(f, (0, 1, 2))(*a)))(q, k, v, rest[2])


@pytest.mark.parametrize('how', HOWS, ids=str)
@pytest.mark.parametrize('value_dim, biased', [(8, False), (6, True)])
def test_all_agree_with_a_loop_and_with_each_other(how, value_dim, biased):
  q, k, v, rows, _, bias = arrays(value_dim=value_dim)
  bias = bias if biased else None
  expected = both('plain', how, q, k, v, rows, rows, bias)
  np.testing.assert_allclose(expected[0], slow(how, *map(np.asarray, (q, k, v)), rows, rows, None if bias is None else np.asarray(bias)), atol=1e-5)
  for name in DENSE:
    common.assert_trees_close(both(name, how, q, k, v, rows, rows, bias), expected, atol=1e-5)


def test_memory_of_another_length_and_what_has_none(one_device):
  """Across to another text, by segment; a segment that the memory lacks gets zeros, not the mean of what is not its own."""
  q, k, v, q_rows, k_rows, _ = arrays(M=24)
  how = How(0.3, causal=False)
  expected = slow(how, *map(np.asarray, (q, k, v)), q_rows, k_rows, None)
  lacking = k_rows._replace(segments_BL=jnp.where(k_rows.segments_BL == 1, 7, k_rows.segments_BL))
  for name in DENSE:
    put = lambda tree: jax.tree.map(jax.device_put, tree)
    np.testing.assert_allclose(on_mesh.attend(ModelConfig(attention=name), how, *put((q, k, v, q_rows, k_rows))), expected, atol=1e-5)
    out = np.asarray(on_mesh.attend(ModelConfig(attention=name), how, *put((q, k, v, q_rows, lacking))))
    mine = np.asarray(q_rows.segments_BL) == 1
    assert mine.any() and (out[mine] == 0).all()
    np.testing.assert_allclose(out[~mine], expected[~mine], atol=1e-5)


BY_DISTANCE = [How(0.3), How(0.3, 'local', window=70), How(0.3, cap=1.5), How(0.3, causal=False),
               How(0.3, 'local+stride', window=100, cap=2.), How(0.3, 'local', window=40, causal=False)]


@pytest.mark.parametrize('how', BY_DISTANCE, ids=str)
def test_splash_agrees_with_plain_forward_and_backward(how, monkeypatch):
  """Interpreted, on rows of several documents and blocks; head dims that are no multiples of 128; keys of another length
  where no place is later than another."""
  monkeypatch.setattr(splash, 'BLOCK', 128)
  anywhere = not how.causal and how.where == 'global'
  q, k, v, rows, k_rows, _ = arrays(L=256, M=384 if anywhere else 256, value_dim=6)
  k_rows = k_rows if anywhere else rows
  found, expected = (both(name, how, q, k, v, rows, k_rows, None) for name in ('splash', 'plain'))
  common.assert_trees_close(found, expected, atol=2e-5)


def test_splash_is_chosen_on_tpu_where_it_can_and_refused_by_name_where_not():
  assert splash.refusal(How(1.), 256, 256) == ''
  for how, lengths, word in ((How(1., 'block', window=4), (256, 256), 'block'), (How(1.), (100, 256), '100')):
    with pytest.raises(UsageError, match=f'model.attention=splash.*{word}'):
      on_mesh.chosen('splash', 'tpu', {'splash': splash.refusal(how, *lengths)})
    assert on_mesh.chosen('auto', 'tpu', {'splash': splash.refusal(how, *lengths)}) == 'dot_product'
  assert on_mesh.chosen('auto', 'tpu', {'splash': ''}) == 'splash'


@pytest.mark.parametrize('how', [how for how in HOWS if not how.cap], ids=str)
def test_what_cudnn_is_asked_for_is_what_plain_makes(how, monkeypatch):
  """With jax.nn's own operations in place of its kernel, which only GPUs have: masks, windows and causality."""
  asked = []

  def by_xla(*args, implementation, **kwargs):
    asked.append(implementation)
    return dot_product_attention(*args, **kwargs)
  dot_product_attention = jax.nn.dot_product_attention
  monkeypatch.setattr(jax.nn, 'dot_product_attention', by_xla)
  q, k, v, rows, k_rows, _ = arrays()
  found, expected = (both(name, how, q, k, v, rows, rows, None) for name in ('cudnn', 'plain'))
  common.assert_trees_close(found, expected, atol=2e-5)
  assert set(asked) == {'cudnn'}


def test_cudnn_is_chosen_on_gpu_where_it_can_and_refused_by_name_where_not():
  half = lambda *shape: jnp.zeros(shape, jnp.bfloat16)
  q, k = half(1, 8, 4, 64), half(1, 8, 2, 64)
  assert cudnn.refusal(How(1.), q, k, k) == '' and on_mesh.chosen('auto', 'gpu', {'cudnn': ''}) == 'cudnn'
  for how, q, v, word in ((How(1., cap=2.), q, k, 'caps'), (How(1.), q, half(1, 8, 2, 32), '64 and 32'),
                          (How(1.), q.astype(jnp.float32), k, 'float32')):
    with pytest.raises(UsageError, match=f'model.attention=cudnn.*{word}'):
      on_mesh.chosen('cudnn', 'gpu', {'cudnn': cudnn.refusal(how, q, k, v)})
    assert on_mesh.chosen('auto', 'gpu', {'cudnn': cudnn.refusal(how, q, k, v)}) == 'dot_product'
  with jax.set_mesh(common.mesh_of(1, 1, 1, 1, 1, 2)):  # JAX's rule to map it fails
    assert 'mesh.stage' in cudnn.refusal(How(1.), k, k, k)


@pytest.mark.parametrize('dtype, T, D, F, sizes', [
    ('float32', 256, 128, 256, [40, 0, 130, 60]), ('float32', 512, 384, 1408, [0, 512, 0, 0]), ('bfloat16', 384, 256, 128, [1, 2, 3, 4]),
    ('float32', 128, 96, 200, [3, 60, 1, 64])])
def test_rows_of_groups_are_multiplied_as_by_a_loop_over_groups(dtype, T, D, F, sizes):
  """Rows of no group are NaN, and touch nothing."""
  rng = np.random.default_rng(0)
  array = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  rows_TD, w_EDF, g_TF, sizes_E = array(T, D), array(4, D, F), array(T, F), jnp.array(sizes)
  real = jnp.arange(T)[:, None] < sum(sizes)
  rows_TD, g_TF = (jnp.where(real, a, jnp.nan) for a in (rows_TD, g_TF))
  group_T = np.repeat(np.arange(4), sizes)
  rows, w, g = (np.asarray(a, np.float64) for a in (rows_TD, w_EDF, g_TF))
  end = np.cumsum(sizes)
  runs = [slice(e - n, e) for e, n in zip(end, sizes)]
  close = lambda mine, right: np.testing.assert_allclose(
      np.asarray(mine, np.float64)[:len(right)], right, rtol=2e-2 if dtype == 'bfloat16' else 1e-4, atol=1e-4 if dtype == 'float32' else .2)
  close(grouped.by_megablox(rows_TD, w_EDF, sizes_E, interpret=True), np.stack([rows[t] @ w[e] for t, e in enumerate(group_T)]))
  close(grouped.by_megablox(g_TF, w_EDF, sizes_E, transposed=True, interpret=True), np.stack([g[t] @ w[e].T for t, e in enumerate(group_T)]))
  close(grouped.outer_by_megablox(rows_TD, g_TF, sizes_E, interpret=True), np.stack([rows[r].T @ g[r] for r in runs]))
