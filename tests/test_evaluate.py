"""The ruler: every token once, and the same number whatever the batch size and mesh."""
import collections
import gzip
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxlm import evaluate, scoring, lm as lms
from jaxlm.data import tokenizer
from jaxlm.errors import UsageError
from jaxlm.models import decoder, kinds
from tests import common

DOCUMENTS = [('a', 'x' * 7 + ' short'), ('b', 'the middle one, naïve λόγος ' * 3), ('c', 'z'),
             ('d', ''.join(chr(33 + (i * i) % 90) for i in range(150)))]


def make_lm(sizes=(1, 1, 1), family='llama', **changes):
  c = common.config(family, **changes)
  mesh = common.mesh_of(*sizes)
  with jax.set_mesh(common.mesh_of(1, 1, 1)):
    params = common.perturbed(jax.jit(lambda key: decoder.init_params(c.model, key))(jax.random.key(0)))
  with jax.set_mesh(mesh):
    from jaxlm import layout
    shardings = layout.named(kinds.abstract_params(c.model), mesh)
    params = jax.tree.map(lambda v, a: jax.device_put(v, a.sharding), params, shardings)
  return lms.LM(c, tokenizer.make('bytes', iter(())), params, mesh, 0)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 60), st.integers(1, 16), st.data())
def test_windows_score_each_token_once_with_the_promised_context(n, context, data):
  stride = data.draw(st.integers(1, context))
  ids = np.arange(n + 1)
  scored = collections.Counter()
  for w in scoring.windows(ids, context, stride):
    assert len(w.ids) - 1 <= context
    for at in range(w.scored, len(w.ids) - 1):
      target = w.ids[at + 1]
      scored[target] += 1
      assert at + 1 >= min(target, context - stride + 1)  # tokens before it that it is given
  assert scored == {t: 1 for t in range(1, n + 1)}


@pytest.mark.parametrize('context, stride', [(32, 16), (32, 32)])
def test_equals_scoring_by_hand(context, stride):
  lm = make_lm()
  result = evaluate.evaluate(lm, DOCUMENTS[:3], context, stride, 4)
  full = {}
  for name, text in DOCUMENTS[:3]:  # one call a document: logits of every window at once
    ids = np.array([lm.tokenizer.boundary, *lm.tokenizer.encode(text)], np.int32)
    nll = 0.
    for w in scoring.windows(ids, context, stride):
      padded = np.zeros(context, np.int32)
      padded[:len(w.ids) - 1] = w.ids[:-1]
      logits = lm.logits(padded[None])[0].astype(np.float64)
      log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
      nll -= sum(log_p[at, w.ids[at + 1]] for at in range(w.scored, len(w.ids) - 1))
    full[name] = nll
  tokens = sum(len(t.encode()) for _, t in DOCUMENTS[:3])
  assert result['tokens'] == result['bytes'] == tokens and result['documents'] == 3
  np.testing.assert_allclose(result['nll_per_token'] * tokens, sum(full.values()), rtol=1e-6)
  np.testing.assert_allclose(result['perplexity'], math.exp(sum(full.values()) / tokens), rtol=1e-5)
  np.testing.assert_allclose(result['bits_per_byte'], sum(full.values()) / tokens / math.log(2), rtol=1e-6)


@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_same_number_for_any_batch_size_and_mesh(family):
  numbers = [evaluate.evaluate(make_lm(sizes, family), DOCUMENTS, 32, 8, batch)['nll_per_token']
             for sizes, batch in [((1, 1, 1), 1), ((1, 1, 1), 5), ((1, 4, 2), 16), ((2, 2, 2), 3), ((1, 8, 1), 8)]]
  np.testing.assert_allclose(numbers, numbers[0], rtol=1e-6)


def test_nothing_to_score_is_null_and_bad_strides_are_refused():
  lm = make_lm()
  result = evaluate.evaluate(lm, [], 32, 8, 4)
  assert result['nll_per_token'] is result['perplexity'] is result['bits_per_byte'] is None
  for stride in (0, 33):
    with pytest.raises(UsageError, match='stride'):
      evaluate.evaluate(lm, DOCUMENTS, 32, stride, 4)
  with pytest.raises(UsageError, match='context'):
    evaluate.evaluate(make_lm(family='gpt2'), DOCUMENTS, 128, 8, 4)


def test_sources_are_resolved_so_that_nothing_trained_on_is_scored():
  c = common.config(**{'data.source': 'stdlib'})
  assert evaluate.resolve('heldout', c) == evaluate.resolve('stdlib', c) == ('stdlib', 'heldout')
  assert evaluate.resolve('stdlib/all', c) == ('stdlib', 'all')
  assert evaluate.resolve('text:x', c) == ('text:x', 'all')
  assert evaluate.resolve('text:x', common.config(**{'data.source': 'text:x'})) == ('text:x', 'heldout')


def test_baselines_are_those_of_the_tools(texts):
  c = common.config(**{'data.source': f'text:{texts}/*.txt', 'data.heldout': 0.2})
  _, documents = evaluate.source_documents('heldout', c)
  whole = ''.join(t for _, t in documents).encode()
  result = evaluate.baselines(documents, c)
  assert result['gzip_bits_per_byte'] == 8 * len(gzip.compress(whole, 9)) / len(whole)
  assert 0 < result['fivegram_bits_per_byte'] < 8 and 0 < result['xz_bits_per_byte'] < 8
