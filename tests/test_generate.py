"""Generation against taking the argmax of logits by hand."""
import jax
import numpy as np
import pytest
import torch
from transformers.generation import logits_process

from jaxlm import generate, sampling
from jaxlm.errors import UsageError
from jaxlm.models import cache, decoder
from jaxlm.sampling import Sampling
from jaxlm.schema import MoeConfig
from tests import common
from tests.test_evaluate import make_lm

PROMPTS = ['def f(', 'a much longer prompt than the other ones', '']


def greedy(lm, prompt, count):
  ids = [lm.tokenizer.boundary, *lm.tokenizer.encode(prompt)]
  start = len(ids)
  for _ in range(count):
    padded = np.zeros((1, 64), np.int32)  # causal: what follows changes nothing
    padded[0, :len(ids)] = ids
    logits = lm.logits(padded)[0, len(ids) - 1, :lm.tokenizer.vocab_size]
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
  ids = lm.tokenizer.prompt('q')
  new = generate.sample(lm, [ids] * 2000, 1, Sampling(0.8), 3, stop=lambda b, row: False)
  logits = lm.logits(np.array([ids]))[0, -1, :lm.tokenizer.vocab_size]
  p = np.asarray(jax.nn.softmax(logits / 0.8))
  for token in np.argsort(-p)[:5]:
    share = np.mean([row == [token] for row in new])
    assert abs(share - p[token]) < 4 * (p[token] * (1 - p[token]) / 2000) ** 0.5


@pytest.mark.parametrize('s', [Sampling(0.5), Sampling(1., top_k=3), Sampling(1., top_p=0.7), Sampling(1., min_p=0.3),
                               Sampling(1.3, top_k=9, top_p=0.8, min_p=0.1)], ids=str)
def test_filters_equal_transformers(s):
  logits = 2 * np.random.default_rng(0).standard_normal((4, 20)).astype(np.float32)
  theirs = torch.tensor(logits)
  for warper in ([logits_process.TemperatureLogitsWarper(s.temperature)]
                 + ([logits_process.TopKLogitsWarper(s.top_k)] if s.top_k else [])
                 + ([logits_process.TopPLogitsWarper(s.top_p)] if s.top_p < 1 else [])
                 + ([logits_process.MinPLogitsWarper(s.min_p)] if s.min_p else [])):
    theirs = warper(None, theirs)
  ours = np.asarray(jax.jit(lambda x: sampling.filtered(s, x))(logits))
  np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
  assert s == Sampling(0.5) or np.isinf(ours).any()


def test_repetition_penalty_equals_transformers():
  logits = np.random.default_rng(0).standard_normal((2, 9)).astype(np.float32)
  ids = torch.tensor([[1, 3, 3], [0, 8, 2]])
  theirs = logits_process.RepetitionPenaltyLogitsProcessor(1.7)(ids, torch.tensor(logits)).numpy()
  seen = np.zeros((2, 9), bool)
  seen[[[0], [1]], ids.numpy()] = True
  np.testing.assert_allclose(sampling.penalized(Sampling(repetition_penalty=1.7), logits, seen), theirs, rtol=1e-6)


def test_a_row_draws_the_same_whatever_is_beside_it():
  lm = make_lm()
  ids = lm.tokenizer.prompt('x')
  draw = lambda prompts: generate.sample(lm, prompts, 10, Sampling(1.), 5, stop=lambda b, row: False)
  assert draw([ids])[0] == draw([ids, lm.tokenizer.prompt('quite another text'), ids])[0]


def test_stop_strings_end_a_text_and_are_not_in_it():
  lm = make_lm()
  whole = lm.generate(['x'], 24, temperature=0)[0]
  stop = whole[10:12]
  assert lm.generate(['x'], 24, temperature=0, stop=[stop]) == [whole[:whole.index(stop)]]
  seen = []
  lm.generate(['x'], 24, temperature=0, stream=seen.append)
  assert seen[-1] == whole and all(whole.startswith(text.rstrip('\ufffd')) for text in seen)


@pytest.mark.parametrize('bad', [dict(temperature=-1.), dict(top_k=-1), dict(top_p=0.), dict(min_p=2.), dict(num_beams=0),
                                 dict(repetition_penalty=0.)], ids=str)
def test_bad_sampling_is_refused_by_name(bad):
  with pytest.raises(UsageError, match=f'--{next(iter(bad))}='):
    make_lm().generate(['x'], 4, **bad)


def test_prompts_beyond_learned_positions_are_refused():
  with pytest.raises(UsageError, match='64 learned positions'):
    make_lm(family='gpt2').generate(['x' * 60], 10)


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


def test_what_is_computed_in_float32_stays_so_when_decoding():
  """Norms and routers: in bfloat16 they would choose other experts than training does."""
  for cfg in (common.model('llama', dtype='bfloat16', moe=MoeConfig(E=3, F=16)), common.model('gpt2', dtype='bfloat16')):
    with jax.set_mesh(common.mesh_of(1, 1, 1)):
      prepared = cache.prepare(cfg, decoder.init_params(cfg, jax.random.key(0)))
    kept = {jax.tree_util.keystr(path[-1:], simple=True) for path, a in jax.tree_util.tree_leaves_with_path(prepared)
            if a.dtype == np.float32}
    assert kept == ({'scale', 'router'} if cfg.moe.E else {'scale', 'bias'}), kept
