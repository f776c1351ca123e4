"""What the backward pass recomputes changes the program and not the result: by name, by tensor, in the host's memory."""
import functools
import re

import jax
import numpy as np
import pytest

from jaxlm import remat, train as training
from jaxlm.errors import UsageError
from jaxlm.models import kinds
from jaxlm.objectives import token_loss
from jaxlm.optimizer import make_optimizer
from jaxlm.step import init_state, make_step
from jaxlm.tensors import REMAT, TENSORS, made
from tests import common
from tests.test_checkpoint import losses, run_config, state_of

MOE = {'model.moe.E': 4, 'model.moe.F': 16}
MLA = {'model.mla.kv': 16, 'model.mla.q': 24, 'model.mla.rope': 4, 'model.mla.v': 8, 'model.G': 8}
MODELS = {'llama': {}, 'normed': {'model.qk_norm': 'head', 'model.norm_place': 'both'}, 'moe': MOE,
          'capacity': {**MOE, 'model.moe.dispatch': 'capacity'}, 'latent': MLA}
ALL = ('none', 'dots', *REMAT)
PROGRAM = ('attention', 'remat', 'scan', 'save', 'offload')  # keys of the model that change how it is run, and no parameter
OFFLOADED = {'model.remat': 'attention', 'model.save': 'gate up', 'model.offload': 'block_in q k v'}


@functools.cache
def parameters(family, model, sizes):
  """On a mesh, which is the current one. What is recomputed changes no parameter: a model has them once."""
  c = common.config(family, **dict(model))
  return jax.jit(lambda key: kinds.init_params(c.model, key))(jax.random.key(0))


def gradient(changes, family='llama'):
  """(value_and_grad of the loss, parameters) on the current mesh."""
  c = common.config(family, **changes)
  model = tuple((key, value) for key, value in changes.items() if key.removeprefix('model.') not in PROGRAM)
  batch = common.put(common.batch(c))
  f = lambda p: token_loss(c, p, batch)[0]
  return jax.value_and_grad(f), parameters(family, model, tuple(jax.sharding.get_mesh().shape.values()))


def jaxpr(changes):
  f, params = gradient({'model.attention': 'plain', **changes})
  return str(jax.make_jaxpr(f)(params))


def assert_same(changes, result, family='llama'):
  """The program's jaxpr, if its result is the same."""
  f, params = gradient(changes, family)
  traced = jax.jit(f).trace(params)
  common.assert_trees_close(traced.lower().compile()(params), result, rtol=1e-4, atol=1e-5)
  return str(traced.jaxpr)


@pytest.mark.parametrize('family, scan', [('llama', True), ('llama', False), ('gpt2', True)])
def test_remat_and_unrolling_change_the_program_and_not_the_result(one_device, family, scan):
  f, params = gradient({}, family)
  result = jax.jit(f)(params)
  names = ALL if scan else ('none', 'dots', 'minimal')
  jaxprs = {name: assert_same({'model.remat': name, 'model.scan': scan}, result, family) for name in names}
  assert len(set(jaxprs.values())) == len(jaxprs)


ONE, MESH = (1, 1, 1), (1, 2, 2, 2)  # fsdp × tensor × context


# On one device all but llama, whose tensors are among those of normed.
@pytest.mark.parametrize('name, sizes', [*((name, ONE) for name in list(MODELS)[1:]), ('llama', MESH), ('moe', MESH)], ids=str)
def test_what_is_offloaded_and_saved_changes_no_gradient(name, sizes):
  all_made = made(common.config(**MODELS[name]).model)
  with jax.set_mesh(common.mesh_of(*sizes)):
    f, params = gradient(MODELS[name])
    result = jax.jit(f)(params)
    assert_same({**MODELS[name], **OFFLOADED}, result)
    assert_same({**MODELS[name], 'model.remat': 'full', 'model.offload': ' '.join(all_made)}, result)


def test_each_name_recomputes_the_matrix_products_that_it_says(one_device):
  """Of a layer: q, k, v, scores, what they weigh, o, gate, up; down's own result is of no use to the backward pass. A kernel in
  XLA's operations computes its scores again in any case."""
  count = {name: jaxpr({'model.remat': name}).count('dot_general') for name in ALL}
  more = {name: n - count['none'] for name, n in count.items()}
  assert more == {'none': 0, 'full': 8, 'attention': 7, 'qkv': 4, 'minimal': 1, 'dots': 2}


@pytest.mark.parametrize('name', MODELS)
def test_a_saved_tensor_is_not_recomputed(one_device, name):
  """Beside what is left with all saved, each tensor that is not costs a matrix product or an exchange."""
  all_made = made(common.config(**MODELS[name]).model)
  useful = [t for t in all_made if t != 'block_in' and (t != 'mlp_out' or name == 'normed')]
  def work(kept):
    text = jaxpr({**MODELS[name], 'model.remat': 'full', 'model.save': ' '.join(kept)})
    return sum(text.count(op) for op in ('dot_general', 'ragged_dot', 'gather', 'custom_vmap'))
  least = work(all_made)
  for tensor in useful:
    assert work([t for t in all_made if t != tensor]) > least, tensor


def test_only_what_is_offloaded_is_in_the_hosts_memory(one_device):
  shapes = {'block_in': '[3,8,32,32]', 'q': '[3,8,32,8,8]', 'attention': '[3,8,32,8,8]', 'k': '[3,8,32,4,8]', 'up': '[3,8,32,64]'}
  for tensor, shape in {'': '', **shapes}.items():
    text = re.sub(r'@(\(.*?\)|\w+)', '', jaxpr({'model.remat': 'minimal', 'model.offload': tensor}))  # less what cuts it
    assert set(re.findall(r'f32<host>(\[3,.*?\])', text)) == ({shape} if tensor else set())  # of all layers


def test_every_tensor_is_made_by_some_model_and_no_other_can_be_tagged():
  assert set(TENSORS) == {t for name in MODELS for t in made(common.config(**MODELS[name]).model)}
  with pytest.raises(KeyError, match='hidden'):
    remat.tag(np.zeros(3), 'hidden')


BAD = [
    ({'model.save': 'q'}, ["model.save='q'", 'model.remat to be one of full, attention, qkv, minimal']),
    ({'model.remat': 'dots', 'model.offload': 'q'}, ["model.offload='q'", 'model.remat']),
    ({'model.remat': 'full', 'model.save': 'q atention'}, ["'atention' is no tensor", 'did you mean attention']),
    ({'model.remat': 'full', 'model.offload': 'z'}, ["'z' is no tensor", 'block_in', 'mlp_out']),
    ({'model.remat': 'full', 'model.save': 'latent'}, ["make no 'latent'", 'gate']),
    ({'model.remat': 'full', 'model.save': 'q k', 'model.offload': 'k'}, ["model.offload='k'", 'k cannot be in model.save']),
    ({'model.remat': 'ful'}, ["model.remat='ful'", 'did you mean full']),
]


@pytest.mark.parametrize('changes, says', BAD, ids=lambda v: ' '.join(v.values()) if isinstance(v, dict) else '')
def test_a_wrong_name_is_one_line(changes, says):
  with pytest.raises(UsageError) as e:
    common.config(**changes)
  assert '\n' not in str(e.value)
  for part in says:
    assert part in str(e.value), str(e.value)


def test_a_recurrent_layer_has_no_named_tensors():
  with pytest.raises(UsageError, match='model.remat=.attention.: model.kind=rnn'):
    common.config('lstm', **{'model.remat': 'attention'})


@pytest.mark.parametrize('sizes, optimizer', [((1, 1, 1), 'adamw'), ((1, 4, 2), 'muon')])  # AdamW on a mesh: the run below
def test_offloaded_moments_change_no_bit(sizes, optimizer):
  def three_steps(offload):
    c = common.config(**{'optimizer.name': optimizer, 'optimizer.offload': offload})
    tx, schedule = make_optimizer(c.optimizer, c.steps)
    state = jax.jit(lambda key: init_state(c, tx, key))(jax.random.key(0))
    step, batch = jax.jit(make_step(c, tx, schedule), donate_argnums=0), common.put(common.batch(c))
    for _ in range(3):
      where = {a.sharding.memory_kind for a in jax.tree.leaves(state['opt']) if a.ndim}
      assert where == {'pinned_host' if offload else 'device'}
      state, sums = step(state, batch)
    assert step._cache_size() == 1
    return jax.device_get((state, sums))
  with jax.set_mesh(common.mesh_of(*sizes)):
    common.assert_trees_equal(three_steps(True), three_steps(False))


def test_a_run_goes_on_with_its_moments_elsewhere(texts, tmp_path):
  """Saved at each step while its buffers are donated; stopped and gone on with, from the host's memory to the device's and back."""
  def run(folder, steps, offload):
    changes = {'optimizer.schedule': 'constant', 'optimizer.offload': offload}
    training.train(run_config(texts, steps=steps, save_every=1, **changes), tmp_path / folder)
  run('plain', 6, False)
  for steps, offload in ((2, True), (4, False), (6, True)):
    run('both', steps, offload)
  assert losses(tmp_path / 'both') == losses(tmp_path / 'plain')
  for step in range(1, 7):
    common.assert_trees_equal(state_of(tmp_path / 'both', step), state_of(tmp_path / 'plain', step))
