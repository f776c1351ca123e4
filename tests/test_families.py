"""Every family against transformers: logits, gradients, and the way there and back."""
import dataclasses
import functools
import types

import jax
import numpy as np
import pytest
import torch

from jaxlm import beams, generate, layout
from jaxlm.interop import convert
from jaxlm.interop.huggingface import Folder
from jaxlm.models import cache, decoder
from jaxlm.objectives import causal_lm
from jaxlm.sampling import Sampling
from tests import common, families

LENGTH = 24
NEW = 10


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


def batch_of(m):
  t_BM = np.random.default_rng(0).integers(3, m.V, (2, LENGTH + 1), dtype=np.int32)
  ones = np.ones((2, LENGTH), np.int32)
  return t_BM, {'tokens': t_BM[:, :-1], 'targets': t_BM[:, 1:], 'segments': ones, 'weights': ones.astype(np.float32),
                'positions': np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ones.shape)}


@pytest.mark.parametrize('name', families.FAMILIES)
def test_logits_and_gradients_equal_transformers(name, checkpoint, one_device, tmp_path):
  peer, _, m, params = checkpoint(name)
  t_BM, batch = batch_of(m)
  ids = torch.tensor(t_BM, dtype=torch.long)
  peer.zero_grad()
  logits = peer(ids[:, :-1], use_cache=False).logits
  torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
  placed = jax.tree.map(lambda v, a: jax.device_put(v, a.sharding), params, layout.named(decoder.abstract_params(m), common.mesh_of(1, 1, 1)))
  on = common.put(batch)
  c = dataclasses.replace(common.config(), model=m)
  ours = jax.jit(lambda p: decoder.logits(m, p, on['tokens'], on['positions'], on['segments']))(placed)
  np.testing.assert_allclose(ours, logits.detach().numpy(), atol=2e-4)
  grads = jax.jit(jax.grad(lambda p: causal_lm(c, p, on)[0] / on['weights'].sum()))(placed)
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


@pytest.mark.parametrize('name', families.FAMILIES)
def test_config_and_tensors_come_back_as_they_were(name, checkpoint):
  peer, folder, m, params = checkpoint(name)
  model_type = Folder(folder).model_type
  written = convert.to_config_json(model_type, m)
  assert model_of(dataclasses.make_dataclass('S', ['family', 'config'])(Folder(folder).family, written)) == m

  def get(path, index):
    return functools.reduce(lambda t, k: t[k], path.split('/'), params)[index]
  stored = {k: np.concatenate([b for _, b in Folder(folder).blocks(k)]) for k in Folder(folder).names()}
  back = dict(convert.write(model_type, m, get))
  assert set(back) == {k for k in stored if not convert.re.search(Folder(folder).family.ignored, k)} | (
      set(back) & set(stored))
  for key, tensor in back.items():
    np.testing.assert_array_equal(tensor, stored[key], err_msg=key)


def lm_of(m, params, sizes=(1, 1, 1)):
  """What generation needs of an LM."""
  mesh = common.mesh_of(*sizes)
  with jax.set_mesh(mesh):
    placed = jax.tree.map(lambda v, a: jax.device_put(v, a.sharding), params, layout.named(decoder.abstract_params(m), mesh))
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
def test_greedy_and_beams_equal_transformers(name, checkpoint):
  """Token for token, three prompts of different lengths at once, one of them longer than the window."""
  peer, _, m, params = checkpoint(name)
  rng = np.random.default_rng(1)
  prompts = [rng.integers(3, m.V, n).tolist() for n in (3, 11, 6)]
  lm = lm_of(m, params)
  greedy = generate.sample(lm, 3 * prompts, NEW, Sampling(0.), 0, lambda b, row: row[-1] == 2)  # as many rows as beams
  assert greedy == 3 * peer_says(peer, prompts, num_beams=1)
  assert beams.search(lm, prompts, NEW, Sampling(0., num_beams=3), {2}) == peer_says(peer, prompts, num_beams=3)


@pytest.mark.parametrize('sizes', [(1, 2, 2), (2, 2, 1)])
@pytest.mark.parametrize('name', ['llama 3', 'gemma3', 'qwen3_moe', 'deepseek_v3'])
def test_generation_is_the_same_on_a_mesh(name, sizes, checkpoint):
  peer, _, m, params = checkpoint(name)
  prompts = [np.random.default_rng(n).integers(3, m.V, n).tolist() for n in (3, 11, 6)]
  lm = lm_of(m, params, sizes)
  assert generate.sample(lm, prompts, NEW, Sampling(0.), 0, lambda b, row: row[-1] == 2) == peer_says(peer, prompts)
