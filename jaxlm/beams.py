"""Beam search, with the rules of transformers' (its `early_stopping=False`), so that the same beams come out."""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import decoding, layout, sampling
from jaxlm.sampling import Sampling

NEVER = -1e9


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _candidates(s: Sampling, vocab: int, never: tuple[int, ...], keep: int, prompts: int, logits_BV, scores_PW, seen_BV):
  """The `keep` best continuations of each prompt's beams: (score, beam · V + token), [P, keep]."""
  W, V = s.num_beams, logits_BV.shape[1]
  logp_BV = jax.nn.log_softmax(jnp.where(sampling.barred((), vocab, V), -jnp.inf, logits_BV), -1)
  logp_BV = sampling.penalized(s, logp_BV, seen_BV)[:prompts * W]
  logp_BV = jnp.where(sampling.barred(never, vocab, V), -jnp.inf, logp_BV)  # after the softmax: what is not said has a share
  return jax.lax.top_k((logp_BV.reshape(prompts, W, V) + scores_PW[..., None]).reshape(prompts, W * V), keep)


def search(lm, prompts: list[list[int]], max_length: int, s: Sampling, stop_ids: set[int]) -> list[list[int]]:
  """The best finished continuation of each prompt, its stop token included.

  1. Of the likeliest continuations of all beams, twice as many as there are beams (more with more stop tokens) are
  looked at, so that enough go on when some stop. 2. Those that stop among the first `num_beams` are finished, with
  score ÷ length^length_penalty; the best `num_beams` finished ones are kept. 3. The best that did not stop are the new
  beams. 4. A prompt is done when its best beam, at its present length, cannot beat its worst finished one.
  """
  P, W = len(prompts), s.num_beams
  keep = max(2, 1 + len(stop_ids)) * W
  beams = [[[] for _ in range(W)] for _ in prompts]
  done: list[list[tuple[float, list[int]]]] = [[] for _ in prompts]
  scores_PW = np.full((P, W), NEVER, np.float32)
  scores_PW[:, 0] = 0
  hopeful = np.ones(P, bool)
  with jax.set_mesh(lm.mesh):
    rows = decoding.make(lm, [ids for ids in prompts for _ in range(W)], max_length)
    seen_BV = rows.seen() if s.repetition_penalty != 1 else np.zeros((rows.size, 1), bool)
    never, logits_BV = decoding.never_of(lm), rows.start()
    for length in range(1, max_length + 1):
      on_host = jax.sharding.reshard(logits_BV, jax.P(None, None))
      found = _candidates(s, lm.tokenizer.vocab_size, never, keep, P, on_host, scores_PW, seen_BV)
      top_PC, index_PC = jax.device_get(found)
      origin_PC, token_PC = index_PC // rows.cfg.V, index_PC % rows.cfg.V
      order_B, next_B = np.arange(rows.size, dtype=np.int32), np.zeros(rows.size, np.int32)
      for p in range(P):
        grown = [beams[p][o] + [int(t)] for o, t in zip(origin_PC[p], token_PC[p])]
        stops = np.array([length == max_length or t in stop_ids for t in token_PC[p]])
        if hopeful[p]:
          fresh = [(float(top_PC[p, c]) / length ** s.length_penalty, grown[c]) for c in range(W) if stops[c]]
          done[p] = sorted(done[p] + fresh, key=lambda d: -d[0])[:W]
        running = np.argsort(-(top_PC[p] + stops * NEVER), kind='stable')[:W]
        beams[p] = [grown[c] for c in running]
        scores_PW[p] = (top_PC[p] + stops * NEVER)[running]
        order_B[p * W:(p + 1) * W] = p * W + origin_PC[p, running]
        next_B[p * W:(p + 1) * W] = token_PC[p, running]
        worst = done[p][-1][0] if len(done[p]) == W else NEVER
        hopeful[p] &= scores_PW[p, 0] / length ** s.length_penalty > worst
      if length == max_length or not hopeful.any():
        break
      rows.reorder(order_B)
      if s.repetition_penalty != 1:
        seen_BV = seen_BV[order_B]
        seen_BV[np.arange(rows.size), next_B] = True
      logits_BV = rows.extend(jax.device_put(next_B, layout.spec('B')))
  return [max(d, key=lambda x: x[0])[1] for d in done]
