"""batch(step): which rows a step trains on, as a pure function of (manifest, seed, step).

Example i of the run is window permute(i mod n) of epoch i div n: seeking takes constant time, an epoch sees each window
once, each epoch has its own order, and nothing depends on hosts, devices or what was read before. The position in
the data is one number, the count of examples.
"""
import dataclasses
import functools
import hashlib
import pathlib

import jax
import numpy as np

from jaxlm import layout
from jaxlm.schema import Config
from jaxlm.data import examples, packing, windows
from jaxlm.errors import UsageError


EPOCHS = 4  # up to which repeated text is worth nearly as much as new (Muennighoff et al. 2023, arXiv:2305.16264)


def permute(index: np.ndarray, n: int, key: str) -> np.ndarray:
  """A permutation of range(n) that `key` chooses, at `index` (int64 in [0, n)), with no table.

  A balanced Feistel network on the next even number of bits, walked until it falls in range (Black & Rogaway 2002,
  "Ciphers with arbitrary finite domains"): at most 4 n values, so under four turns a value on average.
  """
  half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
  mask = np.uint64((1 << int(half)) - 1)
  rounds = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=64).digest(), np.uint64)

  def cipher(x):
    left, right = x >> half, x & mask
    for k in rounds:
      mixed = (right ^ k) * np.uint64(0x9E3779B97F4A7C15)
      mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
      left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
    return (left << half) | right

  out = cipher(np.asarray(index, np.uint64))
  while (outside := out >= n).any():
    out[outside] = cipher(out[outside])
  return out.astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """The training batches of a run."""
  config: Config
  cache: packing.Cache
  skipped: int = 0  # examples before those of step 0: of a run that had another batch

  def after(self, saved: Config, meta: dict, skipped: int) -> 'Pipeline':
    """As it goes on from a checkpoint of that config and meta, of whose examples `skipped` were before step 0."""
    del saved, meta
    return dataclasses.replace(self, skipped=skipped)

  def meta(self) -> dict:
    """What a checkpoint keeps of its place, beside the count of examples."""
    return {}

  @functools.cached_property
  def task(self) -> examples.Task:
    return examples.Task(self.config, self.cache.tokenizer)

  @property
  def windows(self) -> int:
    """Examples in an epoch."""
    return examples.count(self.task, self.cache.streams['train'])

  def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
    """Rows [start, stop) of the global batch of `step` (from 0)."""
    numbers = self.skipped + step * self.config.batch + np.arange(start, stop, dtype=np.int64)
    if self.config.data.order == 'contiguous':
      return self._lanes(step, np.arange(start, stop, dtype=np.int64), numbers)
    return self.examples(numbers)

  def examples(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Examples of the run by number, in shuffled order."""
    epochs, index = np.divmod(numbers, self.windows)
    chosen = np.empty_like(index)
    for epoch in np.unique(epochs):
      here = epochs == epoch
      chosen[here] = permute(index[here], self.windows, f'{self.config.seed}/{epoch}')
    return examples.make(self.task, self.cache.streams['train'], chosen, numbers)

  def _lanes(self, step: int, lanes: np.ndarray, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """The stream in `batch` lanes of equal length (what does not divide is left out): each row goes on in its own, and
    starts again with the next epoch. Positions count from the start of the document or of the lane."""
    steps = self.windows // self.config.batch
    first = lanes * steps
    return windows.causal(self.task, self.cache.streams['train'], first + step % steps, numbers, first * self.config.length)

  def batch(self, step: int, mesh) -> dict[str, jax.Array]:
    """The global batch of `step` on the mesh. Each process reads only the rows its devices hold."""
    return place(lambda start, stop: self.rows(step, start, stop), self.config.batch, mesh)

  def epochs(self, share: float = 1.) -> str:
    """How long the run's steps last, if `share` of the examples come from here, in words."""
    return f'{self.windows:,} windows an epoch, {self._passes(share):.2f} epochs'

  def _passes(self, share: float) -> float:
    return share * self.config.steps * self.config.batch / self.windows

  def repeats(self, share: float = 1.) -> str:
    """A warning, if each document is seen more often than new ones would be worth; else ''."""
    if self._passes(share) <= EPOCHS:
      return ''
    return (f'each document is seen {self._passes(share):,.0f} times; beyond about {EPOCHS} a repetition teaches less and less than new text '
            f'would (data.source={self.config.data.source})')


def sharding(length: int, mesh) -> jax.sharding.NamedSharding:
  """Of an array [B, length] of a batch; what has one value a row is whole along it."""
  return jax.sharding.NamedSharding(mesh, layout.spec('BL' if length > 1 else 'B'))


def place(rows, batch_size: int, mesh) -> dict[str, jax.Array]:
  """rows(start, stop) → dict of arrays [B, L], put on the current mesh."""
  cuts = sharding(1, mesh).addressable_devices_indices_map((batch_size, 1)).values()
  runs = contiguous(sorted({index[0].indices(batch_size)[:2] for index in cuts}))
  parts = [rows(start, stop) for start, stop in runs]
  at = {row: (part, row - start) for part, (start, stop) in enumerate(runs) for row in range(start, stop)}

  def put(name):
    def own(index):
      start, stop, _ = index[0].indices(batch_size)
      part, first = at[start]
      return parts[part][name][first:first + stop - start, index[1]]
    length = parts[0][name].shape[1]
    return jax.make_array_from_callback((batch_size, length), sharding(length, mesh), own)
  with jax.transfer_guard_host_to_device('allow'):  # the one transfer that the training loop means to make
    return {name: put(name) for name in parts[0]}


def contiguous(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
  """Sorted spans, those that touch made one."""
  out = []
  for start, stop in spans:
    if out and out[-1][1] == start:
      start = out.pop()[0]
    out.append((start, stop))
  return out


def prepare(config: Config, workdir: pathlib.Path, say=print) -> packing.Cache:
  """Opens the run's token cache, building it first if it is not there. UsageError if it does not fit the model."""
  folder = pathlib.Path(config.data.cache) if config.data.cache else workdir / 'data'
  if not folder.exists():
    packing.build_apart(config.data, folder, say)
  cache = packing.open_cache(config.data, folder)
  examples.check(config, cache.tokenizer)
  return cache


def make(config: Config, cache: packing.Cache) -> Pipeline:
  pipeline = Pipeline(config, cache)
  if pipeline.windows < (config.batch if config.data.order == 'contiguous' else 1):
    raise UsageError(f'data source {config.data.source}: too little text for its windows of length={config.length}')
  return pipeline
