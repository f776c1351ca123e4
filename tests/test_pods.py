"""The step compiled for TPU pods by their own compiler: kernels and collectives are those that were asked for."""
import pytest

from jaxlm import config as configs
from jaxlm.errors import UsageError
from jaxlm.plan import compile as compiling, hlo

SMALL = {'model.D': 256, 'model.H': 4, 'model.G': 2, 'model.K': 128, 'model.F': 512, 'model.N': 4, 'model.V': 1024,
         'model.dtype': 'bfloat16', 'model.remat': 'full', 'batch': 8, 'length': 512, 'loss.chunks': 2, 'loss.over': 'vocabulary'}
MOE = {'model.moe.E': 8, 'model.moe.F': 512}


def compiled(changes):
  return compiling.step(configs.from_flat({**SMALL, **changes}), 'v5e:2x4')


def in_layers(c):
  """What is sent to neighbours in the loop over layers; rows are brought into zigzag order outside of it."""
  return [op for op in hlo.collectives(c.ops) if op.kind == 'collective-permute' and op.times == SMALL['model.N']]


def test_splash_goes_round_the_ring_and_loops_are_counted():
  c = compiled({'mesh.fsdp': 4, 'mesh.context': 2})
  assert c.mesh['context'] == 2 and 0 < c.arguments < c.peak < 1
  kernels = {op.name.split('.')[0]: op for op in hlo.kernels(c.ops) if 'splash' in op.name}
  assert {name.split('_segmented')[0] for name in kernels} == {'splash_mha_fwd', 'splash_mha_dq', 'splash_mha_dkv'}
  assert all(op.times == SMALL['model.N'] for op in kernels.values())  # in the loop over layers
  assert in_layers(c) and all(op.is_async for op in in_layers(c))


def test_all_keys_come_to_all_where_a_ring_is_not_asked_for():
  c = compiled({'mesh.fsdp': 4, 'mesh.context': 2, 'model.context': 'gather'})
  assert any('splash' in op.name for op in hlo.kernels(c.ops)) and not in_layers(c)


def test_rows_go_to_their_experts_by_one_ragged_exchange():
  c = compiled({**MOE, 'mesh.fsdp': 2, 'mesh.expert': 4})
  kinds = {op.kind for op in hlo.collectives(c.ops)}
  assert 'ragged-all-to-all' in kinds


def test_stages_hand_on_to_their_neighbours():
  c = compiled({'mesh.fsdp': 4, 'mesh.stage': 2, 'batch': 16, 'model.pipeline.rounds': 2})
  assert any(op.kind == 'collective-permute' and op.times > 1 for op in hlo.collectives(c.ops))


def test_a_topology_that_does_not_exist_is_refused():
  with pytest.raises(UsageError, match='--topology=v5e:3x999'):
    compiling.devices('v5e:3x999')
