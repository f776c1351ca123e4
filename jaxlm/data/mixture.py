"""Several tasks in one run, each with its own objective, data and metrics: batch(step) of them together.

Examples of the run come in blocks of Q = 1000, and of each block task k has exactly q_k, its share. Which places are whose is
an order of its own in each block, chosen by the seed; the n-th example of task k in the run is example n of the run that has
this task alone. So all of it is a pure function of (manifests, seed, step), as pipeline.py has it: seeking takes constant
time. When the weights change, or the tasks do, blocks begin anew there, and each task goes on with its next example: what
each had had is kept beside the count of the run's examples (Origin).
"""
import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from jaxlm.data import caches, examples, packing, pipeline, sources
from jaxlm.errors import UsageError
from jaxlm.schema import Config, lead, of_task

Q = 1000


def quotas(weights: Sequence[float]) -> np.ndarray:
  """Examples of each task in a block: Q · weight / Σ weights, by largest remainder, and at least 1."""
  share = np.array(weights, np.float64) / max(weights)  # no overflow
  share *= Q / share.sum()
  out = np.floor(share).astype(np.int64)
  for k in np.argsort(out - share, kind='stable')[:Q - out.sum()]:
    out[k] += 1
  for k in np.flatnonzero(out == 0):
    out[k] += 1
    out[out.argmax()] -= 1
  return out


@functools.lru_cache(maxsize=16)
def _block(number: int, seed: int, sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  """Of each place of a block: its task, and how many of that task come before it in the block."""
  drawn_Q = pipeline.permute(np.arange(Q), Q, f'{seed}/mixture/{number}')
  task_Q, before_Q = np.searchsorted(np.cumsum(sizes), drawn_Q, 'right'), np.empty(Q, np.int64)
  for k, size in enumerate(sizes):
    before_Q[task_Q == k] = np.arange(size)
  return task_Q, before_Q


@dataclasses.dataclass(frozen=True)
class Origin:
  """Where the first block of these weights begins: after so many examples of the run, and of each task by name, of former tasks too."""
  examples: int = 0
  of: dict[str, int] = dataclasses.field(default_factory=dict)


def counts(config: Config, origin: Origin, examples: int) -> dict[str, int]:
  """How many of each task are among the first `examples` of a run that has had the weights of config since origin."""
  sizes = tuple(map(int, quotas([task.weight for task in config.tasks])))
  blocks, places = divmod(examples - origin.examples, Q)
  had = np.bincount(_block(blocks, config.seed, sizes)[0][:places], minlength=len(sizes)) + blocks * np.array(sizes)
  return {**origin.of, **{task.name: origin.of.get(task.name, 0) + int(n) for task, n in zip(config.tasks, had)}}


def _weights(config: Config):
  """What blocks are made of."""
  return config.seed, [(task.name, task.weight) for task in config.tasks]


@dataclasses.dataclass(frozen=True)
class Mixture:
  """The training batches of a run of several tasks: what pipeline.Pipeline is to one."""
  config: Config
  cache: caches.Caches
  pipelines: tuple[pipeline.Pipeline, ...]  # a task each, in order
  skipped: int = 0  # see Pipeline
  origin: Origin = Origin()

  def after(self, saved: Config, meta: dict, skipped: int) -> 'Mixture':
    """See Pipeline.after."""
    origin = Origin(**meta['mixture']) if 'mixture' in meta else Origin()  # of a run that began when only their examples were counted
    if _weights(saved) != _weights(self.config):
      origin = Origin(meta['examples'], counts(saved, origin, meta['examples']) if saved.tasks else {})
    return dataclasses.replace(self, skipped=skipped, origin=origin)

  def meta(self) -> dict:
    """See Pipeline.meta."""
    return {'mixture': dataclasses.asdict(self.origin)}

  @functools.cached_property
  def quotas(self) -> tuple[int, ...]:
    return tuple(map(int, quotas([task.weight for task in self.config.tasks])))

  def tasks_of(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(task, number among the examples of that task) of examples of the run by number."""
    blocks, places = np.divmod(numbers - self.origin.examples, Q)
    tasks, own = np.empty_like(numbers), np.empty_like(numbers)
    first = np.array([self.origin.of.get(task.name, 0) for task in self.config.tasks])
    for block in np.unique(blocks):
      here = blocks == block
      task_Q, before_Q = _block(int(block), self.config.seed, self.quotas)
      tasks[here] = task_Q[places[here]]
      own[here] = first[tasks[here]] + block * np.array(self.quotas)[tasks[here]] + before_Q[places[here]]
    return tasks, own

  def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
    """Rows [start, stop) of the global batch of `step` (from 0); 'task' [B, 1] says whose each is."""
    tasks, own = self.tasks_of(self.skipped + step * self.config.batch + np.arange(start, stop, dtype=np.int64))
    out = {name: np.zeros((len(own), size), dtype) for name, (size, dtype) in shapes(self.config).items()}
    out['task'][:, 0] = tasks
    for k in np.unique(tasks):
      for name, a in self.pipelines[k].examples(own[tasks == k]).items():
        out[name][tasks == k] = a
    return out

  def batch(self, step: int, mesh) -> dict[str, jax.Array]:
    """See Pipeline.batch."""
    return pipeline.place(lambda start, stop: self.rows(step, start, stop), self.config.batch, mesh)

  def epochs(self) -> str:
    """How long the run's steps last, task by task, in words."""
    each = zip(self.config.tasks, self.quotas, self.pipelines)
    return '; '.join(f'{task.name} {100 * q / Q:g}%: {p.epochs(q / Q)}' for task, q, p in each)

  def repeats(self) -> str:
    """See Pipeline.repeats."""
    each = zip(self.config.tasks, self.quotas, self.pipelines)
    return '; '.join(f'task {task.name}: {said}' for task, q, p in each if (said := p.repeats(q / Q)))


def shapes(config: Config) -> dict[str, tuple[int, type]]:
  """examples.shapes, of a mixture too."""
  return {**examples.shapes(lead(config)), **({'task': (1, np.int32)} if config.tasks else {})}


def prepare(config: Config, workdir: pathlib.Path, say=print) -> packing.Cache | caches.Caches:
  """pipeline.prepare, of a mixture too."""
  sources.check_stated(config)
  if not config.tasks:
    return pipeline.prepare(config, workdir, say)
  found = caches.prepare(config, pathlib.Path(config.data.cache) if config.data.cache else workdir / 'data', say)
  for task in config.tasks:
    examples.check(of_task(config, task), found.tokenizer)
  return found


def make(config: Config, cache) -> pipeline.Pipeline | Mixture:
  """pipeline.make, of a mixture too."""
  if not config.tasks:
    return pipeline.make(config, cache)
  made = []
  for task in config.tasks:
    try:
      made.append(pipeline.make(of_task(config, task), cache.of[task.name]))
    except UsageError as e:
      raise UsageError(f'task {task.name}: {e}') from e
  return Mixture(config, cache, tuple(made))
