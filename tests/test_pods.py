"""The step compiled for TPU pods by their own compiler: kernels and collectives are those that were asked for."""
import functools
import json
import re

import jax
import pytest

from jaxlm import cli, config as configs, layout
from jaxlm.errors import UsageError
from jaxlm.plan import compile as compiling, hlo, traffic
from jaxlm.plan.job import job
from jaxlm.plan.topology import parse
from jaxlm.schema import MeshConfig
from tests import campaigns

SMALL = {'model.D': 256, 'model.H': 4, 'model.G': 2, 'model.K': 128, 'model.F': 512, 'model.N': 4, 'model.V': 1024,
         'model.dtype': 'bfloat16', 'model.remat': 'full', 'batch': 8, 'length': 512, 'loss.chunks': 2, 'loss.over': 'vocabulary'}
MOE = {'model.moe.E': 8, 'model.moe.F': 512}


@functools.cache
def step(topology, *changes):
  return compiling.step(configs.from_flat({**SMALL, **dict(changes)}), topology)


def compiled(changes, topology='v5e:2x4'):
  """Once, for all tests that look at it."""
  return step(topology, *({'model.remat': 'full'} | changes).items())


@pytest.mark.parametrize('topology', ['v5p:2x2x2', 'v6e:2x4', 'tpu7x:2x2x1'])
def test_later_chips_send_by_their_sparse_cores(topology):
  """Weights of D = 1,024, of which a device has 128, whole lanes: all are gathered twice in bfloat16 and their gradients summed once in
  float32, asynchronously, and hlo.py counts every byte. (On so few chips a compiler may sum and then cut, in place of scattering.)"""
  c = compiled({'model.D': 1024, 'model.F': 4096, 'model.H': 2, 'model.N': 3, 'mesh.fsdp': 8}, topology)
  weights = 4 * 1024 * 2 * 128 + 3 * 1024 * 4096  # q, k, v, o; gate, up, down
  of_layers = lambda *kinds: sum(op.bytes for op in hlo.collectives(c.ops) if op.kind in kinds and op.times == 3 and op.is_async)
  assert of_layers('all-gather') == 2 * 2 * weights
  assert of_layers('reduce-scatter', 'all-reduce') == 4 * weights


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


def runs(c, kernel):
  """How often a kernel runs in a step."""
  return sum(op.times for op in hlo.kernels(c.ops) if op.name.startswith(kernel))


@pytest.mark.parametrize('mesh, times', [
    pytest.param({'mesh.fsdp': 8}, 1, marks=campaigns.pods), ({'mesh.fsdp': 4, 'mesh.context': 2}, 5)])  # in a layer, once
def test_the_kernel_does_not_run_again_where_what_it_made_is_kept(mesh, times):
  full, kept = (compiled({**mesh, 'model.remat': name}) for name in ('full', 'attention'))
  assert (runs(full, 'splash_mha_fwd'), runs(kept, 'splash_mha_fwd')) == (2 * times * SMALL['model.N'], times * SMALL['model.N'])
  assert runs(full, 'splash_mha_dq') == runs(kept, 'splash_mha_dq') == times * SMALL['model.N']


def test_what_is_offloaded_is_in_the_hosts_memory():
  """S(5) in the compiler's words. Of its loops over layers it peels off a turn, which is counted apart. Two rows a device: of one,
  libtpu 0.0.52 fails on attention's sums."""
  c = compiled({'mesh.fsdp': 8, 'batch': 16, 'model.offload': 'block_in attention'})
  assert re.search(r'bf16\[4,2,512,256\]\{[^}]*S\(5\)\}', c.text)
  assert re.search(r'bf16\[4,2,4,512,128\]\{[^}]*S\(5\)\}', c.text)
  assert runs(c, 'splash_mha_fwd') == runs(c, 'splash_mha_dq') == SMALL['model.N']


@campaigns.pods
def test_offloaded_moments_are_no_arguments_on_the_device():
  """Of three float32 copies of the parameters, one is left."""
  plain, offloaded = (compiled({'mesh.fsdp': 8, 'optimizer.offload': value}) for value in (False, True))
  assert offloaded.arguments == pytest.approx(plain.arguments / 3, rel=0.05) and offloaded.peak < plain.peak


@campaigns.pods
def test_all_keys_come_to_all_where_a_ring_is_not_asked_for():
  c = compiled({'mesh.fsdp': 4, 'mesh.context': 2, 'model.context': 'gather'})
  assert any('splash' in op.name for op in hlo.kernels(c.ops)) and not in_layers(c)


def test_rows_go_to_their_experts_by_one_ragged_exchange():
  """Of a layer's three products each runs forward, again for the backward pass (remat), and backward for both of its gradients."""
  c = compiled({**MOE, 'mesh.fsdp': 2, 'mesh.expert': 4})
  kinds = {op.kind for op in hlo.collectives(c.ops)}
  assert 'ragged-all-to-all' in kinds
  assert (runs(c, 'gmm'), runs(c, 'tgmm')) == (9 * SMALL['model.N'], 3 * SMALL['model.N'])


def test_int8_projections_are_multiplied_and_gathered_as_int8():
  """Each of the 7 of a layer forward, backward for both gradients, and but for the last again forward (remat)."""
  c = compiled({'mesh.fsdp': 8, 'model.matmul': 'int8'})
  assert len(re.findall(r' = s32\[[\d,]+\]\S* (?:convolution|dot)\(', c.text)) >= 4 * 7 - 1
  gathered = re.findall(r' = (\w+)\[([\d,]+)\]\S* all-gather\(', c.text)
  weights = {'256,4,128', '256,2,128', '4,128,256', '256,512', '512,256'}
  assert {dtype for dtype, shape in gathered if shape in weights} == {'s8'}


@campaigns.pods
def test_experts_of_int8_values_are_gathered_and_multiplied_as_such():
  """All products but those of the weights' gradients, which are of bfloat16."""
  c = compiled({**MOE, 'mesh.fsdp': 8, 'model.matmul': 'int8'})
  assert (runs(c, 'gmm_scaled'), runs(c, 'tgmm')) == (9 * SMALL['model.N'], 3 * SMALL['model.N'])
  assert not [op.name for op in hlo.kernels(c.ops) if re.match(r'gmm(?!_)', op.name)]
  D, F, E = SMALL['model.D'], MOE['model.moe.F'], MOE['model.moe.E']
  gathered = re.findall(r' = \(?(\w+)\[([\d,]+)\]\S* all-gather', c.text)
  assert {dtype for dtype, shape in gathered if shape == f'{E},{D},{F}'} == {'s8'}


@campaigns.pods
def test_stages_hand_on_to_their_neighbours():
  c = compiled({'mesh.fsdp': 4, 'mesh.stage': 2, 'batch': 16, 'model.pipeline.rounds': 2})
  assert any(op.kind == 'collective-permute' and op.times > 1 for op in hlo.collectives(c.ops))


@pytest.mark.parametrize('pod, sizes', [('v5p:4x4x4', {'fsdp': 64}), ('v5p:4x4x4', {'data': 2, 'fsdp': 32}), ('v6e:8x8', {'fsdp': 64})], ids=str)
def test_only_over_all_three_rings_of_a_slice_are_wholes_added_up(pod, sizes):
  """What traffic.summed says of a weight that is gathered over mesh.fsdp, asked of the compiler."""
  mesh = layout.make_mesh(MeshConfig(**sizes), compiling.devices(parse(pod)))
  product = lambda x_BD, w_DF: x_BD @ jax.sharding.reshard(w_DF, jax.P(None, None))
  of = lambda spec: jax.ShapeDtypeStruct((4096, 4096), 'bfloat16', sharding=jax.sharding.NamedSharding(mesh, spec))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = jax.jit(product).trace(of(jax.P(('data', 'fsdp'))), of(jax.P('fsdp'))).lower(lowering_platforms=('tpu',))
  kinds = {op.kind for op in hlo.collectives(compiling.of(lowered, mesh).ops)}
  j = job(configs.from_flat({**SMALL, 'batch': 64}), {**dict.fromkeys(layout.AXES, 1), **sizes}, parse(pod))
  assert kinds == {'all-reduce' if traffic.summed(j, ('fsdp',)) else 'all-gather'}


def test_a_topology_that_does_not_exist_is_refused():
  with pytest.raises(UsageError, match='--topology=v5e:3x999'):
    compiling.step(configs.from_flat(SMALL), 'v5e:3x999')


def test_plans_are_verified_by_the_compiler(tmp_path, capsys):
  """jaxlm plan --verify: compiled beside predicted, and the program is kept. D of a device is a whole row of lanes, so that arrays
  are not padded."""
  file, out, program = tmp_path / 'small.py', tmp_path / 'plan.json', tmp_path / 'step.hlo'
  model = {key.removeprefix('model.'): value for key, value in SMALL.items() if key.startswith('model.')}
  file.write_text('from ml_collections import ConfigDict\ndef get_config():\n'
                  f'  return ConfigDict(dict(batch=16, length=512, model=dict({model!r}), '
                  'loss=dict(chunks=2, over="vocabulary")))\n')
  cli.run(['plan', f'--config={file}', '--topology=v5e:2x4', '--verify', '--best=1', f'--hlo={program}', f'--json={out}',
           '--config.mesh.data=2', '--config.mesh.tensor=2', '--config.model.D=512', '--config.model.remat=full'])
  result = json.loads(out.read_text())
  assert result['verified'] and result['compile_seconds'] > 0 and (result['mesh']['data'], result['mesh']['fsdp'], result['mesh']['tensor']) == (2, 2, 2)
  assert result['hbm_gib']['arguments'] == pytest.approx(result['predicted_hbm_gib']['arguments'], rel=0.03)
  assert result['hbm_gib']['peak'] > result['hbm_gib']['arguments'] and result['fits']
  assert 0 < result['compiled']['mfu'] < 1
  sent = {s['kind']: s['bytes'] for s in result['compiled']['collectives']}
  kept = hlo.read(program.read_text())
  assert sent and sum(sent.values()) == sum(op.times * op.bytes for op in hlo.collectives(kept))
  assert 'hidden behind other work' in capsys.readouterr().out
  assert hlo.seconds(kept, 1.5e9) == pytest.approx(result['compiled']['seconds']['fusions'])
