"""Generation against taking the argmax of logits by hand."""
import jax
import numpy as np
import pytest

from jaxlm.errors import UsageError
from tests.test_evaluate import make_lm

PROMPTS = ['def f(', 'a much longer prompt than the context of 32 bytes has room for', '']


def greedy(lm, prompt, count):
  ids = [lm.tokenizer.boundary, *lm.tokenizer.encode(prompt)]
  start = len(ids)
  for _ in range(count):
    tail = ids[-lm.config.length:]
    padded = np.zeros((1, lm.config.length), np.int32)  # causal: what follows the tail changes nothing
    padded[0, :len(tail)] = tail
    logits = lm.logits(padded)[0, len(tail) - 1, :lm.tokenizer.vocab_size]
    if (token := int(logits.argmax())) == lm.tokenizer.boundary:
      break
    ids.append(token)
  return lm.tokenizer.decode(ids[start:])


@pytest.mark.parametrize('sizes', [(1, 1, 1), (1, 2, 2)])
@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_greedy_is_the_argmax_and_prompts_do_not_touch_each_other(family, sizes):
  lm = make_lm(sizes, family)
  assert lm.generate(PROMPTS, 12, temperature=0) == [greedy(lm, p, 12) for p in PROMPTS]


def test_samples_follow_the_seed_and_the_temperature():
  lm = make_lm()
  sample = lambda **kw: lm.generate(['x'], 16, **kw)[0]
  assert sample(seed=1) == sample(seed=1) != sample(seed=2)
  assert sample(temperature=1e-6) == sample(temperature=0)


def test_sampling_frequencies_are_the_softmax():
  lm = make_lm()
  prompts = ['q'] * 2000
  first = [t[:1] for t in lm.generate(prompts, 1, temperature=0.8, seed=3)]
  logits = lm.logits(np.array([[lm.tokenizer.boundary, *lm.tokenizer.encode('q')]]))[0, -1, :lm.tokenizer.vocab_size]
  p = np.asarray(jax.nn.softmax(logits / 0.8))
  token = int(p.argmax())
  share = np.mean([lm.tokenizer.encode(t)[:1] == [token] for t in first])
  assert abs(share - p[token]) < 4 * (p[token] * (1 - p[token]) / 2000) ** 0.5


def test_padded_vocabulary_rows_are_never_sampled():
  lm = make_lm()
  assert lm.config.model.V > lm.tokenizer.vocab_size
  embed = np.array(lm.params['embed'])
  embed[lm.tokenizer.vocab_size:] *= 100
  lm.params['embed'] = jax.device_put(embed, lm.params['embed'].sharding)
  assert len(lm.generate(['x'], 20, temperature=2.)[0]) > 0


def test_bad_lengths_are_refused():
  with pytest.raises(UsageError, match='max_length'):
    make_lm().generate(['x'], 0)
