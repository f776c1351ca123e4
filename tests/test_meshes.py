"""Sharding runs on eight CPU devices: every mesh gives the same losses and gradients, with one compile."""
import functools

import jax
import numpy as np
import pytest

from jaxlm import layout
from jaxlm.optimizer import make_optimizer
from jaxlm.step import abstract_state, init_state, make_step
from tests import common

CASES = {
    'llama': {},
    'gpt2-dropout': {'model.dropout': 0.1},
    'llama-muon-remat-untied-zloss': {
        'optimizer.name': 'muon', 'model.remat': 'full', 'model.tied': False, 'loss.z_loss': 1e-4},
    'bert': {'model.dropout': 0.1}, 'transformer': {'loss.smoothing': 0.1}, 't5': {'optimizer.lr': 1e-3},
    'lstm': {}, 'bahdanau': {'model.rnn.teacher': 0.5, 'model.dropout': 0.1}, 'gru-remat': {'model.remat': 'full'},
    'llama-mixture-local-capped': {
        'model.pattern': 'local global', 'model.window': 9, 'model.qk_norm': 'all', 'model.norm_place': 'both',
        'model.logit_cap': 5., 'model.attention_cap': 5., 'model.moe.E': 4, 'model.moe.F': 32,
        'model.moe.first': 1, 'model.moe.shared': 16, 'model.moe.balance_loss': 0.1, 'model.moe.z_loss': 0.01},
}


def three_steps(c, sizes):
  """Losses and gradient norms of three steps, the parameters after them, and the number of compiles."""
  mesh = common.mesh_of(*sizes)
  with jax.set_mesh(mesh):
    tx, schedule = make_optimizer(c.optimizer, c.steps)
    state = jax.jit(lambda key: init_state(c, tx, key))(jax.random.key(0))
    abstract = layout.named(abstract_state(c, tx), mesh)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(abstract)):
      assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    step = jax.jit(make_step(c, tx, schedule), donate_argnums=0)
    out = []
    for n in range(3):
      batch = common.put(common.batch(c) if c.model.kind == 'decoder' else common.examples_of(c, n if 'carry' in state else 0))
      state, sums = step(state, batch)
      out.append([float(sums['nll'] / sums['tokens']), float(sums['grad_norm'])])
    return np.array(out), jax.device_get(state['params']), step._cache_size()


@functools.cache
def reference(case):
  return three_steps(common.config(case.split('-')[0], **CASES[case]), common.MESHES[0])


# Decoders run on all meshes; what other kinds add to them is seen on these.
RUNS = [(case, sizes) for case in CASES for sizes in common.MESHES
        if case.split('-')[0] in ('llama', 'gpt2') or sizes in ((1, 1, 1), (1, 2, 4), (2, 2, 2))]


@pytest.mark.parametrize('case, sizes', RUNS, ids=lambda v: v if isinstance(v, str) else '×'.join(map(str, v)))
def test_three_steps_are_equal_on_every_mesh(case, sizes):
  out, params, compiles = three_steps(common.config(case.split('-')[0], **CASES[case]), sizes)
  expected, expected_params, _ = reference(case)
  assert compiles == 1
  assert expected[0, 0] > expected[2, 0]  # it learns
  np.testing.assert_allclose(out[:, 0], expected[:, 0], rtol=2e-5)
  np.testing.assert_allclose(out[:, 1], expected[:, 1], rtol=1e-4)
  common.assert_trees_close(params, expected_params, atol=1e-3)  # Adam makes much of a gradient near 0; lr is 1e-2


def test_weights_are_cut_over_fsdp_and_tensor():
  with jax.set_mesh(common.mesh_of(1, 4, 2)):
    c = common.config()
    tx, _ = make_optimizer(c.optimizer, c.steps)
    state = jax.jit(lambda key: init_state(c, tx, key))(jax.random.key(0))
    w = state['params']['layers']['attention']['q']['w']
    assert w.addressable_shards[0].data.size * 8 == w.size
    total = sum(a.size for a in jax.tree.leaves(state))
    held = sum(a.addressable_shards[0].data.size for a in jax.tree.leaves(state))
    assert held < total / 7  # of 8 devices; only norms' scales and counters are on all
