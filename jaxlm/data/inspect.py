"""`jaxlm data build | show | stats`: make the token cache, read a batch as the model will, count."""
import itertools
import pathlib

from jaxlm.schema import Config
from jaxlm.data import mixture
from jaxlm.metrics import say


def build(config: Config, workdir: pathlib.Path, step: int) -> None:
  del step
  workdir.mkdir(parents=True, exist_ok=True)
  stats(config, workdir, 0)


def show(config: Config, workdir: pathlib.Path, step: int) -> None:
  """Every row of the batch of `step`, decoded: ⏎ ends a segment, ▢ is a mask or a sentinel, → precedes what is to be said."""
  cache = mixture.prepare(config, workdir, say)
  batch = mixture.make(config, cache).rows(step, 0, config.batch)
  for row in range(config.batch):
    task = config.tasks[int(batch['task'][row, 0])] if config.tasks else None
    say(f'--- step {step} row {row}{f" {task.name}" if task else ""}: {int(batch["weights"][row].sum())} of '
        f'{len(batch["weights"][row])} targets count' + (f', label {batch["labels"][row, 0]}' if 'labels' in batch else ''))
    for prefix in ('input_', '') if 'inputs' in batch else ('',):
      ids, segments = batch['inputs' if prefix else 'tokens'][row], batch[f'{prefix}segments'][row]
      for segment in range(1, int(segments.max()) + 1):
        say(f'[{segment}{" source" if prefix else ""}] {_text(cache.tokenizer, ids[segments == segment])}⏎')
    if 'at' in batch or (task or config).objective.name == 'spans':
      say(f'→ {_text(cache.tokenizer, batch["targets"][row][batch["weights"][row] > 0])}')


def _text(tokenizer, ids) -> str:
  runs = itertools.groupby(map(int, ids), lambda i: i == tokenizer.mask or i in tokenizer.sentinels)
  return ''.join('▢' * len(list(run)) if special else tokenizer.decode(run) for special, run in runs)


def stats(config: Config, workdir: pathlib.Path, step: int) -> None:
  """Counts of the cache, and how long the run's steps last."""
  del step
  cache = mixture.prepare(config, workdir, say)
  each = cache.of if config.tasks else {'': cache}
  for name, part in each.items():
    for split, entry in part.manifest['splits'].items():
      ratio = f'{entry["bytes"] / entry["tokens"]:.3f} bytes a token' if entry['tokens'] else f'nothing, of data.heldout={config.data.heldout}'
      say(f'{name}{" " if name else ""}{split:<8} {entry["documents"]:,} documents  {entry["bytes"]:,} bytes  {entry["tokens"]:,} tokens  {ratio}')
  say(f'windows of {config.length}, {config.steps} steps of {config.batch}: {mixture.make(config, cache).epochs()}; '
      f'hash {cache.hash[:16]}')


COMMANDS = {'build': build, 'show': show, 'stats': stats}
