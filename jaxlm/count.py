"""Counting in place of training: `jaxlm train` with model.kind=ngram (models/ngram.py).

The checkpoint is step 1, with the levels as its parameters: numpy arrays that never see a device.
"""
import dataclasses
import pathlib
import shutil

import numpy as np

from jaxlm import config as configs, report
from jaxlm.checkpoint import Checkpoints, run_meta
from jaxlm.data import packing, pipeline as pipelines
from jaxlm.errors import StorageError
from jaxlm.metrics import say
from jaxlm.models import ngram
from jaxlm.resume import resume
from jaxlm.schema import Config


@dataclasses.dataclass(frozen=True)
class Text:
  """A stream of the token cache as ngram.count takes it, sliced like an array: its opening boundaries are START."""
  stream: packing.Stream
  start: int

  def __len__(self) -> int:
    return self.stream.tokens

  def __getitem__(self, span: slice) -> np.ndarray:
    if span.start >= span.stop:
      return np.zeros(0, np.int32)
    symbols, starts = self.stream.read(span.start, span.stop), self.stream.starts
    symbols[starts[slice(*np.searchsorted(starts, (span.start, span.stop)))] - span.start] = self.start
    return symbols


def run(config: Config, workdir: pathlib.Path) -> None:
  """Counts the training text and saves step 1, unless it is there. Raises UsageError, CheckpointError, StorageError."""
  m = config.model
  say(f'{workdir}: {m.ngram.order}-grams, counted\n{configs.summary(config)}')
  cache = pipelines.prepare(config, workdir, say)
  checkpoints = Checkpoints(workdir, config.checkpoint, say=say)
  try:
    if restored := resume(checkpoints, config, cache, None, None, None):
      say(f'already counted, step {restored[0]}; there is nothing left to do')
      return
    (workdir / 'config.json').write_text(configs.to_json(config), encoding='utf-8')
    params = _count(m.ngram.order, m.vocab or m.V, cache.streams['train'], workdir / 'counting')
    for k in range(1, m.ngram.order + 1):
      say(f'order {k}: {len(params[f"level_{k}"]["keys"]):,} grams')
    checkpoints.save(1, {'params': params}, run_meta(config, cache, cache.manifest['splits']['train']['documents']))
    checkpoints.finish()
  finally:
    checkpoints.close()
  say(f'counted; checkpoint saved in {workdir}')


def _count(order: int, V: int, stream: packing.Stream, folder: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
  """{'level_1': {'keys', 'counts'}, …}; what does not fit in memory is in `folder` meanwhile."""
  shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
  try:
    folder.mkdir()
    with report.progress('counting', order * stream.tokens) as tick:
      levels = ngram.count(Text(stream, V), order, V, folder, tick)
  except OSError as e:
    raise StorageError(f'{folder}: cannot be written ({e.strerror or e}); free some space, or use another --workdir') from e
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  return {f'level_{k}': level for k, level in enumerate(levels, 1)}
