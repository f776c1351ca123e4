"""Attention kernels, one signature: (how, q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows, bias_HLM) → o_BLHK.

A new one is a function and a line of ATTENTION. Kernels see what one device holds of the batch and the heads, and know
nothing of the mesh (`attend` puts them under shard_map). They tag as 'attention' (remat.py) what they make, and with it what their
backward pass wants of the forward pass, if they have one of their own. Values may have another head dim than queries and keys. They
agree with each other in tests/test_kernels.py.
"""
import functools

import jax
import jax.numpy as jnp

from jaxlm import layout
from jaxlm.errors import UsageError
from jaxlm.kernels import context, cudnn, dense, splash
from jaxlm.kernels.patterns import How, Rows, allowed
from jaxlm.schema import ModelConfig

ON_ALL = {'dot_product': dense.dot_product, 'blocked': dense.blocked, 'plain': dense.plain}  # platforms, and any length
ATTENTION = {**ON_ALL, 'splash': splash.splash, 'cudnn': cudnn.cudnn}


def attend(cfg: ModelConfig, how: How, q_BLHK, k_BMGK, v_BMGK, q_rows: Rows, k_rows: Rows, bias_HLM=None):
  """Attention on the mesh by the kernel that the config names; 'auto' is the fastest known for the mesh's platform that can do
  this. Rows that mesh.context cuts are in zigzag order (context.py)."""
  L, M, S = q_BLHK.shape[1], k_BMGK.shape[1], layout.shards('L')
  refused = {'splash': splash.refusal(how, L // S, M // S, bias_HLM), 'cudnn': cudnn.refusal(how, q_BLHK, k_BMGK, v_BMGK, bias_HLM)}
  name = chosen(cfg.attention, layout.platform(), refused)
  arrays, of_row = (q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows), ()
  if S == 1:
    kernel = functools.partial(ATTENTION[name], how)
  elif goes_round(cfg, name, how, L // S, bias_HLM):
    kernel = functools.partial(context.ring, 'splash' if name == 'splash' else 'dense', how)
  elif name == 'splash':
    heads = q_BLHK.shape[2] // layout.shards('H')
    of_row = splash.make(how, heads, context.places(L, S), M, context.PlaceOf(M, S), S)
    kernel = functools.partial(context.gathered, splash.apply, how)
  else:
    kernel = functools.partial(context.gathered, ATTENTION[name], how)

  def masked(q_BLHK, k_BMGK, v_BMGK, q, k, *more):
    o_BLHK = kernel(q_BLHK, k_BMGK, v_BMGK, q, k, *more)
    if q_rows is k_rows:  # a token sees at least itself
      return o_BLHK
    some_BL = (q.segments_BL[:, :, None] == k.segments_BL[:, None]).any(-1)
    return jnp.where(some_BL[..., None, None], o_BLHK, 0)
  check = S == 1 and name != 'splash'
  if of_row:
    return _on_mesh(masked, layout.spec('BLHK'), *arrays, *splash.cut(of_row, context.AXIS), check=check)
  return _on_mesh(masked, layout.spec('BLHK'), *arrays, bias_HLM, layout.spec('HL'), check=check)


def goes_round(cfg: ModelConfig, name: str, how: How, L: int, bias_HLM=None) -> bool:
  """Whether a layer's keys go round mesh.context: they can under a causal mask and with no bias of relative positions, which each
  device has for all keys; and splash knows no other mask by halves."""
  able = how.where == 'global' and (L // 2) % splash.LANES == 0 if name == 'splash' else True
  return cfg.context == 'ring' and how.causal and bias_HLM is None and able


FASTEST = {'cpu': 'blocked', 'tpu': 'splash', 'gpu': 'cudnn'}  # on each platform, where it can


def chosen(name: str, platform: str, refused: dict[str, str]) -> str:
  """The kernel to use on a platform; refused: kernel → why it cannot do this, or ''."""
  if refused.get(name):
    raise UsageError(f'model.attention={name}: {refused[name]}; set auto')
  if name != 'auto':
    return name
  fastest = FASTEST.get(platform, 'dot_product')
  return 'dot_product' if refused.get(fastest) else fastest


def shown(how: How, q_BLHK, k_BMGK, v_BMGK, q_rows: Rows, k_rows: Rows, bias_HLM=None):
  """(o_BLHK, p_BHLM float32): what `attend` by 'plain' makes on the mesh, and the weights it makes it with; those of a
  query that sees no key are 0."""
  def kernel(q_BLHK, k_BMGK, v_BMGK, q, k, *bias):
    allowed_BLM = allowed(how, q, k)
    p_BGRLM = dense.weights(how, q_BLHK, k_BMGK, allowed_BLM, *bias) * allowed_BLM.any(-1)[:, None, None, :, None]
    return dense.weigh(p_BGRLM, v_BMGK), p_BGRLM.reshape(p_BGRLM.shape[0], -1, *p_BGRLM.shape[3:])
  specs = (layout.spec('BLHK'), jax.P(*layout.spec('BH')))
  return _on_mesh(kernel, specs, q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows, bias_HLM, layout.spec('H'))


def _on_mesh(kernel, out_specs, q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows, more, more_specs, check=True):
  """`kernel` on what each device holds of the batch and the heads. check: of how its results vary over the mesh, which Pallas
  does not say."""
  rows = Rows(layout.spec('BL'), layout.spec('BL'))
  in_specs = (layout.spec('BLHK'), layout.spec('BMGK'), layout.spec('BMGK'), rows, rows)
  arrays = jax.tree.map(jax.sharding.reshard, (q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows), in_specs)
  if more is not None:
    arrays, in_specs = (*arrays, more), (*in_specs, more_specs)
  return jax.shard_map(kernel, in_specs=in_specs, out_specs=out_specs, check_vma=check)(*arrays)
