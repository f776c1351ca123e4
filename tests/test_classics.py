"""Encoders and encoder-decoders against transformers: logits, gradients, generation, heads, and the way there and back."""
import dataclasses
import functools
import json
import os
import pathlib
import re
import types

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from jaxlm import beams, generate, layout
from jaxlm.interop import convert, importing
from jaxlm.interop.huggingface import Folder
from jaxlm.models import cache, heads, kinds
from jaxlm.objectives import token_loss
from jaxlm.sampling import Sampling
from tests import classics, common
from tests.test_families import tree_of

LENGTH, SOURCE, NEW = 24, 17, 10
SEQ2SEQ = [name for name in classics.LMS if 'bert' not in name]
DOCS = pathlib.Path('docs/parity_classics.md')
COLUMNS = ('outputs', 'gradient of the loss', 'greedy', '3 beams', 'export and reload')
HEAD = f"""# Parity with transformers: encoders and encoder-decoders

Made by `make parity` (tests/test_classics.py) from tiny random models of each family, every parameter perturbed, in float32
on CPU: the largest absolute difference of what the model makes (logits, scores or hidden states) at 2 × {LENGTH} positions, a
decoder's beside {SOURCE} inputs, and of the gradient over all parameters of the cross entropy of all of them; tokens equal
in {NEW} steps after inputs of 3, 11 and 6 tokens; and what transformers {transformers.__version__} loads of what jaxlm exports,
all tensors.
"""


def config_of(source) -> common.Config:
  model = convert.to_model(source.family, source.config)
  return common.configs.from_flat({'length': 48, 'loss.chunks': 1, **importing.objective_of(model, 48),
                                   **{f'model.{k}': v for k, v in model.items()}})


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  """name → (the model in transformers, its folder, our config, our parameters)."""
  @functools.cache
  def make(name):
    peer, folder = classics.make(name), tmp_path_factory.mktemp('hf') / 'model'
    peer.save_pretrained(folder)
    source = Folder(folder)
    c = config_of(source)
    return peer, folder, c, tree_of(source, c.model)
  return make


@pytest.fixture(scope='module')
def table():
  """{model: {column: cell}}, written into docs/ when JAXLM_PARITY is set (`make parity`)."""
  rows = {}
  yield lambda name, **cells: rows.setdefault(name, {}).update(cells)
  if os.environ.get('JAXLM_PARITY'):
    lines = [HEAD, '| model | ' + ' | '.join(COLUMNS) + ' |', '|---' * (len(COLUMNS) + 1) + '|']
    lines += ['| ' + ' | '.join([name, *(rows[name].get(c, '') for c in COLUMNS)]) + ' |' for name in classics.ALL]
    DOCS.write_text('\n'.join(lines) + '\n', encoding='utf-8')


def batches(m):
  """(our batch, transformers' of the same)."""
  rng = np.random.default_rng(0)
  tokens = lambda length: rng.integers(3, m.V - 1, (2, length), dtype=np.int32)
  places = lambda ids: np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
  long = lambda ids: torch.tensor(ids, dtype=torch.long)
  ids = tokens(LENGTH)
  ours = {'tokens': ids, 'targets': tokens(LENGTH), 'segments': np.ones_like(ids), 'positions': places(ids),
          'weights': np.ones(ids.shape, np.float32)}
  if m.kind == 'seq2seq':
    inputs = tokens(SOURCE)
    return {**ours, 'inputs': inputs, 'input_segments': np.ones_like(inputs), 'input_positions': places(inputs)}, {
        'input_ids': long(inputs), 'decoder_input_ids': long(ids), 'use_cache': False}
  types_BL = (np.arange(LENGTH)[None] > LENGTH // 2).repeat(2, 0).astype(np.int32) * (m.T > 1)
  return {**ours, 'types': types_BL}, {'input_ids': long(ids), 'token_type_ids': long(types_BL)}


def placed(m, params, mesh):
  return jax.tree.map(lambda v, a: jax.device_put(v, a.sharding), params, layout.named(kinds.abstract_params(m), mesh))


@pytest.mark.parametrize('name', classics.LMS)
def test_logits_and_gradients_equal_transformers(name, checkpoint, one_device, tmp_path, table):
  peer, _, c, params = checkpoint(name)
  m = c.model
  ours, theirs = batches(m)
  peer.zero_grad()
  logits = classics.outputs(peer, **theirs)
  torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(ours['targets']).long().flatten()).backward()
  on, weights = common.put(ours), placed(m, params, common.mesh_of(1, 1, 1))
  difference = np.abs(np.asarray(jax.jit(lambda p: kinds.logits(m, p, on))(weights)) - logits.detach().numpy()).max()
  assert difference <= 2e-4
  grads = jax.jit(jax.grad(lambda p: token_loss(c, p, on)[0] / on['weights'].sum()))(weights)
  with torch.no_grad():  # their gradients, saved as if they were weights, come through the same rows
    slopes = classics.make(name)
    for (_, p), q in zip(slopes.named_parameters(), peer.parameters(), strict=True):
      p.copy_(q.grad if q.grad is not None else torch.zeros_like(q))
  slopes.save_pretrained(tmp_path)
  expected = tree_of(Folder(tmp_path), m)
  if m.kind == 'seq2seq' and m.output_bias:  # a buffer there, which gets no gradient: here that of log-softmax
    p_BLV = torch.softmax(logits.detach(), -1).numpy()
    hits_V = np.bincount(ours['targets'].ravel(), minlength=m.V)
    expected['unembed_bias'] = (p_BLV.sum((0, 1)) - hits_V) / ours['targets'].size
  common.assert_trees_close(grads, expected, atol=2e-5, rtol=2e-3)
  gap = max(np.abs(np.asarray(a) - b).max() for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected)))
  table(name, **{'outputs': f'{difference:.1e}', 'gradient of the loss': f'{gap:.1e}'})


@pytest.mark.parametrize('name', classics.ALL)
def test_config_and_tensors_come_back_as_they_were(name, checkpoint, tmp_path, table):
  """What we write is what was read, bit for bit, and loads in transformers' class with the same tensors."""
  peer, folder, c, params = checkpoint(name)
  source = Folder(folder)
  written = convert.to_config_json(source.model_type, c.model)
  assert config_of(types.SimpleNamespace(family=source.family, config=written)) == c
  assert written['architectures'] == [type(peer).__name__] and convert.family_of(c.model) == source.model_type
  stored = safetensors.numpy.load_file(folder / 'model.safetensors')
  back = dict(convert.write(source.model_type, c.model,
                               lambda path, index: functools.reduce(lambda t, k: t[k], path.split('/'), params)[index]))
  assert all(re.search(source.family.ignored, key) for key in set(stored) - set(back)) and not set(back) - set(stored)
  for key, tensor in back.items():
    np.testing.assert_array_equal(tensor, stored[key], err_msg=key)
  safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in back.items()}, tmp_path / 'model.safetensors',
                              metadata={'format': 'pt'})
  (tmp_path / 'config.json').write_text(json.dumps(
      {'max_position_embeddings': 64, 'pad_token_id': peer.config.pad_token_id, **written}))
  again, said = type(peer).from_pretrained(tmp_path, output_loading_info=True)
  assert not said['missing_keys'] and not said['unexpected_keys'] and not said['mismatched_keys']
  tensors = dict(peer.state_dict())
  for key, tensor in again.state_dict().items():
    assert torch.equal(tensor, tensors.pop(key)), key
  assert not tensors
  table(name, **{'export and reload': 'bitwise equal'})


def lm_of(c, params, start, end, sizes=(1, 1, 1)):
  """What generation needs of an LM."""
  mesh = common.mesh_of(*sizes)
  with jax.set_mesh(mesh):
    prepared = cache.prepare(c.model, placed(c.model, params, mesh))
  c = dataclasses.replace(c, data=dataclasses.replace(c.data, start='start'))
  return types.SimpleNamespace(config=c, decoding_params=prepared, mesh=mesh, rows_multiple=sizes[0] * sizes[1], stop_ids={end},
                               tokenizer=types.SimpleNamespace(vocab_size=c.model.V, ids_of=lambda names: [start]))


def peer_says(peer, prompts, **how):
  """transformers' continuations, up to and with its end token; inputs are padded on the right."""
  longest, pad, end = max(map(len, prompts)), peer.config.pad_token_id, peer.config.eos_token_id
  ids = torch.tensor([p + [pad] * (longest - len(p)) for p in prompts])
  mask = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in prompts])
  start = peer.config.decoder_start_token_id
  out = peer.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, decoder_start_token_id=start,
                      use_cache=False, **how)[:, 1:].tolist()  # its cache wants a decoder as deep as the encoder
  return [row[:row.index(end) + 1] if end in row else row for row in out]


@pytest.mark.parametrize('name', SEQ2SEQ)
def test_greedy_and_beams_equal_transformers(name, checkpoint, table):
  """Token for token, three inputs of different lengths at once, the decoder begun with the family's start token."""
  peer, _, c, params = checkpoint(name)
  rng = np.random.default_rng(1)
  prompts = [rng.integers(3, c.model.V - 1, n).tolist() for n in (3, 11, 6)]
  start, end = peer.config.decoder_start_token_id, peer.config.eos_token_id
  lm = lm_of(c, params, start, end)
  greedy = lambda lm: generate.sample(lm, prompts, NEW, Sampling(0.), 0, lambda b, row: row[-1] == end)
  expected = peer_says(peer, prompts, num_beams=1)
  assert greedy(lm) == expected and len(set(map(tuple, expected))) > 1
  assert greedy(lm_of(c, params, start, end, (1, 2, 2))) == expected
  assert beams.search(lm, prompts, NEW, Sampling(0., num_beams=3), {end}) == peer_says(peer, prompts, num_beams=3)
  table(name, greedy='equal', **{'3 beams': 'equal'})


@pytest.mark.parametrize('name', ['t5', 'marian, unscaled'])
def test_penalties_and_what_is_never_said_equal_transformers(name, checkpoint):
  """The penalty is for what the decoder said and began with, and not for what the encoder read."""
  peer, _, c, params = checkpoint(name)
  rng = np.random.default_rng(1)
  prompts = [rng.integers(3, c.model.V - 1, n).tolist() for n in (3, 11, 6)]
  start, end = peer.config.decoder_start_token_id, peer.config.eos_token_id
  plain = peer_says(peer, prompts, num_beams=1)
  prompts = [ids + row for ids, row in zip(prompts, plain)]  # what it wants to say is in what it reads
  plain = peer_says(peer, prompts, num_beams=1)
  never = [plain[0][0], plain[1][-1], start]
  lm = lm_of(c, params, start, end)
  lm.tokenizer.ids_of = lambda names, key='': never if names == ['never'] else [start]
  barred = types.SimpleNamespace(**{**vars(lm), 'config': dataclasses.replace(c, data=dataclasses.replace(
      lm.config.data, never='never'))})
  for model, s, how in ((lm, {'repetition_penalty': 2.}, {'repetition_penalty': 2.}),
                        (barred, {}, {'bad_words_ids': [[i] for i in never]})):
    expected = peer_says(peer, prompts, num_beams=1, **how)
    assert expected != plain
    assert generate.sample(model, prompts, NEW, Sampling(0., **s), 0, lambda b, row: row[-1] == end) == expected
    expected = peer_says(peer, prompts, num_beams=3, **how)
    assert beams.search(model, prompts, NEW, Sampling(0., num_beams=3, **s), {end}) == expected


# ---- heads

@pytest.mark.parametrize('name', classics.HEADS)
def test_scores_of_heads_equal_transformers(name, checkpoint, one_device, table):
  peer, _, c, params = checkpoint(name)
  ours, theirs = batches(c.model)
  with torch.no_grad():
    expected = classics.outputs(peer, **theirs).numpy()
  weights, on = placed(c.model, params, common.mesh_of(1, 1, 1)), common.put(ours)
  found = np.asarray(jax.jit(lambda p: heads.outputs(c.model, p, kinds.forward(c.model, p, on)))(weights))
  assert found.shape == expected.shape and found.dtype == np.float32
  assert np.abs(found - expected).max() <= 1e-5
  table(name, outputs=f'{np.abs(found - expected).max():.1e}')


def test_pairs_and_the_pooler_equal_transformers(checkpoint, one_device):
  """BertForPreTraining: whether one text follows the other, beside the logits."""
  peer, _, c, params = checkpoint('bert, pairs')
  ours, theirs = batches(c.model)
  with torch.no_grad():
    expected = peer(**theirs).seq_relationship_logits.numpy()
  weights, on = placed(c.model, params, common.mesh_of(1, 1, 1)), common.put(ours)
  found = jax.jit(lambda p: heads.of_pairs(c.model, p, kinds.forward(c.model, p, on).pooled_BD))(weights)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_table_in_docs_has_every_model():
  """docs/parity_classics.md is what `make parity` wrote, of the models there are now."""
  rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in DOCS.read_text(encoding='utf-8').splitlines()
          if line.startswith('|')]
  assert rows[0][1:] == list(COLUMNS)
  assert [row[0] for row in rows[2:]] == list(classics.ALL)
  for name, outputs, gradient, greedy, beam, export in rows[2:]:
    assert float(outputs) <= 2e-4 and export == 'bitwise equal', name
    assert float(gradient) <= 2e-5 if name in classics.LMS else gradient == '', name
    assert [greedy, beam] == (['equal'] * 2 if name in SEQ2SEQ else [''] * 2), name
