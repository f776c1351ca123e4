"""Mixtures of experts against a loop over experts."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import layout
from jaxlm.models import exchange, moe
from jaxlm.schema import MeshConfig, ModelConfig, MoeConfig
from jaxlm.step import even_out
from tests import common

CFG = ModelConfig(D=8, moe=MoeConfig(E=4, F=16, top_k=2))


def arrays(cfg, B=4, L=6, seed=0):
  rng = np.random.default_rng(seed)
  E, F, S = cfg.moe.E, cfg.moe.F, cfg.moe.top_k
  draw = lambda *shape: 0.5 * rng.standard_normal(shape, np.float32)
  experts = np.stack([rng.permutation(E)[:S] for _ in range(B * L)]).reshape(B, L, S).astype(np.int32)
  return draw(B, L, cfg.D), rng.random((B, L, S), np.float32), experts, draw(E, cfg.D, F), draw(E, cfg.D, F), draw(E, F, cfg.D)


def loop(cfg, x, weights, experts, gate, up, down):
  """Each token through each of its experts, one at a time."""
  y = jnp.zeros_like(x)
  for e in range(cfg.moe.E):
    out = (jax.nn.silu(x @ gate[e]) * (x @ up[e])) @ down[e]
    y += out * jnp.sum(jnp.where(experts == e, weights, 0), -1, keepdims=True)
  return y


@pytest.mark.parametrize('sizes', [(1, 1, 1), (1, 2, 2), (2, 2, 1)])
@pytest.mark.parametrize('dispatch', sorted(moe.DISPATCH))
def test_dispatch_equals_a_loop_over_experts(dispatch, sizes):
  """Values and gradients; with capacity for every choice, none is dropped."""
  cfg = dataclasses.replace(CFG, moe=dataclasses.replace(CFG.moe, dispatch=dispatch, capacity=4.))
  host = arrays(cfg)
  with jax.set_mesh(common.mesh_of(*sizes)):
    dims = ('BLD', 'BLS', 'BLS')
    on = [jax.device_put(a, layout.spec(d)) for a, d in zip(host, dims)] + [
        jax.device_put(a, layout.spec(d, 'weight')) for a, d in zip(host[3:], ('EDF', 'EDF', 'EFD'))]

    def f(x, weights, gate, up, down):
      return moe.DISPATCH[dispatch](cfg, x, weights, on[2], gate, up, down)[0]
    free = [a for i, a in enumerate(on) if i != 2]
    got = jax.device_get((jax.jit(f)(*free), jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), tuple(range(5))))(*free)))
  g = lambda x, weights, gate, up, down: loop(cfg, x, weights, host[2], gate, up, down)
  free = [a for i, a in enumerate(host) if i != 2]
  expected = (g(*free), jax.grad(lambda *a: jnp.sum(jnp.sin(g(*a))), tuple(range(5)))(*free))
  common.assert_trees_close(got, expected, rtol=1e-4, atol=1e-4)


def test_capacity_drops_the_latest_of_the_last_choices(one_device):
  """Six tokens choose expert 0 first and 1 second; with room for three a row, the first three of each are served."""
  cfg = dataclasses.replace(CFG, moe=dataclasses.replace(CFG.moe, dispatch='capacity', capacity=1.))
  x, weights, experts, *mats = arrays(cfg, B=1)
  experts[:] = [0, 1]
  got, dropped = jax.jit(lambda *a: moe.capacity(cfg, *a))(x, weights, experts, *mats)
  served = loop(cfg, x, weights, experts, *mats)
  np.testing.assert_allclose(got[:, :3], served[:, :3], rtol=1e-4, atol=1e-4)
  assert not np.asarray(got[:, 3:]).any() and dropped == 2 * 3


def test_choices_come_from_the_best_groups_and_the_bias_only_chooses():
  m = MoeConfig(E=6, F=1, top_k=2, groups=3, top_groups=1, bias=True, score='sigmoid', scale=2.)
  scores = np.array([[[.9, .1, .5, .6, .8, .0]]], np.float32)  # groups: .9 + .1, .5 + .6, .8 + .0
  weights, experts = moe.choose(m, scores, np.zeros(6, np.float32))
  assert sorted(experts[0, 0].tolist()) == [2, 3]
  np.testing.assert_allclose(sorted(weights[0, 0]), [2 * .5 / 1.1, 2 * .6 / 1.1], rtol=1e-6)
  weights, experts = moe.choose(m, scores, np.array([0, 0, 0, 0, 0, 9], np.float32))
  assert sorted(experts[0, 0].tolist()) == [4, 5]
  np.testing.assert_allclose(weights.sum(), 2., rtol=1e-6)


@pytest.mark.parametrize('skewed', [False, True])
def test_what_finds_no_room_is_counted_and_passes_by(skewed, monkeypatch):
  """Over four devices with an expert each, room for the mean: 12 rows. Where all of the 6 tokens of each device choose experts 0 and 1,
  the first two devices' rows fill both; where choices are even, nothing is dropped."""
  monkeypatch.setattr(exchange, 'TILE', 1)
  cfg = dataclasses.replace(CFG, moe=dataclasses.replace(CFG.moe, room=1.))
  x, weights, experts, *mats = arrays(cfg)
  experts[:] = [0, 1]
  if not skewed:
    experts[:, 1::2] = [2, 3]
  mesh = layout.make_mesh(MeshConfig(fsdp=1, expert=4), jax.devices()[:4])
  with jax.set_mesh(mesh):
    on = [jax.device_put(a, layout.spec(d)) for a, d in zip((x, weights, experts), ('BLD', 'BLS', 'BLS'))] + [
        jax.device_put(a, layout.spec(d, 'weight')) for a, d in zip(mats, ('EDF', 'EDF', 'EFD'))]
    f = lambda x, *mats: moe.dropless(cfg, x, *on[1:3], *mats)
    got, dropped = jax.jit(f)(on[0], *on[3:])
    slopes = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a)[0])), (0, 1, 2, 3)))(on[0], *on[3:])
  served = np.float32([1, 1, 0, 0] if skewed else [1, 1, 1, 1])[:, None, None]
  g = lambda x, *mats: loop(cfg, x, weights, experts, *mats) * served
  assert dropped == (24 if skewed else 0)
  np.testing.assert_allclose(got, g(x, *mats), rtol=1e-4, atol=1e-4)
  common.assert_trees_close(slopes, jax.grad(lambda *a: jnp.sum(jnp.sin(g(*a))), (0, 1, 2, 3))(x, *mats), rtol=1e-4, atol=1e-4)


def test_router_report_by_hand(one_device):
  """Two real tokens of three; E = 2, top 1."""
  m = MoeConfig(E=2, F=1, top_k=1)
  logits = np.log(np.array([[[.75, .25], [.5, .5], [.1, .9]]], np.float32))
  real = np.array([[True, True, False]])
  report = moe._report(m, logits, np.exp(logits), np.array([[[0], [1], [1]]]), real)
  np.testing.assert_allclose(report['load_E'], [1, 1])
  np.testing.assert_allclose(report['balance'], 2 * (.5 * .625 + .5 * .375), rtol=1e-6)
  np.testing.assert_allclose(report['z'], 0, atol=1e-6)


def test_bias_moves_towards_even_loads():
  m = MoeConfig(E=3, F=1, bias=True, bias_rate=.01)
  params = {'layers': {'moe': {'bias': jnp.zeros((1, 3)), 'gate': jnp.ones(1)}}, 'embed': jnp.ones(1)}
  moved = even_out(m, params, {'load': jnp.array([[9., 3., 0.]])})['layers']['moe']['bias']
  np.testing.assert_allclose(moved, [[-.01, .01, .01]])
