"""The train step: accumulation, dropout, and updates that are not finite."""
import jax
import numpy as np
import pytest

from jaxlm import config as configs, layout, objectives
from jaxlm.errors import UsageError
from jaxlm.models import kinds
from jaxlm.optimizer import make_optimizer
from jaxlm.schema import FREE
from jaxlm.step import init_state, make_step
from tests import common


def one_step(c, batch=None, steps=1):
  tx, schedule = make_optimizer(c.optimizer, c.steps)
  state = jax.jit(lambda key: init_state(c, tx, key))(jax.random.key(0))
  step = jax.jit(make_step(c, tx, schedule))
  batch = common.put(batch if batch is not None else common.batch(c))
  for _ in range(steps):
    state, sums = step(state, batch)
  return state, sums


@pytest.mark.parametrize('sizes', [(1, 1, 1), (1, 2, 1)])
def test_four_microbatches_equal_one(sizes):
  """Rows hold different numbers of tokens that count, so a mean of means would differ."""
  with jax.set_mesh(common.mesh_of(*sizes)):
    c1, c4 = common.config(), common.config(microbatches=4)
    weights = common.batch(c1)['weights'].sum(1)
    assert len(set(weights)) > 2
    (state1, sums1), (state4, sums4) = one_step(c1), one_step(c4)
    assert float(sums1['tokens']) == float(sums4['tokens']) == weights.sum()
    for name in ('nll', 'grad_norm'):
      np.testing.assert_allclose(sums4[name], sums1[name], rtol=1e-6)
    common.assert_trees_close(state4['params'], state1['params'], atol=1e-4)  # a hundredth of the learning rate


def test_gradients_summed_in_bfloat16_train_as_those_in_float32():
  """Over eight devices, in bfloat16 compute: sums of half the bytes move the loss of 12 steps by less than bfloat16 compute itself does."""
  with jax.set_mesh(common.mesh_of(2, 4, 1)):
    change = {'narrow': {'model.dtype': 'bfloat16', 'model.reduce_dtype': 'bfloat16'}, 'usual': {'model.dtype': 'bfloat16'}, 'exact': {}}
    nll = {name: float(one_step(common.config(**keys), steps=12)[1]['nll']) for name, keys in change.items()}
    first = float(one_step(common.config())[1]['nll'])
  assert nll['narrow'] != nll['usual']  # it did something
  assert abs(nll['narrow'] - nll['usual']) < max(abs(nll['usual'] - nll['exact']), 1e-3 * nll['exact'])
  assert nll['narrow'] < 0.9 * first


MIXTURE = {'model.N': 1, 'model.moe.E': 4, 'model.moe.F': 32}
STAGES = {**MIXTURE, 'model.N': 2, 'mesh.stage': 2, 'mesh.fsdp': 2, 'model.pipeline.pieces': 4}
IN_PIECES = [  # family, a run, a change of how its batches are cut, and whether that changes the objective
    ('llama', MIXTURE, {'microbatches': 2}, False),
    ('llama', {**MIXTURE, 'model.moe.balance_loss': 1.}, {'microbatches': 2}, True),
    ('llama', {**STAGES, 'model.moe.balance_loss': 1.}, {'model.pipeline.pieces': 0}, True),
    ('bert', {}, {'microbatches': 2}, True),
    ('bert', {'objective.next_sentence': 0.}, {'microbatches': 2}, False),
]


@pytest.mark.parametrize('family, run, change, other', IN_PIECES, ids=str)
def test_how_a_batch_is_cut_may_change_just_where_the_objective_does_not_depend_on_it(family, run, change, other):
  key, = change
  a, b = common.config(family, **run), common.config(family, **{**run, **change})
  with jax.set_mesh(common.mesh_of(1, a.mesh.stage, 1, 1, 1, a.mesh.stage)):
    batch = common.put(common.batch(a) if family == 'llama' else common.examples_of(a))
    params = jax.jit(lambda: kinds.init_params(a.model, jax.random.key(0)))()
    loss = lambda c, params, batch: sum(objectives.of(c)(c, params, jax.tree.map(lambda a: a[n], layout.deal(c.microbatches, batch)))[0]
                                        for n in range(c.microbatches))  # as a step has it
    losses = [float(jax.jit(loss, static_argnums=0)(c, params, batch)) for c in (a, b)]
  assert FREE.match(key) and (abs(losses[1] / losses[0] - 1) > 1e-6) == other, losses
  if other:
    with pytest.raises(UsageError, match=f'another run: {key} was .* depend on how a batch is cut; set --config.{key}='):
      configs.refuse_change(a, b)
  else:
    configs.refuse_change(a, b)
  configs.refuse_change(a, b, (key,))
  configs.refuse_change(b, b)


@pytest.mark.parametrize('family, run', [('llama', {'model.dropout': .1}), ('bahdanau', {'model.rnn.teacher': .5})], ids=str)
def test_what_is_drawn_for_each_microbatch_keeps_their_number(family, run):
  a, b = common.config(family, **run), common.config(family, **run, microbatches=2)
  with pytest.raises(UsageError, match='microbatches was 1 and is now 2, and losses of this run depend on how a batch is cut'):
    configs.refuse_change(a, b)
  configs.refuse_change(*(common.config(family, microbatches=n) for n in (1, 2)))


def test_dropout_in_microbatches_is_another_loss(one_device):
  """Of the same weights and the same batch."""
  losses = [float(one_step(common.config(**{'model.dropout': .1, 'microbatches': n}))[1]['nll']) for n in (1, 2)]
  assert abs(losses[1] / losses[0] - 1) > 1e-6


def test_pairs_are_trained_in_microbatches(one_device):
  """Counts are sums over them, and so is what is learned of the tokens, where the pairs count nothing."""
  c1, c4 = (common.config('bert', **{'objective.next_sentence': 0., 'microbatches': n}) for n in (1, 4))
  sums1, sums4 = (one_step(c, common.examples_of(c))[1] for c in (c1, c4))
  assert float(sums1['pairs']) == float(sums4['pairs']) == c1.batch
  for name in ('nll', 'grad_norm', 'pairs_nll'):
    np.testing.assert_allclose(sums4[name], sums1[name], rtol=1e-5)


def test_pieces_of_a_pipeline_are_those_that_there_are():
  """As many as stages, where none are stated; one, where there is one stage."""
  run = {**STAGES, 'model.moe.balance_loss': 1.}
  of = lambda stages, pieces: common.config(**{**run, 'mesh.stage': stages, 'model.pipeline.pieces': pieces})
  configs.refuse_change(of(2, 0), of(2, 2))
  configs.refuse_change(of(1, 0), of(1, 4))
  configs.refuse_change(of(1, 0), of(2, 1))
  with pytest.raises(UsageError, match='pieces was 2 and is now 4, .* set --config.model.pipeline.pieces=2 to go on'):
    configs.refuse_change(of(2, 0), of(2, 4))
  with pytest.raises(UsageError, match='pieces was 2 and is now 1, .* set --config.mesh.stage=2 to go on'):
    configs.refuse_change(of(2, 0), of(1, 0))
  z = {**MIXTURE, 'model.moe.z_loss': 1.}
  with pytest.raises(UsageError, match='microbatches was 1 and is now 2, .* set --config.microbatches=1 to go on'):
    configs.refuse_change(common.config(**z), common.config(**z, microbatches=2))


def test_dropout_differs_by_step_and_not_by_run(one_device):
  c = common.config('gpt2', **{'model.dropout': 0.3, 'optimizer.lr': 1e-9, 'optimizer.weight_decay': 0.})
  nll = [float(one_step(c, steps=n)[1]['nll']) for n in (1, 1, 2)]
  assert nll[0] == nll[1]
  assert abs(nll[2] - nll[0]) > 1e-3  # the parameters hardly moved: what changed is what was dropped


def test_dropout_keeps_the_expected_value(one_device):
  from jaxlm.models.layers import Dropout
  x = np.ones((1, 200, 200), np.float32)
  y = np.asarray(Dropout(0.25, True).apply({}, common.put(x), rngs={'dropout': jax.random.key(0)}))
  assert set(np.unique(y)) == {0., np.float32(1 / 0.75)}
  assert abs((y == 0).mean() - 0.25) < 0.01 and abs(y.mean() - 1) < 0.01
  np.testing.assert_array_equal(Dropout(0.25, False).apply({}, common.put(x)), x)


def test_an_update_that_is_not_finite_is_not_applied(one_device):
  c = common.config()
  tx, schedule = make_optimizer(c.optimizer, c.steps)
  state = jax.jit(lambda key: init_state(c, tx, key))(jax.random.key(0))
  state['params']['norm']['scale'] = state['params']['norm']['scale'].at[0].set(np.inf)
  new, sums = jax.jit(make_step(c, tx, schedule))(state, common.put(common.batch(c)))
  assert float(sums['finite']) == 0
  common.assert_trees_equal(new, state)
  _, sums = one_step(c)
  assert float(sums['finite']) == 1


@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_bfloat16_compute_trains_near_float32(family, one_device):
  """Forward and backward in bfloat16 on whatever backend this is: the same loss and gradient norm to 2%."""
  def sums(dtype):
    state, out = one_step(common.config(family, **{'model.dtype': dtype}))
    assert {a.dtype for a in jax.tree.leaves(state['params'])} == {np.dtype('float32')}
    return np.array([out['loss'], out['grad_norm']])
  exact, near = sums('float32'), sums('bfloat16')
  np.testing.assert_allclose(near, exact, rtol=2e-2)
  assert (near != exact).all()


def test_loads_of_experts_are_counted_over_real_tokens_and_microbatches(one_device):
  """Each real token makes top_k choices in each mixture; the biases move against the loads."""
  mixture = {'model.moe.E': 4, 'model.moe.F': 32, 'model.moe.first': 1, 'model.moe.bias': True, 'model.moe.bias_rate': 0.01,
             'optimizer.lr': 1e-9}
  c1, c4 = common.config(**mixture), common.config(microbatches=4, **mixture)
  (state, sums), (_, sums4) = one_step(c1), one_step(c4)
  real = int((common.batch(c1)['segments'] > 0).sum())
  assert 0 < real < c1.batch * c1.length
  np.testing.assert_array_equal(sums['load'].sum(-1), [real * c1.model.moe.top_k] * (c1.model.N - 1))
  np.testing.assert_array_equal(sums['load'], sums4['load'])
  load = np.asarray(sums['load'])
  np.testing.assert_allclose(state['params']['layers']['moe']['bias'], 0.01 * np.sign(load.mean(-1, keepdims=True) - load))
