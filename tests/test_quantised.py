"""Projections of int8 and fp8 values against the rule worked out in numpy, float ones, and themselves on other meshes."""
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import layout
from jaxlm.errors import UsageError, extra
from jaxlm.models import layers, quantised
from jaxlm.optimizer import make_optimizer
from jaxlm.step import init_state, make_step
from tests import campaigns, common
from tests.test_evaluate import make_lm
from tests.test_generate import PROMPTS, greedy
from tests.test_meshes import three_steps

SIZES = dict(B=8, L=16, D=32, H=8, K=4, F=64)
EQUATIONS = ['BLD,DHK->BLHK', 'BLHK,HKD->BLD', 'BLF,FD->BLD']  # over tensor, letters of the result are cut; summed; summed
LARGEST = {np.dtype('int8'): 127., jnp.dtype(jnp.float8_e4m3fn): 448., jnp.dtype(jnp.float8_e5m2): 57_344.}


def arrays(eqn):
  """x, w, and a gradient of their product, all normal."""
  rng = np.random.default_rng(0)
  return [rng.standard_normal([SIZES[d] for d in dims], np.float32) for dims in layers._split(eqn)]


def products(contract, eqn, sizes=(1, 1, 1), given=None):
  """[y, dx, dw] on a mesh of these sizes."""
  x_dims, w_dims, out_dims = layers._split(eqn)
  x, w, g = given or arrays(eqn)
  with jax.set_mesh(common.mesh_of(*sizes)):
    x, w, g = (jax.device_put(a, layout.spec(dims, kind)) for a, dims, kind in
               ((x, x_dims, 'act'), (w, w_dims, 'weight'), (g, out_dims, 'act')))
    @jax.jit
    def run(x, w, g):
      y, back = jax.vjp(contract, x, w)
      return (y, *back(g))
    out = run(x, w, g)
    assert [jax.typeof(a).sharding.spec for a in out[1:]] == [jax.typeof(a).sharding.spec for a in (x, w)]
    return jax.device_get(list(out))


def full(eqn):
  return functools.partial(layers.contract, eqn, None)


def of(eqn, how):
  return functools.partial(quantised.contract, eqn, how)


def rounded(a, dims, over, dtype):
  """q · s of float32 a, in numpy, and s."""
  axes, dtype = tuple(dims.index(d) for d in over if d in dims), jnp.dtype(dtype)
  scale = np.abs(a).max(axes, keepdims=True) / np.float32(LARGEST[dtype])
  q = a / scale
  q = np.rint(q) if dtype == np.int8 else q.astype(dtype).astype(np.float32)
  return q * scale, scale


def far(a, b):
  """‖a − b‖ / ‖b‖"""
  return float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))


@pytest.mark.parametrize('how', quantised.FORMATS)
@pytest.mark.parametrize('eqn', EQUATIONS)
def test_products_are_those_of_the_rule_in_numpy(eqn, how):
  """Here scales go into a gradient and are taken out of the product again; there they stay with what they are of."""
  x_dims, w_dims, out_dims = layers._split(eqn)
  forward, backward = quantised.FORMATS[how]
  x, w, g = arrays(eqn)
  (x_r, x_s), (w_r, w_s) = rounded(x, x_dims, w_dims, forward), rounded(w, w_dims, x_dims, forward)
  to_out = lambda s, dims: np.einsum(f'{dims}->{"".join(d for d in out_dims if d in dims)}', s).reshape(
      [s.shape[dims.index(d)] if d in dims else 1 for d in out_dims])
  w_s, x_s = to_out(w_s, w_dims), to_out(x_s, x_dims)
  g_x = rounded(g * w_s, out_dims, w_dims, backward)[0] / w_s
  g_w = rounded(g * x_s, out_dims, x_dims[1], backward)[0] / x_s
  expected = [np.einsum(eqn, x_r, w_r), np.einsum(f'{out_dims},{w_dims}->{x_dims}', g_x, w_r),
              np.einsum(f'{x_dims},{out_dims}->{w_dims}', x_r, g_w)]
  for found, exact in zip(products(of(eqn, how), eqn), expected):
    assert far(found, exact) < 1e-5


@pytest.mark.parametrize('eqn', EQUATIONS)
def test_whole_numbers_up_to_the_largest_pass_through_int8_exactly(eqn):
  """With scales of 1 everywhere: the first of all that a matmul sums is 127."""
  x_dims, w_dims, out_dims = layers._split(eqn)
  rng = np.random.default_rng(0)
  def whole(dims, *overs):
    a = rng.integers(-127, 128, [SIZES[d] for d in dims]).astype(np.float32)
    for over in overs:
      a[tuple(0 if d in over else slice(None) for d in dims)] = 127
    return a
  given = [whole(x_dims, w_dims), whole(w_dims, x_dims), whole(out_dims, w_dims, x_dims[1])]
  x, w, g = given
  expected = [np.einsum(eqn, x, w), np.einsum(f'{out_dims},{w_dims}->{x_dims}', g, w), np.einsum(f'{x_dims},{out_dims}->{w_dims}', x, g)]
  for found, exact in zip(products(of(eqn, 'int8'), eqn, given=given), expected):
    assert far(found, exact) < 1e-6


@pytest.mark.parametrize('how, most', [('int8', 0.01), ('fp8', 0.065)])
@pytest.mark.parametrize('eqn', EQUATIONS)
def test_products_are_near_those_of_float32(eqn, how, most):
  """A rounding to one of 255 values, or to 3 bits, 2 of a gradient, errs by about 0.6%, 2.5% and 5%; a product by two of them."""
  for found, exact in zip(products(of(eqn, how), eqn), products(full(eqn), eqn)):
    assert most / 4 < far(found, exact) < most


@pytest.mark.parametrize('sizes', [(1, 8, 1), (1, 4, 2), (2, 2, 2), (1, 2, 2, 2)])
@pytest.mark.parametrize('how', quantised.FORMATS)
def test_products_are_the_same_on_every_mesh(how, sizes):
  """No scale depends on the mesh: what differs is the order of float32 sums."""
  for eqn in EQUATIONS:
    for found, exact in zip(products(of(eqn, how), eqn, sizes), products(of(eqn, how), eqn)):
      assert far(found, exact) < 2e-7


@functools.cache
def steps(how, sizes=(1, 1, 1)):
  return three_steps(common.config(**{'model.N': 4, 'model.matmul': how}), sizes)


@pytest.mark.parametrize('how, sizes', [
    *(pytest.param('int8', sizes, marks=campaigns.parity) for sizes in ((1, 8, 1), (1, 4, 2), (1, 2, 1, 4))),
    ('int8', (1, 2, 2, 1, 1, 2)), ('fp8', (2, 2, 2))])
def test_steps_are_the_same_on_every_mesh(how, sizes):
  """Up to roundings: what a float32 sum in another order moves by 1e-7 is now and then rounded to the next value, and Adam makes
  much of that in the steps after."""
  (found, _, compiles), (expected, _, _) = steps(how, sizes), steps(how)
  assert compiles == 1
  np.testing.assert_allclose(found[0, 0], expected[0, 0], rtol=1e-6)  # loss
  np.testing.assert_allclose(found[0, 1], expected[0, 1], rtol=1e-4)  # gradient norm
  np.testing.assert_allclose(found[1:, 0], expected[1:, 0], rtol=1e-3)


def test_losses_go_down_as_with_float_matmuls(one_device):
  """30 steps in bfloat16 on windows of a text of few bytes."""
  def losses(how):
    c = common.config(**{'model.matmul': how, 'model.dtype': 'bfloat16'})
    tx, schedule = make_optimizer(c.optimizer, c.steps)
    state, out = jax.jit(lambda key: init_state(c, tx, key))(jax.random.key(0)), []
    step = jax.jit(make_step(c, tx, schedule), donate_argnums=0)
    for n in range(30):
      state, sums = step(state, common.put(common.examples_of(c, n)))
      out.append(float(sums['nll'] / sums['tokens']))
    assert {a.dtype for a in jax.tree.leaves(state['params'])} == {np.dtype('float32')}
    return np.array(out)
  exact = losses('full')
  for how in quantised.FORMATS:
    found = losses(how)
    assert (found != exact).all()
    np.testing.assert_allclose(found, exact, rtol=0.01)
  assert exact[0] - exact[-1] > 2


def test_a_token_is_generated_as_the_whole_text_is_read():
  """Scales are of one token each, so that a cache changes nothing."""
  lm = make_lm(**{'model.matmul': 'int8'})
  assert lm.generate(PROMPTS, 8, temperature=0) == [greedy(lm, p, 8) for p in PROMPTS]


@pytest.mark.parametrize('changes, mend', [
    ({'model.matmul': 'int4'}, 'wants one of full, int8, fp8'),
    ({'model.matmul': 'int8', 'model.moe.E': 4, 'model.moe.F': 32, 'model.moe.dispatch': 'capacity'}, 'no quantised experts: set dropless'),
    ({'model.matmul': 'fp8', 'model.kind': 'rnn', 'data.order': 'contiguous'}, 'kind=rnn has no layers with projections'),
])
def test_what_is_not_quantised_is_refused(changes, mend):
  with pytest.raises(UsageError, match=f'^model.matmul={changes["model.matmul"]!r}: .*{mend}'):
    common.config(**changes)


def test_rows_that_int32_cannot_sum_are_refused():
  with pytest.raises(UsageError, match='^length=262144: .*131,072 tokens'):
    common.config(**{'model.matmul': 'int8', 'length': 2 ** 18, 'mesh.fsdp': 8})
  common.config(**{'model.matmul': 'int8', 'length': 2 ** 18, 'mesh.fsdp': 1, 'mesh.context': 2})


def test_qwix_is_loaded_only_where_it_is_asked_for_and_missed_before_jax_is_there():
  script = """if True:
    import sys
    import jaxlm
    from jaxlm import config
    sys.modules['qwix'] = None
    try:
      config.from_flat({'model.matmul': 'int8'})
    except jaxlm.errors.UsageError as e:
      print(e)
    assert 'jax' not in sys.modules
    del sys.modules['qwix']
    import jaxlm.train
    assert 'jax' in sys.modules and 'qwix' not in sys.modules
  """
  done = subprocess.run([sys.executable, '-c', script], check=True, capture_output=True, text=True)
  assert done.stdout == f"model.matmul='int8': wants Qwix: {extra('quant')}; or set full\n"
