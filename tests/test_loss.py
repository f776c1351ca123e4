"""Chunked cross entropy against the plain one, and what it must never hold."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxlm import layout, loss
from jaxlm.schema import LossConfig, ModelConfig
from tests import common

B, L, D, V = 8, 16, 8, 24


def cross_entropy(chunks, scan=True, z_loss=0., over='length', smoothing=0., **model):
  f = functools.partial(loss.cross_entropy, ModelConfig(V=V, scan=scan, **model), LossConfig(chunks, z_loss, smoothing, over))
  return lambda x, w, targets, weights: f(x, {'w': w}, targets, weights)


def arrays():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((B, L, D), np.float32)
  w = rng.standard_normal((V, D), np.float32)
  targets = rng.integers(0, V, (B, L), dtype=np.int32)
  weights = rng.integers(0, 2, (B, L)).astype(np.float32) * rng.random((B, L), np.float32)
  put = lambda a, dims, kind='act': jax.device_put(a, layout.spec(dims, kind))
  return put(x, 'BLD'), put(w, 'VD', 'weight'), put(targets, 'BL'), put(weights, 'BL')


def plain(z, x, w, targets, weights):
  logits = x.astype(np.float64) @ w.astype(np.float64).T
  log_z = np.log(np.exp(logits).sum(-1))
  nll = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
  return ((nll + z * log_z ** 2) * weights).sum(), (nll * weights).sum()


def plain_jax(z, x, w, targets, weights):
  logits = jnp.einsum('BLD,VD->BLV', x, w)
  log_z = jax.nn.logsumexp(logits, -1)
  nll = log_z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
  return jnp.sum((nll + z * log_z ** 2) * weights)


@pytest.mark.parametrize('mesh_sizes', [(1, 1, 1), (1, 4, 2), (2, 2, 2)])
@pytest.mark.parametrize('chunks, unroll, over', [(1, False, 'length'), (4, False, 'length'), (4, True, 'length'), (16, False, 'length'),
                                                  (1, False, 'vocabulary'), (3, False, 'vocabulary'), (12, True, 'vocabulary')])
def test_value_and_gradient_equal_the_plain_loss(mesh_sizes, chunks, unroll, over):
  with jax.set_mesh(common.mesh_of(*mesh_sizes)):
    args = arrays()
    f = jax.jit(cross_entropy(chunks, not unroll, 1e-2, over))
    host = [np.asarray(a) for a in jax.device_get(args)]
    np.testing.assert_allclose(f(*args), plain(1e-2, *host), rtol=2e-6)
    got = jax.jit(jax.grad(lambda x, w: 3 * f(x, w, *args[2:])[0], (0, 1)))(*args[:2])
    assert jax.typeof(got[1]).sharding.spec == jax.typeof(args[1]).sharding.spec
    got = jax.device_get(got)
  expected = jax.grad(lambda x, w: 3 * plain_jax(1e-2, x, w, *host[2:]), (0, 1))(*host[:2])
  common.assert_trees_close(got, expected, rtol=2e-4, atol=2e-5)


def shapes(jaxpr):
  """Of every array anywhere in a jaxpr."""
  for eqn in jaxpr.eqns:
    for v in [*eqn.invars, *eqn.outvars]:
      yield getattr(v.aval, 'shape', ())
    for sub in _inner(eqn.params):
      yield from shapes(sub)


def _inner(params):
  for value in params.values():
    for item in value if isinstance(value, (list, tuple)) else [value]:
      if hasattr(item, 'jaxpr'):
        yield item.jaxpr
      elif hasattr(item, 'eqns'):
        yield item


def test_all_logits_never_exist_at_once(one_device):
  """Forward and backward hold at most a chunk of [B, L, V]; with one chunk the same search does find it whole."""
  args = arrays()
  for chunks, whole in ((4, False), (1, True)):
    f = jax.grad(lambda x, w: cross_entropy(chunks)(x, w, *args[2:])[0], (0, 1))
    sizes = [int(np.prod(s)) for s in shapes(jax.make_jaxpr(f)(*args[:2]).jaxpr)]
    assert (max(sizes) >= B * L * V) == whole


def test_per_token_nll_sums_to_the_loss(one_device):
  x, w, targets, weights = arrays()
  nll_BL = jax.jit(functools.partial(loss.per_token_nll, ModelConfig(V=V), LossConfig(4)))(x, {'w': w}, targets)
  np.testing.assert_allclose(jnp.sum(nll_BL * weights), cross_entropy(4)(x, w, targets, weights)[1],
                             rtol=1e-6)


def test_gradient_of_the_matrix_is_float32_under_bfloat16_compute(one_device):
  """Only the operands are rounded to bfloat16: the sum over tokens and over pieces is not."""
  x, w, targets, weights = arrays()
  x = x.astype(jnp.bfloat16)
  got = jax.jit(jax.grad(lambda x, w: cross_entropy(4)(x, w, targets, weights)[0], 1))(x, w)
  rounded = lambda a: np.asarray(jax.device_get(a).astype(jnp.bfloat16), np.float32)
  logits = rounded(x) @ rounded(w).T
  g = jax.nn.softmax(logits) - jax.nn.one_hot(jax.device_get(targets), V)
  g = rounded(g * jax.device_get(weights)[..., None])
  np.testing.assert_allclose(got, np.einsum('BLV,BLD->VD', g, rounded(x)), rtol=1e-5, atol=1e-2 / B / L)


def test_capped_logits_and_padded_rows(one_device):
  """A cap is part of the loss; rows from `vocab` on take no probability and get no gradient."""
  x, w, targets, weights = arrays()
  targets = targets % 20
  f = jax.jit(lambda x, w: cross_entropy(4, logit_cap=1.5, vocab=20)(x, w, targets, weights)[0])

  def plain_capped(x, w):
    logits = 1.5 * jnp.tanh(x @ w[:20].T / 1.5)
    nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, jax.device_get(targets)[..., None], -1)[..., 0]
    return jnp.sum(nll * jax.device_get(weights))
  host = jax.device_get((x, w))
  np.testing.assert_allclose(f(x, w), plain_capped(*host), rtol=1e-5)
  got = jax.device_get(jax.jit(jax.grad(f, (0, 1)))(x, w))
  common.assert_trees_close(got, jax.grad(plain_capped, (0, 1))(*host), rtol=2e-4, atol=2e-5)
  assert not got[1][20:].any()


@pytest.mark.parametrize('mesh_sizes', [(1, 1, 1), (2, 2, 2)])
def test_bias_scale_and_smoothing_equal_torch(mesh_sizes):
  """torch's cross entropy has the same label smoothing; rows that pad the vocabulary take no part in it."""
  with jax.set_mesh(common.mesh_of(*mesh_sizes)):
    x, w, targets, weights = arrays()
    targets, bias = targets % 20, jax.device_put(np.linspace(-1, 1, V, dtype=np.float32), layout.spec('V', 'weight'))
    f = lambda x, w, bias: loss.cross_entropy(ModelConfig(V=V, vocab=20, logit_scale=0.5), LossConfig(4, smoothing=0.1), x,
                                              {'w': w, 'bias': bias}, targets, weights)[0]
    value, got = jax.jit(jax.value_and_grad(f, (0, 1, 2)))(x, w, bias)
    leaves = [torch.tensor(np.asarray(jax.device_get(a)), requires_grad=True) for a in (x, w, bias)]
    host = [torch.tensor(np.asarray(jax.device_get(a))) for a in (targets, weights)]
  logits = 0.5 * (leaves[0] @ leaves[1].T + leaves[2])[..., :20]
  expected = (torch.nn.functional.cross_entropy(logits.flatten(0, 1), host[0].long().flatten(), reduction='none', label_smoothing=0.1)
              * host[1].flatten()).sum()
  expected.backward()
  np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
  common.assert_trees_close(list(got), [a.grad.numpy() for a in leaves], rtol=2e-4, atol=2e-5)
