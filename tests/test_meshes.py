"""Sharding runs on eight CPU devices: every mesh gives the same losses and gradients, with one compile."""
import dataclasses
import functools
import os
import pathlib

import jax
import numpy as np
import pytest

from jaxlm import layout
from jaxlm.data import pipeline
from jaxlm.optimizer import make_optimizer
from jaxlm.schema import MeshConfig
from jaxlm.step import abstract_state, init_state, make_step
from jaxlm.train import abstract_batch
from tests import campaigns, common

MOE = {'model.moe.E': 4, 'model.moe.F': 32}
CASES = {
    'llama': {'model.N': 4}, 'llama-gather': {'model.N': 4, 'model.context': 'gather'},
    'llama-rounds-remat': {'model.N': 4, 'model.pipeline.rounds': 2, 'model.pipeline.pieces': 4, 'model.remat': 'full'},
    'llama-relative': {'model.N': 4, 'model.position': 'relative'}, 'llama-relative-gather': {'model.position': 'relative', 'model.context': 'gather'},
    'llama-vocabulary': {'model.N': 4, 'loss.over': 'vocabulary', 'loss.z_loss': 1e-4},
    'llama-moe': {'model.N': 4, **MOE}, 'llama-moe-capacity': {'model.N': 4, **MOE, 'model.moe.dispatch': 'capacity'},
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
# data, fsdp, tensor, context, expert, stage. Each axis alone, products in which each axis meets others, and each of CASES on one
# mesh at least; MORE, the other products of two that pods use, `make parity` runs.
MESHES = {
    'llama': [(8, 1, 1), (1, 8, 1), (1, 1, 4), (1, 1, 1, 8), (1, 1, 1, 1, 1, 4), (2, 2, 2)],
    'llama-gather': [(1, 2, 1, 4)], 'llama-rounds-remat': [(1, 1, 2, 1, 1, 2)], 'llama-vocabulary': [(1, 2, 2, 2)],
    'llama-relative': [(1, 1, 1, 4, 1, 2)], 'llama-relative-gather': [(1, 2, 2, 2)],
    'llama-moe': [(1, 1, 1, 1, 4), (1, 1, 1, 4, 2), (1, 2, 1, 1, 1, 4)], 'llama-moe-capacity': [(1, 2, 2, 1, 2)],
    'llama-mixture-local-capped': [(1, 2, 1, 4)],
}
MORE = {
    'llama': [(2, 4, 1), (2, 1, 4), (1, 4, 2), (1, 2, 4), (1, 2, 1, 4), (1, 1, 2, 4), (1, 4, 1, 1, 1, 2), (1, 1, 4, 1, 1, 2),
              (1, 1, 1, 4, 1, 2)],
    'llama-gather': [(1, 1, 1, 4), (1, 1, 1, 4, 1, 2)], 'llama-relative': [(1, 1, 1, 8)],
    'llama-moe': [(2, 1, 1, 1, 4), (1, 2, 1, 1, 4), (1, 1, 4, 1, 2), (1, 1, 1, 1, 4, 2), (1, 4, 2), (1, 1, 1, 4)],
    'gpt2-dropout': [(1, 4, 2)], 'llama-muon-remat-untied-zloss': [(1, 2, 4)], 'llama-mixture-local-capped': [(1, 2, 4)],
}
DOCS = pathlib.Path('docs/meshes.md')
HEAD = """# Every mesh gives what one device gives

Made by `make parity` (tests/test_meshes.py): three steps of a tiny model in float32 on eight CPU devices, from the same state on
the same packed batches. The largest relative differences from the same steps on one device; each run compiles once.

| model | mesh | loss | gradient norm |
|---|---|---|---|
"""


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


RUNS = [run for case in CASES for run in (
    *((case, sizes) for sizes in (MESHES[case] if case in MESHES else [(2, 2, 2)])),
    *(pytest.param(case, sizes, marks=campaigns.parity) for sizes in (MORE[case] if case in MORE else ())))]


def text_of(sizes) -> str:
  return ' × '.join(f'{f.name} {n}' for f, n in zip(dataclasses.fields(MeshConfig), sizes) if n > 1)


@pytest.fixture(scope='module')
def table():
  """Rows of docs/meshes.md, written when JAXLM_PARITY is set (`make parity`)."""
  rows = []
  yield rows.append
  if os.environ.get('JAXLM_PARITY'):
    DOCS.write_text(HEAD + '\n'.join(rows) + '\n', encoding='utf-8')


@pytest.mark.parametrize('case, sizes', RUNS, ids=lambda v: v if isinstance(v, str) else text_of(v).replace(' ', ''))
def test_three_steps_are_equal_on_every_mesh(case, sizes, table):
  out, params, compiles = three_steps(common.config(case.split('-')[0], **CASES[case]), sizes)
  expected, expected_params, _ = reference(case)
  assert compiles == 1
  assert expected[0, 0] > expected[2, 0]  # it learns
  np.testing.assert_allclose(out[:, 0], expected[:, 0], rtol=1e-5)
  np.testing.assert_allclose(out[:, 1], expected[:, 1], rtol=1e-5)
  common.assert_trees_close(params, expected_params, atol=1e-3)  # Adam makes much of a gradient near 0; lr is 1e-2
  loss, norm = np.abs(out / expected - 1).max(0)
  table(f'| {case.replace("-", ", ")} | {text_of(sizes)} | {loss:.1e} | {norm:.1e} |')


@pytest.mark.parametrize('sizes', [(2, 2, 2), (1, 2, 2, 2), (1, 1, 1, 8)], ids=text_of)
def test_batches_lie_where_the_step_wants_them(sizes):
  """As the training loop places them, a row's one value (its task) too."""
  c = common.config()
  rows = common.examples_of(c) | {'task': np.arange(c.batch, dtype=np.int32)[:, None]}
  mesh = common.mesh_of(*sizes)
  with jax.set_mesh(mesh):
    placed = pipeline.place(lambda start, stop: {name: a[start:stop] for name, a in rows.items()}, c.batch, mesh)
    for name, a in abstract_batch(c, mesh).items():
      assert placed[name].sharding.is_equivalent_to(a.sharding, 2) and placed[name].shape == a.shape, name
  common.assert_trees_equal(placed, rows)


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
