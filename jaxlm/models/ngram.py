"""Byte n-grams with interpolated modified Kneser-Ney smoothing (Chen & Goodman 1998, §3; all by sorted arrays).

p(w|h) = max(c(hw) − D(c(hw)), 0) / c(h·) + γ(h) · p(w|h′), h′ without its first symbol; the highest order counts
occurrences, lower ones the different symbols seen to the left; below the unigram is the uniform 1/256.
"""
from collections.abc import Iterable

import numpy as np

START = 256  # pads the left of each document
BITS = 9     # a symbol in a key


def _keys(symbols: np.ndarray, order: int) -> np.ndarray:
  """uint64 key of the `order` symbols that end at each position from order − 1 on."""
  keys = np.zeros(len(symbols) - order + 1, np.uint64)
  for i in range(order):
    keys = (keys << np.uint64(BITS)) | symbols[i:len(symbols) - order + 1 + i].astype(np.uint64)
  return keys


def _suffix(keys: np.ndarray, order: int) -> np.ndarray:
  return keys & np.uint64((1 << (BITS * order)) - 1)


def _lookup(sorted_keys: np.ndarray, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
  """values of keys, 0 where a key is not there."""
  at = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
  return np.where(sorted_keys[at] == keys, values[at], 0)


class NGram:
  """An n-gram model of `order` (up to 7) over bytes, counted on `documents`."""

  def __init__(self, order: int, documents: Iterable[bytes]):
    self.order = order
    grams, counts = self._count(documents)
    self._levels = []
    for k in range(order, 0, -1):
      self._levels.insert(0, self._level(grams, counts))
      if k > 1:  # a lower order's count: how many different symbols stand to the left of it
        grams, counts = np.unique(_suffix(grams, k - 1), return_counts=True)

  def _symbols(self, text: bytes) -> np.ndarray:
    pad = np.full(self.order - 1, START, np.uint16)
    return np.concatenate([pad, np.frombuffer(text, np.uint8).astype(np.uint16)])

  def _count(self, documents: Iterable[bytes], batch: int = 2 ** 25) -> tuple[np.ndarray, np.ndarray]:
    """(sorted keys, counts) of the highest order; memory stays near a batch of symbols and the different keys."""
    grams, counts = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    waiting, size = [], 0

    def merge():
      new, n = np.unique(np.concatenate(waiting), return_counts=True)
      keys, inverse = np.unique(np.concatenate([grams, new]), return_inverse=True)
      return keys, np.bincount(inverse, np.concatenate([counts, n])).astype(np.int64)

    for text in documents:
      waiting.append(_keys(self._symbols(text), self.order))
      size += len(text)
      if size >= batch:
        grams, counts = merge()
        waiting, size = [], 0
    if waiting:
      grams, counts = merge()
    return grams, counts

  def _level(self, grams: np.ndarray, counts: np.ndarray) -> dict:
    """Of one order: discounted counts by gram; totals and γ by context."""
    n1, n2, n3, n4 = (int((counts == n).sum()) for n in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2) if n1 else 0.
    discounts = np.array([0., *(max(0., k - (k + 1) * y * b / a) if a else 0.
                                for k, a, b in ((1, n1, n2), (2, n2, n3), (3, n3, n4)))])
    discount = discounts[np.minimum(counts, 3)]
    contexts, first = np.unique(grams >> np.uint64(BITS), return_index=True)
    totals = np.add.reduceat(counts, first)
    return {'grams': grams, 'discounted': counts - discount, 'contexts': contexts, 'totals': totals,
            'gamma': np.add.reduceat(discount, first) / totals}

  def probabilities(self, text: bytes) -> np.ndarray:
    """p of each byte given those before it in the document, float64 [len(text)]."""
    symbols = self._symbols(text)
    p = np.full(len(text), 1 / 256)
    for k, level in enumerate(self._levels, 1):
      keys = _keys(symbols[self.order - k:], k)
      contexts = keys >> np.uint64(BITS)
      totals = _lookup(level['contexts'], level['totals'], contexts)
      seen = totals > 0
      higher = _lookup(level['grams'], level['discounted'], keys) / np.maximum(totals, 1)
      gamma = np.where(seen, _lookup(level['contexts'], level['gamma'], contexts), 1.)
      p = higher + gamma * p
    return p

  def bits(self, text: bytes) -> float:
    """−log2 p(text)."""
    return float(-np.log2(self.probabilities(text)).sum())
