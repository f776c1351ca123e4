"""From logits to tokens: what `jaxlm generate` can be told about sampling."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is chosen. The filters apply in this order, as in transformers; each is off at its default.

  repetition_penalty: logits of tokens that the row has are divided by it if positive, else multiplied (CTRL, §4.1).
  temperature: logits are divided by it; 0 is greedy. top_k: of the k likeliest. top_p: of the fewest that together have
  this probability (Holtzman et al. 2020). min_p: of those at least this share as likely as the likeliest.
  num_beams: above 1, beam search (with no sampling): sums of log-probabilities ÷ length^length_penalty.
  """
  temperature: float = 0.7
  top_k: int = 0
  top_p: float = 1.
  min_p: float = 0.
  repetition_penalty: float = 1.
  num_beams: int = 1
  length_penalty: float = 1.

  def __post_init__(self):
    def need(ok, name, wants):
      if not ok:
        raise UsageError(f'--{name}={getattr(self, name)}: {wants}')
    need(self.temperature >= 0, 'temperature', 'wants 0 (greedy) or more')
    need(self.top_k >= 0, 'top_k', 'wants a count of tokens, or 0 for all')
    need(0 < self.top_p <= 1, 'top_p', 'wants a probability above 0, up to 1')
    need(0 <= self.min_p <= 1, 'min_p', 'wants a share from 0 to 1')
    need(self.repetition_penalty > 0, 'repetition_penalty', 'wants a number above 0; 1 is off')
    need(self.num_beams >= 1, 'num_beams', 'wants at least 1')


def penalized(s: Sampling, logits_BV, seen_BV):
  """Logits after the repetition penalty; seen_BV bool: the row has the token."""
  if s.repetition_penalty == 1:
    return logits_BV
  lower_BV = jnp.where(logits_BV > 0, logits_BV / s.repetition_penalty, logits_BV * s.repetition_penalty)
  return jnp.where(seen_BV, lower_BV, logits_BV)


def barred(never: tuple[int, ...], vocab: int, V: int) -> np.ndarray:
  """bool [1, V]: the columns from `vocab` on, which are no tokens, and those of tokens that are never said."""
  columns_V = np.arange(V)
  return ((columns_V >= vocab) | np.isin(columns_V, never))[None]


def filtered(s: Sampling, logits_BV):
  """Logits after temperature, top_k, top_p and min_p: −inf for what may not be drawn. s.temperature is above 0."""
  logits_BV = logits_BV / s.temperature
  if 0 < s.top_k < logits_BV.shape[-1]:
    least_B1 = jax.lax.top_k(logits_BV, s.top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  if s.top_p < 1:
    order_BV = jnp.argsort(logits_BV, -1, descending=True)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, -1)
    p_BV = jax.nn.softmax(sorted_BV, -1)
    before_BV = jnp.cumsum(p_BV, -1) - p_BV  # the likeliest always stays
    least_B1 = jnp.min(jnp.where(before_BV < s.top_p, sorted_BV, jnp.inf), -1, keepdims=True)
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  if s.min_p > 0:
    p_BV = jax.nn.softmax(logits_BV, -1)
    logits_BV = jnp.where(p_BV < s.min_p * jnp.max(p_BV, -1, keepdims=True), -jnp.inf, logits_BV)
  return logits_BV


def choose(s: Sampling, logits_BV, seen_BV, keys_B):
  """The next token of each row, int32 [B]. Each row draws with its own key, whatever rows are beside it."""
  logits_BV = penalized(s, logits_BV, seen_BV)
  if s.temperature == 0:
    return jnp.argmax(logits_BV, -1).astype(jnp.int32)
  logits_BV = filtered(s, logits_BV)
  noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
  return jnp.argmax(logits_BV + noise_BV, -1).astype(jnp.int32)
