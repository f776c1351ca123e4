"""Where documents come from: SOURCE → (name, text) pairs, in an order that is the same on every machine.

    stdlib                 the Python standard library's own source files: real text that is on every machine
    text:GLOB              a file a document, UTF-8
    jsonl:GLOB             a line a document, its field data.key
    arrayrecord:GLOB       a JSON record a document, its field data.key
    tfds:NAME[:VERSION]/SPLIT   an example a document, its field data.key; prepared beforehand, read without TensorFlow

With data.target, a record is a question (data.key) and its answer (that field): `answers` gives both. data.prefix is put before
each text or question.

Each source is split once and for all: a document is held out if the hash of its name falls in the held-out share.
"""
import glob
import hashlib
import json
import os
import pathlib
import sysconfig
from collections.abc import Iterator

from jaxlm.schema import DataConfig
from jaxlm.errors import UsageError


def is_heldout(name: str, share: float) -> bool:
  digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
  return int.from_bytes(digest, 'big') < share * 2 ** 64


def documents(source: str, data: DataConfig, split: str) -> Iterator[tuple[str, str]]:
  """(name, text) of the documents of `source` in `split`: 'train', 'heldout' or 'all'. Empty ones are left out.

  Raises UsageError naming the source, file or record that cannot be used.
  """
  for name, text in _records(source, data, split, (data.key,)):
    yield name, text


def answers(source: str, data: DataConfig, split: str) -> Iterator[tuple[str, str, str]]:
  """(name, question, answer), as `documents`."""
  yield from _records(source, data, split, (data.key, data.target))


def _records(source: str, data: DataConfig, split: str, keys: tuple[str, ...]):
  kind, _, rest = source.partition(':')
  if kind not in SOURCES or bool(rest) == (kind == 'stdlib'):
    raise UsageError(f'data source {source!r}: wants one of stdlib, text:GLOB, jsonl:GLOB, arrayrecord:GLOB, '
                     'tfds:NAME/SPLIT')
  if len(keys) > 1 and kind in ('stdlib', 'text'):
    raise UsageError(f'data source {source!r}: has no field data.target={data.target!r}; jsonl, arrayrecord and tfds have fields')
  for name, *texts in SOURCES[kind](rest, keys):
    if all(texts) and (split == 'all' or is_heldout(name, data.heldout) == (split == 'heldout')):
      yield (name, data.prefix + texts[0], *texts[1:])


def _stdlib(rest: str, keys: tuple[str, ...]):
  """Whole .py files, UTF-8 ones only (a dozen test files are in other encodings on purpose)."""
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  skip = {'site-packages', 'dist-packages', '__pycache__'}
  for path in sorted(root.rglob('*.py')):
    name = path.relative_to(root).as_posix()
    if skip.isdisjoint(name.split('/')) and path.is_file():
      try:
        yield name, path.read_bytes().decode()
      except UnicodeDecodeError:
        continue


def _files(pattern: str, kind: str) -> Iterator[tuple[str, str]]:
  """(path, name): names are relative to the folder before the first wildcard, so that moving it changes no split."""
  paths = sorted(p for p in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(p))
  if not paths:
    raise UsageError(f'data source {kind}:{pattern}: no file matches')
  root = os.path.dirname(pattern.split('*')[0].split('?')[0].split('[')[0])
  for path in paths:
    yield path, os.path.relpath(path, os.path.expanduser(root) or '.')


def _text(pattern: str, keys: tuple[str, ...]):
  for path, name in _files(pattern, 'text'):
    try:
      yield name, pathlib.Path(path).read_bytes().decode()
    except UnicodeDecodeError as e:
      raise UsageError(f'{path}: is not UTF-8 (byte {e.start}); convert it, or narrow the glob') from e


def _fields(record, keys: tuple[str, ...], where: str) -> list[str]:
  texts = [record.get(key) if isinstance(record, dict) else None for key in keys]
  texts = [t.decode() if isinstance(t, bytes) else t for t in texts]
  for key, text, name in zip(keys, texts, ('key', 'target')):
    if not isinstance(text, str):
      known = ', '.join(record) if isinstance(record, dict) else type(record).__name__
      raise UsageError(f'{where}: no text in field {key!r} (there is {known}); set --config.data.{name}')
  return texts


def _json(line, where: str):
  try:
    return json.loads(line)
  except ValueError as e:
    raise UsageError(f'{where}: is not JSON ({e})') from e


def _jsonl(pattern: str, keys: tuple[str, ...]):
  for path, name in _files(pattern, 'jsonl'):
    with open(path, 'rb') as f:
      for number, line in enumerate(f, 1):
        if line.strip():
          yield f'{name}:{number}', *_fields(_json(line, f'{path}:{number}'), keys, f'{path}:{number}')


def _arrayrecord(pattern: str, keys: tuple[str, ...]):
  from grain.sources import ArrayRecordDataSource  # pylint: disable=g-import-not-at-top
  for path, name in _files(pattern, 'arrayrecord'):
    records = ArrayRecordDataSource(path)
    for start in range(0, len(records), 512):  # 8 × faster than one at a time
      for number, record in enumerate(records.__getitems__(range(start, min(start + 512, len(records)))), start):
        yield f'{name}:{number}', *_fields(_json(record, f'{path}:{number}'), keys, f'{path}:{number}')


def _tfds(rest: str, keys: tuple[str, ...]):
  """A prepared TFDS dataset (any folder on TFDS_DATA_DIR or ~/tensorflow_datasets): never a download."""
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top
  dataset, _, split = rest.rpartition('/')
  if not dataset:
    raise UsageError(f'data source tfds:{rest}: wants tfds:NAME/SPLIT, as tfds:lm1b/train')
  try:
    builder = tfds.builder_from_directory(_tfds_folder(dataset))
    records = builder.as_data_source(split)
  except (ValueError, KeyError, NotImplementedError, FileNotFoundError) as e:
    reason = str(e).strip().splitlines()[0]
    raise UsageError(f'data source tfds:{rest}: {reason}') from e
  for number, record in enumerate(records):
    yield f'{rest}:{number}', *_fields(record, keys, f'tfds:{rest}[{number}]')


def _tfds_folder(dataset: str) -> pathlib.Path:
  """…/NAME[/CONFIG]/VERSION of a dataset that `tfds build NAME --file_format=array_record` has prepared."""
  name, _, version = dataset.partition(':')
  root = pathlib.Path(os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')).expanduser()
  found = sorted(p.parent for p in (root / name).rglob('dataset_info.json') if version in ('', p.parent.name))
  if not found:
    raise UsageError(f'data source tfds:{dataset}: nothing prepared in {root / name}; run `tfds build {name} '
                     '--file_format=array_record` where there is a network, and set TFDS_DATA_DIR')
  return max(found, key=lambda p: [int(n) if n.isdigit() else 0 for n in p.name.split('.')])


SOURCES = {'stdlib': _stdlib, 'text': _text, 'jsonl': _jsonl, 'arrayrecord': _arrayrecord, 'tfds': _tfds}
