"""Which keys a query sees: a pattern's words, causality, and the documents that share a row."""
import dataclasses
import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class How:
  """scale: × scores; where: which keys are seen, words of SEEN joined by + (any of them); window, first: their sizes;
  cap: scores become cap · tanh(score / cap); causal: no key after the query is seen; in_order: places in the row are in the
  order of the text, so that they will do in place of positions."""
  scale: float
  where: str = 'global'
  window: int = 0
  first: int = 0
  cap: float = 0.
  causal: bool = True
  in_order: bool = True


class Rows(NamedTuple):
  """Where tokens stand: segments int32 (only equal ones see each other), positions int32 in their document."""
  segments_BL: jax.Array
  positions_BL: jax.Array


# May the query at position i of a document see the key at j? (Sparse Transformer, Child et al. 2019, §4.3: its strided
# attention is local+stride, its fixed one block+summary; Longformer's, Beltagy et al. 2020, is local+first.)
SEEN = {
    'global': lambda how, i, j: np.bool_(True),
    'local': lambda how, i, j: (i - j < how.window) & (j - i < how.window),
    'stride': lambda how, i, j: (i - j) % how.window == 0,
    'block': lambda how, i, j: i // how.window == j // how.window,
    'summary': lambda how, i, j: j % how.window >= how.window - how.first,
    'first': lambda how, i, j: (j < how.first) | (i < how.first),
}
BY_DISTANCE = {'global', 'local', 'stride'}  # depend on i − j only, so that places in the row will do


def visible(how: How, i, j):
  """bool, broadcast over i and j: the query at position i may see the key at position j of its document."""
  seen = functools.reduce(operator.or_, (SEEN[word](how, i, j) for word in how.where.split('+')))
  return seen & (i >= j) if how.causal else seen


def allowed(how: How, q: Rows, k: Rows, queries: slice = slice(None), keys: slice = slice(None)):
  """bool [B, L, M], of these queries and keys."""
  same_BLM = q.segments_BL[:, queries, None] == k.segments_BL[:, None, keys]
  if not how.causal and how.where == 'global':
    return same_BLM
  if how.in_order and BY_DISTANCE.issuperset(how.where.split('+')):
    i, j = jnp.arange(q.segments_BL.shape[1])[queries, None], jnp.arange(k.segments_BL.shape[1])[None, keys]
    return same_BLM & visible(how, i, j)[None]
  return same_BLM & visible(how, q.positions_BL[:, queries, None], k.positions_BL[:, None, keys])
