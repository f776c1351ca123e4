"""A bad config is one clear line and exit code 2, before jax is even imported."""
import glob
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxlm import config as configs, layout, schema
from jaxlm.errors import UsageError
from jaxlm.models import decoder
from jaxlm.optimizer import make_optimizer
from jaxlm.step import abstract_state

FILE = 'configs/quickstart.py'

BAD = [  # override, and what the line must say
    (('optimizer.learning_rate', '1'), ["'optimizer.learning_rate'", 'optimizer.lr']),
    (('optimiser.lr', '1'), ["'optimiser.lr'", 'optimizer.lr']),
    (('model.d', '64'), ["'model.d'", 'model.D']),
    (('lr', '1e-3'), ["'lr'", 'optimizer.lr']),
    (('steps', 'many'), ['steps', "'many'", 'integer']),
    (('steps', '1.5'), ['steps', '1.5', 'integer']),
    (('optimizer.lr', 'fast'), ['optimizer.lr', "'fast'", 'number']),
    (('model.scan', 'perhaps'), ['model.scan', "'perhaps'", 'true or false']),
    (('optimizer.schedule', 'cosin'), ['optimizer.schedule', "'cosin'", 'did you mean cosine']),
    (('model.G', '3'), ['model.G=3', 'model.H=4']),
    (('model.norm', 'batch'), ['model.norm', "'batch'", 'rms, layer']),
    (('batch', '7'), ['batch=7', 'mesh.data', 'multiple of 2']),
    (('microbatches', '3'), ['microbatches=3', 'batch=']),
    (('model.V', '4095'), ['model.V=4095', 'mesh.tensor=2', '4096']),
    (('model.F', '5'), ['model.F=5', 'mesh.tensor=2', '6']),
    (('model.D', '255'), ['model.D=255', 'mesh.fsdp=2', '256']),
    (('loss.chunks', '7'), ['loss.chunks=7', 'length=256']),
    (('mesh.data', '0'), ['mesh.data=0', '-1']),
    (('steps', '0'), ['steps=0', 'above 0']),
    (('model.P', '8'), ['model.P=8', 'position=learned']),
    (('optimizer.no_decay', '('), ['optimizer.no_decay', 'regular expression']),
    (('data.heldout', '1.0'), ['data.heldout=1.0']),
]


@pytest.mark.parametrize('override, says', BAD, ids=[f'{o[0]}={o[1]}' for o, _ in BAD])
def test_bad_override_names_key_value_and_mend(override, says):
  mesh = [('mesh.data', '1'), ('mesh.fsdp', '2'), ('mesh.tensor', '2'), ('model.G', '2'), ('model.H', '4')]
  with pytest.raises(UsageError) as e:
    configs.load(FILE, [*mesh, override])
  text = str(e.value)
  assert '\n' not in text
  for part in says:
    assert part in text, text


def test_good_overrides_reach_the_config():
  c = configs.load(FILE, [('optimizer.lr', '1'), ('steps', '2_000'), ('model.scan', 'true'), ('data.source', 'text:*')])
  assert (c.optimizer.lr, c.steps, c.model.scan, c.data.source) == (1.0, 2000, True, 'text:*')
  assert isinstance(c.optimizer.lr, float)


def test_config_file_with_argument(tmp_path):
  path = tmp_path / 'c.py'
  path.write_text('from ml_collections import ConfigDict\n'
                  'def get_config(size="4"):\n  return ConfigDict(dict(model=dict(N=int(size))))\n')
  assert configs.load(str(path)).model.N == 4
  assert configs.load(f'{path}:9').model.N == 9


def test_unknown_key_in_a_file(tmp_path):
  path = tmp_path / 'c.py'
  path.write_text('from ml_collections import ConfigDict\n'
                  'def get_config():\n  return ConfigDict(dict(model=dict(layers=2)))\n')
  with pytest.raises(UsageError, match='model.layers'):
    configs.load(str(path))


def test_json_round_trip():
  c = configs.load(FILE)
  assert configs.from_json(configs.to_json(c)) == c


def test_command_line_fails_before_jax_is_imported():
  code = ('import sys\nfrom jaxlm import cli\n'
          'sys.argv = ["jaxlm", "train", "--config=configs/quickstart.py", "--workdir=x", "--config.model.HH=3"]\n'
          'try:\n  cli.main()\nfinally:\n  assert "jax" not in sys.modules, "jax was imported"\n')
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert out.returncode == 2, out.stderr
  assert out.stderr.count('\n') == 1 and 'model.HH' in out.stderr and 'model.H' in out.stderr


@pytest.mark.parametrize('argv, says', [
    (['trian'], 'train'), ([], 'wants one of'), (['train', '--workdir=x'], '--config'),
    (['train', '--config=nope.py', '--workdir=x'], 'nope.py'), (['eval', '--workdir=/nonexistent'], '/nonexistent'),
    (['eval', '--workdir=x', '--contxt=3'], 'contxt'), (['generate', '--workdir=x'], '--prompt'),
    (['eval', '--workdir=x', '--config.steps=3'], 'belongs to train'), (['data', 'shwo'], ''),
])
def test_usage_errors_are_one_line_and_code_2(argv, says):
  out = subprocess.run([sys.executable, '-m', 'jaxlm', *argv], capture_output=True, text=True, check=False)
  assert out.returncode == 2, out.stderr
  assert out.stderr.strip().count('\n') == 0 and says in out.stderr, out.stderr


PUBLISHED = {'gpt2_small': 124_475_904, 'llama_1b': 1_040_254_976, 'llama3_8b': 8_030_261_248}


@pytest.mark.parametrize('path', sorted(glob.glob('configs/*.py')))
def test_every_config_builds_its_state_for_256_devices(path):
  """Shapes and shardings only: no large parameter or moment is on every device, and the count is the published one."""
  c = configs.load(path)
  mesh = AbstractMesh((1, 64, 4) if c.model.G % 4 == 0 and c.model.H % 4 == 0 else (1, 64, 1), layout.AXES,
                      axis_types=(AxisType.Explicit,) * 3)
  with jax.sharding.use_abstract_mesh(mesh):
    state = abstract_state(c, make_optimizer(c.optimizer, c.steps)[0])
    for a in jax.tree.leaves(state):
      replicated = a.sharding is None or all(axis is None for axis in a.sharding.spec)
      assert not replicated or a.size <= 2 ** 20, a
    count = decoder.count_params(c.model)
  assert 0 <= count - schema.approximate_params(c.model) < 0.002 * count
  name = path.removeprefix('configs/').removesuffix('.py')
  if name in PUBLISHED:
    assert count == PUBLISHED[name]
  assert count == sum(int(np.prod(a.shape)) for a in jax.tree.leaves(state['params']))
