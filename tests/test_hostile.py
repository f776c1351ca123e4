"""No folder that is damaged or hostile comes in, nor ends in a traceback."""
import json
import pickle
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from tests.test_gguf import refuse
from tests.test_interop import saved, tensors  # pylint: disable=unused-import  # a fixture


def change(file, how):
  """how(what the JSON file says) is what it says next."""
  return lambda folder: (folder / file).write_text(json.dumps(how(json.loads((folder / file).read_text()))))


def raw(how, file='model.safetensors'):
  return lambda folder: (folder / file).write_bytes(how((folder / file).read_bytes()))


def index(where):
  return lambda folder: (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': where}))


def tensor(name, how):
  """`name` becomes how(what it was); None: it goes."""
  def damage(folder):
    new = {**tensors(folder), name: how(tensors(folder).get(name))}
    safetensors.torch.save_file({k: t for k, t in new.items() if t is not None}, folder / 'model.safetensors')
  return damage


def config_with(key, value):
  return change('config.json', lambda c: {k: v for k, v in {**c, key: value}.items() if v != 'gone'})


GONE = lambda file: lambda folder: (folder / file).unlink()
Q, FILE = 'model.layers.1.self_attn.q_proj.weight', 'model.safetensors: cannot be read'
ENDS = lambda value: change('generation_config.json', lambda c: {'eos_token_id': value})
HEADER = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[9,13]}}'
HOSTILE = {  # what is done to the folder, and what the line must name
    'cut short': (raw(lambda b: b[:-100]), FILE), 'cut in the header': (raw(lambda b: b[:50]), FILE),
    'empty': (raw(lambda b: b''), FILE),
    'a header of 2**60 bytes': (raw(lambda b: (2 ** 60).to_bytes(8, 'little') + b[8:]), FILE),
    'offsets beyond the file': (raw(lambda b: len(HEADER).to_bytes(8, 'little') + HEADER), FILE),
    'config is a list': (change('config.json', lambda c: [c]), r'config.json: is no JSON object'),
    'config is cut short': (raw(lambda b: b[:40], 'config.json'), 'config.json: cannot be read'),
    'config is binary': (raw(lambda b: b'\xff\xfe', 'config.json'), 'config.json: cannot be read'),
    'config is deep': (raw(lambda b: b'{"a":' * 100_000, 'config.json'), 'config.json: cannot be read'),
    'config is gone': (GONE('config.json'), 'config.json: cannot be read'),
    'only a model_type': (change('config.json', lambda c: {'model_type': 'llama'}), 'config.json: has no hidden_size'),
    **{f'{key}={str(value)[:20]}': (config_with(key, value), match) for key, value, match in [
        ('vocab_size', 'gone', 'config.json: .*vocab_size'), ('vocab_size', 200, 'tokenizer has 257 tokens.*200'),
        ('model_type', 'xlnet', "config.json: model_type='xlnet'"), ('model_type', ['llama'], 'config.json: model_type'),
        ('model_type', 'gemma3', 'config.json: has no text_config'), ('num_attention_heads', 0, 'model.H'),
        ('hidden_size', 'wide', 'model.D'), ('hidden_size', 32.5, 'model.D'), ('hidden_size', -32, 'model.D'),
        ('hidden_size', 10 ** 15, 'model.D'), ('head_dim', 10 ** 9, 'model.K'), ('rms_norm_eps', 10 ** 400, 'config.json'),
        ('num_hidden_layers', 10 ** 12, 'num_hidden_layers'), ('rope_parameters', 'default', 'config.json'),
        ('rope_parameters', {'rope_theta': 'x'}, 'config.json'), ('max_position_embeddings', 'x', 'max_position_embeddings'),
        ('hidden_act', 'relu', "hidden_act='relu'")]},
    'an end that is no token': (ENDS(9999), 'eos_token_id=9999'), 'an end that is text': (ENDS('x'), "eos_token_id='x'"),
    'generation_config is a list': (change('generation_config.json', lambda c: []), 'generation_config.json'),
    **{f'an index to {where}': (index(where), match) for where, match in [
        ({'a': '../hf2/model.safetensors'}, r"index.json: names '\.\./hf2"), ({'a': '/etc/passwd'}, 'index.json: names'),
        ({'a': '..'}, 'index.json: names'), (['model.safetensors'], 'index.json: names'), ({'a': 5}, 'index.json: names 5'),
        ({'a': 'model-2.safetensors'}, 'model-2.safetensors: cannot be read')]},
    'half of a tensor': (tensor(Q, lambda t: t[:16].clone()), rf'{Q} is \[16, 32\].*\[32, 32\]'),
    'a tensor flat': (tensor(Q, lambda t: t.flatten()), rf'{Q} is \[1024\]'),
    'a tensor gone': (tensor(Q, lambda t: None), f'has no tensor {Q}'),
    'a bias too many': (tensor(Q.replace('weight', 'bias'), lambda t: torch.zeros(32)), 'holds .*q_proj.bias'),
    'a layer too many': (tensor(Q.replace('1', '3'), lambda t: torch.zeros(32, 32)), 'holds model.layers.3'),
    'integers': (tensor(Q, lambda t: t.to(torch.int32)), f'model.safetensors: tensor {Q} is I32'),
    'floats of 8 bits': (tensor(Q, lambda t: t.to(torch.float8_e4m3fn)), f'model.safetensors: tensor {Q} is F8_E4M3'),
    'no tokenizer': (GONE('tokenizer.json'), 'has no tokenizer.json'),
    'a tokenizer of another kind': (change('tokenizer.json', lambda t: {'model': 5}), 'its tokenizer cannot be read'),
    'a tokenizer of no text': (raw(lambda b: b'\xff', 'tokenizer.json'), 'its tokenizer cannot be read'),
}


@pytest.mark.parametrize('case', HOSTILE)
def test_hostile_folders_are_refused_in_one_line(case, saved, tmp_path):
  damage, match = HOSTILE[case]
  for name in ('hf', 'hf2'):
    shutil.copytree(saved('llama 3')[1], tmp_path / name)
  damage(tmp_path / 'hf')
  refuse(tmp_path / 'hf', tmp_path / 'run', match)


class Bomb:
  """Unpickled, it makes a file."""

  def __init__(self, marker):
    self.marker = marker

  def __reduce__(self):
    return (open, (str(self.marker), 'w'))


def test_a_pickle_is_not_opened(saved, tmp_path):
  shutil.copytree(saved('llama 3')[1], tmp_path / 'hf', ignore=shutil.ignore_patterns('*.safetensors'))
  (tmp_path / 'hf' / 'pytorch_model.bin').write_bytes(pickle.dumps(Bomb(tmp_path / 'marker')))
  refuse(tmp_path / 'hf', tmp_path / 'run', 'pytorch_model.bin is a pickle')
  for words in (['import', str(tmp_path / 'hf')], ['import', str(tmp_path / 'none.gguf')]):
    out = subprocess.run([sys.executable, '-m', 'jaxlm', *words, f'--workdir={tmp_path}/run'], capture_output=True,
                         text=True, check=False)
    assert out.returncode == 2 and out.stderr.startswith(f'jaxlm: {words[1]}') and out.stderr.count('\n') == 1, out.stderr
  assert not (tmp_path / 'marker').exists() and not (tmp_path / 'run').exists()
  pickle.loads((tmp_path / 'hf' / 'pytorch_model.bin').read_bytes()).close()
  assert (tmp_path / 'marker').exists()  # it would have been
