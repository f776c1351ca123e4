"""What each objective asks: every example by what it promises of the text it came from."""
import collections

import numpy as np
import pytest

from jaxlm.data import examples, packing, tokenizer
from jaxlm.errors import UsageError
from jaxlm.schema import span_lengths
from tests import common

STREAM = common.stream()


def make(c, windows=None, numbers=None):
  windows = np.arange(STREAM.windows(examples.stride(c))) if windows is None else windows
  return examples.make(examples.Task(c, common.BYTES), STREAM, windows, windows if numbers is None else numbers)


def document_of(at):
  return np.searchsorted(STREAM.starts, at, 'right') - 1


@pytest.mark.parametrize('family', ['transformer', 't5', 'bert', 'lstm', 'llama'])
def test_shapes_are_as_promised_and_made_again_the_same(family):
  c = common.config(family)
  batch = make(c)
  assert {k: (a.shape[1], a.dtype) for k, a in batch.items()} == {k: (n, np.dtype(d)) for k, (n, d) in examples.shapes(c).items()}
  common.assert_trees_equal(make(c), batch)
  common.assert_trees_equal({k: a[3:5] for k, a in batch.items()}, make(c, np.arange(3, 5)))


def test_every_token_is_a_target_once_after_what_precedes_it():
  c = common.config('transformer')
  L, M = c.length, c.objective.source
  batch, seen = make(c), collections.Counter()
  for w in range(len(batch['tokens'])):
    for i in np.flatnonzero(batch['weights'][w]):
      at = w * L + i + 1
      seen[at] += 1
      assert batch['targets'][w, i] == STREAM.read(at, at + 1)[0]
      mine = batch['input_segments'][w] == batch['segments'][w, i]
      expected = [p for p in range(max(0, w * L - M), w * L) if document_of(p) == document_of(at)]
      np.testing.assert_array_equal(batch['inputs'][w, mine], STREAM.read(expected[0], expected[-1] + 1) if expected else [])
  first = set(STREAM.starts[:-1])
  assert seen == {at: 1 for at in range(1, STREAM.tokens) if at not in first}


def test_a_prefix_and_what_follows_it_are_the_window():
  c = common.config('transformer', **{'objective.name': 'prefix', 'objective.source': 32})
  batch, cuts = make(c), []
  for w in range(len(batch['tokens']) - 1):
    window = STREAM.slices(np.array([w * 32]), 33)
    cut = int((batch['input_segments'][w] > 0).sum())
    cuts.append(cut)
    np.testing.assert_array_equal(batch['inputs'][w, :cut], window['tokens'][0, :cut])
    np.testing.assert_array_equal(batch['targets'][w, :33 - cut], window['tokens'][0, cut:])
    np.testing.assert_array_equal(batch['tokens'][w, :33 - cut], window['tokens'][0, cut - 1:32])
    assert batch['weights'][w, :33 - cut].sum() >= 1 or cut == 32 or len(set(window['segments'][0])) > 1
  assert min(cuts) < 6 and max(cuts) > 26


def test_spans_put_back_are_the_window():
  """Each sentinel of the inputs, replaced by what follows it in the targets, gives the window back, document by document."""
  c = common.config('t5')
  size, targets = span_lengths(c.objective)
  batch, sentinels = make(c), {s: n for n, s in enumerate(common.BYTES.sentinels)}
  masked = total = 0
  for w in range(len(batch['tokens']) - 1):
    spans, current = {}, None
    for token in batch['targets'][w, batch['segments'][w] > 0]:
      if token in sentinels:
        current = spans.setdefault(int(token), [])
      else:
        current.append(int(token))
    assert list(map(sentinels.get, spans)) == sorted(map(sentinels.get, spans)) and all(spans.values())
    inputs = batch['inputs'][w, batch['input_segments'][w] > 0]
    back = [t for token in inputs for t in (spans[int(token)] if int(token) in sentinels else [int(token)])]
    np.testing.assert_array_equal(back, STREAM.read(w * size, (w + 1) * size)[:len(back)])
    assert len(back) >= size - 8  # a span that ends with its document leaves more than the source has room for
    for token, segment in zip(batch['targets'][w], batch['segments'][w]):  # a sentinel's document is that of its place
      if token in sentinels and segment:  # what is asked for has its place
        assert batch['input_segments'][w, list(batch['inputs'][w]).index(token)] == segment
    masked, total = masked + sum(map(len, spans.values())), total + size
  assert abs(masked / total - c.objective.share) < 0.02
  assert targets <= c.length
  first = batch['positions'] == 0
  assert (batch['tokens'][first & (batch['segments'] > 0)] == common.BYTES.boundary).all()


@pytest.mark.parametrize('o, expected', [(dict(source=512), (568, 114)), (dict(source=114, share=0.15, span=3.), (126, 26))])
def test_span_lengths_are_those_of_t5(o, expected):
  """T5's own: 568 tokens become 512 with 114 targets (random_spans_helper with its defaults)."""
  from jaxlm.schema import ObjectiveConfig
  assert span_lengths(ObjectiveConfig(**o)) == expected


def masked_config(**changes):
  return common.config('bert', **{'objective.name': 'mask', 'objective.share': 0.25, 'loss.chunks': 4, **changes})


def test_masks_are_of_the_share_and_kind_promised():
  c = masked_config()
  plain = STREAM.slices(np.arange(STREAM.windows(32)) * 32, 32)
  kinds, places = collections.Counter(), 0
  for epoch in range(20):
    batch = make(c, numbers=1000 * epoch + np.arange(len(plain['tokens'])))
    for b in range(len(plain['tokens'])):
      at = batch['at'][b][batch['weights'][b] > 0]
      assert len(set(at)) == len(at) == round(0.25 * ((plain['tokens'][b] != common.BYTES.boundary) & (plain['segments'][b] > 0)).sum())
      np.testing.assert_array_equal(batch['targets'][b][:len(at)], plain['tokens'][b][at])
      others = np.setdiff1d(np.arange(32), at)
      np.testing.assert_array_equal(batch['tokens'][b][others], plain['tokens'][b][others])
      for i in at:
        new, old = batch['tokens'][b, i], plain['tokens'][b, i]
        kinds['mask' if new == common.BYTES.mask else 'same' if new == old else 'other'] += 1
      places += len(at)
  assert common.BYTES.mask == common.BYTES.vocab_size
  for kind, share in (('mask', 0.8), ('same', 0.1 + 0.1 / 257), ('other', 0.1 * 256 / 257)):
    assert abs(kinds[kind] / places - share) < 4 * (share * (1 - share) / places) ** 0.5, kinds


def test_static_masks_stay_and_dynamic_ones_change():
  windows = np.arange(8)
  for static in (True, False):
    c = masked_config(**{'objective.static': static})
    first, second = (make(c, windows, windows + 100 * epoch) for epoch in range(2))
    assert (first['at'] == second['at']).all() == static


def test_whole_words_are_masked_or_not():
  text = 'the quick brown fox jumps over the lazy dog again and again ' * 40
  bpe = tokenizer.make('bpe:290', iter([text]))
  ids = np.array([bpe.boundary, *bpe.encode(text), bpe.boundary])
  stream = packing.Stream((ids,), np.array([0, len(ids)]), np.array([0, len(ids)]))
  c = masked_config(**{'model.V': 296, 'objective.whole_words': True})
  batch = examples.make(examples.Task(c, bpe), stream, np.arange(8), np.arange(8))
  plain = stream.slices(np.arange(8) * 32, 32)
  split = 0
  for b in range(8):
    starts = bpe.word_starts[plain['tokens'][b]]
    starts[0] = True
    words = np.cumsum(starts)
    at = set(batch['at'][b][batch['weights'][b] > 0])
    assert at
    for word in np.unique(words):
      places = set(np.flatnonzero((words == word) & (plain['tokens'][b] != bpe.boundary)))
      assert not places or places <= at or not places & at
      split += len(places) > 1 and places <= at
  assert split > 3


def test_pairs_are_two_halves_or_of_two_documents():
  c = common.config('bert', **{'objective.share': 1e-6, 'loss.chunks': 1})
  batch, labels = make(c), []
  stream = STREAM.read(0, STREAM.tokens)
  text = ' '.join(map(str, stream))
  for b in range(len(batch['tokens'])):
    tokens, types = batch['tokens'][b].copy(), batch['types'][b]
    for at, target, weight in zip(batch['at'][b], batch['targets'][b], batch['weights'][b]):
      if weight:
        tokens[at] = target
    real = batch['segments'][b] > 0
    assert tokens[0] == common.BYTES.cls and tokens[real][-1] == common.BYTES.sep
    first, second = (tokens[real & (types == t)] for t in (0, 1))
    first, second = first[1:-1], second[:-1]
    assert not np.isin(common.BYTES.boundary, [*first, *second])
    labels.append(int(batch['labels'][b, 0]))
    joined = ' '.join(map(str, [*first, *second]))
    if labels[-1] == 0 and len(first) + len(second) < 29:  # not cut
      assert joined in text
    for part in (first, second):
      assert ' '.join(map(str, part)) in text
  assert 0.2 < np.mean(labels) < 0.8


@pytest.mark.parametrize('family', ['transformer', 'llama', 'cho'])
def test_answers_are_asked_for_once_an_epoch_with_their_question(family):
  rng = np.random.default_rng(0)
  pairs = [(rng.integers(60, 90, rng.integers(1, 12)), rng.integers(90, 120, rng.integers(1, 9))) for _ in range(50)]
  b = common.BYTES.boundary
  ids = [np.array([b, *q, b, *a, b]) for q, a in pairs]
  starts = np.cumsum([0] + [len(i) for i in ids])
  stream = packing.Stream((np.concatenate(ids),), np.array([0, starts[-1]]), starts,
                          starts[:-1] + np.array([len(q) + 2 for q, _ in pairs]))
  c = common.config(family, **{'objective.name': 'answer', 'data.target': 'a'})
  task = examples.Task(c, common.BYTES)
  count = examples.count(task, stream)
  assert count == 50 if family == 'cho' else count < 40
  batch = examples.make(task, stream, np.arange(count), np.arange(count))
  assert {k: (a.shape[1], a.dtype) for k, a in batch.items()} == {k: (n, np.dtype(d)) for k, (n, d) in examples.shapes(c).items()}
  found = []
  for row in range(count):
    for segment in range(1, batch['segments'][row].max() + 1):
      here = batch['segments'][row] == segment
      tokens, targets, weights = (batch[k][row][here] for k in ('tokens', 'targets', 'weights'))
      said = targets[weights > 0]
      if c.objective.source:
        question = batch['inputs'][row][batch['input_segments'][row] == segment][:-1]
        np.testing.assert_array_equal(tokens, [b, *said[:-1]])
      else:
        question = tokens[1:np.flatnonzero(weights)[0]]
        np.testing.assert_array_equal(tokens, [b, *question, b, *said[:-1]])
      np.testing.assert_array_equal(batch['positions'][row][here], np.arange(here.sum()))
      assert said[-1] == b
      found.append((tuple(question), tuple(said[:-1])))
  assert sorted(found) == sorted((tuple(q), tuple(a)) for q, a in pairs)


@pytest.mark.parametrize('family', ['transformer', 'llama'])
def test_long_questions_are_cut_where_they_matter_least(family):
  """Beside an encoder their end goes, before an answer their beginning; and what is asked at the end is cut as in training."""
  c = common.config(family, **{'objective.name': 'answer', 'data.target': 'a'})
  texts = ''.join(chr(65 + n) for n in range(50)), '0123456789'
  question, said = map(common.BYTES.encode, texts)
  stream = packing.in_memory(c.data, common.BYTES, [texts])
  batch = examples.make(examples.Task(c, common.BYTES), stream, np.array([0]), np.array([0]))
  b, kept = common.BYTES.boundary, c.objective.source - 1 if family == 'transformer' else c.length - 2 - len(said)
  if family == 'transformer':
    assert batch['inputs'][0].tolist() == [*question[:kept], b]
  else:
    assert batch['tokens'][0].tolist() == [b, *question[-kept:], b, *said]


def test_a_vocabulary_without_room_for_masks_is_refused():
  with pytest.raises(UsageError, match='objective.name=mask puts in others; set at least 258'):
    examples.check(masked_config(**{'model.V': 257}), common.BYTES)
  examples.check(masked_config(**{'model.V': 258}), common.BYTES)
  with pytest.raises(UsageError, match='set at least 357'):
    examples.check(common.config('t5', **{'model.V': 300}), common.BYTES)
