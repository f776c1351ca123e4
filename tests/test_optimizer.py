"""Schedules by their closed forms, weight decay by its own, AdamW by torch's, Muon by its defining property and by hand."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxlm import optimizer
from jaxlm.schema import MoeConfig, OptimizerConfig
from jaxlm.models import decoder, kinds
from tests import common

T, W, LR = 100, 10, 2.


def curve(**changes):
  c = OptimizerConfig(**{'lr': LR, 'warmup': W, 'final': 0.1, 'decay': 0.25, **changes})
  schedule = optimizer.make_schedule(c, T)
  return np.array([schedule(jnp.int32(n)) for n in range(T)])


@pytest.mark.parametrize('name', sorted(optimizer.SCHEDULES))
def test_warmup_is_linear_and_never_zero(name):
  np.testing.assert_allclose(curve(schedule=name)[:W], LR * np.arange(1, W + 1) / W, rtol=1e-5)


def test_shapes_after_warmup():
  t = np.arange(W + 1, T + 1)
  progress = (t - W) / (T - W)
  expected = {
      'constant': np.full(len(t), LR), 'linear': LR * (1 - 0.9 * progress),
      'cosine': LR * (0.1 + 0.9 * (1 + np.cos(np.pi * progress)) / 2), 'inverse_sqrt': LR * np.sqrt(W / t),
      'wsd': LR * np.where(t <= 75, 1, 1 - 0.9 * (t - 75) / 25)}
  assert set(expected) == set(optimizer.SCHEDULES)
  for name, values in expected.items():
    np.testing.assert_allclose(curve(schedule=name)[W:], values, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_every_path_has_a_decay_decision(one_device, family):
  params = kinds.abstract_params(common.model(family, tied=False))
  mask = optimizer.decay_mask(OptimizerConfig())(params)
  flat = {optimizer.path_of(p): m for p, m in jax.tree_util.tree_leaves_with_path(mask)}
  assert len(flat) == len(jax.tree.leaves(params))
  for path, decays in flat.items():
    assert decays == (path.split('/')[-1] in ('w', 'embed', 'unembed', 'positions')), path


def test_no_decay_of_nothing_exempts_nothing(one_device):
  params = kinds.abstract_params(common.model('gpt2'))
  assert all(jax.tree.leaves(optimizer.decay_mask(OptimizerConfig(no_decay=''))(params)))
  assert not any(jax.tree.leaves(optimizer.decay_mask(OptimizerConfig(no_decay='.'))(params)))


def test_adamw_equals_torch(one_device):
  """Clip, moments, bias correction, decoupled decay and the schedule, over five steps."""
  rng = np.random.default_rng(0)
  start = {'w': rng.standard_normal((4, 5), np.float32), 'bias': rng.standard_normal(5).astype(np.float32)}
  grads = [{k: 3 * rng.standard_normal(v.shape).astype(np.float32) for k, v in start.items()} for _ in range(5)]
  c = OptimizerConfig(lr=0.1, schedule='linear', warmup=2, weight_decay=0.3, clip=1.)
  tx, schedule = optimizer.make_optimizer(c, 5)
  params, state = jax.tree.map(jnp.asarray, start), tx.init(start)
  peers = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()}
  adam = torch.optim.AdamW([{'params': [peers['w']], 'weight_decay': 0.3}, {'params': [peers['bias']], 'weight_decay': 0.}],
                           betas=(c.b1, c.b2), eps=c.eps)
  for n, g in enumerate(grads):
    updates, state = tx.update(jax.tree.map(jnp.asarray, g), state, params)
    params = jax.tree.map(jnp.add, params, updates)
    for k, p in peers.items():
      p.grad = torch.tensor(g[k])
    torch.nn.utils.clip_grad_norm_(list(peers.values()), 1.)
    for group in adam.param_groups:
      group['lr'] = float(schedule(jnp.int32(n)))
    adam.step()
  for k, p in peers.items():
    np.testing.assert_allclose(params[k], p.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_muon_orthogonalises_each_experts_matrices(one_device):
  cfg = common.model('llama', moe=MoeConfig(E=3, F=16))
  params = jax.jit(lambda key: decoder.init_params(cfg, key))(jax.random.key(0))
  tx, _ = optimizer.make_optimizer(OptimizerConfig(name='muon', lr=1., warmup=0, schedule='constant', weight_decay=0., clip=0.), 10)
  updates, _ = jax.jit(tx.update)(common.put_params(common.perturbed(params, seed=1), params), tx.init(params), params)
  for name, matrix in (('gate', (cfg.D, 16)), ('down', (16, cfg.D))):
    stacked = np.asarray(updates['layers']['moe'][name])
    assert stacked.shape == (cfg.N, 3, *matrix)
    singular = np.linalg.svd(stacked, compute_uv=False) / (0.2 * max(matrix) ** 0.5)
    assert 0.6 < singular.min() and singular.max() < 1.4, (name, singular)


def test_muon_orthogonalises_each_layers_matrices(one_device):
  """With no momentum yet, the update of a matrix is −lr · 0.2 √max(in, out) · U Vᵀ: its singular values are near equal."""
  cfg = common.model('llama')
  params = jax.jit(lambda key: decoder.init_params(cfg, key))(jax.random.key(0))
  c = OptimizerConfig(name='muon', lr=1., warmup=0, schedule='constant', weight_decay=0., clip=0.)
  tx, _ = optimizer.make_optimizer(c, 10)
  grads = common.perturbed(params, seed=1)
  updates, _ = jax.jit(tx.update)(common.put_params(grads, params), tx.init(params), params)
  for name, matrix in (('q', (cfg.D, cfg.H * cfg.K)), ('o', (cfg.H * cfg.K, cfg.D)), ('k', (cfg.D, cfg.G * cfg.K))):
    stacked = np.asarray(updates['layers']['attention'][name]['w']).reshape(cfg.N, *matrix)
    singular = np.linalg.svd(stacked, compute_uv=False) / (0.2 * max(matrix) ** 0.5)
    assert 0.6 < np.quantile(singular, 0.05) and singular.max() < 1.4, (name, singular)  # a tiny one may lag behind
  assert np.linalg.svd(np.asarray(grads['layers']['attention']['q']['w']).reshape(cfg.N, cfg.D, -1),
                       compute_uv=False).std() > 0.1  # the gradients were not so to begin with


@pytest.mark.parametrize('name', sorted(optimizer.OPTIMIZERS))
@pytest.mark.parametrize('changes', [{'tied': False}, {'moe': MoeConfig(E=3, F=16, shared=8), 'bias': 'qkv'}],
                         ids=['dense', 'mixture'])
def test_with_no_gradient_all_that_is_decayed_shrinks_by_lr_times_weight_decay(one_device, name, changes):
  cfg = common.model('llama', **changes)
  params = jax.jit(lambda key: decoder.init_params(cfg, key))(jax.random.key(0))
  params = common.put_params(common.perturbed(params), params)  # no bias is 0
  c = OptimizerConfig(name=name, lr=0.5, warmup=0, schedule='constant', weight_decay=0.2, no_decay='scale|bias|unembed')
  tx, _ = optimizer.make_optimizer(c, 10)
  updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  shrunk = {optimizer.path_of(p): u for p, u in jax.tree_util.tree_leaves_with_path(updates)}
  decayed = set()
  for path, p in jax.tree_util.tree_leaves_with_path(params):
    path = optimizer.path_of(path)
    if not path.startswith('unembed') and path.rpartition('/')[2] not in ('scale', 'bias'):
      decayed.add(path)
    np.testing.assert_allclose(shrunk[path], -0.1 * p if path in decayed else 0 * p, rtol=1e-6, atol=1e-9, err_msg=path)
  assert {'embed', 'layers/attention/q/w'} < decayed and ('moe' not in changes or 'layers/moe/router' in decayed)


@pytest.mark.parametrize('changes', [{}, {'nesterov': False}, {'momentum': 0.5}, {'ns_steps': 2}], ids=str)
def test_muon_by_hand(one_device, changes):
  """Three updates of one matrix, in numpy: the mean of gradients (with Nesterov, a step ahead), Newton-Schulz, the scale of its
  shape."""
  c = OptimizerConfig(name='muon', lr=0.1, warmup=0, schedule='constant', weight_decay=0.3, clip=0., **changes)
  rng = np.random.default_rng(0)
  w = rng.standard_normal((1, 6, 4)).astype(np.float32)
  grads = [rng.standard_normal(w.shape).astype(np.float32) for _ in range(3)]
  tx, _ = optimizer.make_optimizer(c, 3)
  params = {'layers': {'mlp': {'up': {'w': jnp.asarray(w)}}}}
  state, mean, by_hand = tx.init(params), np.zeros((6, 4)), w[0].astype(np.float64)
  for n, g in enumerate(grads, 1):
    updates, state = jax.jit(tx.update)(jax.tree.map(lambda _, g=g: jnp.asarray(g), params), state, params)
    params = jax.tree.map(jnp.add, params, updates)
    mean = c.momentum * mean + (1 - c.momentum) * g[0]
    ahead = c.momentum * mean / (1 - c.momentum ** (n + 1)) + (1 - c.momentum) * g[0] / (1 - c.momentum ** n)
    x = ahead if c.nesterov else mean
    x = x / np.linalg.norm(x)
    for _ in range(c.ns_steps):  # Jordan 2024
      xx = x @ x.T
      x = 3.4445 * x + (-4.775 * xx + 2.0315 * xx @ xx) @ x
    by_hand = by_hand - 0.1 * (0.2 * 6 ** 0.5 * x + 0.3 * by_hand)
    np.testing.assert_allclose(params['layers']['mlp']['up']['w'][0], by_hand, atol=2e-5)


def test_muon_updates_what_is_no_matrix_of_a_layer_as_adamw_does(one_device):
  """Two updates: with the first alone, Nadam would be AdamW times a constant."""
  rng = np.random.default_rng(0)
  start = {'embed': rng.standard_normal((5, 4), np.float32), 'final_norm': {'scale': rng.standard_normal(4).astype(np.float32)}}
  ends = []
  for name in ('adamw', 'muon'):
    tx, _ = optimizer.make_optimizer(OptimizerConfig(name=name, lr=0.1, warmup=0, weight_decay=0.3), 2)
    params = jax.tree.map(jnp.asarray, start)
    state = tx.init(params)
    for n in range(2):
      grads = jax.tree.map(lambda a, n=n: jnp.asarray(np.cos(a + n)), start)
      updates, state = jax.jit(tx.update)(grads, state, params)
      params = jax.tree.map(jnp.add, params, updates)
    ends.append(params)
  common.assert_trees_close(*ends, rtol=1e-6)
