"""The step with Auto axes that benchmarks/axes.py compiles is the same step: equal losses and gradients, and updates that follow."""
import jax
import numpy as np

from benchmarks import auto_axes
from jaxlm.optimizer import make_optimizer
from jaxlm.schema import MeshConfig
from jaxlm.step import init_state, make_step
from tests import common


def test_auto_axes_train_alike():
  c = common.config(**{'model.tied': False, 'model.remat': 'full', 'loss.over': 'vocabulary', 'mesh.data': 2, 'mesh.fsdp': 4,
                       'model.rope.base': 1000., 'optimizer.lr': 1e-3})
  explicit, auto, out = common.mesh_of(2, 4, 1), auto_axes.make_mesh(c, jax.devices()), {}
  with jax.set_mesh(explicit):
    tx, schedule = make_optimizer(c.optimizer, c.steps)
    state = jax.jit(lambda key: init_state(c, tx, key))(jax.random.key(0))
    state['params'] = common.put_params(common.perturbed(state['params']), state['params'])
    params = auto_axes.from_jaxlm(jax.device_get(state['params']))
    step, batches = jax.jit(make_step(c, tx, schedule)), [common.put(common.batch(c, n)) for n in range(2)]
    for batch in batches:
      state, sums = step(state, batch)
      out.setdefault('explicit', []).append([float(sums[name]) for name in ('nll', 'tokens', 'grad_norm', 'param_norm')])
    expected = auto_axes.from_jaxlm(jax.device_get(state['params']))
  with jax.sharding.use_abstract_mesh(auto.abstract_mesh):
    tx = auto_axes.optimizer(c)
    state = jax.device_get({'params': params, 'opt': tx.init(params), 'step': np.int32(0)})
    state, step = jax.device_put(state, auto_axes.shardings(auto, state)), auto_axes.make_step(c, auto)
    for n in range(2):
      state, sums = step(state, jax.device_put(common.batch(c, n), jax.NamedSharding(auto, jax.P(auto_axes.ROWS))))
      out.setdefault('auto', []).append([float(sums[name]) for name in ('nll', 'tokens', 'grad_norm', 'param_norm')])
  np.testing.assert_allclose(out['auto'], out['explicit'], rtol=1e-5)
  common.assert_trees_close(state['params'], expected, atol=1e-4)
  q = state['params']['q']
  assert q.addressable_shards[0].data.size * 4 == q.size  # cut over fsdp
