"""The decoder against its peers, and against itself run in other ways."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxlm import layout
from jaxlm.models import attention, decoder
from jaxlm.objectives import causal_lm
from tests import common


def init(cfg):
  return jax.jit(lambda key: decoder.init_params(cfg, key))(jax.random.key(0))


def run(cfg, params, tokens_BL, segments_BL=None, positions_BL=None):
  B, L = tokens_BL.shape
  arrays = common.put({
      't': tokens_BL, 's': np.ones((B, L), np.int32) if segments_BL is None else segments_BL,
      'p': np.broadcast_to(np.arange(L, dtype=np.int32), (B, L)) if positions_BL is None else positions_BL})
  return np.asarray(jax.jit(lambda p, a: decoder.logits(cfg, p, a['t'], a['p'], a['s']))(params, arrays))


def tokens(cfg, B=4, L=32, seed=0):
  return np.random.default_rng(seed).integers(0, cfg.V, (B, L), dtype=np.int32)


def fill(torch_model, seed=0):
  """Noise on every parameter of a transformers model."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for p in torch_model.parameters():
      p.add_(0.1 * torch.randn(p.shape, generator=generator))
  return torch_model.eval()


def stack(cfg, get):
  return np.stack([get(n) for n in range(cfg.N)])


def gpt2_params(cfg, w):
  """transformers' names → ours, for weights and for their gradients."""
  at = lambda n, name: w[f'transformer.h.{n}.{name}']
  qkv = lambda i: (lambda n: np.split(at(n, 'attn.c_attn.weight'), 3, 1)[i].reshape(cfg.D, cfg.H, cfg.K))
  qkv_bias = lambda i: (lambda n: np.split(at(n, 'attn.c_attn.bias'), 3)[i].reshape(cfg.H, cfg.K))
  part = {name: {'w': stack(cfg, qkv(i)), 'bias': stack(cfg, qkv_bias(i))} for i, name in enumerate('qkv')}
  part['o'] = {'w': stack(cfg, lambda n: at(n, 'attn.c_proj.weight').reshape(cfg.H, cfg.K, cfg.D)),
               'bias': stack(cfg, lambda n: at(n, 'attn.c_proj.bias'))}
  two = lambda name, weight: {weight: stack(cfg, lambda n: at(n, f'{name}.weight')),
                              'bias': stack(cfg, lambda n: at(n, f'{name}.bias'))}
  return {'embed': w['transformer.wte.weight'], 'positions': w['transformer.wpe.weight'],
          'norm': {'scale': w['transformer.ln_f.weight'], 'bias': w['transformer.ln_f.bias']},
          'layers': {'attention': part, 'norm1': two('ln_1', 'scale'), 'norm2': two('ln_2', 'scale'),
                     'mlp': {'up': two('mlp.c_fc', 'w'), 'down': two('mlp.c_proj', 'w')}}}


def llama_params(cfg, w):
  at = lambda n, name: w[f'model.layers.{n}.{name}.weight']
  heads = lambda name, count: {'w': stack(cfg, lambda n: at(n, name).T.reshape(cfg.D, count, cfg.K))}
  linear = lambda name: {'w': stack(cfg, lambda n: at(n, name).T)}
  norm = lambda name: {'scale': stack(cfg, lambda n: at(n, name))}
  o = {'w': stack(cfg, lambda n: at(n, 'self_attn.o_proj').T.reshape(cfg.H, cfg.K, cfg.D))}
  params = {'embed': w['model.embed_tokens.weight'], 'norm': {'scale': w['model.norm.weight']},
            'layers': {'attention': {'q': heads('self_attn.q_proj', cfg.H), 'k': heads('self_attn.k_proj', cfg.G),
                                     'v': heads('self_attn.v_proj', cfg.G), 'o': o},
                       'norm1': norm('input_layernorm'), 'norm2': norm('post_attention_layernorm'),
                       'mlp': {n: linear(f'mlp.{n}_proj') for n in ('gate', 'up', 'down')}}}
  return params if cfg.tied else {**params, 'unembed': w['lm_head.weight']}


def assert_equals_peer(cfg, peer, to_params):
  """Logits, loss and the gradient of every parameter."""
  t_BL = tokens(cfg, L=33)
  ours = to_params(cfg, {k: v.detach().numpy() for k, v in peer.state_dict().items()})
  assert jax.tree.structure(ours) == jax.tree.structure(decoder.abstract_params(cfg))
  ids = torch.tensor(t_BL, dtype=torch.long)
  logits = peer(ids[:, :-1]).logits
  torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
  np.testing.assert_allclose(run(cfg, ours, t_BL[:, :-1]), logits.detach().numpy(), atol=2e-4)
  B, L = t_BL.shape[0], t_BL.shape[1] - 1
  batch = common.put({'tokens': t_BL[:, :-1], 'targets': t_BL[:, 1:], 'segments': np.ones((B, L), np.int32),
                      'positions': np.broadcast_to(np.arange(L, dtype=np.int32), (B, L)),
                      'weights': np.ones((B, L), np.float32)})
  c = dataclasses.replace(common.config(), model=cfg)
  shardings = layout.named(decoder.abstract_params(cfg), common.mesh_of(1, 1, 1))
  placed = jax.tree.map(lambda v, a: jax.device_put(v, a.sharding), ours, shardings)
  grads = jax.jit(jax.grad(lambda p: causal_lm(c, p, batch)[0] / (B * L)))(placed)
  theirs = to_params(cfg, {k: p.grad.numpy() for k, p in peer.named_parameters()})
  common.assert_trees_close(grads, theirs, atol=2e-5, rtol=1e-3)


def test_gpt2_equals_transformers(one_device):
  cfg = common.model('gpt2')
  assert_equals_peer(cfg, fill(transformers.GPT2LMHeadModel(transformers.GPT2Config(
      n_embd=cfg.D, n_head=cfg.H, n_layer=cfg.N, n_inner=cfg.F, vocab_size=cfg.V, n_positions=cfg.P, bos_token_id=0,
      eos_token_id=0))), gpt2_params)


@pytest.mark.parametrize('tied', [True, False])
def test_llama_equals_transformers(one_device, tied):
  cfg = common.model('llama', tied=tied, rope_base=500.)
  assert_equals_peer(cfg, fill(transformers.LlamaForCausalLM(transformers.LlamaConfig(
      hidden_size=cfg.D, num_attention_heads=cfg.H, num_key_value_heads=cfg.G, head_dim=cfg.K, intermediate_size=cfg.F,
      num_hidden_layers=cfg.N, vocab_size=cfg.V, rms_norm_eps=cfg.norm_eps, tie_word_embeddings=tied,
      rope_parameters={'rope_type': 'default', 'rope_theta': cfg.rope_base}, bos_token_id=0, eos_token_id=0))),
                     llama_params)


@pytest.mark.parametrize('kernel', sorted(attention.ATTENTION))
@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_causal_by_gradient(one_device, family, kernel):
  """No logit depends on a later token's embedding, and each depends on its own and earlier ones."""
  cfg = common.model(family, attention=kernel)
  params = common.perturbed(init(cfg))
  L, at = 8, 5
  t_BL = common.put(np.arange(L, dtype=np.int32)[None])  # every token occurs once, so its embedding's gradient is its
  p_BL, s_BL = common.put(np.arange(L, dtype=np.int32)[None]), common.put(np.ones((1, L), np.int32))

  def one_logit(params):
    hidden, _ = decoder.Decoder(cfg).apply({'params': params}, t_BL, p_BL, s_BL)
    return jnp.sum(jnp.where(jnp.arange(L)[None, :, None] == at, hidden, 0))
  g_VD = np.asarray(jax.jit(jax.grad(one_logit))(params)['embed'])
  assert (np.abs(g_VD[:at + 1]).max(1) > 0).all()
  assert (g_VD[at + 1:] == 0).all()


@pytest.mark.parametrize('kernel', sorted(attention.ATTENTION))
@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_packed_equals_unpacked(one_device, family, kernel):
  """Three documents in one row give the logits they give alone."""
  cfg = common.model(family, attention=kernel)
  params = common.perturbed(init(cfg))
  t_BL = tokens(cfg, B=1, L=32)
  cuts = [0, 9, 20, 32]
  segments = np.concatenate([np.full(b - a, i + 1, np.int32) for i, (a, b) in enumerate(zip(cuts, cuts[1:]))])[None]
  positions = np.concatenate([np.arange(b - a, dtype=np.int32) for a, b in zip(cuts, cuts[1:])])[None]
  packed = run(cfg, params, t_BL, segments, positions)
  for a, b in zip(cuts, cuts[1:]):
    np.testing.assert_allclose(packed[:, a:b], run(cfg, params, t_BL[:, a:b]), atol=2e-5)


def gradient(cfg, params, c):
  c = dataclasses.replace(c, model=cfg)
  b = common.put(common.batch(c))
  return jax.value_and_grad(lambda p: causal_lm(c, p, b)[0]), params


@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_remat_and_unrolling_change_the_program_and_not_the_result(one_device, family):
  c = common.config(family)
  params = common.perturbed(init(c.model))
  jaxprs, results = {}, {}
  for remat in decoder.REMAT:
    for scan in (True, False):
      f, p = gradient(common.model(family, remat=remat, scan=scan), params, c)
      jaxprs[remat, scan] = str(jax.make_jaxpr(f)(p))
      results[remat, scan] = jax.jit(f)(p)
  assert len(set(jaxprs.values())) == len(jaxprs)
  count = lambda key: jaxprs[key].count('dot_general')
  assert count(('full', True)) > count(('none', True))  # the backward pass does redo the forward's matmuls
  for result in results.values():
    common.assert_trees_close(result, results['none', True], rtol=2e-4, atol=2e-5)


def test_attention_kernels_agree_forward_and_backward():
  rng = np.random.default_rng(0)
  B, L, H, G, K = 2, 16, 8, 4, 8
  q, k, v = (jnp.asarray(rng.standard_normal((B, L, n, K), np.float32)) for n in (H, G, G))
  segments = jnp.asarray(np.sort(rng.integers(0, 3, (B, L)), 1).astype(np.int32))

  def all_of(name):
    f = lambda q, k, v: jnp.sum(jnp.sin(attention.ATTENTION[name](q, k, v, segments)))
    return jax.jit(lambda *a: (attention.ATTENTION[name](*a, segments), jax.grad(f, (0, 1, 2))(*a)))(q, k, v)
  expected = all_of('dot_product')
  for name in attention.ATTENTION:
    common.assert_trees_close(all_of(name), expected, atol=1e-5)


def test_bfloat16_compute_keeps_float32_weights_and_is_near(one_device):
  cfg = common.model('llama')
  params = common.perturbed(init(cfg))
  low = common.model('llama', dtype='bfloat16')
  assert {a.dtype for a in jax.tree.leaves(decoder.abstract_params(low))} == {jnp.dtype('float32')}
  t_BL = tokens(cfg)
  exact, near = run(cfg, params, t_BL), run(low, params, t_BL)
  assert near.dtype == np.float32
  error = np.abs(near - exact).max() / np.abs(exact).max()
  assert 1e-4 < error < 5e-2
