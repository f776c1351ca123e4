"""`jaxlm data build | show | stats`: make the token cache, read a batch as the model will, count."""
import pathlib

from jaxlm.schema import Config
from jaxlm.data import pipeline as pipelines
from jaxlm.metrics import say


def build(config: Config, workdir: pathlib.Path, step: int) -> None:
  del step
  workdir.mkdir(parents=True, exist_ok=True)
  stats(config, workdir, 0)


def show(config: Config, workdir: pathlib.Path, step: int) -> None:
  """Every row of the batch of `step`, decoded; ⏎ ends a segment."""
  cache = pipelines.prepare(config, workdir, say)
  batch = pipelines.make(config, cache).rows(step, 0, config.batch)
  for row in range(config.batch):
    say(f'--- step {step} row {row}: {int(batch["weights"][row].sum())} of {config.length} targets count')
    for segment in range(1, int(batch['segments'][row].max()) + 1):
      ids = batch['tokens'][row][batch['segments'][row] == segment]
      say(f'[{segment}] {cache.tokenizer.decode(ids)}⏎')


def stats(config: Config, workdir: pathlib.Path, step: int) -> None:
  """Counts of the cache, and how long the run's steps last."""
  del step
  cache = pipelines.prepare(config, workdir, say)
  for split, entry in cache.manifest['splits'].items():
    if entry['tokens']:
      say(f'{split:<8} {entry["documents"]:,} documents  {entry["bytes"]:,} bytes  {entry["tokens"]:,} tokens  '
          f'{entry["bytes"] / entry["tokens"]:.3f} bytes a token')
  windows = pipelines.make(config, cache).windows
  say(f'{windows:,} windows of {config.length}; {config.steps} steps of {config.batch} are '
      f'{config.steps * config.batch / windows:.2f} epochs; hash {cache.hash[:16]}')


COMMANDS = {'build': build, 'show': show, 'stats': stats}
