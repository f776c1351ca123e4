"""Every family against transformers: logits, gradients, and the way there and back."""
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
from jaxlm.interop import convert
from jaxlm.interop.huggingface import Folder
from jaxlm.models import cache, kinds
from jaxlm.objectives import token_loss
from jaxlm.sampling import Sampling
from tests import campaigns, common, families

LENGTH = 24
NEW = 10
DOCS = pathlib.Path('docs/parity.md')
COLUMNS = ('logits', 'gradient of the loss', 'greedy', '3 beams', 'export and reload')
HEAD = f"""# Parity with transformers

Made by `make parity` (tests/test_families.py) from tiny random models of each family, every parameter perturbed, in float32
on CPU: the largest absolute difference of the logits of 2 × {LENGTH} positions and of the loss's gradient over all parameters,
tokens equal in {NEW} steps after prompts of 3, 11 and 6 tokens, and what transformers {transformers.__version__} loads of what
jaxlm exports, all tensors.
"""


def model_of(source) -> dict:
  return common.configs.from_flat({'length': 1, 'loss.chunks': 1, **{
      f'model.{k}': v for k, v in convert.to_model(source.family, source.config).items()}}).model


def tree_of(source, m):
  """A foreign checkpoint as our parameters, in memory."""
  flat = {path: np.full(shape, np.nan, np.float32) for path, shape in convert.shapes(m).items()}
  for path, index, array in convert.read(source, m):
    assert np.isnan(flat[path][index]).all(), f'{path}{index} is written twice'
    flat[path][index] = array
  tree = {}
  for path, array in flat.items():
    assert not np.isnan(array).any(), path
    *parents, leaf = path.split('/')
    functools.reduce(lambda t, k: t.setdefault(k, {}), parents, tree)[leaf] = array
  return tree


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  """name → (the model in transformers, its folder, ours)."""
  @functools.cache
  def make(name):
    peer = families.make(name)
    folder = tmp_path_factory.mktemp('hf') / 'model'
    peer.save_pretrained(folder)
    source = Folder(folder)
    m = model_of(source)
    return peer, folder, m, tree_of(source, m)
  return make


@pytest.fixture(scope='module')
def table():
  """{family: {column: cell}}, written into docs/ when JAXLM_PARITY is set (`make parity`)."""
  rows = {}
  yield lambda name, **cells: rows.setdefault(name, {}).update(cells)
  if os.environ.get('JAXLM_PARITY'):
    lines = [HEAD, '| family | ' + ' | '.join(COLUMNS) + ' |', '|---' * (len(COLUMNS) + 1) + '|']
    lines += ['| ' + ' | '.join([name, *(cells[c] for c in COLUMNS)]) + ' |' for name, cells in rows.items()]
    DOCS.write_text('\n'.join(lines) + '\n', encoding='utf-8')


def batch_of(m):
  t_BM = np.random.default_rng(0).integers(3, m.V, (2, LENGTH + 1), dtype=np.int32)
  ones = np.ones((2, LENGTH), np.int32)
  return t_BM, {'tokens': t_BM[:, :-1], 'targets': t_BM[:, 1:], 'segments': ones, 'weights': ones.astype(np.float32),
                'positions': np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ones.shape)}


@pytest.mark.parametrize('name', families.FAMILIES)
def test_logits_and_gradients_equal_transformers(name, checkpoint, one_device, tmp_path, table):
  peer, _, m, params = checkpoint(name)
  t_BM, batch = batch_of(m)
  ids = torch.tensor(t_BM, dtype=torch.long)
  peer.zero_grad()
  logits = peer(ids[:, :-1], use_cache=False).logits
  torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
  placed = jax.tree.map(lambda v, a: jax.device_put(v, a.sharding), params, layout.named(kinds.abstract_params(m), common.mesh_of(1, 1, 1)))
  on = common.put(batch)
  c = dataclasses.replace(common.config(), model=m)
  ours = jax.jit(lambda p: kinds.logits(m, p, on))(placed)
  difference = np.abs(np.asarray(ours) - logits.detach().numpy()).max()
  assert difference <= 2e-4
  grads = jax.jit(jax.grad(lambda p: token_loss(c, p, on)[0] / on['weights'].sum()))(placed)
  with torch.no_grad():  # their gradients, saved as if they were weights, come through the same rows
    slopes = families.make(name)
    for (key, p), q in zip(slopes.named_parameters(), peer.parameters()):
      p.copy_(q.grad if q.grad is not None else torch.zeros_like(q))
  slopes.save_pretrained(tmp_path)
  theirs = tree_of(Folder(tmp_path), m)
  if m.moe.bias:  # no gradient reaches it on either side; what was saved is the buffer
    assert not np.asarray(grads['layers']['moe']['bias']).any()
    theirs['layers']['moe']['bias'][:] = 0
  common.assert_trees_close(grads, theirs, atol=2e-5, rtol=2e-3)
  gap = max(np.abs(np.asarray(a) - b).max() for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(theirs)))
  table(name, **{'logits': f'{difference:.1e}', 'gradient of the loss': f'{gap:.1e}'})


@pytest.mark.parametrize('name', families.FAMILIES)
def test_config_and_tensors_come_back_as_they_were(name, checkpoint, tmp_path, table):
  """What we write is what was read, bit for bit, and loads in transformers with the same tensors."""
  peer, folder, m, params = checkpoint(name)
  source = Folder(folder)
  written = convert.to_config_json(source.model_type, m)
  assert model_of(types.SimpleNamespace(family=source.family, config=written)) == m

  def get(path, index):
    return functools.reduce(lambda t, k: t[k], path.split('/'), params)[index]
  stored = {k: np.concatenate([b for _, b in source.blocks(k)]) for k in source.names()}
  back = dict(convert.write(source.model_type, m, get))
  assert set(stored) - set(back) == {k for k in stored if k not in back and re.search(source.family.ignored, k)}
  for key, tensor in back.items():
    np.testing.assert_array_equal(tensor, stored[key], err_msg=key)
  safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in back.items()}, tmp_path / 'model.safetensors',
                              metadata={'format': 'pt'})
  (tmp_path / 'config.json').write_text(json.dumps({**written, 'max_position_embeddings': 64, 'pad_token_id': None, 'num_mtp_layers': 0}))
  again, said = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
  assert not said['missing_keys'] and not said['unexpected_keys'] and not said['mismatched_keys']
  tensors = dict(peer.state_dict())
  for key, tensor in again.state_dict().items():
    assert torch.equal(tensor, tensors.pop(key)), key
  assert not tensors
  table(name, **{'export and reload': 'bitwise equal'})


def lm_of(m, params, sizes=(1, 1, 1)):
  """What generation needs of an LM."""
  mesh = common.mesh_of(*sizes)
  with jax.set_mesh(mesh):
    placed = jax.tree.map(lambda v, a: jax.device_put(v, a.sharding), params, layout.named(kinds.abstract_params(m), mesh))
    prepared = cache.prepare(m, placed)
  c = dataclasses.replace(common.config(), model=m)
  return types.SimpleNamespace(config=c, decoding_params=prepared, mesh=mesh, rows_multiple=sizes[0] * sizes[1],
                               tokenizer=types.SimpleNamespace(vocab_size=m.V), stop_ids={2})


def peer_says(peer, prompts, **how):
  """transformers' continuations, up to and with its end token."""
  longest = max(map(len, prompts))
  ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
  mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
  out = peer.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, **how)[:, longest:].tolist()
  return [row[:row.index(2) + 1] if 2 in row else row for row in out]


@pytest.mark.parametrize('name', families.FAMILIES)
def test_greedy_and_beams_equal_transformers(name, checkpoint, table):
  """Token for token, three prompts of different lengths at once, one of them longer than the window."""
  peer, _, m, params = checkpoint(name)
  rng = np.random.default_rng(1)
  prompts = [rng.integers(3, m.V, n).tolist() for n in (3, 11, 6)]
  lm = lm_of(m, params)
  greedy = generate.sample(lm, 3 * prompts, NEW, Sampling(0.), 0, lambda b, row: row[-1] == 2)  # as many rows as beams
  assert greedy == 3 * peer_says(peer, prompts, num_beams=1)
  assert beams.search(lm, prompts, NEW, Sampling(0., num_beams=3), {2}) == peer_says(peer, prompts, num_beams=3)
  table(name, greedy='equal', **{'3 beams': 'equal'})


@pytest.mark.parametrize('name, sizes', [
    ('llama 3', (1, 2, 2)), ('gemma3', (1, 2, 2)), ('qwen3_moe', (2, 2, 1)), ('deepseek_v3', (1, 2, 2)),
    *(pytest.param(name, sizes, marks=campaigns.parity) for name, sizes in (
        ('llama 3', (2, 2, 1)), ('gemma3', (2, 2, 1)), ('qwen3_moe', (1, 2, 2)), ('deepseek_v3', (2, 2, 1))))])
def test_generation_is_the_same_on_a_mesh(name, sizes, checkpoint):
  peer, _, m, params = checkpoint(name)
  prompts = [np.random.default_rng(n).integers(3, m.V, n).tolist() for n in (3, 11, 6)]
  lm = lm_of(m, params, sizes)
  assert generate.sample(lm, prompts, NEW, Sampling(0.), 0, lambda b, row: row[-1] == 2) == peer_says(peer, prompts)


def test_the_table_in_docs_has_every_family():
  """docs/parity.md is what `make parity` wrote, of the families there are now."""
  rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in DOCS.read_text(encoding='utf-8').splitlines()
          if line.startswith('|')]
  assert rows[0][1:] == list(COLUMNS)
  assert [row[0] for row in rows[2:]] == list(families.FAMILIES)
  for row in rows[2:]:
    assert float(row[1]) <= 2e-4 and float(row[2]) <= 2e-5 and row[3:] == ['equal', 'equal', 'bitwise equal'], row
