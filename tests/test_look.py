"""What looks at a model: maps of attention and hidden states against transformers, losses against the scores, probes against
data whose answer is known. Pictures, pages and the command line: tests/test_look_pages.py."""
import dataclasses
import functools
import random

import jax
import numpy as np
import pytest
import torch

from jaxlm import layout, lm as lms, scoring
from jaxlm.errors import UsageError
from jaxlm.interop.huggingface import Folder
from jaxlm.look import attention, hidden, lens, probe, reading
from jaxlm.models import embedding, kinds, seq2seq
from tests import common, families, test_families
from tests.test_kinds import make_lm

TEXT = 'if "a" < b & c:\n  \'λ\''
SOURCE = 'a <source> of its own'


@functools.cache
def lm_of(family, sizes=(1, 1, 1)):
  return make_lm(family, sizes)


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
  """name of a family → (the model in transformers, an LM of its weights, the ids of TEXT)."""
  @functools.cache
  def make(name):
    peer = families.make(name)
    folder = tmp_path_factory.mktemp('hf') / 'model'
    peer.save_pretrained(folder)
    source = Folder(folder)
    m = test_families.model_of(source)
    mesh = common.mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
      like = layout.named(kinds.abstract_params(m), mesh)
      params = common.put_params(test_families.tree_of(source, m), like)
    return peer, lms.LM(dataclasses.replace(common.config(), model=m), common.BYTES, params, mesh, 0)
  return make


def peer_says(peer, lm, **what):
  ids = reading.read(lm, TEXT).ids
  with torch.no_grad():
    return peer(torch.tensor(ids, dtype=torch.long)[None], use_cache=False, **what)


# ---- attention

@pytest.mark.parametrize('name', ['gpt2', 'llama 3', 'gemma2', 'deepseek_v3'])
def test_maps_equal_transformers(name, imported):
  """Learned positions; grouped queries and rope; windows and a cap of scores; latent attention."""
  peer, lm = imported(name)
  theirs = peer_says(peer, lm, output_attentions=True).attentions
  ours = attention.maps(lm, TEXT)
  assert len(ours) == len(theirs) == lm.config.model.N
  for p_HLM, expected in zip(ours, theirs):
    assert p_HLM.dtype == np.float32
    np.testing.assert_allclose(p_HLM, expected[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(p_HLM.sum(-1), 1, atol=1e-5)
    assert (p_HLM[:, ~np.tri(*p_HLM.shape[1:], dtype=bool)] == 0).all()


@pytest.mark.parametrize('family, part', [('bert', 'self'), ('t5', 'self'), ('t5', 'memory'), ('t5', 'encoder'),
                                          ('transformer', 'memory')])
def test_maps_of_encoders_and_of_encoder_decoders(family, part):
  lm = lm_of(family)
  source = None if family == 'bert' else SOURCE
  found, (rows, columns) = attention.maps(lm, TEXT, source, part), attention.tokens(lm, TEXT, source, part)
  m, own, others = lm.config.model, len(lm.tokenizer.encode(TEXT)), len(lm.tokenizer.prompt(SOURCE))
  sizes = {'self': (own + (2 if family == 'bert' else 1),) * 2, 'memory': (own + 1, others), 'encoder': (others, others)}[part]
  assert len(found) == (m.encoder_N if part == 'encoder' else m.N) and (len(rows), len(columns)) == sizes
  for p_HLM in found:
    assert p_HLM.shape == (m.H, *sizes)
    np.testing.assert_allclose(p_HLM.sum(-1), 1, atol=1e-5)
    causal = (p_HLM[:, ~np.tri(*sizes, dtype=bool)] == 0).all()
    assert causal == (part == 'self' and family != 'bert')
  on_a_mesh = attention.maps(lm_of(family, (1, 2, 2)), TEXT, source, part)
  np.testing.assert_allclose(on_a_mesh, found, atol=1e-5)


@pytest.mark.parametrize('family', ['llama', 'bert', 'transformer', 't5', 'lstm'])
@pytest.mark.parametrize('maps', [False, True])
def test_layer_after_layer_is_the_forward_pass(family, maps):
  """With the weights shown or not, so that they are those that the model mixes values with."""
  if maps and family == 'lstm':
    return
  lm = lm_of(family)
  m = lm.config.model
  r = reading.read(lm, TEXT, SOURCE if m.kind == 'seq2seq' else None)
  last_LD = np.asarray(hidden.run(lm, [r], lambda x_BLD, _: x_BLD, maps)[-1])[0, :len(r.ids)]
  row = lambda ids, names: dict(zip(names, (ids[None], np.ones_like(ids)[None], np.arange(len(ids), dtype=np.int32)[None])))
  batch = row(r.ids, ('tokens', 'segments', 'positions'))
  if m.kind == 'seq2seq':
    batch |= row(r.source, ('inputs', 'input_segments', 'input_positions'))
  with jax.set_mesh(lm.mesh):
    if m.kind != 'rnn':
      last_LD = embedding.final_norm(m, lm.params, last_LD[None])[0]
    plain = dataclasses.replace(m, head='lm')  # without what an encoder's logits go through besides
    expected = jax.jit(kinds.forward, static_argnums=0)(plain, lm.params, common.put(batch)).x_BLD
    if m.kind == 'seq2seq' and not maps:
      memory_BMD, _ = jax.jit(seq2seq.encode, static_argnums=0)(m, lm.params, common.put(batch))
      states = hidden.states(lm, ['x', SOURCE])
      its = embedding.final_norm(m, lm.params['encoder'], states[-1][1][None])
      assert len(states) == m.encoder_N + 1
      np.testing.assert_allclose(its, memory_BMD, atol=1e-5)
  np.testing.assert_allclose(last_LD, expected[0], atol=1e-5)


# ---- the logit lens

@pytest.mark.parametrize('name', ['gpt2', 'llama 3'])
def test_lens_equals_the_norm_and_the_matrix_of_transformers(name, imported):
  peer, lm = imported(name)
  said = peer_says(peer, lm, output_hidden_states=True)
  ours = lens.lens(lm, TEXT)
  norm, matrix = (peer.transformer.ln_f if name == 'gpt2' else peer.model.norm), peer.lm_head
  with torch.no_grad():
    middle = torch.stack([matrix(norm(h)) for h in said.hidden_states[:-1]])[:, 0].numpy()
  np.testing.assert_allclose(ours[:-1], middle, atol=1e-4)
  np.testing.assert_allclose(ours[-1], said.logits[0].numpy(), atol=1e-4)
  ids_NLK, p_NLK = lens.likeliest(lm, TEXT, 3)
  p_NLV = np.asarray(jax.nn.softmax(ours, -1))
  np.testing.assert_array_equal(ids_NLK[..., 0], ours.argmax(-1))
  np.testing.assert_allclose(p_NLK, np.sort(p_NLV, -1)[..., :-4:-1], rtol=1e-5)
  states = hidden.states(lm, ['another text', TEXT])
  np.testing.assert_allclose(np.stack([layer[1] for layer in states[:-1]]),
                             torch.stack(said.hidden_states[:-1])[:, 0].numpy(), atol=1e-5)


@pytest.mark.parametrize('family', ['llama', 'bert', 'lstm', 'gru', 'gpt2'])
def test_the_last_row_of_the_lens_is_the_logits(family):
  lm = lm_of(family)
  np.testing.assert_allclose(lens.lens(lm, TEXT)[-1], lm.logits(reading.read(lm, TEXT).ids[None])[0], atol=1e-4)
  assert len(lens.lens(lm, TEXT)) == lm.config.model.N + 1


@pytest.mark.parametrize('family', ['transformer', 't5'])
def test_the_last_row_of_the_lens_beside_an_encoder(family):
  lm = lm_of(family)
  r = reading.read(lm, TEXT, SOURCE)
  expected = -of_row(family, tuple(r.ids.tolist()), 32, tuple(r.source.tolist()))[:len(r.ids)]
  np.testing.assert_allclose(jax.nn.log_softmax(lens.lens(lm, TEXT, SOURCE)[-1]), expected, atol=1e-4)


# ---- hidden states and probes

def test_pooled_states_are_the_states_pooled():
  for family in ('llama', 'bert', 't5', 'lstm'):
    lm, texts = lm_of(family, (1, 2, 1)), ['a text', 'b', 'a text that is longer than 16 tokens']
    states = hidden.states(lm_of(family), texts)
    for pool, one in (('mean', lambda x: x.mean(0)), ('last', lambda x: x[-1]), ('first', lambda x: x[0])):
      expected = [[one(x_LD) for x_LD in layer] for layer in states]
      np.testing.assert_allclose(hidden.pooled(lm, texts, pool, batch=2), expected, atol=1e-5)
  cut = hidden.pooled(lm, texts, 'last', context=4)
  np.testing.assert_allclose(cut[:, 2], [layer[2][3] for layer in states], atol=1e-5)
  with pytest.raises(UsageError, match='--pool=max: wants one of mean, last, first'):
    hidden.pooled(lm, texts, 'max')


def test_probes_find_what_is_there_and_not_what_is_not():
  """Whether a text has a Q, which its embeddings say; and labels that nothing says."""
  rng = random.Random(0)
  texts = [''.join(rng.choices('abcdefgh', k=rng.randint(6, 12))) for _ in range(240)]
  texts = [t[:3] + 'Q' + t[3:] if i % 3 == 0 else t for i, t in enumerate(texts)]
  labels = [str('Q' in t) for t in texts]
  result = probe.probe(lm_of('llama'), texts, labels, [0, 1])
  assert result['majority']['accuracy'] == pytest.approx(2 / 3) and result['classes'] == {'True': 80, 'False': 160}
  assert result['majority']['macro_f1'] == pytest.approx(0.4)  # of the two F1s 0.8 and 0
  for layer in ('0', '1'):
    assert result['layers'][layer]['accuracy'] > 0.95 and result['layers'][layer]['macro_f1'] > 0.95
  halves = ['a', 'b'] * 120
  rng.shuffle(halves)
  chance = probe.probe(lm_of('llama'), texts, halves, [1])
  assert abs(chance['layers']['1']['accuracy'] - 0.5) < 0.1
  assert probe.probe(lm_of('llama'), texts, halves, [1]) == chance
  assert probe.probe(lm_of('llama'), texts, halves, [1], seed=1) != chance


def test_cross_validation_is_scikit_learns():
  from sklearn.linear_model import LogisticRegression
  from sklearn.model_selection import StratifiedKFold, cross_validate
  from sklearn.pipeline import make_pipeline
  from sklearn.preprocessing import StandardScaler
  rng = np.random.default_rng(0)
  x_BD, y = rng.standard_normal((60, 4)), [str(n % 3) for n in range(60)]
  x_BD[:, 0] += np.array(y, int)
  theirs = cross_validate(make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)), x_BD, y,
                          cv=StratifiedKFold(4, shuffle=True, random_state=3), scoring=('accuracy', 'f1_macro'))
  ours = probe.validate(x_BD, y, 4, 3)
  for key, name in (('accuracy', 'test_accuracy'), ('macro_f1', 'test_f1_macro')):
    assert ours[key] == pytest.approx(theirs[name].mean()) and ours[f'{key}_std'] == pytest.approx(theirs[name].std(ddof=1))


# ---- loss

@pytest.mark.parametrize('family', ['llama', 'gpt2', 'transformer', 't5', 'bert', 'lstm'])
@pytest.mark.parametrize('context, stride', [(16, 8), (32, 32)])
def test_the_loss_of_each_token_sums_to_the_score(family, context, stride):
  lm, text = lm_of(family), TEXT + ' and more of it' if family == 'bert' else 3 * TEXT
  ids, nll_L = scoring.per_token(lm, text, context, stride, 4)
  assert ids.tolist() == [lm.tokenizer.opening, *lm.tokenizer.encode(text)] and len(nll_L) == len(ids) - 1
  scored = scoring.score(lm, [('other', 'another one'), ('this', text)], context, stride, 4)[1]
  np.testing.assert_allclose(nll_L.sum(dtype=np.float64), scored.nll, rtol=1e-5)
  expected = [by_hand(family, ids, t, context, stride) for t in range(1, len(ids))]
  np.testing.assert_allclose(nll_L, expected, rtol=1e-3, atol=1e-4)


def by_hand(family, ids, t, context, stride):
  """−log p of token t of a document, alone, from the logits of the row in which it is scored."""
  lm = lm_of(family)
  kind, n = lm.config.model.kind, len(ids) - 1
  if kind == 'encoder':
    start = (t - 1) // (context - 2) * (context - 2) + 1
    row = [lm.tokenizer.cls, *ids[start:start + context - 2], lm.tokenizer.sep]
    at, size = t - start + 1, context
    row[at] = lm.tokenizer.mask
  elif kind == 'rnn':
    row, at, size = ids[:-1], t - 1, n
  else:
    end = min(n, context + -(-max(0, t - context) // stride) * stride)
    start = max(0, end - context)
    row, at, size = ids[start:end], t - 1 - start, context
  source = ids[max(0, start - lm.config.objective.source):start] if kind == 'seq2seq' else ()
  return of_row(family, tuple(map(int, row)), size, tuple(map(int, source)))[at][ids[t]]


@functools.cache
def of_row(family, row, size, source):
  """−log p [L, V] after one row, which is padded to `size`."""
  lm = lm_of(family)
  pad = lambda values, size: np.pad(np.asarray(values, np.int32), (0, size - len(values)))[None]
  rows = lambda ids, size, names: dict(zip(names, (pad(ids, size), pad([1] * len(ids), size), pad(range(len(ids)), size))))
  batch = rows(row, size, ('tokens', 'segments', 'positions'))
  if lm.config.model.kind == 'seq2seq':
    batch |= rows(source, 48, ('inputs', 'input_segments', 'input_positions'))
  with jax.set_mesh(lm.mesh):
    return -np.asarray(jax.nn.log_softmax(_logits(lm.config.model, lm.params, common.put(batch))[0]))


_logits = jax.jit(kinds.logits, static_argnums=0)
