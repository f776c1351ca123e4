"""The command line, as processes that are killed."""
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import jaxlm
from jaxlm.checkpoint import steps
from tests import common
from tests.test_checkpoint import losses, metrics, state_of

ENV = {**os.environ, 'XLA_FLAGS': '', 'JAX_NUM_CPU_DEVICES': '2'}
STEPS = 200


def command(*words):
  return [sys.executable, '-m', 'jaxlm', *words]


def train_command(texts, workdir, *more):
  return command('train', f'--config=tests/configs/tiny.py:{texts}/*.txt', f'--workdir={workdir}', f'--config.steps={STEPS}',
                 *more)


def run(*words, code=0):
  out = subprocess.run(command(*words), capture_output=True, text=True, env=ENV, check=False)
  assert out.returncode == code, out.stderr + out.stdout
  return out


@pytest.fixture(scope='module')
def trained(texts, tmp_path_factory):
  """A run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp('trained')
  out = subprocess.run(train_command(texts, workdir), capture_output=True, text=True, env=ENV, check=False)
  assert out.returncode == 0, out.stderr
  return workdir, out


def last_step(workdir):
  path = workdir / 'metrics.jsonl'
  return path.read_bytes().count(b'\n') if path.exists() else 0


def until(condition, child, seconds=120):
  end = time.time() + seconds
  while not condition():
    assert child.poll() is None and time.time() < end, child.returncode
    time.sleep(0.005)


def test_killed_at_random_steps_it_ends_as_if_nothing_had_happened(texts, trained, tmp_path):
  rng = random.Random(0)
  kills = sorted(rng.sample(range(1, STEPS - 20), 3))
  for kill in kills:
    with subprocess.Popen(train_command(texts, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENV) as child:
      until(lambda: last_step(tmp_path) >= kill, child)
      child.send_signal(signal.SIGKILL)
  assert subprocess.run(train_command(texts, tmp_path), capture_output=True, env=ENV, check=False).returncode == 0
  assert losses(tmp_path) == losses(trained[0]) and len(losses(tmp_path)) == STEPS
  common.assert_trees_equal(state_of(tmp_path, STEPS), state_of(trained[0], STEPS))


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_says_how_to_go_on_and_the_same_command_does(texts, trained, tmp_path, number):
  with subprocess.Popen(train_command(texts, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                        env=ENV) as child:
    until(lambda: last_step(tmp_path) >= 33, child)
    child.send_signal(number)
    child.send_signal(number)  # a second one is harmless
    _, err = child.communicate(timeout=60)
  assert child.returncode == 10, err
  saved = max(steps(tmp_path))
  assert saved >= 33 and saved % 20 and f'saved step {saved} of {STEPS}' in err and 'same command' in err
  if number == signal.SIGTERM:  # what was saved is the same for both
    out = subprocess.run(train_command(texts, tmp_path), capture_output=True, text=True, env=ENV, check=False)
    assert out.returncode == 0 and f'goes on from step {saved}' in out.stdout, out.stderr
    assert losses(tmp_path) == losses(trained[0])


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_is_no_traceback(tmp_path, number):
  with subprocess.Popen(command('train', '--config=configs/quickstart.py', f'--workdir={tmp_path}',
                                '--config.mesh.fsdp=2'), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                        env={**ENV, 'PYTHONUNBUFFERED': '1'}) as child:
    while 'data: reading' not in child.stdout.readline():
      pass
    child.send_signal(number)
    _, err = child.communicate(timeout=120)
  assert child.returncode == 10 and 'Traceback' not in err and 'starts again' in err, err
  assert not (tmp_path / 'data').exists()


def test_what_a_run_says_and_writes(trained):
  workdir, out = trained
  assert 'first step after' in out.stdout
  for part in ('import', 'trace', 'data', 'init', 'compile', 'step'):
    assert f' {part} ' in out.stdout.split('first step after')[1].splitlines()[0]
  lines = metrics(workdir)
  assert [m['step'] for m in lines] == list(range(1, STEPS + 1))
  assert {'loss', 'tokens', 'tokens_per_second', 'grad_norm', 'param_norm', 'learning_rate', 'step_seconds',
          'model_flops_per_second'} <= set(lines[0])
  assert lines[-1]['tokens'] == STEPS * 8 * 32
  assert lines[-1]['loss'] < lines[0]['loss'] - 2
  assert json.loads((workdir / 'config.json').read_text())['model']['D'] == 16
  from tensorboardX.proto.event_pb2 import Event  # the file is TFRecord: length, crc, data, crc
  raw = next((workdir / 'tensorboard').iterdir()).read_bytes()
  at, found = 0, {}
  while at < len(raw):
    size = int.from_bytes(raw[at:at + 8], 'little')
    event = Event.FromString(raw[at + 12:at + 12 + size])
    found.update({(v.tag, event.step): v.simple_value for v in event.summary.value})
    at += 16 + size
  np.testing.assert_allclose(found['loss', STEPS], lines[-1]['loss'], rtol=1e-6)


def test_trained_to_the_end_it_says_so_and_does_nothing(texts, trained):
  before = (trained[0] / 'metrics.jsonl').read_bytes()
  out = subprocess.run(train_command(texts, trained[0]), capture_output=True, text=True, env=ENV, check=False)
  assert out.returncode == 0 and f'already at step {STEPS}' in out.stdout
  assert (trained[0] / 'metrics.jsonl').read_bytes() == before


def test_eval_json_and_python_agree(texts, trained, tmp_path):
  workdir = trained[0]
  run('eval', f'--workdir={workdir}', '--baselines', f'--json={tmp_path}/e.json', '--stride=8', f'--by_document={tmp_path}/d.jsonl')
  result = json.loads((tmp_path / 'e.json').read_text())
  assert {'nll_per_token', 'perplexity', 'bits_per_byte', 'tokens', 'bytes', 'documents', 'step', 'gzip_bits_per_byte',
          'xz_bits_per_byte', 'fivegram_bits_per_byte'} <= set(result)
  assert result['step'] == STEPS and result['tokens'] == result['bytes']
  each = [json.loads(line) for line in (tmp_path / 'd.jsonl').read_text(encoding='utf-8').splitlines()]
  assert len(each) == result['documents'] and sum(d['bytes'] for d in each) == result['bytes']
  np.testing.assert_allclose(sum(d['nll'] for d in each) / result['tokens'], result['nll_per_token'], rtol=1e-9)
  from jaxlm import evaluate
  from jaxlm.schema import MeshConfig
  lm = jaxlm.load(workdir, mesh=MeshConfig(1, 8, 1))
  _, documents = evaluate.source_documents('heldout', lm.config)
  again = evaluate.evaluate(lm, documents, lm.config.length, 8, 24)
  np.testing.assert_allclose(again['nll_per_token'], result['nll_per_token'], rtol=1e-6)
  first = run('eval', f'--workdir={workdir}', '--step=160', f'--data=text:{texts}/0*.txt', f'--json={tmp_path}/f.json')
  assert 'all documents of text:' in first.stdout
  assert json.loads((tmp_path / 'f.json').read_text())['step'] == 160


def test_exit_code_3_when_no_checkpoint_is_good(texts, trained, tmp_path):
  import shutil
  shutil.copytree(trained[0], tmp_path / 'run')
  for path in (tmp_path / 'run' / 'checkpoints').rglob('*'):
    if path.is_file():
      path.write_bytes(b'')
  out = subprocess.run(train_command(texts, tmp_path / 'run'), capture_output=True, text=True, env=ENV, check=False)
  assert out.returncode == 3 and 'none of the steps' in out.stderr, out.stderr
  assert run('eval', f'--workdir={tmp_path}/run', code=3).stderr.startswith('jaxlm: ')


def test_data_commands(texts, tmp_path):
  flags = [f'--config=tests/configs/tiny.py:{texts}/*.txt', f'--workdir={tmp_path}']
  assert 'epochs' in run('data', 'build', *flags).stdout
  shown = run('data', 'show', *flags, '--step=3').stdout
  assert shown.count('--- step 3 row') == 8 and '<|endoftext|>' in shown
  assert run('data', 'stats', *flags).stdout.count('documents') == 2
  masked = run('data', 'show', *flags, '--config.model.kind=encoder', '--config.model.head=mlm', '--config.objective.name=mask',
               '--config.loss.chunks=1').stdout
  assert '▢' in masked and masked.count('→ ') == 8


def test_fetching_what_is_not_there_is_one_line(tmp_path):
  assert 'data fetch hamlet: there are shakespeare: ' in run('data', 'fetch', 'hamlet', f'--out={tmp_path}', code=2).stderr
  assert 'wants --out' in run('data', 'fetch', 'shakespeare', code=2).stderr


def test_doctor():
  assert 'devices' in run('doctor').stdout
