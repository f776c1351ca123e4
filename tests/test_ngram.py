"""Counted models: against their definition written with dictionaries, a worked example, other people's counts, themselves
counted in other ways. As people use them: tests/test_ngram_runs.py."""
import collections
import fractions
import math

import numpy as np
import pytest

from jaxlm.models import ngram
from tests import common

BYTE_TEXTS = [b'abracadabra abracadabra', b'the cat sat on the mat; the cat', b'a', b'abab abab cab ' * 4]


class Slow:
  """Interpolated modified Kneser-Ney, word for word from Chen & Goodman 1998."""

  def __init__(self, order, V, documents):
    self.order, self.V = order, V
    self.count = {k: collections.Counter() for k in range(1, order + 1)}
    for text in documents:
      symbols = (V,) * (order - 1) + tuple(text)
      for i in range(order - 1, len(symbols)):
        self.count[order][symbols[i - order + 1:i + 1]] += 1
    for k in range(order - 1, 0, -1):
      for gram in self.count[k + 1]:
        self.count[k][gram[1:]] += 1
    self.ofs = {k: [sum(1 for v in c.values() if v == i) for i in range(5)] for k, c in self.count.items()}
    self.following = {k: collections.defaultdict(dict) for k in self.count}
    for k, grams in self.count.items():
      for gram, c in grams.items():
        self.following[k][gram[:-1]][gram[-1]] = c

  def discount(self, k, c):
    n = self.ofs[k]
    y = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.
    c = min(c, 3)
    return max(0., c - (c + 1) * y * n[c + 1] / n[c]) if c and n[c] else 0.

  def p(self, history, symbol, k=None):
    k = self.order if k is None else k
    if k == 0:
      return 1 / self.V
    lower = self.p(history, symbol, k - 1)
    following = self.following[k].get(tuple(history[len(history) - k + 1:]))
    if following is None:
      return lower
    total = sum(following.values())
    taken = {w: self.discount(k, c) for w, c in following.items()}
    if not any(taken.values()):
      taken = dict.fromkeys(following, 0.5)
    return (following.get(symbol, 0) - taken.get(symbol, 0.)) / total + sum(taken.values()) / total * lower

  def of(self, text):
    """p of each symbol of a document."""
    symbols = (self.V,) * (self.order - 1) + tuple(text)
    return [self.p(symbols[i:i + self.order - 1], symbols[i + self.order - 1]) for i in range(len(text))]


def joined(V, documents):
  """Documents in a row, each after START."""
  return np.concatenate([[V, *d] for d in documents])


def token_texts(V=1000, seed=0):
  """Documents of Zipfian tokens with repeated phrases, so that long grams come again; one of a token, one long."""
  rng = np.random.default_rng(seed)
  phrases = [rng.zipf(1.3, n) % V for n in rng.integers(1, 12, 40)]
  documents = [np.concatenate([phrases[i] for i in rng.integers(0, 40, n)]) for n in rng.integers(1, 15, 30)]
  return [[int(t) for t in d] for d in [*documents, [V - 1], np.concatenate(phrases * 2)]]


def made(order, V, documents, folder, **how):
  return ngram.NGram(V, ngram.count(joined(V, documents), order, V, folder, **how))


@pytest.mark.parametrize('order', [1, 2, 3, 5])
def test_bytes_equal_the_definition_and_sum_to_one(order):
  fast, slow = ngram.of_bytes(order, BYTE_TEXTS), Slow(order, 256, BYTE_TEXTS)
  for text in (b'the abracat zq', b'', b'a'):
    np.testing.assert_allclose(fast.probabilities(ngram.as_symbols(text)), slow.of(text), rtol=1e-9)
  total = sum(fast.probabilities(ngram.as_symbols(b'the c' + bytes([b])))[-1] for b in range(256))
  np.testing.assert_allclose(total, 1, rtol=1e-9)


@pytest.mark.parametrize('order', [1, 2, 3, 4, 7])
def test_tokens_equal_the_definition_and_sum_to_one(order, tmp_path):
  V, documents = 1000, token_texts()
  fast, slow = made(order, V, documents, tmp_path), Slow(order, V, documents)
  assert [len(level['keys']) - (k < order) for k, level in enumerate(fast._levels, 1)] == [len(c) for c in slow.count.values()]
  held_out = [*token_texts(seed=1)[:3], documents[2], documents[-1][:30], documents[-2], [5, 5, 5, 999, 0, *documents[3]]]
  for text in held_out:
    np.testing.assert_allclose(fast.probabilities(np.array([V, *text])), slow.of(text), rtol=1e-9)
    for history in ([V], [V, *text], [V, *text[:2]]):
      p = fast.distribution(np.array(history))
      np.testing.assert_allclose(p.sum(), 1, rtol=1e-9)
      asked = [fast.probabilities(np.array([*history, w]))[-1] for w in (0, 5, 999)]
      np.testing.assert_allclose(p[[0, 5, 999]], asked, rtol=1e-9)


def test_nothing_is_impossible(tmp_path):
  """After 0 only counts whose D is 0, in all levels: Chen & Goodman's estimates alone would leave nothing for others."""
  documents = [[0, 1] * 5 + [2, 3] * 5] * 6
  for order in (1, 2, 4):
    model, slow = made(order, 9, documents, tmp_path), Slow(order, 9, documents)
    for history in ([9, 0], [9, 0, 1, 2], [9]):
      p = model.distribution(np.array(history))
      np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)
      assert (p > 0).all()
    np.testing.assert_allclose(model.probabilities(np.array([9, 0, 1, 8, 2, 3])), slow.of([0, 1, 8, 2, 3]), rtol=1e-12)


def test_the_largest_vocabulary_and_order(tmp_path):
  """Keys of the highest level are far beyond 64 bits of symbols."""
  V = 2 ** 20
  documents = [[V - 1, 0, V - 1, 1, 2, V - 1, 0, V - 1], [V - 1, 0, V - 1, 1, 2, 3, V - 2]]
  fast, slow = made(7, V, documents, tmp_path), Slow(7, V, documents)
  text = [V - 1, 0, V - 1, 1, 2, 3, V - 2, V - 1, 7]
  np.testing.assert_allclose(fast.probabilities(np.array([V, *text])), slow.of(text), rtol=1e-9)
  np.testing.assert_allclose(fast.distribution(np.array([V, *text[:6]])).sum(), 1, rtol=1e-9)


@pytest.mark.parametrize('batch, held', [(7, 100), (64, 300), (1000, 10 ** 6), (10 ** 6, 10)])
@pytest.mark.parametrize('order', [2, 5])
def test_counts_the_same_in_any_batches_and_on_disk(order, batch, held, tmp_path, monkeypatch):
  spilled = []
  once = ngram.Runs.merged
  monkeypatch.setattr(ngram.Runs, 'merged', lambda runs: (once(runs), spilled.append(len(runs.spilled)))[0])
  symbols, ticks = joined(1000, token_texts()), []
  whole = ngram.count(symbols, order, 1000, tmp_path, batch=10 ** 6, held=10 ** 7)
  assert not any(spilled)
  merge, sizes = ngram._merge, []
  monkeypatch.setattr(ngram, '_merge', lambda runs: (sizes.append(sum(len(keys) for keys, _ in runs)), merge(runs))[1])
  pieces = ngram.count(symbols, order, 1000, tmp_path, ticks.append, batch=batch, held=held)
  assert max(sizes) <= held + max(batch, *spilled)  # what is in memory at once
  common.assert_trees_equal(pieces, whole)
  assert any(spilled) == (held < 1000) and sum(ticks) == order * len(symbols)
  assert not list(tmp_path.iterdir())
  assert whole[-1]['counts'].sum() == sum(map(len, token_texts())) and whole[-1]['keys'].dtype == np.int64


def test_runs_are_summed():
  rng = np.random.default_rng(0)
  expected, runs = collections.Counter(), ngram.Runs(None)
  for _ in range(20):
    keys, counts = np.unique(rng.integers(0, 50, 30), return_counts=True)
    runs.add(keys, counts)
    expected.update(dict(zip(keys.tolist(), counts.tolist())))
  keys, counts = runs.merged()
  assert dict(zip(keys.tolist(), counts.tolist())) == expected and (np.diff(keys) > 0).all()


def test_a_worked_example(tmp_path):
  """Bigrams of 'ab', 'ab', 'ac', 'cb' over a, b, c, by hand. Occurrences: ^a 3, ab 2, ac 1, ^c 1, cb 1. Bigrams: n1 = 3 (ac,
  ^c, cb), n2 = 1, n3 = 1, n4 = 0: Y = 3/5, D1 = 1 − 2·Y·n2/n1 = 3/5, D2 = 2 − 3·Y·n3/n2 = 1/5, D3 = 3 − 4·Y·n4/n3 = 3. To the
  left of a stands 1 symbol (^), of b 2 (a, c), of c 2 (a, ^). Unigrams: n1 = 1, n2 = 2, n3 = 0: Y = 1/5, D1 = 1 − 2·Y·2 = 1/5,
  D2 = 2 − 3·Y·0 = 2."""
  F = fractions.Fraction
  model = made(2, 3, [[0, 1], [0, 1], [0, 2], [2, 1]], tmp_path)
  gamma_0 = F(F(1, 5) + 2 + 2) / 5
  unigram = [F(F(4, 5), 5) + gamma_0 / 3, gamma_0 / 3, gamma_0 / 3]
  gamma_a = F(F(1, 5) + F(3, 5)) / 3
  after_a = [gamma_a * unigram[0], F(F(9, 5), 3) + gamma_a * unigram[1], F(F(2, 5), 3) + gamma_a * unigram[2]]
  gamma_c = F(3, 5)
  after_c = [gamma_c * unigram[0], F(2, 5) + gamma_c * unigram[1], gamma_c * unigram[2]]
  gamma_start = F(3 + F(3, 5)) / 4
  first = [gamma_start * unigram[0], gamma_start * unigram[1], F(F(2, 5), 4) + gamma_start * unigram[2]]
  for history, expected in (([0], after_a), ([2], after_c), ([3], first), ([3, 0], after_a), ([1], unigram)):
    assert sum(expected) == 1
    np.testing.assert_allclose(model.distribution(np.array(history)), [float(p) for p in expected], rtol=1e-12)
  p = float(first[0] * after_a[1])
  np.testing.assert_allclose(model.nats(np.array([3, 0, 1])), -math.log(p), rtol=1e-12)
  np.testing.assert_allclose(model.bits(np.array([3, 0, 1])), -math.log2(p), rtol=1e-12)
  np.testing.assert_allclose(model.perplexity(np.array([3, 0, 1])), p ** -0.5, rtol=1e-12)


def test_a_text_is_scored_the_same_in_pieces(tmp_path):
  model = made(4, 1000, token_texts(), tmp_path)
  for order in (1, 4):
    model = made(order, 1000, token_texts(), tmp_path)
    symbols = np.array([1000, *token_texts(seed=2)[-1]])
    whole = -np.log(model.probabilities(symbols)).sum()
    for piece in (1, 2, 7, 10 ** 6):
      np.testing.assert_allclose(model.nats(symbols, piece), whole, rtol=1e-12)


def test_draws_as_it_predicts(tmp_path):
  V, documents = 12, [[0, 1, 2, 0, 1, 3, 0, 1, 2], [0, 1, 4, 5], [6, 7, 8, 0, 1, 2]]
  model, rng = made(3, V, documents, tmp_path), np.random.default_rng(0)
  p, N = model.distribution(np.array([V, 0, 1])), 4000
  drawn = np.bincount([model.sample(np.array([V, 0, 1]), 1, rng)[0] for _ in range(N)], minlength=V)
  assert ((drawn - N * p) ** 2 / (N * p)).sum() < 31.3  # χ² with 11 degrees of freedom, 0.1%
  both = model.sample(np.array([V]), 2, np.random.default_rng(3))
  again = np.random.default_rng(3)
  one = model.sample(np.array([V]), 1, again)
  assert list(both) == [*one, *model.sample(np.array([V, *one]), 1, again)]
