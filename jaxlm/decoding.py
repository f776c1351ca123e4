"""Prompts being continued: a batch of rows with its cache (models/cache.py), one token at a time."""
from collections.abc import Sequence

import jax
import numpy as np

from jaxlm import layout
from jaxlm.errors import UsageError
from jaxlm.models import cache as caches

PLACES = 64  # caches and prompts have a multiple of so many places, so that few lengths are compiled


class Rows:
  """Prompts in a batch with its cache: `start` reads them, `extend` one more token each. Logits are of the last tokens.

  Beside an encoder, the prompt (its last objective.source tokens) is what the encoder reads, and the decoder begins with the
  token data.start; where there is none, as it did in training: with the prompt's last token, or, where it was trained to
  answer (objectives spans, answer), with a boundary.
  """

  def __init__(self, lm, prompts: Sequence[Sequence[int]], new: int):
    self.cfg, self.params = lm.config.model, lm.decoding_params
    if self.cfg.kind not in caches.FORWARD:
      raise UsageError(f'model.kind={self.cfg.kind}: generates no text')
    self.size = -(-len(prompts) // lm.rows_multiple) * lm.rows_multiple
    self._source = lm.config.objective.source
    if self._source:
      name, start = lm.config.objective.name, start_of(lm)
      cut = (lambda ids: ids[:-1]) if name == 'next' and not start else list
      self._inputs = _aligned([cut(ids)[-self._source:] for ids in prompts], self.size, self._source, right=False)
      prompts = [start or ids[-1:] for ids in prompts]
    self._prompts, longest = prompts, max(map(len, prompts))
    positions = self.cfg.P - self.cfg.first_position
    if self.cfg.P and longest + new > positions:
      raise UsageError(f'prompt and --max_length come to {longest + new} tokens; the model has {positions} learned positions')
    if self._source and new > lm.config.length:
      raise UsageError(f'--max_length={new}: beside an encoder the decoder says at most length={lm.config.length} tokens')
    self.at = -(-longest // PLACES) * PLACES
    self.places = -(-(self.at + new) // PLACES) * PLACES
    self._tokens_BL, real_BL = _aligned(prompts, self.size, self.at, right=True)
    real_BL[len(prompts):, -1] = True
    self._pad_B = jax.device_put((self.at - real_BL.sum(1)).astype(np.int32), layout.spec('B'))

  def start(self):
    """logits_BV after the prompts."""
    cache = _empty(self.cfg, self.size, self.places)
    place = lambda a: jax.device_put(a, layout.spec('BL'))
    if self._source:
      inputs_BM, real_BM = self._inputs
      positions_BM = np.broadcast_to(np.arange(self._source, dtype=np.int32), inputs_BM.shape)
      cache = _remember(self.cfg, self.params, cache, place(inputs_BM), place(real_BM.astype(np.int32)), place(positions_BM))
    logits_BV, self.cache = _forward(self.cfg, self.params, cache, place(self._tokens_BL), 0, self._pad_B)
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
    """bool [B, V]: the row has the token; beside an encoder, what the decoder begins with, and not what the encoder reads."""
    return _seen(self._prompts, self.size, self.cfg.V)


class CountedRows:
  """Rows of an n-gram: logits are log-probabilities, and the cache is the last order − 1 tokens."""

  def __init__(self, lm, prompts: Sequence[Sequence[int]]):
    self.cfg, self.size, self._model = lm.config.model, len(prompts), lm.counted
    self._prompts, self._kept = prompts, max(1, self._model.order - 1)
    self._histories = [lm.symbols(ids) for ids in prompts]

  def start(self):
    """logits_BV after the prompts."""
    logits_BV = np.full((self.size, self.cfg.V), -np.inf, np.float32)
    for b, history in enumerate(self._histories):
      self._histories[b] = history[-self._kept:]
      logits_BV[b, :self._model.V] = np.log(self._model.distribution(self._histories[b]))
    return jax.device_put(logits_BV, layout.spec('BL'))

  def extend(self, tokens_B):
    """logits_BV after one more token a row, int32 [B] on the device."""
    for b, token in enumerate(jax.device_get(tokens_B)):
      self._histories[b] = np.append(self._histories[b], token)
    return self.start()

  def reorder(self, rows_B: np.ndarray) -> None:
    """Row b goes on from what row rows_B[b] was."""
    self._histories = [self._histories[b] for b in rows_B]

  def seen(self) -> np.ndarray:
    """bool [B, V]: the row's prompt has the token."""
    return _seen(self._prompts, self.size, self.cfg.V)


def make(lm, prompts: Sequence[Sequence[int]], new: int) -> Rows | CountedRows:
  """The rows of prompts that go on for up to `new` tokens, as the kind of model wants them."""
  return CountedRows(lm, prompts) if lm.config.model.kind == 'ngram' else Rows(lm, prompts, new)


def _seen(prompts: Sequence[Sequence[int]], size: int, V: int) -> np.ndarray:
  seen_BV = np.zeros((size, V), bool)
  for b, ids in enumerate(prompts):
    seen_BV[b, list(ids)] = True
  return seen_BV


def start_of(lm) -> list[int]:
  """What the decoder of an LM begins with beside an encoder, [] if that is the prompt's last token."""
  name = lm.config.data.start
  if not name:
    return [lm.tokenizer.boundary] if lm.config.objective.name in ('spans', 'answer') else []
  try:
    return lm.tokenizer.ids_of([name])
  except UsageError as e:
    raise UsageError(f'data.start={name!r}: is no token of the tokenizer') from e


def never_of(lm) -> tuple[int, ...]:
  """Tokens that are never said, data.never."""
  names = lm.config.data.never.split()
  return tuple(lm.tokenizer.ids_of(names, 'data.never')) if names else ()


def _aligned(rows: Sequence[Sequence[int]], size: int, length: int, right: bool) -> tuple[np.ndarray, np.ndarray]:
  """(ids, which of them are real), [size, length], aligned at one end."""
  tokens_BL, real_BL = np.zeros((size, length), np.int32), np.zeros((size, length), bool)
  for b, ids in enumerate(rows):
    span = slice(length - len(ids), length) if right else slice(len(ids))
    tokens_BL[b, span], real_BL[b, span] = ids, True
  return tokens_BL, real_BL


_forward = jax.jit(caches.forward, static_argnums=0, donate_argnums=2)
_remember = jax.jit(caches.remember, static_argnums=0, donate_argnums=2)
_empty = jax.jit(caches.empty, static_argnums=(0, 1, 2))
_reorder = jax.jit(lambda cache, rows_B: jax.tree.map(
    lambda a: a.at[rows_B].get(out_sharding=jax.typeof(a).sharding.spec), cache), donate_argnums=0)
