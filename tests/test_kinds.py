"""Recurrent models, encoders and encoder-decoders: against torch, against themselves run in other ways, and as people use
them: scored and prompted. What they share with decoders is tested there; parity with transformers: tests/test_classics.py."""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxlm import beams, decoding, layout, lm as lms, objectives, scoring
from jaxlm.models import encoder, kinds, rnn
from jaxlm.optimizer import make_optimizer
from jaxlm.sampling import Sampling
from jaxlm.step import init_state, make_step
from tests import common

KINDS = ['lstm', 'gru', 'transformer', 't5', 'bert', 'cho', 'bahdanau', 'luong']


@functools.cache
def values_of(m):
  """Parameters of a model, none of them 0 or 1."""
  with jax.set_mesh(common.mesh_of(1, 1, 1)):
    return common.perturbed(jax.jit(lambda key: kinds.init_params(m, key))(jax.random.key(0)))


def make_lm(family, sizes=(1, 1, 1), **changes):
  c, mesh = common.config(family, **changes), common.mesh_of(*sizes)
  with jax.set_mesh(mesh):
    params = common.put_params(values_of(c.model), layout.named(kinds.abstract_params(c.model), mesh))
    return lms.LM(c, common.BYTES, params, mesh, 0)


# ---- recurrent models

@pytest.mark.parametrize('cell', ['lstm', 'gru'])
def test_cells_equal_torch_forward_and_backward(cell, one_device):
  cfg = common.model('lstm', **{'rnn': dataclasses.replace(common.model('lstm').rnn, cell=cell)})
  params = common.perturbed(jax.jit(lambda key: rnn.init_layers(cfg, key))(jax.random.key(0)))
  x_BLD = np.random.default_rng(0).standard_normal((4, 12, cfg.D)).astype(np.float32)
  peer = getattr(torch.nn, cell.upper())(cfg.D, cfg.D, cfg.N, batch_first=True)
  with torch.no_grad():
    for n in range(cfg.N):
      for ours, theirs in (('x', 'ih'), ('h', 'hh')):
        w_DJK = params[ours]['w'][n]
        getattr(peer, f'weight_{theirs}_l{n}').copy_(torch.tensor(np.moveaxis(w_DJK, 0, -1).reshape(-1, cfg.D)))
        getattr(peer, f'bias_{theirs}_l{n}').copy_(torch.tensor(params[ours]['bias'][n].reshape(-1)))
  x = torch.tensor(x_BLD, requires_grad=True)
  out, last = peer(x)
  last_h = last[0] if cell == 'lstm' else last
  (out.sin().sum() + last_h.cos().sum()).backward()

  def loss(params, x_BLD):
    h_BLD, carry = rnn.layers(cfg, params, x_BLD, jnp.ones(x_BLD.shape[:2], bool), rnn.empty_carry(cfg, 4))
    return jnp.sum(jnp.sin(h_BLD)) + jnp.sum(jnp.cos(carry['h'])), h_BLD
  (_, h_BLD), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, common.put({'x': x_BLD})['x'])
  np.testing.assert_allclose(h_BLD, out.detach().numpy(), atol=1e-5)
  np.testing.assert_allclose(grads[1], x.grad.numpy(), atol=1e-5)
  for n in range(cfg.N):
    for ours, theirs in (('x', 'ih'), ('h', 'hh')):
      expected = getattr(peer, f'weight_{theirs}_l{n}').grad.numpy()
      np.testing.assert_allclose(np.moveaxis(np.asarray(grads[0][ours]['w'][n]), 0, -1).reshape(expected.shape), expected, atol=1e-4)
      np.testing.assert_allclose(np.asarray(grads[0][ours]['bias'][n]).reshape(-1),
                                 getattr(peer, f'bias_{theirs}_l{n}').grad.numpy(), atol=1e-4)


def test_a_state_that_is_carried_is_one_long_row(one_device):
  """Two halves, the state handed over, are the whole; a document starts from zeros wherever it lies."""
  cfg = common.model('lstm')
  params = jax.jit(lambda key: kinds.init_params(cfg, key))(jax.random.key(0))
  t_BL = np.random.default_rng(0).integers(0, 256, (2, 24), dtype=np.int32)
  p_BL = np.stack([np.arange(24), [*range(7), *range(17)]]).astype(np.int32)
  run = lambda cut, carry=None: kinds.forward(cfg, params, common.put({'tokens': t_BL[:, cut], 'positions': p_BL[:, cut]}), carry=carry)
  whole, first = run(slice(None)), run(slice(0, 11))
  second = run(slice(11, 24), first.carry)
  np.testing.assert_allclose(np.concatenate([first.x_BLD, second.x_BLD], 1), whole.x_BLD, atol=1e-6)
  common.assert_trees_close(second.carry, whole.carry, atol=1e-6)
  np.testing.assert_allclose(whole.x_BLD[1, 7:], run(slice(7, 24)).x_BLD[1], atol=1e-6)


@pytest.mark.parametrize('sizes', [(1, 1, 1), (2, 2, 1)])
def test_microbatches_carry_each_their_rows(sizes):
  """Two steps of four microbatches: the same loss, gradient and carry as whole."""
  def two_steps(count):
    c = common.config('lstm', microbatches=count)
    with jax.set_mesh(common.mesh_of(*sizes)):
      tx, schedule = make_optimizer(c.optimizer, c.steps)
      state = jax.jit(lambda key: init_state(c, tx, key))(jax.random.key(0))
      step = jax.jit(make_step(c, tx, schedule))
      for n in range(2):
        state, sums = step(state, common.put(common.examples_of(c, n)))
      return jax.device_get((state['carry'], sums['nll'], sums['grad_norm']))
  common.assert_trees_close(two_steps(2), two_steps(1), rtol=2e-4, atol=2e-4)


def test_rows_go_on_where_they_ended():
  """Contiguous order: row b of step n + 1 begins with the target that row b of step n ended with, in the same document."""
  c = common.config('lstm')
  first, second = common.examples_of(c, 0), common.examples_of(c, 1)
  np.testing.assert_array_equal(second['tokens'][:, 0], first['targets'][:, -1])
  same = second['positions'][:, 0] > 0
  assert same.sum() > 2
  np.testing.assert_array_equal(second['positions'][same, 0], first['positions'][same, -1] + 1)
  steps = -(-(common.stream().tokens - 1) // c.length) // c.batch
  common.assert_trees_equal(common.examples_of(c, steps), first)
  assert (first['positions'][:, 0] == 0).all()  # a lane begins with a fresh state, also in the next epoch


# ---- encoders and encoder-decoders

@pytest.mark.parametrize('family', ['bert', 'transformer', 't5'])
def test_packed_equals_unpacked(family, one_device):
  """Two documents in one row, each with its own source, give the hidden states they give alone."""
  cfg = common.model(family)
  params = common.perturbed(jax.jit(lambda key: kinds.init_params(cfg, key))(jax.random.key(0)))
  rng = np.random.default_rng(0)
  cuts, source_cuts = [0, 9, 32], [0, 13, 24]

  def arrays(names, cuts, ids):
    parts = list(zip(cuts, cuts[1:]))
    return {names[0]: ids, names[1]: np.concatenate([np.full(b - a, i + 1) for i, (a, b) in enumerate(parts)])[None].astype(np.int32),
            names[2]: np.concatenate([np.arange(b - a) for a, b in parts])[None].astype(np.int32)}
  whole = arrays(('tokens', 'segments', 'positions'), cuts, rng.integers(0, 256, (1, 32), dtype=np.int32))
  if cfg.kind == 'seq2seq':
    whole |= arrays(('inputs', 'input_segments', 'input_positions'), source_cuts, rng.integers(0, 256, (1, 24), dtype=np.int32))
  run = jax.jit(lambda batch: kinds.forward(cfg, params, batch).x_BLD)
  together = run(common.put(whole))
  for i in range(2):
    part, source = slice(*cuts[i:i + 2]), slice(*source_cuts[i:i + 2])
    alone = {k: a[:, source if k.startswith('input') else part] for k, a in whole.items()}
    np.testing.assert_allclose(together[:, part], run(common.put(alone)), atol=2e-5)


def test_an_encoder_sees_both_ways_and_a_decoder_does_not(one_device):
  cfg = common.model('transformer')
  params = common.perturbed(jax.jit(lambda key: kinds.init_params(cfg, key))(jax.random.key(0)))
  each = np.arange(8, dtype=np.int32)[None]
  ones = np.ones_like(each)
  batch = {'inputs': each + 100, 'input_segments': ones, 'input_positions': each, 'tokens': each, 'segments': ones, 'positions': each}
  at = lambda params: jnp.sum(kinds.forward(cfg, params, common.put(batch)).x_BLD[:, 3])
  g_VD = np.abs(np.asarray(jax.jit(jax.grad(at))(params)['embed'])).max(1)
  assert (g_VD[100:108] > 0).all() and (g_VD[:4] > 0).all() and (g_VD[4:8] == 0).all()


def test_hidden_states_of_selected_places(one_device):
  x_BLD = np.random.default_rng(0).standard_normal((8, 5, 3)).astype(np.float32)
  at_BS = np.random.default_rng(1).integers(0, 5, (8, 2), dtype=np.int32)
  np.testing.assert_array_equal(encoder.select(*common.put((x_BLD, at_BS))), x_BLD[np.arange(8)[:, None], at_BS])


# ---- scored and prompted

DOCUMENTS = [('a', 'the first one, short'), ('b', 'a second document that is longer than one window of it ' * 2), ('c', 'z')]


_logits = jax.jit(kinds.logits, static_argnums=0)


def nll_by_hand(lm, batch):
  """Σ −log p of the targets of one row, from all of its logits, in float64."""
  multiple = {k: np.repeat(a[None], lm.rows_multiple, 0) for k, a in batch.items()}
  with jax.set_mesh(lm.mesh):
    logits = np.asarray(_logits(lm.config.model, lm.params, common.put(multiple)))[0].astype(np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return -(log_p[np.arange(len(batch['targets'])), batch['targets']] * batch['weights']).sum()


def row(**arrays):
  return {k: np.asarray(a, np.float32 if k == 'weights' else np.int32) for k, a in arrays.items()}


def expected(lm, text, context, stride):
  """Nats of a document, token by token as the module says, with no packing and no batch."""
  ids = [lm.tokenizer.boundary, *lm.tokenizer.encode(text)]
  kind, M, total = lm.config.model.kind, lm.config.objective.source, 0.
  if kind == 'rnn':
    n = len(ids) - 1
    return nll_by_hand(lm, row(tokens=ids[:-1], targets=ids[1:], positions=range(n), segments=[1] * n, weights=[1] * n))
  if kind == 'encoder':
    for start in range(1, len(ids), context - 2):
      chunk = [lm.tokenizer.cls, *ids[start:start + context - 2], lm.tokenizer.sep]
      for at in range(1, len(chunk) - 1):
        masked = [*chunk[:at], lm.tokenizer.mask, *chunk[at + 1:]]
        total += nll_by_hand(lm, row(tokens=masked, positions=range(len(chunk)), segments=[1] * len(chunk), at=[at],
                                     targets=[chunk[at]], weights=[1]))
    return total
  for w in scoring.windows(np.array(ids), context, stride, M):
    n, m = len(w.ids) - 1, max(1, len(w.source))
    source = list(w.source) or [0]  # one that is no part of the document
    total += nll_by_hand(lm, row(tokens=w.ids[:-1], targets=w.ids[1:], positions=range(n), segments=[1] * n,
                                 weights=np.arange(n) >= w.scored, inputs=source, input_positions=range(m),
                                 input_segments=[1 if len(w.source) else 0] * m))
  return total


@pytest.mark.parametrize('family', KINDS)
def test_scores_equal_those_by_hand_on_any_mesh(family):
  lm = make_lm(family)
  documents = DOCUMENTS if family != 'bert' else DOCUMENTS[::2]
  stride = 16 if lm.config.model.kind == 'rnn_seq2seq' else 8  # it forgets its source within a few tokens
  found = scoring.score(lm, documents, 16, stride, 4)
  assert [(d.name, d.bytes, d.tokens) for d in found] == [(n, len(t), len(t)) for n, t in documents]
  np.testing.assert_allclose([d.nll for d in found], [expected(lm, t, 16, stride) for _, t in documents], rtol=1e-5)
  again = scoring.score(make_lm(family, (2, 2, 2)), documents, 16, stride, 7)
  np.testing.assert_allclose([d.nll for d in again], [d.nll for d in found], rtol=1e-5)


def greedy(lm, prompt, count):
  """The argmax of whole forward passes."""
  ids, new, o = lm.tokenizer.prompt(prompt), [], lm.config.objective
  source = ids[:-1][-o.source:] if o.name == 'next' else ids[-o.source:] if o.source else []
  ids = [lm.tokenizer.boundary] if o.name == 'spans' else ids[-1:] if o.source else ids
  real = len(source)
  pad = lambda a, n: np.pad(np.asarray(a, np.int32), (0, n - len(a)))[None]
  for _ in range(count):
    n = len(ids) + len(new)
    batch = {'tokens': pad(ids + new, 64), 'positions': np.arange(64, dtype=np.int32)[None], 'segments': pad([1] * n, 64)}
    if o.source:
      batch |= {'inputs': pad(source, o.source), 'input_segments': pad([1] * real, o.source),
                'input_positions': np.arange(o.source, dtype=np.int32)[None]}
    with jax.set_mesh(lm.mesh):
      logits = np.asarray(_logits(lm.config.model, lm.params, common.put(batch)))[0, n - 1, :lm.tokenizer.vocab_size]
    new.append(int(logits.argmax()))
    if new[-1] == lm.tokenizer.boundary:
      break
  return lm.tokenizer.decode([i for i in new if i != lm.tokenizer.boundary])


@pytest.mark.parametrize('family', [k for k in KINDS if k != 'bert'])
def test_greedy_is_the_argmax_and_beams_are_the_best_of_all(family):
  lm = make_lm(family)
  prompts = ['def f(', 'a much longer prompt than the other one']
  assert lm.generate(prompts, 10, temperature=0) == [greedy(lm, p, 10) for p in prompts]
  assert make_lm(family, (1, 2, 2)).generate(prompts, 10, temperature=0) == lm.generate(prompts, 10, temperature=0)
  V, ids = lm.tokenizer.vocab_size, lm.prompt(prompts[0])
  (found,) = beams.search(lm, [ids], 2, Sampling(0., num_beams=V), set())  # as many beams as tokens: all pairs are seen
  with jax.set_mesh(lm.mesh):
    rows = decoding.make(lm, [ids] * V, 2)
    first_BV = np.asarray(jax.nn.log_softmax(rows.start()[:, :V]))
    second_BV = np.asarray(jax.nn.log_softmax(rows.extend(jax.device_put(np.arange(V, dtype=np.int32), layout.spec('B')))[:, :V]))
  assert found == list(np.unravel_index(np.argmax(first_BV[0][:, None] + second_BV), (V, V)))


def test_an_encoder_generates_no_text():
  with pytest.raises(Exception, match='model.kind=encoder: generates no text'):
    make_lm('bert').generate(['x'], 4)


def test_loss_of_pairs_is_reported_and_weighed(one_device):
  c = common.config('bert')
  params = jax.jit(lambda key: kinds.init_params(c.model, key))(jax.random.key(0))
  batch = common.put(common.examples_of(c))
  loss = {w: objectives.token_loss(dataclasses.replace(c, objective=dataclasses.replace(c.objective, next_sentence=w)), params, batch)
          for w in (0., 1.)}
  sums = loss[1.][1][0]
  assert float(sums['pairs']) == c.batch and abs(float(sums['pairs_nll']) / c.batch - math.log(2)) < 0.1
  np.testing.assert_allclose(loss[1.][0] - loss[0.][0], sums['tokens'] * sums['pairs_nll'] / c.batch, rtol=1e-4)
