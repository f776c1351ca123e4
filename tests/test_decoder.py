"""The decoder against itself run in other ways; against its peers: tests/test_families.py."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import layout
from jaxlm.models import decoder, kernels, stack
from jaxlm.objectives import causal_lm
from tests import common


def init(cfg):
  return jax.jit(lambda key: decoder.init_params(cfg, key))(jax.random.key(0))


def run(cfg, params, tokens_BL, segments_BL=None, positions_BL=None):
  B, L = tokens_BL.shape
  arrays = common.put({
      't': tokens_BL, 's': np.ones((B, L), np.int32) if segments_BL is None else segments_BL,
      'p': np.broadcast_to(np.arange(L, dtype=np.int32), (B, L)) if positions_BL is None else positions_BL})
  return np.asarray(jax.jit(lambda p, a: decoder.logits(cfg, p, a['t'], a['p'], a['s']))(params, arrays))


def tokens(cfg, B=4, L=32, seed=0):
  return np.random.default_rng(seed).integers(0, cfg.V, (B, L), dtype=np.int32)


@pytest.mark.parametrize('kernel', sorted(kernels.ATTENTION))
@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_causal_by_gradient(one_device, family, kernel):
  """No logit depends on a later token's embedding, and each depends on its own and earlier ones."""
  cfg = common.model(family, attention=kernel)
  params = common.perturbed(init(cfg))
  L, at = 8, 5
  t_BL = common.put(np.arange(L, dtype=np.int32)[None])  # every token occurs once, so its embedding's gradient is its
  p_BL, s_BL = common.put(np.arange(L, dtype=np.int32)[None]), common.put(np.ones((1, L), np.int32))

  def one_logit(params):
    hidden, _, _ = decoder.forward(cfg, params, t_BL, p_BL, s_BL)
    return jnp.sum(jnp.where(jnp.arange(L)[None, :, None] == at, hidden, 0))
  g_VD = np.asarray(jax.jit(jax.grad(one_logit))(params)['embed'])
  assert (np.abs(g_VD[:at + 1]).max(1) > 0).all()
  assert (g_VD[at + 1:] == 0).all()


@pytest.mark.parametrize('kernel', sorted(kernels.ATTENTION))
@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_packed_equals_unpacked(one_device, family, kernel):
  """Three documents in one row give the logits they give alone."""
  cfg = common.model(family, attention=kernel)
  params = common.perturbed(init(cfg))
  t_BL = tokens(cfg, B=1, L=32)
  cuts = [0, 9, 20, 32]
  segments = np.concatenate([np.full(b - a, i + 1, np.int32) for i, (a, b) in enumerate(zip(cuts, cuts[1:]))])[None]
  positions = np.concatenate([np.arange(b - a, dtype=np.int32) for a, b in zip(cuts, cuts[1:])])[None]
  packed = run(cfg, params, t_BL, segments, positions)
  for a, b in zip(cuts, cuts[1:]):
    np.testing.assert_allclose(packed[:, a:b], run(cfg, params, t_BL[:, a:b]), atol=2e-5)


def gradient(cfg, params, c):
  c = dataclasses.replace(c, model=cfg)
  b = common.put(common.batch(c))
  return jax.value_and_grad(lambda p: causal_lm(c, p, b)[0]), params


@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_remat_and_unrolling_change_the_program_and_not_the_result(one_device, family):
  c = common.config(family)
  params = common.perturbed(init(c.model))
  jaxprs, results = {}, {}
  for remat in stack.REMAT:
    for scan in (True, False):
      f, p = gradient(common.model(family, remat=remat, scan=scan), params, c)
      jaxprs[remat, scan] = str(jax.make_jaxpr(f)(p))
      results[remat, scan] = jax.jit(f)(p)
  assert len(set(jaxprs.values())) == len(jaxprs)
  count = lambda key: jaxprs[key].count('dot_general')
  assert count(('full', True)) > count(('none', True))  # the backward pass does redo the forward's matmuls
  for result in results.values():
    common.assert_trees_close(result, results['none', True], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize('how', [kernels.How(0.3), kernels.How(0.3, window=5), kernels.How(0.3, cap=1.5),
                                 kernels.How(0.3, window=1, cap=2.)], ids=str)
@pytest.mark.parametrize('value_dim', [8, 6])
def test_attention_kernels_agree_forward_and_backward(how, value_dim):
  rng = np.random.default_rng(0)
  B, L, H, G, K = 2, 16, 8, 4, 8
  q, k, v = (jnp.asarray(rng.standard_normal((B, L, n, d), np.float32)) for n, d in ((H, K), (G, K), (G, value_dim)))
  segments = jnp.asarray(np.sort(rng.integers(0, 3, (B, L)), 1).astype(np.int32))

  def slow(q, k, v):
    """A loop over what each query sees."""
    out = np.zeros((B, L, H, value_dim))
    for b, l, h in np.ndindex(B, L, H):
      seen = [m for m in range(l + 1) if segments[b, m] == segments[b, l] and not (how.window and l - m >= how.window)]
      s = np.array([q[b, l, h] @ k[b, m, h // 2] for m in seen]) * how.scale
      s = how.cap * np.tanh(s / how.cap) if how.cap else s
      p = np.exp(s - s.max())
      out[b, l, h] = (p / p.sum()) @ np.array([v[b, m, h // 2] for m in seen])
    return out

  def all_of(name):
    f = lambda q, k, v: jnp.sum(jnp.sin(kernels.ATTENTION[name](how, q, k, v, segments)))
    return jax.jit(lambda *a: (kernels.ATTENTION[name](how, *a, segments), jax.grad(f, (0, 1, 2))(*a)))(q, k, v)
  expected = all_of('plain')
  np.testing.assert_allclose(expected[0], slow(*map(np.asarray, (q, k, v))), atol=1e-5)
  for name in kernels.ATTENTION:
    common.assert_trees_close(all_of(name), expected, atol=1e-5)


@pytest.mark.parametrize('kinds, stages', [
    ('aaaa', [('a', 4)]), ('ababab', [('ab', 3)]), ('aabaabaa', [('aab', 2), ('a', 2)]), ('abbbb', [('a', 1), ('b', 4)]),
    ('aaabbbb', [('a', 3), ('b', 4)]), ('abcd', [('a', 1), ('b', 1), ('c', 1), ('d', 1)])])
def test_stages_are_the_fewest_blocks(kinds, stages):
  found = stack.stages(tuple((k, 'mlp') for k in kinds))
  assert [(''.join(k for k, _ in s.period), s.repeats) for s in found] == stages or (
      sum(len(s.period) for s in found) == sum(len(p) for p, _ in stages) and len(found) <= len(stages))
  assert ''.join(''.join(k for k, _ in s.period) * s.repeats for s in found) == kinds


def test_bfloat16_compute_keeps_float32_weights_and_is_near(one_device):
  cfg = common.model('llama')
  params = common.perturbed(init(cfg))
  low = common.model('llama', dtype='bfloat16')
  assert {a.dtype for a in jax.tree.leaves(decoder.abstract_params(low))} == {jnp.dtype('float32')}
  t_BL = tokens(cfg)
  exact, near = run(cfg, params, t_BL), run(low, params, t_BL)
  assert near.dtype == np.float32
  error = np.abs(near - exact).max() / np.abs(exact).max()
  assert 1e-4 < error < 5e-2
