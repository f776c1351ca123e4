"""The decoder against itself run in other ways; against its peers: tests/test_families.py."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.kernels import on_mesh
from jaxlm.models import decoder, kinds, stack
from tests import common


def init(cfg):
  return jax.jit(lambda key: decoder.init_params(cfg, key))(jax.random.key(0))


def run(cfg, params, tokens_BL, segments_BL=None, positions_BL=None):
  B, L = tokens_BL.shape
  arrays = common.put({
      'tokens': tokens_BL, 'segments': np.ones((B, L), np.int32) if segments_BL is None else segments_BL,
      'positions': np.broadcast_to(np.arange(L, dtype=np.int32), (B, L)) if positions_BL is None else positions_BL})
  return np.asarray(jax.jit(lambda p, a: kinds.logits(cfg, p, a))(params, arrays))


def tokens(cfg, B=4, L=32, seed=0):
  return np.random.default_rng(seed).integers(0, cfg.V, (B, L), dtype=np.int32)


@pytest.mark.parametrize('kernel', sorted(on_mesh.ON_ALL))
@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_causal_by_gradient(one_device, family, kernel):
  """No logit depends on a later token's embedding, and each depends on its own and earlier ones."""
  cfg = common.model(family, attention=kernel)
  params = common.perturbed(init(cfg))
  L, at = 8, 5
  each_BL = np.arange(L, dtype=np.int32)[None]  # every token occurs once, so its embedding's gradient is its
  batch = common.put({'tokens': each_BL, 'positions': each_BL, 'segments': np.ones((1, L), np.int32)})

  def one_logit(params):
    return jnp.sum(jnp.where(jnp.arange(L)[None, :, None] == at, decoder.forward(cfg, params, batch).x_BLD, 0))
  g_VD = np.asarray(jax.jit(jax.grad(one_logit))(params)['embed'])
  assert (np.abs(g_VD[:at + 1]).max(1) > 0).all()
  assert (g_VD[at + 1:] == 0).all()


@pytest.mark.parametrize('kernel', sorted(on_mesh.ON_ALL))
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
  assert {a.dtype for a in jax.tree.leaves(kinds.abstract_params(low))} == {jnp.dtype('float32')}
  t_BL = tokens(cfg)
  exact, near = run(cfg, params, t_BL), run(low, params, t_BL)
  assert near.dtype == np.float32
  error = np.abs(near - exact).max() / np.abs(exact).max()
  assert 1e-4 < error < 5e-2
