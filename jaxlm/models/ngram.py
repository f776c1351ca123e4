"""N-grams with interpolated modified Kneser-Ney smoothing (Chen & Goodman 1998, §3), over bytes or tokens.

p(w|h) = max(c(hw) − D(c(hw)), 0) / c(h·) + γ(h) · p(w|h′), h′ without its first symbol; the highest order counts
occurrences, lower ones the different symbols seen to the left; below the unigram is the uniform 1/V. START stands to
the left of a document, as often as asked for; it is never predicted. In a small text the estimates of D can be 0 for all
that was seen after an h, and γ(h) with them: there D is HALF, so that nothing has probability 0.

The grams are a trie in sorted arrays. Those of k symbols, level k, are keys: (index at level k − 1 of the first k − 1
symbols) · (V + 1) + the last symbol, int64, which any order and vocabulary fit; START is the symbol V. Contexts of STARTs
alone are there too, with count 0, which changes no sum and no discount.

Counting goes level by level over the text, a batch at a time: a batch's keys become a run, sorted keys with their counts;
runs are merged, and those that do not fit in memory wait on disk. The index of what stands before each position is kept on
disk from level to level.
"""
import concurrent.futures
import functools
import os
import pathlib
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator

import numpy as np

BATCH = 2 ** 21  # symbols that a thread works on at a time: some 130 MB
HELD = 2 ** 23   # pairs of key and count in memory, 16 bytes each, before a run goes to disk; a merge needs 4 times that
THREADS = 8      # at most: each has its batch
HALF = 0.5


def find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
  """Indices of `wanted` in the sorted keys, −1 where one is not there; int64."""
  if not len(keys):
    return np.full(len(wanted), -1)
  at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
  return np.where(keys[at] == wanted, at, -1)


def _index_type(size: int) -> type:
  return np.int32 if size < 2 ** 31 else np.int64


def _spans(size: int, batch: int) -> list[tuple[int, int]]:
  return [(first, min(first + batch, size)) for first in range(0, size, batch)]


def _merge(runs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
  """One run of many: sorted keys, each once, with the sum of its counts."""
  keys, counts = (np.concatenate(a) for a in zip(*runs))
  order = np.argsort(keys, kind='stable')  # timsort: it takes the runs as they are and merges
  keys = keys[order]
  first = np.flatnonzero(np.diff(keys, prepend=-1))
  return keys[first], np.add.reduceat(counts[order], first) if len(first) else counts


class Runs:
  """Pairs (key, count), summed by key in bounded memory. `add` may be called from any thread."""

  def __init__(self, folder: pathlib.Path, held: int = HELD):
    self._folder, self._limit = folder, held
    self._runs, self._lock = [], threading.Lock()
    self.spilled = []  # lengths of the runs on disk

  def add(self, keys: np.ndarray, counts: np.ndarray) -> None:
    """keys: sorted, int64, each once; counts: int64."""
    with self._lock:
      self._runs.append((keys, counts))
      if sum(len(keys) for keys, _ in self._runs) > self._limit:
        self._runs = [_merge(self._runs)]
        if len(self._runs[0][0]) > self._limit // 2:
          self._spill()

  def _file(self, what: str, run) -> pathlib.Path:
    return self._folder / f'run-{run}.{what}'

  def _spill(self) -> None:
    for what, a in zip(('keys', 'counts'), self._runs.pop()):
      a.tofile(self._file(what, len(self.spilled)))
    self.spilled.append(len(a))

  def merged(self) -> tuple[np.ndarray, np.ndarray]:
    """(sorted keys, counts) of all that was added. Runs on disk are merged a range of keys at a time, and removed."""
    if self._runs:
      self._runs = [_merge(self._runs)]
    if not self.spilled:
      return self._runs[0] if self._runs else (np.zeros(0, np.int64), np.zeros(0, np.int64))
    if self._runs:
      self._spill()
    names = range(len(self.spilled))
    step = max(1, self._limit // len(names))  # no run has more between two cuts
    maps = [np.memmap(self._file('keys', run), np.int64, 'r') for run in names]
    cuts = np.unique(np.concatenate([keys[step::step] for keys in maps]))
    bounds_RC = [[0, *np.searchsorted(keys, cuts), len(keys)] for keys in maps]
    del maps
    read = lambda what, run, low, high: np.fromfile(self._file(what, run), np.int64, high - low, offset=8 * low)
    with open(self._file('keys', 'all'), 'wb') as all_keys, open(self._file('counts', 'all'), 'wb') as all_counts:
      for c in range(len(cuts) + 1):
        spans = [(run, *bounds_RC[run][c:c + 2]) for run in names]
        keys, counts = _merge([(read('keys', *span), read('counts', *span)) for span in spans])
        keys.tofile(all_keys)
        counts.tofile(all_counts)
    out = tuple(np.fromfile(self._file(what, 'all'), np.int64) for what in ('keys', 'counts'))
    for run in (*names, 'all'):
      for what in ('keys', 'counts'):
        self._file(what, run).unlink()
    return out


class _Counter:
  """Counts a text level by level: see `count`."""

  def __init__(self, symbols, order: int, V: int, folder: pathlib.Path, tick, batch: int, held: int, pool):
    self._symbols, self._order, self._base, self._folder = symbols, order, V + 1, folder
    self._tick, self._batch, self._held, self._pool = tick, batch, held, pool
    self._keys = [np.zeros(1, np.int64)]      # by level; level 0 is the root
    self._starts = [0]                        # index of the context of STARTs alone, by level below the order
    self._suffixes = np.zeros(1, np.int32)    # of the newest level: the index, a level lower, without the first symbol

  def levels(self) -> list[dict[str, np.ndarray]]:
    counts = []
    for k in range(1, self._order + 1):
      counts.append(self._level(k))
      if k > 1:  # a lower order's count: how many different symbols stand to the left of it
        counts[k - 2] = np.bincount(self._suffixes, minlength=len(self._keys[k - 1]))
        counts[k - 2][self._starts[k - 1]] = 0
    small = lambda a: a.astype(np.uint32) if not len(a) or a.max() < 2 ** 32 else a
    return [{'keys': keys, 'counts': small(c)} for keys, c in zip(self._keys[1:], counts)]

  def _level(self, k: int) -> np.ndarray:
    """Makes the keys of level k and their suffixes → how often each occurs."""
    runs = Runs(self._folder, self._held)
    if k < self._order:
      starts = self._starts[k - 1] * self._base + self._base - 1
      runs.add(np.array([starts]), np.zeros(1, np.int64))
    for n in self._pool.map(functools.partial(self._run, k, runs), _spans(len(self._symbols), self._batch)):
      self._tick(n)
    keys, counts = runs.merged()
    if k > 1:
      suffixes = np.empty(len(keys), _index_type(len(self._keys[-1])))
      list(self._pool.map(functools.partial(self._suffix, keys, suffixes), _spans(len(keys), self._batch)))
      self._suffixes = suffixes
    else:
      self._suffixes = np.zeros(len(keys), np.int32)
    self._keys.append(keys)
    if k < self._order:
      self._starts.append(int(np.searchsorted(keys, starts)))
    if k > 2:
      self._before_file(k - 2).unlink()
    return counts

  def _run(self, k: int, runs: Runs, span: tuple[int, int]) -> int:
    """Adds the k-grams that end in a span of the text."""
    symbols = np.asarray(self._symbols[slice(*span)], np.int64)
    keys = self._before(k - 1, *span) * self._base + symbols
    keys = np.sort(keys[symbols != self._base - 1])
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    runs.add(keys[first], np.diff(first, append=len(keys)))
    return span[1] - span[0]

  def _before_file(self, k: int) -> pathlib.Path:
    return self._folder / f'before-{k}'

  def _before(self, k: int, first: int, last: int) -> np.ndarray:
    """Index at level k of the k symbols before each position of a span, int64; is written down for level k + 1."""
    if k == 0:
      return np.zeros(last - first, np.int64)
    low = max(first - 1, 0)
    symbols = np.asarray(self._symbols[low:last - 1], np.int64)
    if k == 1:
      shorter = np.zeros(len(symbols), np.int64)
    else:
      kind = np.dtype(_index_type(len(self._keys[k - 1])))
      shorter = np.fromfile(self._before_file(k - 1), kind, last - 1 - low, offset=kind.itemsize * low).astype(np.int64)
    index = find(self._keys[k], shorter * self._base + symbols)
    index[symbols == self._base - 1] = self._starts[k]
    if first == 0:  # nothing stands before the first START, nor is it counted
      index = np.concatenate([[0], index])
    if k < self._order - 1:
      out = index.astype(_index_type(len(self._keys[k])))
      fd = os.open(self._before_file(k), os.O_WRONLY | os.O_CREAT, 0o600)
      try:
        os.pwrite(fd, out.tobytes(), first * out.itemsize)
      finally:
        os.close(fd)
    return index

  def _suffix(self, keys: np.ndarray, out: np.ndarray, span: tuple[int, int]) -> None:
    context, symbol = np.divmod(keys[slice(*span)], self._base)
    out[slice(*span)] = find(self._keys[-1], self._suffixes[context].astype(np.int64) * self._base + symbol)


def count(symbols, order: int, V: int, folder: pathlib.Path, tick: Callable[[int], object] = lambda n: None,
          batch: int = BATCH, held: int = HELD) -> list[dict[str, np.ndarray]]:
  """The levels, 1 to order, of a text → [{'keys': int64 [n], 'counts': uint32 [n]}, …], the same for any batch and held.

  symbols: integers below V, and V (START) where a document opens, the first of them; anything that can be sliced as an
  array is (a memmap, count.Text), so that it need not be in memory. folder: for what does not fit there either. tick(n) is
  called as n more symbols are counted, order · len(symbols) in all.
  """
  with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, THREADS)) as pool:  # sorts and searches hold no GIL
    return _Counter(symbols, order, V, folder, tick, batch, held, pool).levels()


class NGram:
  """The model of the levels that `count` makes. Symbols given to it are as `count` takes them: a text begins with START; one
  that begins without it is read as if cut from the middle of a document."""

  def __init__(self, V: int, levels: list[dict[str, np.ndarray]]):
    self.V, self.order, self._base = V, len(levels), V + 1
    self._levels, self._starts, contexts = levels, [0], 1
    self._discounts, self._totals, self._gammas, self._halves = [], [], [], []  # by level; all but D by context, which is
    # an index a level lower; halves: whether D is HALF there
    for k, level in enumerate(levels, 1):
      keys, counts = level['keys'], level['counts']
      discounts = _discounts(counts)
      context = keys // self._base
      totals = np.bincount(context, counts, contexts)
      taken = np.bincount(context, discounts[np.minimum(counts, 3)], contexts)
      halves = (taken == 0) & (totals > 0)
      taken[halves] = HALF * np.bincount(context, counts > 0, contexts)[halves]
      for to, values in ((self._discounts, discounts), (self._totals, totals), (self._gammas, taken / np.maximum(totals, 1)),
                         (self._halves, halves)):
        to.append(values)
      if k < self.order:
        self._starts.append(int(find(keys, np.array([self._starts[-1] * self._base + V]))[0]))
      contexts = len(keys)

  def _before(self, symbols: np.ndarray) -> list[np.ndarray]:
    """By k, 0 to order: index at level k of the k symbols before each position, and before the end; −1: never seen."""
    symbols = np.asarray(symbols, np.int64)
    out = [np.zeros(len(symbols) + 1, np.int64)]
    for k, level in enumerate(self._levels, 1):
      shorter = out[-1][:-1]
      index = np.where(shorter < 0, -1, find(level['keys'], shorter * self._base + symbols))
      if k < self.order:
        index[symbols == self.V] = self._starts[k]
      out.append(np.concatenate([[-1], index]))
    return out

  def probabilities(self, symbols: np.ndarray) -> np.ndarray:
    """p of each symbol but the first given those before it, float64 [len(symbols) − 1]."""
    before, p = self._before(symbols), np.full(len(symbols) - 1, 1 / self.V)
    for k, level in enumerate(self._levels, 1):
      context, gram = before[k - 1][1:-1], before[k][2:]
      total = np.where(context < 0, 0, self._totals[k - 1][context])
      counts = np.where(gram < 0, 0, level['counts'][gram])
      higher = self._discounted(k, counts, context) / np.maximum(total, 1)
      p = np.where(total > 0, higher + self._gammas[k - 1][context] * p, p)
    return p

  def distribution(self, symbols: np.ndarray) -> np.ndarray:
    """p of each symbol after these, float64 [V]."""
    before, p = self._before(symbols[len(symbols) - min(len(symbols), self.order - 1):]), np.full(self.V, 1 / self.V)
    for k, level in enumerate(self._levels, 1):
      context = int(before[k - 1][-1])
      if context >= 0 and (total := self._totals[k - 1][context]) > 0:
        low, high = np.searchsorted(level['keys'], np.array([context * self._base, context * self._base + self.V]))
        counts = level['counts'][low:high]
        p *= self._gammas[k - 1][context]
        p[level['keys'][low:high] - context * self._base] += self._discounted(k, counts, context) / total
    return p

  def _discounted(self, k: int, counts: np.ndarray, context) -> np.ndarray:
    """Counts less D, of grams of level k."""
    discounts = self._discounts[k - 1][np.minimum(counts, 3)]
    return counts - np.where(self._halves[k - 1][context] & (counts > 0), HALF, discounts)

  def each(self, symbols: np.ndarray, piece: int = BATCH) -> Iterator[np.ndarray]:
    """−ln p of each symbol but the first, a piece of them at a time; memory is that of a piece."""
    for first in range(1, len(symbols), piece):
      since = max(0, first - max(self.order - 1, 1))
      yield -np.log(self.probabilities(symbols[since:first + piece])[first - since - 1:])

  def nats(self, symbols: np.ndarray, piece: int = BATCH) -> float:
    """−ln p of all symbols but the first."""
    return sum(float(nats.sum()) for nats in self.each(symbols, piece))

  def bits(self, symbols: np.ndarray) -> float:
    """−log2 p of all symbols but the first."""
    return self.nats(symbols) / float(np.log(2))

  def perplexity(self, symbols: np.ndarray) -> float:
    """e to the mean −ln p of all symbols but the first."""
    return float(np.exp(self.nats(symbols) / (len(symbols) - 1)))

  def sample(self, symbols: np.ndarray, new: int, rng: np.random.Generator) -> np.ndarray:
    """`new` symbols after these, drawn one at a time, int64 [new]. With filters and stops: generate.sample."""
    out = np.concatenate([np.asarray(symbols, np.int64), np.zeros(new, np.int64)])
    for at in range(len(symbols), len(out)):
      cumulative = np.cumsum(self.distribution(out[:at]))
      out[at] = np.searchsorted(cumulative, rng.random() * cumulative[-1], 'right')
    return out[len(symbols):]


def _discounts(counts: np.ndarray) -> np.ndarray:
  """D of the counts 0, 1, 2, and 3 or more (Chen & Goodman 1998, eq. 26)."""
  _, n1, n2, n3, n4, _ = (int(n) for n in np.bincount(np.minimum(counts, 5), minlength=6))
  y = n1 / (n1 + 2 * n2) if n1 else 0.
  return np.array([0., *(max(0., k - (k + 1) * y * b / a) if a else 0. for k, a, b in ((1, n1, n2), (2, n2, n3), (3, n3, n4)))])


BYTES = 256  # the vocabulary of a byte model, and so its START


def as_symbols(text: bytes) -> np.ndarray:
  """A document as a byte model takes it, uint16 [len(text) + 1]."""
  return np.concatenate([[BYTES], np.frombuffer(text, np.uint8)]).astype(np.uint16)


def of_bytes(order: int, documents: Iterable[bytes]) -> NGram:
  """A byte model of documents, counted in bounded memory beside a temporary file of them."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'symbols'
    with path.open('wb') as f:
      for text in documents:
        as_symbols(text).tofile(f)
    return NGram(BYTES, count(np.memmap(path, np.uint16, 'r'), order, BYTES, pathlib.Path(folder)))
