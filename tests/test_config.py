"""A bad config is one clear line and exit code 2, before jax is even imported."""
import math
import pathlib
import subprocess
import sys

import pytest

from jaxlm import cli, config as configs
from jaxlm.errors import UsageError
from jaxlm.schema import Config, flatten
from tests import common

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
    (('optimizer.no_decay', '('), ["optimizer.no_decay='('", 'regular expression']),
    (('model.lora.targets', '*q'), ["model.lora.targets='*q'", 'regular expression']),
    (('data.heldout', '1.0'), ['data.heldout=1.0']),
    (('optimizer.lr', '1e999'), ['optimizer.lr=inf', 'finite']),
    (('optimizer.lr', '1' + 400 * '0'), ['optimizer.lr', 'a number, as 0.1']),
    (('seed', str(2 ** 32)), ['seed=4294967296', '32 bits']),
    (('steps', str(2 ** 31)), ['steps=2147483648', '32 bits']),
    (('data.source', 'foo:bar'), ["data.source='foo:bar'", 'wants one of stdlib, text:GLOB']),
    (('data.source', 'json:x'), ["data.source='json:x'", 'did you mean jsonl?']),
    (('data.source', 'text:'), ["data.source='text:'", 'text:GLOB']),
    (('data.source', 'tfds:lm1b'), ["data.source='tfds:lm1b'", 'tfds:NAME/SPLIT']),
    (('data.tokenizer', 'bpe:4k'), ["data.tokenizer='bpe:4k'", 'at least 257']),
]


@pytest.mark.parametrize('override, says', BAD, ids=[f'{o[0]}={o[1]}'[:40] for o, _ in BAD])
def test_bad_override_names_key_value_and_mend(override, says):
  mesh = [('mesh.data', '1'), ('mesh.fsdp', '2'), ('mesh.tensor', '2'), ('model.G', '2'), ('model.H', '4')]
  with pytest.raises(UsageError) as e:
    configs.load(FILE, [*mesh, override])
  text = str(e.value)
  assert '\n' not in text
  for part in says:
    assert part in text, text


PODS = [  # overrides on eight devices, and what the line must say
    ({'mesh.context': '2', 'length': '254', 'loss.chunks': '2'}, ['length=254', 'mesh.context=2', 'multiple of 4']),
    ({'mesh.context': '8', 'loss.chunks': '64'}, ['loss.chunks=64', '256 / 8 = 32']),
    ({'mesh.expert': '2'}, ['model.moe.E=0', 'mesh.expert=2']),
    ({'mesh.expert': '4', 'model.moe.E': '6', 'model.moe.F': '64'}, ['model.moe.E=6', 'mesh.expert=4']),
    ({'mesh.tensor': '2', 'model.moe.E': '4', 'model.moe.F': '63'}, ['model.moe.F=63', 'mesh.tensor=2', '64']),
    ({'mesh.tensor': '2', 'model.moe.E': '4', 'model.moe.F': '64', 'model.moe.shared': '9'}, ['model.moe.shared=9', 'mesh.tensor=2', '10']),
    ({'mesh.stage': '8'}, ['model.N=4', 'mesh.stage=8']),
    ({'mesh.stage': '2', 'model.pipeline.rounds': '4'}, ['model.N=4', 'model.pipeline.rounds=4']),
    ({'mesh.stage': '2', 'batch': '4', 'mesh.fsdp': '4'}, ['model.pipeline.pieces=2', '1 sequences', 'batch=4']),
    ({'mesh.stage': '2', 'model.remat': 'full', 'model.offload': 'q'}, ["model.offload='q'", 'mesh.stage=1']),
    ({'mesh.stage': '2', 'model.dropout': '0.1'}, ['model.dropout=0.1', 'mesh.stage=1']),
    ({'mesh.stage': '2', 'model.pattern': 'local global global global', 'model.window': '8'}, ['mesh.stage=2', 'model.pattern']),
    ({'mesh.context': '2', 'model.kind': 'rnn'}, ['model.kind=rnn', 'mesh.context=2', 'set 1']),
    ({'mesh.context': '2', 'model.moe.E': '4', 'model.moe.F': '64', 'model.moe.dispatch': 'capacity'}, ['capacity', 'mesh.context=2']),
    ({'model.context': 'rings'}, ['model.context', "'rings'", 'did you mean ring']),
    ({'loss.over': 'vocabulary', 'loss.chunks': '7'}, ['loss.chunks=7', 'model.V=']),
]


@pytest.mark.parametrize('overrides, says', PODS, ids=[' '.join(f'{k}={v}' for k, v in o.items()) for o, _ in PODS])
def test_what_a_mesh_cannot_cut_is_one_line(overrides, says):
  whole = {'mesh.data': '1', 'mesh.fsdp': '1', 'model.N': '4', 'model.H': '4', 'model.G': '4', **overrides}
  with pytest.raises(UsageError) as e:
    configs.load(FILE, list(whole.items()))
  text = str(e.value)
  assert '\n' not in text
  for part in says:
    assert part in text, text


VOCABULARY = {'loss.over': 'vocabulary', 'loss.chunks': 8}
CHUNKS = [  # family, changes on eight devices, and what the line must say
    ('bert', {'mesh.tensor': 4, 'mesh.fsdp': 2, **VOCABULARY}, '66 rows of model.V=264 that a device of mesh.tensor=4 has; set 2'),
    ('t5', {'mesh.tensor': 8, 'mesh.fsdp': 1, 'loss.over': 'vocabulary'}, '360 / 8 = 45 rows of model.V=360'),
    ('lstm', {'mesh.tensor': 2, 'mesh.fsdp': 4, **VOCABULARY}, '264 / 2 = 132 rows of model.V=264'),
    ('luong', {'mesh.tensor': 2, 'mesh.fsdp': 4, **VOCABULARY}, '264 / 2 = 132 rows of model.V=264'),
    ('llama', {'mesh.stage': 3, 'mesh.fsdp': 1, 'batch': 3, 'model.D': 33, **VOCABULARY, 'loss.chunks': 6}, '264 / 3 = 88 rows'),
    ('llama', {'mesh.context': 4, 'mesh.fsdp': 2, 'loss.chunks': 16}, '32 / 4 = 8 targets of a row of length=32 that'),
    ('bert', {'loss.chunks': 3}, '8 targets of a row of length=32; set 1'),  # a quarter of it is masked
    ('t5', {'loss.chunks': 3}, '32 targets of a row of length=32; set 1'),  # of the decoder's rows, not of objective.source=48
]


@pytest.mark.parametrize('family, changes, says', CHUNKS, ids=[f'{f}-{c}' for f, c, _ in CHUNKS])
def test_chunks_of_the_loss_must_divide_what_a_device_has_whatever_the_kind(family, changes, says):
  """In the step they would be a traceback of a reshape."""
  with pytest.raises(UsageError) as e:
    common.config(family, **changes)
  assert str(e.value).startswith('loss.chunks=') and says in str(e.value)


def test_chunks_are_not_asked_of_what_has_no_such_loss():
  heads = {'model.C': 2, 'objective.name': 'classify', 'model.head': 'classify', 'data.target': 'a', 'data.classes': 'x|y'}
  common.config('bert', length=30, **{**heads, 'loss.chunks': 8})
  configs.load('configs/ngram.py', [('length', '30'), ('loss.chunks', '8')])


def test_no_number_that_is_not_finite_passes():
  """Of whatever key: 1e999 is a number to Python, as are Infinity and NaN to its JSON."""
  keys = [key for key, value in flatten(Config()).items() if type(value) is float]
  assert len(keys) > 40
  for key in keys:
    for value in (math.inf, -math.inf, math.nan):
      with pytest.raises(UsageError, match=f'^{key}='):
        configs.from_flat({key: value})
  with pytest.raises(UsageError, match='tasks.a.weight=nan'):
    configs.from_flat({'tasks.a.weight': math.nan})


@pytest.mark.parametrize('family, targets, says', [
    ('llama', 'attn/q', 'there are layers/attention/q/w, layers/attention/k/w'), ('llama', '', 'no weight'),
    ('gpt2', 'gate', 'no weight'), ('llama', '^embed', 'no weight'), ('lstm', 'attention/(q|v)/w', 'there are layers/x/w, layers/h/w')])
def test_pairs_of_low_rank_for_no_weight_are_refused(family, targets, says):
  with pytest.raises(UsageError) as e:
    common.config(family, **{'model.lora.rank': 2, 'model.lora.targets': targets})
  assert str(e.value).startswith(f'model.lora.targets={targets!r}: ') and says in str(e.value)
  common.config(family, **{'model.lora.targets': targets})  # without any, nothing is asked of them


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
    (['train', '--config=nope.py', '--workdir=x'], 'nope.py'),
    (['train', '--config=configs/quickstart.py:x', '--workdir=x'], 'takes no argument; leave :x out'),
    (['eval', '--workdir=/nonexistent'], '/nonexistent'),
    (['eval', '--workdir=x', '--contxt=3'], 'contxt'), (['generate', '--workdir=x'], '--prompt'),
    (['eval', '--workdir=x', '--config.steps=3'], 'belongs to train'), (['data', 'shwo'], ''),
])
def test_usage_errors_are_one_line_and_code_2(argv, says):
  out = subprocess.run([sys.executable, '-m', 'jaxlm', *argv], capture_output=True, text=True, check=False)
  assert out.returncode == 2, out.stderr
  assert out.stderr.strip().count('\n') == 0 and says in out.stderr, out.stderr


def test_a_size_that_a_config_file_does_not_know():
  with pytest.raises(UsageError, match="the file knows no '9b'"):
    configs.load('configs/llama3.py:9b')


FILES = [  # a config file, what is asked of it, and what the line must say
    ('def get_config():\n  return {}\n', ':x', 'takes no argument; leave :x out'),
    ('def get_config(size):\n  return {}\n', '', 'wants an argument, '),
    ('def get_config(size):\n  return {"steps": int(size)}\n', ':x', 'line 2 of the file raises ValueError: invalid literal'),
    ('SIZES = {"a": {}}\ndef get_config(size="a"):\n  return SIZES[size]["b"]\n', '', "line 3 of the file raises KeyError: 'b'"),
    ('def get_config(:\n', '', 'raises SyntaxError: invalid syntax (c.py, line 1)'),
    ('import no_such_module\n', '', "line 1 of the file raises ModuleNotFoundError: No module named 'no_such_module'"),
    ('raise ValueError("two\\nlines")\n', '', 'raises ValueError: two'), ('raise ValueError\n', '', 'raises ValueError: '),
    ('\xff', '', 'raises SyntaxError'), ('steps = 3\n', '', 'no get_config()'), ('get_config = 3\n', '', 'no get_config()'),
    ('def get_config():\n  pass\n', '', 'returns a NoneType'), ('def get_config():\n  return {4: 5}\n', '', 'keys that are no texts'),
]


@pytest.mark.parametrize('text, argument, says', FILES, ids=[says for *_, says in FILES])
def test_whatever_is_wrong_with_a_config_file_is_one_line(tmp_path, text, argument, says):
  (tmp_path / 'c.py').write_text(text, encoding='latin-1')
  with pytest.raises(UsageError) as e:
    configs.load(f'{tmp_path}/c.py{argument}')
  assert str(e.value).startswith(f'--config={tmp_path}/c.py{argument}: ') and says in str(e.value) and '\n' not in str(e.value)


def test_a_config_file_imports_what_is_beside_it(tmp_path):
  """Of each folder its own, though both have one name; and nothing is left on the path."""
  before = list(sys.path)
  for name, steps in (('a', 3), ('b', 4)):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'beside.py').write_text(f'STEPS = {steps}')
    (tmp_path / name / 'c.py').write_text('import beside\ndef get_config():\n  return dict(steps=beside.STEPS)')
    assert configs.load(f'{tmp_path}/{name}/c.py').steps == steps
  assert sys.path == before and 'beside' not in sys.modules
  (tmp_path / 'code.py').write_text('raise ValueError("not that of Python")')
  (tmp_path / 'd.py').write_text('import code\ndef get_config():\n  return dict(steps=len(code.__name__))')
  assert configs.load(f'{tmp_path}/d.py').steps == 4


ANSWERS = ['translation', 'translation:gru', 'classification', 'classification:yes|no|perhaps', 'tagging', 'question_answering',
           'summarisation', 'dialogue', 'dialogue:chatml', 'code', 'code:8']


@pytest.mark.parametrize('name', ANSWERS)
def test_configs_for_fine_tuning_are_good(name):
  file, _, argument = name.partition(':')
  c = configs.load(f'configs/finetune/{file}.py' + (f':{argument}' if argument else ''))
  choices = len([x for x in c.data.classes.split('|') if x])
  assert (c.data.target or c.data.template) and c.model.C == (2 if c.objective.name == 'span' else choices)
  assert c.model.lora.rank == (8 if name == 'code:8' else 0)


def test_an_at_sign_in_a_folder_is_no_topology_and_a_colon_no_argument(tmp_path):
  """FILE.py[:SIZE]@TOPOLOGY is asked of configs/pods.json; a@b:c/config.json is a file."""
  folder = tmp_path / 'a@b:c'
  folder.mkdir()
  (folder / 'config.json').write_text(configs.to_json(configs.load(FILE)))
  (folder / 'c.py').write_text(pathlib.Path(FILE).read_text(encoding='utf-8'), encoding='utf-8')
  assert configs.load(str(folder / 'config.json')) == configs.load(str(folder / 'c.py')) == configs.load(FILE)
  with pytest.raises(UsageError, match='@v5e:16x16: nothing is recommended for it; there is nothing for this config'):
    configs.load(f'{folder}/c.py@v5e:16x16')


def test_a_field_that_may_change_must_be_one():
  with pytest.raises(UsageError, match=r'--allow_change=optimizer.lrr: the config has no such field; did you mean optimizer.lr'):
    cli.run(['train', f'--config={FILE}', '--workdir=/nowhere', '--allow_change=optimizer.lrr'])
