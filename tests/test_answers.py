"""Answers: what they are scored by, and that a model learns to give them."""
import dataclasses
import json
import math

import numpy as np
import pytest
import sacrebleu

from jaxlm import answers, config as configs, train
from jaxlm import lm as lms
from jaxlm.data import sources
from jaxlm.errors import UsageError
from tests import common

DIGITS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')


# Of hundreds of long steps it is running them that takes the time, and not the compile, which conftest.py cuts short.
OPTIMIZED = {'compiler_options': 'xla_backend_optimization_level=3'}


@pytest.fixture(scope='module', params=['transformer', 'llama'])
def trained(request, tmp_path_factory):
  """A model that was taught to spell digits, on 200 pairs, and the file of them."""
  folder = tmp_path_factory.mktemp(request.param)
  rng = np.random.default_rng(0)
  numbers = rng.integers(0, 10, (200, 2))
  lines = [json.dumps({'q': ''.join(map(str, n)), 'a': ' '.join(DIGITS[i] for i in n)}) for n in numbers]
  (folder / 'pairs.jsonl').write_text('\n'.join(lines))
  changes = {f'model.{k}': v for k, v in common.MODELS[request.param].items()}
  source = {'objective.source': 8} if request.param == 'transformer' else {}
  config = configs.from_flat({
      **changes, **source, 'model.norm_place': 'pre', 'objective.name': 'answer', 'data.source': f'jsonl:{folder}/pairs.jsonl',
      'data.key': 'q', 'data.target': 'a', 'data.tokenizer': 'bytes', 'data.heldout': 0.1, 'steps': 400, 'batch': 16, 'length': 32,
      'loss.chunks': 4, 'optimizer.lr': 5e-3, 'optimizer.warmup': 20, 'log_every': 50, 'mesh.fsdp': 1})
  return folder, config


def test_a_model_learns_to_answer_and_says_how_well(trained, monkeypatch):
  folder, config = trained
  import jax
  devices = jax.devices()
  monkeypatch.setattr(jax, 'devices', lambda *a: devices[:1])
  train.train(dataclasses.replace(config, **OPTIMIZED), folder / 'run')
  lm = lms.load(folder / 'run')
  result, each = answers.evaluate_answers(lm, 'heldout', ['exact', 'bleu', 'chrf', 'rouge', 'f1'])
  assert result['questions'] == len(each) >= 10 and result['exact'] > 0.9, (result, each[:3])
  assert result['exact'] == np.mean([a['said'] == a['right'] for a in each])
  assert result['bleu'] == sacrebleu.corpus_bleu([a['said'] for a in each], [[a['right'] for a in each]]).score
  assert 'version:' in result['bleu_signature'] and result['rougeL'] > 0.9
  beams, _ = answers.evaluate_answers(lm, 'heldout', ['exact'], num_beams=3, limit=5)
  assert beams['questions'] == 5 and beams['exact'] > 0.7
  by_hand = answers.loss(lm, [(a['question'], a['right']) for a in each], batch=3)
  np.testing.assert_allclose(by_hand['nll_per_token'], result['nll_per_token'], rtol=1e-5, atol=1e-7)  # of logits near 10, in float32
  assert result['tokens'] == sum(len(a['right']) + 1 for a in each) and result['nll_per_token'] < 0.1
  with pytest.raises(UsageError, match='--metrics=meteor: objective.name=answer wants some of exact'):
    answers.evaluate_answers(lm, 'heldout', ['meteor'])


def test_a_model_learns_to_classify(tmp_path, monkeypatch):
  """Whether a number has a 7: accuracy by scores is that of training's own loss."""
  import jax
  devices = jax.devices()
  monkeypatch.setattr(jax, 'devices', lambda *a: devices[:1])
  numbers = np.random.default_rng(0).integers(0, 10, (400, 4))
  lines = [json.dumps({'text': ' '.join(map(str, n)), 'seven': 'yes' if 7 in n else 'no'}) for n in numbers]
  (tmp_path / 'n.jsonl').write_text('\n'.join(lines))
  flat = {f'model.{k}': v for k, v in common.BERT.items()} | {
      'model.head': 'classify', 'model.T': 0, 'objective.name': 'classify', 'data.target': 'seven', 'data.classes': 'no|yes',
      'data.source': f'jsonl:{tmp_path}/n.jsonl', 'data.tokenizer': 'bytes', 'data.heldout': 0.1, 'steps': 200, 'batch': 32,
      'length': 16, 'loss.chunks': 1, 'optimizer.lr': 3e-3, 'optimizer.warmup': 20, 'log_every': 50, 'eval_every': 100, 'mesh.fsdp': 1}
  train.train(configs.from_flat(flat), tmp_path / 'run')
  logged = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  held_out = [m['heldout_loss'] for m in logged if 'heldout_loss' in m]
  assert held_out[-1] < 0.3 and max(m.get('accuracy', 0) for m in logged) > 0.95
  result, each = answers.evaluate_answers(lms.load(tmp_path / 'run'), 'heldout', ['exact', 'f1'])
  assert result['exact'] == np.mean([a['said'] == a['right'] for a in each]) > 0.9
  np.testing.assert_allclose(result['nll_per_token'], held_out[-1], rtol=1e-5)
  with pytest.raises(UsageError, match="data.classes='no|maybe': field seven also has 'yes'"):
    train.train(configs.from_flat(flat | {'data.classes': 'no|maybe'}), tmp_path / 'other')


COLOURS, PETS = ('red', 'blue', 'green'), ('cat', 'dog', 'owl')


def _record(objective: str, rng) -> dict:
  """tag: a word's tag is its kind, but after 'not' it is O. span: the first colour in a text, if there is one. chat: the
  assistant names the kind of the user's word."""
  words = [str(w) for w in rng.choice(['not', *COLOURS, *PETS], 4)]
  if objective == 'tag':
    tags = ['O' if w == 'not' or before == 'not' else 'B-COL' if w in COLOURS else 'B-PET' for before, w in zip(['', *words], words)]
    return {'words': words, 'tags': tags}
  if objective == 'span':
    words = [str(w) for w in rng.choice(['not', *COLOURS, *PETS, *PETS], rng.integers(3, 14))]
    right = [w for w in words if w in COLOURS][:1]
    return {'question': 'colour?', 'context': ' '.join(w for w in words if w in [*right, *PETS, 'not']), 'answer': right}
  turns = [({'role': 'user', 'content': w}, {'role': 'assistant', 'content': 'colour' if w in COLOURS else 'pet'})
           for w in words[:2] if w != 'not'] or [({'role': 'user', 'content': 'cat'}, {'role': 'assistant', 'content': 'pet'})]
  return {'messages': [m for turn in turns for m in turn]}


RUNS = {'tag': ('bert', {'model.head': 'tag', 'model.C': 3, 'data.classes': 'O|B-COL|B-PET', 'data.form': 'tags', 'data.key': 'words',
                         'data.target': 'tags', 'loss.chunks': 1}, ['accuracy', 'seqeval'], 'seqeval_f1'),
        'span': ('bert', {'model.head': 'span', 'data.form': 'span', 'data.key': 'question', 'data.context': 'context',
                          'data.target': 'answer', 'loss.chunks': 1}, ['squad'], 'squad_f1'),
        'answer': ('llama', {'data.form': 'chat', 'data.key': 'messages', 'data.template': '{role}: {content};\n', 'length': 48, 'steps': 220, 'eval_every': 220},
                   ['exact', 'f1'], 'f1')}


@pytest.mark.parametrize('objective', list(RUNS))
def test_a_model_learns_from_marked_records(objective, tmp_path, monkeypatch):
  """What it says of held-out records is right, and costs what training's own held-out loss says."""
  import jax
  devices = jax.devices()
  monkeypatch.setattr(jax, 'devices', lambda *a: devices[:1])
  rng = np.random.default_rng(0)
  (tmp_path / 'r.jsonl').write_text('\n'.join(json.dumps(_record(objective, rng)) for _ in range(500)))
  family, changes, metrics, main = RUNS[objective]
  config = common.config(family, **{
      'model.V': 320, 'objective.name': objective, 'data.tokenizer': 'bpe:290', 'data.source': f'jsonl:{tmp_path}/r.jsonl',
      'data.heldout': 0.1, 'steps': 150, 'batch': 32, 'length': 24, 'optimizer.lr': 5e-3, 'optimizer.warmup': 20, 'eval_every': 150,
      'log_every': 100, 'mesh.fsdp': 1, **changes, **(OPTIMIZED if objective == 'answer' else {})})
  train.train(config, tmp_path / 'run')
  logged = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  held_out = [m['heldout_loss'] for m in logged if 'heldout_loss' in m]
  lm = lms.load(tmp_path / 'run')
  result, each = answers.evaluate_answers(lm, 'heldout', metrics, limit=16)
  assert result[main] > 0.9 and result['questions'] == len(each) == 16, (result, each[:3])
  every = [r for _, *r in sources.records(config.data.source, config.data, 'heldout')]
  np.testing.assert_allclose(answers.loss(lm, every, 16)['nll_per_token'], held_out[-1], rtol=1e-5)
  if objective == 'span':
    assert any(not a['right'] and not a['said'] for a in each)
    texts = [f'{pet} {colour} not' for colour in COLOURS for pet in PETS]
    once = lm.answer(['colour?'] * 9, texts)
    assert once == [text.split()[1] for text in texts]
    assert lm.answer(['colour?'], ['cat dog ' * 30 + 'red ' + 'owl ' * 30]) == ['red']  # longer than a row
  elif objective == 'answer':
    said = lm.generate([[{'role': 'user', 'content': 'red'}], 'red', [{'role': 'user', 'content': 'owl'}], 'owl'] * 4, 8, temperature=0)
    assert said == ['colour', 'colour', 'pet', 'pet'] * 4
  else:
    assert lm.tag([['red'] * 40])[0] == ['B-COL'] * 40  # longer than a row
  with pytest.raises(UsageError, match=f'--metrics=meteor: objective.name={objective} wants some of {metrics[0]}'):
    answers.evaluate_answers(lm, 'heldout', ['meteor'])


def test_metrics_of_known_answers():
  said, right = ['spam', 'ham ', 'ham', 'eggs'], ['spam', 'ham', 'spam', 'ham']
  assert answers.METRICS['exact'](said, right) == {'exact': 0.5}
  # spam: precision 1, recall 1/2; ham: precision 1/2, recall 1/2; labels that are never right are not counted
  assert math.isclose(answers.METRICS['f1'](said, right)['f1'], (2 / 3 + 1 / 2) / 2)
  rouge = answers.METRICS['rouge'](['the cat sat'], ['the cat sat down'])
  assert math.isclose(rouge['rouge1'], 2 * 1 * 0.75 / 1.75) and math.isclose(rouge['rouge2'], 2 * 1 * (2 / 3) / (5 / 3))
