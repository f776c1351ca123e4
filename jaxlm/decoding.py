"""Prompts being continued: a batch of rows with its cache of keys and values (models/cache.py), one token at a time."""
from collections.abc import Sequence

import jax
import numpy as np

from jaxlm import layout
from jaxlm.errors import UsageError
from jaxlm.models import cache as caches

PLACES = 64  # caches and prompts have a multiple of so many places, so that few lengths are compiled


class Rows:
  """Prompts in a batch with its cache: `start` reads them, `extend` one more token each. Logits are of the last tokens."""

  def __init__(self, lm, prompts: Sequence[Sequence[int]], new: int):
    self.cfg, self.params = lm.config.model, lm.decoding_params
    size = -(-len(prompts) // lm.rows_multiple) * lm.rows_multiple
    longest = max(map(len, prompts))
    self.length = -(-longest // PLACES) * PLACES
    if self.cfg.P and longest + new > self.cfg.P:
      raise UsageError(f'prompt and --max_length come to {longest + new} tokens; the model has {self.cfg.P} learned positions')
    self.places = -(-(self.length + new) // PLACES) * PLACES
    tokens_BL = np.zeros((size, self.length), np.int32)
    pad_B = np.full(size, self.length - 1, np.int32)
    for b, ids in enumerate(prompts):
      pad_B[b] = self.length - len(ids)
      tokens_BL[b, pad_B[b]:] = ids
    self.size, self._prompts = size, prompts
    self._tokens_BL, self._pad_B = tokens_BL, jax.device_put(pad_B, layout.spec('B'))
    self.at = self.length

  def start(self):
    """logits_BV after the prompts."""
    empty = _empty(self.cfg, self.size, self.places)
    logits_BV, self.cache = _forward(self.cfg, self.params, empty, jax.device_put(self._tokens_BL, layout.spec('BL')), 0,
                                     self._pad_B)
    return logits_BV

  def extend(self, tokens_B):
    """logits_BV after one more token a row, int32 [B] on the device."""
    logits_BV, self.cache = _forward(self.cfg, self.params, self.cache, tokens_B[:, None], self.at, self._pad_B)
    self.at += 1
    return logits_BV

  def reorder(self, rows_B: np.ndarray) -> None:
    """Row b goes on from what row rows_B[b] was."""
    self.cache = _reorder(self.cache, rows_B)

  def seen(self) -> np.ndarray:
    """bool [B, V]: the row's prompt has the token."""
    seen_BV = np.zeros((self.size, self.cfg.V), bool)
    for b, ids in enumerate(self._prompts):
      seen_BV[b, list(ids)] = True
    return seen_BV


_forward = jax.jit(caches.forward, static_argnums=0, donate_argnums=2)
_empty = jax.jit(caches.empty, static_argnums=(0, 1, 2))
_reorder = jax.jit(lambda cache, rows_B: jax.tree.map(
    lambda a: a.at[rows_B].get(out_sharding=jax.typeof(a).sharding.spec), cache), donate_argnums=0)
