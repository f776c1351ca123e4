"""Experts of int8 and fp8 values: their kernel against a loop over groups, and their products against the rule worked out in numpy, float
ones, and themselves on other meshes."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import layout
from jaxlm.kernels import grouped_scaled
from jaxlm.models import moe, quantised
from tests import campaigns, common
from tests.test_meshes import three_steps
from tests.test_moe import CFG, arrays
from tests.test_quantised import LARGEST, far, rounded


@pytest.mark.parametrize('kinds', [('int8', 'int8'), ('float8_e4m3fn', 'float8_e4m3fn'), ('float8_e5m2', 'float8_e4m3fn')])
@pytest.mark.parametrize('T, D, F, sizes', [
    (256, 128, 256, [40, 0, 130, 60]), (512, 384, 1408, [0, 512, 0, 0]), (384, 256, 128, [1, 2, 3, 4]), (128, 96, 200, [3, 60, 1, 64])])
def test_the_kernel_is_a_loop_over_groups(T, D, F, sizes, kinds):
  """And so is what other platforms run. Rows of no group have scales that are NaN, and touch nothing."""
  rng = np.random.default_rng(0)
  of_rows, of_weights = kinds
  values = lambda dtype, *shape: jnp.asarray(rng.normal(size=shape) * 30, dtype)
  scales = lambda *shape: jnp.asarray(rng.uniform(.5, 2, shape), jnp.float32)
  real_T1 = jnp.arange(T)[:, None] < sum(sizes)
  group_T = np.repeat(np.arange(4), sizes)
  for transposed in (False, True):
    rows, w_EDF = values(of_rows, T, F if transposed else D), values(of_weights, 4, D, F)
    of_row_T1 = jnp.where(real_T1, scales(T, 1), jnp.nan)
    of_column = scales(4, D, 1) if transposed else scales(4, 1, F)
    wide = np.asarray(w_EDF, np.float64) * np.asarray(of_column, np.float64)
    right = np.stack([(np.asarray(rows[t], np.float64) * float(of_row_T1[t, 0])) @ (wide[e].T if transposed else wide[e])
                      for t, e in enumerate(group_T)])
    given = rows, of_row_T1, w_EDF, of_column, jnp.array(sizes), 'float32', transposed
    with jax.set_mesh(common.mesh_of(1, 1, 1)):
      elsewhere = grouped_scaled.product(*given)
    for found in (grouped_scaled.by_kernel(*given, interpret=True), elsewhere):
      assert far(np.asarray(found)[:len(right)], right) < 1e-6


def dispatched(cfg, sizes, host):
  """[y, and the gradients of x, gate, up and down] of moe.dropless, of a linear function of y."""
  slope = np.random.default_rng(1).standard_normal(host[0].shape, np.float32)
  with jax.set_mesh(common.mesh_of(*sizes)):
    on = [jax.device_put(a, layout.spec(d)) for a, d in zip(host, ('BLD', 'BLS', 'BLS'))] + [
        jax.device_put(a, layout.spec(d, 'weight')) for a, d in zip(host[3:], ('EDF', 'EDF', 'EFD'))]
    slope = jax.device_put(slope, layout.spec('BLD'))
    run = lambda x, gate, up, down: moe.dropless(cfg, x, on[1], on[2], gate, up, down)[0]
    y, back = jax.jit(lambda *a: jax.vjp(run, *a))(on[0], *on[3:])
    return jax.device_get([y, *jax.jit(back)(slope)]), slope


def config(how):
  return dataclasses.replace(CFG, D=32, matmul=how, moe=dataclasses.replace(CFG.moe, F=64))


def by_rule(how, host, slope):
  """`dispatched`, in numpy: each choice of a token by itself."""
  x, weights, chosen, gate, up, down = host
  forward, backward = quantised.FORMATS[how]
  r = lambda a, axis, dtype: rounded(a, 'ab'[:a.ndim], 'ab'[axis], dtype)[0]
  y, dx, (d_gate, d_up, d_down) = np.zeros_like(x), np.zeros_like(x), (np.zeros_like(w) for w in (gate, up, down))
  for b, l, s in np.ndindex(chosen.shape):
    e, weight, row = chosen[b, l, s], weights[b, l, s], x[b, l]
    row_q = r(row, 0, forward)
    g, u = row_q @ r(gate[e], 0, forward), row_q @ r(up[e], 0, forward)
    sigma = 1 / (1 + np.exp(-g))
    hidden = g * sigma * u
    y[b, l] += weight * (r(hidden, 0, forward) @ r(down[e], 0, forward))
    out = slope[b, l] * weight
    d_hidden = r(out, 0, backward) @ r(down[e], 1, forward).T
    d_g, d_u = d_hidden * u * sigma * (1 + g * (1 - sigma)), d_hidden * g * sigma
    dx[b, l] += r(d_g, 0, backward) @ r(gate[e], 1, forward).T + r(d_u, 0, backward) @ r(up[e], 1, forward).T
    d_gate[e] += np.outer(row, d_g)
    d_up[e] += np.outer(row, d_u)
    d_down[e] += np.outer(hidden, out)
  return y, dx, d_gate, d_up, d_down


@pytest.mark.parametrize('how', quantised.FORMATS)
def test_experts_are_those_of_the_rule_in_numpy(how):
  host = arrays(config(how))
  found, slope = dispatched(config(how), (1, 1, 1), host)
  for a, b in zip(found, by_rule(how, host, np.asarray(slope))):
    assert far(a, b) < 2e-3  # a value on the edge between two is now and then rounded to the other


@pytest.mark.parametrize('how, most', [('int8', .02), ('fp8', .12)])
def test_experts_are_near_those_of_float32(how, most):
  host = arrays(config(how))
  for found, exact in zip(dispatched(config(how), (1, 1, 1), host)[0], dispatched(config('full'), (1, 1, 1), host)[0]):
    assert most / 8 < far(found, exact) < most


@pytest.mark.parametrize('sizes', [(1, 4, 1), (1, 2, 2), (1, 1, 1, 1, 4), (1, 2, 1, 1, 2)])
@pytest.mark.parametrize('how', quantised.FORMATS)
def test_experts_are_the_same_on_every_mesh(how, sizes):
  """No scale depends on the mesh: what differs is the order of float32 sums."""
  host = arrays(config(how))
  for found, exact in zip(dispatched(config(how), sizes, host)[0], dispatched(config(how), (1, 1, 1), host)[0]):
    assert far(found, exact) < 2e-3


@functools.cache
def steps(how, sizes=(1, 1, 1)):
  return three_steps(common.config(**{'model.N': 2, 'model.moe.E': 4, 'model.moe.F': 32, 'model.matmul': how}), sizes)


@pytest.mark.parametrize('how, sizes', [('int8', (1, 2, 1, 1, 2, 2)), pytest.param('fp8', (1, 2, 2, 1, 2), marks=campaigns.parity)])
def test_steps_are_the_same_on_every_mesh(how, sizes):
  """As those of tests/test_quantised.py, in a pipeline too."""
  (found, _, compiles), (expected, _, _), (exact, _, _) = steps(how, sizes), steps(how), steps('full')
  assert compiles == 1
  np.testing.assert_allclose(found[0, 0], expected[0, 0], rtol=1e-6)  # loss
  np.testing.assert_allclose(found[0, 1], expected[0, 1], rtol=1e-3)  # gradient norm
  np.testing.assert_allclose(found[1:, 0], expected[1:, 0], rtol=1e-3)
  np.testing.assert_allclose(expected[:, 0], exact[:, 0], rtol=.01)


def test_largest_values_are_those_of_the_formats():
  assert {np.dtype(d) for pair in quantised.FORMATS.values() for d in pair} == set(map(np.dtype, LARGEST))
