"""The train step as it is usually written in JAX: Auto axes, constraints on activations, gathers left to the partitioner.

What benchmarks/axes.py compiles beside jaxlm's own step. A Llama (no biases, untied, pre-norm) on data × fsdp, and nothing else;
tests/test_axes.py holds its loss and its gradient's norm against jaxlm's. The attention kernel is the same one.
"""
import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from jaxlm import layout
from jaxlm.kernels import on_mesh
from jaxlm.kernels.patterns import How, Rows
from jaxlm.models import rope
from jaxlm.optimizer import make_schedule

ROWS = ('data', 'fsdp')  # what cuts the batch
LAYERS = {'norm1': 'ND', 'q': 'NDHK', 'k': 'NDGK', 'v': 'NDGK', 'o': 'NHKD', 'norm2': 'ND', 'gate': 'NDF', 'up': 'NDF', 'down': 'NFD'}
WEIGHTS = {'embed': 'VD', 'norm': 'D', 'unembed': 'VD', **LAYERS}  # float32; D is cut over fsdp, norms are whole


def make_mesh(config, devices) -> Mesh:
  """Auto axes over the devices in the order in which jaxlm's mesh has them."""
  grid = layout.make_mesh(config.mesh, devices).devices.reshape(config.mesh.data, -1)
  return Mesh(grid, ROWS, axis_types=(AxisType.Auto,) * 2)


def shardings(mesh: Mesh, tree):
  """Of a state: a weight, and its moments, lie as its letters say; all else is on every device."""
  def one(path, _):
    name = getattr(path[-1], 'key', '')
    cut = name in WEIGHTS and 'norm' not in name
    return NamedSharding(mesh, P(*('fsdp' if d == 'D' else None for d in WEIGHTS[name])) if cut else P())
  return jax.tree_util.tree_map_with_path(one, tree)


def abstract(config, mesh: Mesh):
  """(state, batch), shapes and shardings."""
  m, tx = config.model, optimizer(config)
  size = {d: getattr(m, d) for d in 'VDNHGKF'}
  params = {name: jax.ShapeDtypeStruct(tuple(size[d] for d in dims), jnp.float32) for name, dims in WEIGHTS.items()}
  state = {'params': params, 'opt': jax.eval_shape(tx.init, params), 'step': jax.ShapeDtypeStruct((), jnp.int32)}
  place = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
  batch = {name: jax.ShapeDtypeStruct((config.batch, config.length), jnp.float32 if name == 'weights' else jnp.int32,
                                      sharding=NamedSharding(mesh, P(ROWS)))
           for name in ('tokens', 'targets', 'weights', 'segments', 'positions')}
  return jax.tree.map(place, state, shardings(mesh, state)), batch


def optimizer(config):
  c = config.optimizer
  mask = lambda params: {name: 'norm' not in name for name in params}
  adamw = optax.adamw(make_schedule(c, config.steps), c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=mask)
  return optax.chain(optax.clip_by_global_norm(c.clip), adamw)


def make_step(config, mesh: Mesh):
  """The jitted (state, batch) → (state, sums), as jaxlm.step's."""
  m, tx, dtype = config.model, optimizer(config), jnp.dtype(config.model.dtype)
  constrain = lambda a: jax.lax.with_sharding_constraint(a, NamedSharding(mesh, P(ROWS)))  # the batch is cut, and nothing else
  kernel = on_mesh.ATTENTION['splash' if mesh.devices.flat[0].platform == 'tpu' else 'dot_product']
  attend = jax.shard_map(lambda q, k, v, rows: kernel(How(m.K ** -0.5), q, k, v, rows, rows), mesh=mesh, in_specs=P(ROWS),
                         out_specs=P(ROWS), check_vma=False)

  def norm(x, scale_D):
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + m.norm_eps) * scale_D[None, None]).astype(x.dtype)

  def turn(x_BLHK, positions_BL):
    frequencies_K, magnitude = rope.frequencies(m.rope, False, m.K)
    angle_BL1K = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies_K[None, None, None]
    cos, sin = ((f(angle_BL1K) * magnitude).astype(dtype) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x_BLHK, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

  def loss_fn(params, batch):
    times = lambda eqn, x, w: constrain(jnp.einsum(eqn, x, w.astype(dtype)))
    rows = Rows(batch['segments'], batch['positions'])

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
    def block(x_BLD, w):
      h_BLD = norm(x_BLD, w['norm1'])
      q_BLHK, k_BMGK, v_BMGK = (times('BLD,DHK->BLHK', h_BLD, w[name]) for name in 'qkv')
      o_BLHK = attend(turn(q_BLHK, rows.positions_BL), turn(k_BMGK, rows.positions_BL), v_BMGK, rows)
      x_BLD += times('BLHK,HKD->BLD', o_BLHK, w['o'])
      h_BLD = norm(x_BLD, w['norm2'])
      h_BLF = jax.nn.silu(times('BLD,DF->BLF', h_BLD, w['gate'])) * times('BLD,DF->BLF', h_BLD, w['up'])
      return constrain(x_BLD + times('BLF,FD->BLD', h_BLF, w['down'])), None

    x_BLD = constrain(params['embed'].astype(dtype)[batch['tokens']])
    x_BLD, _ = jax.lax.scan(block, x_BLD, {name: params[name] for name in LAYERS})
    x_BLD, unembed_VD = norm(x_BLD, params['norm']), params['unembed'].astype(dtype)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def piece(total, piece):
      x_BLD, targets_BL, weights_BL = piece
      logits_BLV = constrain(jnp.einsum('BLD,VD->BLV', x_BLD, unembed_VD, preferred_element_type=jnp.float32))
      return total + jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits_BLV, targets_BL) * weights_BL), None
    cut = lambda a: jnp.moveaxis(a.reshape(a.shape[0], config.loss.chunks, -1, *a.shape[2:]), 1, 0)
    return jax.lax.scan(piece, jnp.float32(0), jax.tree.map(cut, (x_BLD, batch['targets'], batch['weights'])))[0]

  def train_step(state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(state['params'], batch)
    tokens = batch['weights'].sum()
    grads = jax.tree.map(lambda g: g / jnp.maximum(tokens, 1), grads)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt = tx.update(grads, state['opt'], state['params'])
    new = {'params': optax.apply_updates(state['params'], updates), 'opt': opt, 'step': state['step'] + 1}
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    return new, {'nll': loss, 'tokens': tokens, 'grad_norm': grad_norm, 'param_norm': optax.tree.norm(new['params']), 'finite': finite}

  state, batch = (jax.tree.map(lambda a: a.sharding, tree) for tree in abstract(config, mesh))
  return jax.jit(train_step, in_shardings=(state, batch), out_shardings=(state, NamedSharding(mesh, P())), donate_argnums=0)


def from_jaxlm(params) -> dict:
  """The weights of jaxlm's tree under the names here."""
  layers = params['layers']
  return {'embed': params['embed'], 'unembed': params['unembed'], 'norm': params['norm']['scale'],
          **{name: layers[name]['scale'] for name in ('norm1', 'norm2')},
          **{name: layers['attention'][name]['w'] for name in 'qkvo'},
          **{name: layers['mlp'][name]['w'] for name in ('gate', 'up', 'down')}}
