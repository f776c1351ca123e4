"""A rehearsal keeps what a run wants of its sizes, and says what would go wrong on the pod."""
import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest

from jaxlm import config as configs
from jaxlm.data import mixture, sources
from jaxlm.errors import JaxlmError, UsageError
from jaxlm.plan import rehearse, sample, shrink
from jaxlm.schema import MeshConfig, layer_kinds, lead
from jaxlm.validate import check_mesh
from tests import common

MESHES = [dict(data=2, fsdp=4, tensor=2), dict(fsdp=64), dict(data=4, fsdp=8, tensor=8), dict(stage=4, fsdp=4, tensor=2),
          dict(context=4, fsdp=8), dict(expert=8, fsdp=4), dict(data=2, stage=2, expert=4, context=2)]


def names() -> list[str]:
  """Every config, with each of its arguments that is in a table; n-grams have no mesh."""
  out = []
  for path in sorted(set(common.shipped()) - {'configs/ngram.py'}):
    spec = importlib.util.spec_from_file_location('c', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table = next((getattr(module, name) for name in ('SIZES', 'MODELS', 'TEMPLATES') if hasattr(module, name)), None)
    out += [f'{path}:{key}' for key in table] if table else [path]
  return out


def sizes_of(**axes) -> dict[str, int]:
  return {f.name: axes[f.name] if f.name in axes else 1 for f in dataclasses.fields(MeshConfig)}


@pytest.mark.parametrize('devices', [0, 8, 24, 64])
@pytest.mark.parametrize('axes', [*MESHES, dict(data=7, tensor=2), dict(fsdp=256, tensor=16), dict(data=5, stage=9), {}], ids=str)
def test_a_smaller_mesh_divides_the_whole_one_and_uses_its_axes(axes, devices):
  sizes = sizes_of(**axes)
  least = math.prod(min(p for p in range(2, n + 1) if n % p == 0) for n in sizes.values() if n > 1)
  limit = devices or max(16, least)
  if least > limit:
    with pytest.raises(UsageError, match=f'--devices={devices}: .* needs {least} at least'):
      shrink.fewer(sizes, devices)
    return
  small = shrink.fewer(sizes, devices)
  assert math.prod(small.values()) <= limit
  for axis, size in sizes.items():
    assert size % small[axis] == 0 and (small[axis] > 1) == (size > 1)
    more = [n for n in range(small[axis] + 1, size + 1) if size % n == 0 and n % small[axis] == 0]
    assert not more or math.prod(small.values()) // small[axis] * more[0] > limit, 'as many devices as fit'


def test_meshes_as_they_shrink():
  assert shrink.fewer(sizes_of(data=2, fsdp=4, tensor=2), 8) == sizes_of(data=2, fsdp=2, tensor=2)
  assert shrink.fewer(sizes_of(data=2, fsdp=4, tensor=2)) == sizes_of(data=2, fsdp=4, tensor=2)
  assert shrink.fewer(sizes_of(data=64, fsdp=4)) == sizes_of(data=8, fsdp=2)  # the axis that is shrunk most grows first
  assert shrink.fewer(sizes_of(data=4, fsdp=4, tensor=4, context=4, expert=4, stage=4)) == dict.fromkeys(sizes_of(), 2)
  with pytest.raises(UsageError, match='needs 142 devices'):
    shrink.fewer(sizes_of(data=71, tensor=4))


@pytest.mark.parametrize('axes', MESHES, ids=str)
def test_shrinking_keeps_what_divides_what_of_every_config(axes):
  """For configs that the mesh suits: shrunk() checks the result as every run is checked; here, that nothing is lost or grows."""
  sizes = sizes_of(**axes)
  small, seen = shrink.fewer(sizes), 0
  for name in names():
    c = configs.load(name)
    try:
      check_mesh(c, sizes)
    except UsageError:
      continue
    s, seen = shrink.shrunk(c, small), seen + 1
    m, n = c.model, s.model
    assert s.mesh == MeshConfig(**small) and s.batch % (small['data'] * small['fsdp'] * small['expert'] * s.microbatches) == 0
    for key in ('D', 'H', 'G', 'K', 'F', 'V', 'N', 'encoder_N', 'P', 'window'):
      assert getattr(n, key) <= getattr(m, key) and (getattr(n, key) > 0) == (getattr(m, key) > 0), (name, key)
    assert n.V < 1100 and n.D <= 4 * 64 and s.length <= 256, name
    assert (n.H > n.G) == (m.H > m.G) and (n.G > 1) == (m.G > 1), name
    kinds, period = layer_kinds(m), len(m.pattern.split())
    assert layer_kinds(n) == kinds[:n.N] and set(layer_kinds(n)) == set(kinds) and (m.N - n.N) % period == 0, name
    assert (n.window < s.length) == (m.window < c.length) and (0 < n.vocab < n.V) == (0 < m.vocab < m.V), name
    assert (s.microbatches > 1) == (c.microbatches > 1) and (s.loss.chunks > 1) <= (c.loss.chunks > 1), name
    assert n.moe.E % small['expert'] == n.moe.E % n.moe.groups == 0 and (n.moe.E > n.moe.top_k) == (m.moe.E > m.moe.top_k), name
    assert (n.moe.groups, n.moe.first, n.moe.top_k) == (m.moe.groups, m.moe.first, m.moe.top_k), name
    assert lead(s).objective.name == lead(c).objective.name and (s.seed, m.dtype, m.remat) == (c.seed, n.dtype, n.remat)
  assert seen >= 4


@pytest.mark.parametrize('changes', [
    {'model.pattern': 'local+first global', 'model.window': 16, 'model.first': 4, 'model.N': 5}, {'loss.over': 'vocabulary'},
    {'model.pattern': 'block+summary', 'model.window': 16, 'model.first': 12}, {'model.rope.share': 0.25, 'model.K': 40},
    {'model.moe.E': 12, 'model.moe.F': 8, 'model.moe.first': 1, 'model.moe.every': 2, 'model.N': 9, 'model.moe.groups': 3,
     'model.moe.top_groups': 2, 'model.moe.top_k': 3}, {'model.lora.rank': 16}, {'model.attention': 'splash'}], ids=str)
def test_what_no_config_has_shrinks_too(changes):
  c = common.config(**{'length': 256, 'batch': 32, 'loss.chunks': 8, **changes})
  s = shrink.shrunk(c, sizes_of(tensor=2, fsdp=2))
  assert set(layer_kinds(s.model)) == set(layer_kinds(c.model)) and (s.model.first > 0) == (c.model.first > 0)
  assert s.model.K * s.model.rope.share % 2 == 0 and (s.model.lora.rank > 0) == (c.model.lora.rank > 0)


FINETUNE = ['translation.py', 'tagging.py', 'question_answering.py', 'dialogue.py:llama3', 'classification.py', 'multitask.py']


@pytest.mark.parametrize('name', FINETUNE)
def test_records_that_are_made_up_are_what_the_config_reads(name, tmp_path):
  """None of their sources is in this tree; and records that are there are read as they were written."""
  c = configs.load(f'configs/finetune/{name}')
  with_data, made_up = sample.take(c, c, tmp_path)
  assert len(made_up) == (2 if c.tasks else 1) and all('is not on this machine' in text for text in made_up)
  again, none = sample.take(c, with_data, tmp_path / '..')
  assert not none
  for run, data in zip(c.tasks or [c], [t.data for t in again.tasks] or [again.data]):
    whole = run.data if c.tasks else c.data
    found = [fields for _, *fields in sources.records(data.source, dataclasses.replace(whole, prefix=''), 'all')]
    assert len(found) == sample.RECORDS


@pytest.mark.parametrize('name', FINETUNE)
def test_something_counts_in_every_batch_of_made_up_records(name, tmp_path):
  c = configs.load(f'configs/finetune/{name}')
  small, _ = sample.take(shrink.shrunk(c, sizes_of(fsdp=4)), c, tmp_path)
  pipeline = mixture.make(small, mixture.prepare(small, tmp_path, lambda text: None))
  for step in range(small.steps):
    assert pipeline.rows(step, 0, small.batch)['weights'].sum() > 0


def test_a_record_without_its_field_is_no_missing_source(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"body": "text"}\n')
  c = common.config(**{'data.source': f'jsonl:{tmp_path}/a.jsonl'})
  with pytest.raises(UsageError, match="nothing in field 'text'"):
    sample.take(c, c, tmp_path)


def test_only_times_may_differ_after_a_restore():
  lines = [{'step': n, 'loss': 5. - n, 'grad_norm': 1.5, 'step_seconds': 0.1 * n} for n in (1, 2, 3)]
  slower = [lines[0], *({**line, 'step_seconds': 9.} for line in lines[1:])]
  assert 'steps 2 to 3' in rehearse.compare(lines, slower)
  with pytest.raises(JaxlmError, match='grad_norm of step 3 was 1.5, and is 1.25'):
    rehearse.compare(lines, [*slower[:2], {**slower[2], 'grad_norm': 1.25}])
  undefined = [*lines, {'step': 3, 'heldout_loss': float('nan')}]
  assert rehearse.compare(undefined, [*slower, {'step': 3, 'heldout_loss': float('nan')}])
  with pytest.raises(JaxlmError, match='of step 3 was'):
    rehearse.compare(lines, slower[:2])
  with pytest.raises(JaxlmError, match='began anew'):
    rehearse.compare(lines, [{**lines[0], 'step_seconds': 0.3}, *slower[1:]])


def launched(*words, **env):
  env = {**os.environ, 'PYTHON': sys.executable, **env}
  return subprocess.run(['launch/rehearse.sh', *words], env=env, capture_output=True, text=True, check=False)


MIXTRAL = ['--topology', 'v5e:4x4', '--config=configs/mixtral.py:8x7b', '--config.mesh.data=2', '--config.mesh.fsdp=4',
           '--config.mesh.tensor=2']


def test_a_mixture_of_experts_on_sixteen_chips(tmp_path):
  out = launched(*MIXTRAL, '--devices=8', f'--workdir={tmp_path}')
  assert out.returncode == 0, out.stdout + out.stderr
  phases = [line.split()[:2] for line in out.stdout.splitlines()[:5]]
  assert phases == [[name, 'OK'] for name in ('config', 'mesh', 'data', 'train', 'restore')]
  # 46.7B parameters and two moments, 12 bytes of float32, over fsdp 4 × tensor 2: 65.3 GiB
  assert 'data 2 × fsdp 4 × tensor 2 = 16: state 65.2' in out.stdout and 'data 2 × fsdp 2 × tensor 2 = 8: 3 steps' in out.stdout
  folder, = tmp_path.iterdir()
  lines = [json.loads(line) for line in (folder / 'resumed' / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == [1, 2, 3] and 'goes on from step 1' in (folder / 'restore.log').read_text()


@pytest.mark.parametrize('words, code, says', [
    ([*MIXTRAL, '--config.mesh.tensor=4'], 2, 'mesh data=2 × fsdp=4 × tensor=4'),
    ([*MIXTRAL, '--config.model.D=4098'], 2, 'model.D=4098'),
    ([*MIXTRAL, '--config.mesh.fsdp=1', '--config.mesh.expert=4', '--config.model.moe.E=6'], 2, 'model.moe.E=6'),
    ([*MIXTRAL, '--config.model.V=31744'], 2, 'model.V=31744'), ([*MIXTRAL, '--devices=4'], 2, '--devices=4'),
    ([*MIXTRAL, '--config.model.DD=4'], 2, 'model.DD'), (MIXTRAL[2:], 2, '--topology'), (['--topology=v5e:2x2'], 2, '--config'),
    ([*MIXTRAL, 'now'], 2, "'now'"), ([*MIXTRAL, '--workdir=README.md/x'], 13, '--workdir=README.md/x'),
    (['--topology=v5e:2x2', '--config=configs/ngram.py'], 2, 'model.kind=ngram')],
    ids=lambda v: v[-1] if isinstance(v, list) else str(v))
def test_what_is_wrong_is_one_line_and_a_code(words, code, says, tmp_path):
  out = launched(*words, TMPDIR=str(tmp_path))
  errors = [line for line in out.stderr.splitlines() if line.startswith('rehearse: ')]
  assert out.returncode == code and len(errors) == 1 and says in errors[0], out.stderr
  assert 'Traceback' not in out.stderr and ' OK ' not in out.stdout.splitlines()[-1:] and not list(tmp_path.iterdir())


def test_a_training_that_fails_hands_on_its_code(tmp_path):
  (tmp_path / 'config.json').write_text(configs.to_json(common.config()).replace('"batch": 8', '"batch": 7'))
  with pytest.raises(rehearse.Failed, match='train: batch=7 .*train.log has all of it') as e:
    rehearse._train(tmp_path, tmp_path / 'run', 2, 'train')  # pylint: disable=protected-access
  assert e.value.code == 2
