"""The token caches of a mixture: one a task (packing.py), with one tokenizer for all, which `bpe:SIZE` trains on the training
documents of all tasks together. FOLDER/NAME is the cache of task NAME; FOLDER/mixture.json says which there are. All of it
appears at once, or not at all: a task that is added may change the tokenizer, and so the tokens of the others.
"""
import dataclasses
import hashlib
import itertools
import json
import pathlib
import sys

from jaxlm.data import packing, tokenizer as tokenizers
from jaxlm.errors import UsageError
from jaxlm.schema import Config, DataConfig, of_task


@dataclasses.dataclass(frozen=True)
class Caches:
  """By name of the task, in order of their names."""
  of: dict[str, packing.Cache]

  @property
  def hash(self) -> str:
    """Of all that decides which examples each task has."""
    return hashlib.sha256(json.dumps({name: cache.hash for name, cache in self.of.items()}).encode()).hexdigest()

  @property
  def tokenizer(self) -> tokenizers.Tokenizer:
    return next(iter(self.of.values())).tokenizer


def build(tasks: dict[str, DataConfig], folder: pathlib.Path, say=print) -> None:
  """Makes the tokenizer, and writes the caches. Raises UsageError, StorageError."""
  with packing.whole(folder) as fresh:
    spec = next(iter(tasks.values())).tokenizer
    say(f'data: tokenizer {spec} of the tasks {", ".join(tasks)}')
    tokenizer = tokenizers.make(spec, itertools.chain.from_iterable(map(packing.texts, tasks.values())))
    for name, data in tasks.items():
      try:
        packing.build(data, fresh / name, lambda text, name=name: say(f'{name}: {text}'), tokenizer)
      except UsageError as e:
        raise UsageError(f'task {name}: {e}') from e
    hashes = {name: json.loads((fresh / name / 'manifest.json').read_text(encoding='utf-8'))['hash'] for name in tasks}
    (fresh / 'mixture.json').write_text(json.dumps({'tasks': hashes}, indent=1), encoding='utf-8')


def prepare(config: Config, folder: pathlib.Path, say=print) -> Caches:
  """Opens the caches in `folder`, in a process of its own building them first if it is not there. UsageError naming what is
  missing, changed or of another config."""
  tasks = {task.name: of_task(config, task).data for task in config.tasks}
  if not folder.exists():
    packing.apart('jaxlm.data.caches', {name: dataclasses.asdict(data) for name, data in tasks.items()}, folder, say)
  mend = f'set --config.data.cache to another folder, or remove {folder}, whose tasks are built together'
  if not (folder / 'mixture.json').is_file():
    raise UsageError(f'data cache {folder}: mixture.json is missing: it is no cache of tasks; {mend}')
  hashes = json.loads((folder / 'mixture.json').read_text(encoding='utf-8'))['tasks']
  if list(hashes) != list(tasks):
    raise UsageError(f'data cache {folder}: was built for the tasks {", ".join(hashes)}, '
                     f'the config has {", ".join(tasks)}; {mend}')
  found = {}
  for name, data in tasks.items():
    try:
      found[name] = packing.open_cache(data, folder / name)
    except UsageError as e:
      raise UsageError(f'task {name}: {str(e).rpartition("; ")[0]}; {mend}') from e
    if found[name].hash != hashes[name]:
      raise UsageError(f'data cache: {folder / name} is not what was written; {mend}')
  return Caches(found)


if __name__ == '__main__':
  packing.main(lambda tasks, folder: build({name: DataConfig(**data) for name, data in tasks.items()}, folder), *sys.argv[1:])
