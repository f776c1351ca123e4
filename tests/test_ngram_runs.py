"""Counted models as people use them: trained, scored, prompted, resumed."""
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import config as configs, generate, scoring, train
from jaxlm.data import packing
from jaxlm.errors import CheckpointError, UsageError
from jaxlm.sampling import Sampling
from tests import common
from tests.test_ngram import Slow


def make_config(texts, **changes):
  return configs.load('configs/ngram.py:3', [('data.source', f'text:{texts}/*.txt'), ('data.heldout', '0.2'),
                                             *((k, str(v)) for k, v in changes.items())])


@pytest.fixture(scope='module')
def trained(texts, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('ngram')
  train.train(make_config(texts), workdir)
  return workdir


def documents_of(workdir, split):
  """Documents of the cache, [[opening, t1 … tn, closing], …]."""
  config = configs.load(str(workdir / 'config.json'))
  stream = packing.open_cache(config.data, workdir / 'data').streams[split]
  return [stream.read(*span).tolist() for span in zip(stream.starts[:-1], stream.starts[1:])]


def test_the_run_counts_each_token_and_the_end_of_each_document(trained):
  """The opening is the history's START; the closing boundary is predicted."""
  lm = jaxlm.load(trained)
  assert lm.step == 1 and all(type(a) is np.ndarray for a in jax.tree.leaves(lm.params))
  documents = documents_of(trained, 'train')
  slow = Slow(3, 257, [d[1:] for d in documents])
  for d in documents_of(trained, 'heldout')[:3]:
    np.testing.assert_allclose(lm.counted.probabilities(lm.symbols(d[:-1])), slow.of(d[1:-1]), rtol=1e-9)
  boundary = lm.tokenizer.boundary
  assert slow.p(documents[0][-3:-1], boundary) == pytest.approx(
      lm.counted.distribution(np.array(documents[0][-3:-1]))[boundary]) and boundary != 257
  with open(trained / 'checkpoints' / '1' / 'run.json', encoding='utf-8') as f:
    meta = json.load(f)
  assert meta['examples'] == len(documents) and meta['config']['model']['ngram']['order'] == 3
  assert not (trained / 'counting').exists()


def test_a_text_is_scored_as_by_hand_whatever_the_context(trained):
  lm, texts = jaxlm.load(trained), [('a', 'document 3 naïve'), ('b', 'z'), ('c', 'def return λόγος ' * 9)]
  slow = Slow(3, 257, [d[1:] for d in documents_of(trained, 'train')])
  for context, stride, batch in ((256, 128, 16), (4, 2, 1)):
    for scored, (_, text) in zip(scoring.score(lm, texts, context, stride, batch), texts):
      assert scored.tokens == scored.bytes == len(text.encode())
      np.testing.assert_allclose(scored.nll, -np.log(slow.of(lm.tokenizer.encode(text))).sum(), rtol=1e-9)


def test_logits_are_log_probabilities(trained):
  lm = jaxlm.load(trained)
  ids = lm.tokenizer.prompt('def x')
  logits_LV = lm.logits([ids])[0]
  assert logits_LV.dtype == np.float32 and logits_LV.shape == (len(ids), 257)
  np.testing.assert_allclose(np.exp(logits_LV).sum(-1), 1, rtol=1e-5)
  p = lm.counted.probabilities(lm.symbols(ids))
  np.testing.assert_allclose(logits_LV[np.arange(len(ids) - 1), ids[1:]], np.log(p), rtol=1e-5)


def test_generated_frequencies_are_the_probabilities_and_filters_hold(trained):
  lm, N = jaxlm.load(trained), 3000
  ids = lm.tokenizer.prompt('document 3')
  p = lm.counted.distribution(lm.symbols(ids))
  draw = lambda **how: np.bincount(np.concatenate(generate.sample(
      lm, [ids] * N, 1, Sampling(**{'temperature': 1., **how}), 7, lambda b, row: False)), minlength=257)
  drawn, usual = draw(), N * p >= 5
  found, expected = (np.append(a[usual], a[~usual].sum()) for a in (drawn, N * p))
  chi = ((found - expected) ** 2 / expected).sum()
  degrees = usual.sum()
  assert degrees >= 5 and chi < degrees + 4 * math.sqrt(2 * degrees)
  best = np.argsort(-p)
  least = lambda n: set(np.flatnonzero(p > p[best[n - 1]] * (1 - 1e-6)))  # ties stay
  assert set(np.flatnonzero(draw(top_k=3))) == least(3)
  assert set(np.flatnonzero(draw(top_p=0.5))) == least(1 + int(np.argmax(np.cumsum(p[best]) >= 0.5)))
  assert set(np.flatnonzero(draw(temperature=0))) == {best[0]}


def test_generates_greedily_repeatably_and_by_beams(trained):
  lm = jaxlm.load(trained)
  for penalty, said in ((1., 'ument'), (30., 'umen')):
    text, ids = lm.generate(['doc'], 12, temperature=0, repetition_penalty=penalty)[0], lm.tokenizer.prompt('doc')
    for _ in range(12):
      logits_V = lm.logits([ids])[0, -1]
      logits_V[list(set(ids))] *= penalty
      ids.append(int(np.argmax(logits_V)))
    assert text == lm.tokenizer.decode(ids[1:])[3:] and text.startswith(said)
  both = lm.generate(['doc', 'x'], 30, seed=5)
  assert both == [lm.generate(['doc'], 30, seed=5)[0], lm.generate(['x'], 30, seed=6)[0]]
  assert both != lm.generate(['doc', 'x'], 30, seed=9)
  score = lambda new: lm.counted.nats(lm.symbols(lm.tokenizer.prompt('x ' + new))) / len(new)
  beam = lm.generate(['x '], 8, num_beams=6, stop=())[0]
  assert len(beam) == 8 and score(beam) <= score(lm.generate(['x '], 8, temperature=0)[0]) + 1e-6
  ended = lm.generate(['document 3\n' + 'x'], 4000, temperature=1., seed=1)[0]
  assert len(ended) < 4000  # the end of a document is drawn too


def test_again_it_is_done_and_another_order_is_refused(texts, trained, capsys):
  before = sorted((p, p.stat().st_mtime_ns) for p in (trained / 'checkpoints').rglob('*'))
  train.train(make_config(texts), trained)
  assert 'already counted, step 1' in capsys.readouterr().out
  assert before == sorted((p, p.stat().st_mtime_ns) for p in (trained / 'checkpoints').rglob('*'))
  with pytest.raises(UsageError, match='model.ngram.order was 3'):
    train.train(make_config(texts, **{'model.ngram.order': 4}), trained)


def test_what_a_kill_left_is_removed_and_a_damaged_checkpoint_is_kept(texts, trained, tmp_path):
  (tmp_path / 'counting').mkdir()
  for name in ('before-1', 'before-2', 'run-0.keys', 'run-0.counts'):
    (tmp_path / 'counting' / name).write_bytes(b'x' * 10 ** 6)
  train.train(make_config(texts), tmp_path)
  common.assert_trees_equal(jaxlm.load(tmp_path).params, jaxlm.load(trained).params)
  assert not (tmp_path / 'counting').exists()
  for path in (tmp_path / 'checkpoints' / '1' / 'state').rglob('*'):
    if path.is_file():
      path.write_bytes(b'')
  with pytest.raises(CheckpointError, match='1'):
    train.train(make_config(texts), tmp_path)


def test_over_tokens_from_the_command_line(texts, tmp_path):
  """bpe, with rows of the vocabulary to spare: train, eval, generate."""
  run = lambda *words, code=0: _run(words, code)
  words = ['train', '--config=configs/ngram.py:4', f'--workdir={tmp_path}', f'--config.data.source=text:{texts}/*.txt',
           '--config.data.heldout=0.2', '--config.data.tokenizer=bpe:300', '--config.model.V=320']
  out = run(*words, '--config.model.vocab=300')
  assert 'order 4: ' in out and 'checkpoint saved' in out
  assert 'already counted' in run(*words, '--config.model.vocab=300')
  table = run('eval', f'--workdir={tmp_path}', '--baselines', f'--json={tmp_path}/eval.json')
  result = json.loads((tmp_path / 'eval.json').read_text())
  assert 'this model' in table and result['kind'] == 'ngram' and result['step'] == 1
  documents = documents_of(tmp_path, 'heldout')
  slow = Slow(4, 300, [d[1:] for d in documents_of(tmp_path, 'train')])
  nats = sum(-np.log(slow.of(d[1:-1])).sum() for d in documents)
  np.testing.assert_allclose(result['nll_per_token'] * result['tokens'], nats, rtol=1e-9)
  assert result['bits_per_byte'] < result['gzip_bits_per_byte'] and result['tokens'] == sum(len(d) - 2 for d in documents)
  made_text = [run('generate', f'--workdir={tmp_path}', '--prompt=document', '--max_length=9', '--seed=3') for _ in range(2)]
  assert made_text[0] == made_text[1] and made_text[0].startswith('document') and len(made_text[0]) > 12
  for extra, says in (('--mesh=1,1,1', 'on the host'), ('--step=2', '--step=2')):
    assert says in run('eval', f'--workdir={tmp_path}', extra, code=2)


def _run(words, code):
  out = subprocess.run([sys.executable, '-m', 'jaxlm', *words], capture_output=True, text=True, check=False)
  assert out.returncode == code, out.stderr + out.stdout
  return out.stdout if code == 0 else out.stderr


@pytest.mark.parametrize('key, value', [('model.ngram.order', 8), ('model.ngram.order', 0), ('model.V', 2 ** 20 + 1),
                                        ('steps', 2), ('objective.name', 'mask')])
def test_what_it_cannot_be_is_refused(texts, key, value):
  with pytest.raises(UsageError, match=f'^{key}={value!r}: '):
    make_config(texts, **{key: value})


def test_an_order_that_the_config_does_not_know():
  with pytest.raises(UsageError, match="ngram.py:8: the file knows no '8'"):
    configs.load('configs/ngram.py:8')


def test_a_vocabulary_without_a_row_for_each_token_is_refused(texts, tmp_path):
  with pytest.raises(UsageError, match='model.V=256'):
    train.train(make_config(texts, **{'model.V': 256}), tmp_path)
