"""Where documents come from: SOURCE → (name, text) pairs, in an order that is the same on every machine.

    stdlib                 the Python standard library's own source files: real text that is on every machine
    text:GLOB              a file a document, UTF-8
    jsonl:GLOB             a line a record
    arrayrecord:GLOB       a JSON text a record
    tfds:NAME[:VERSION]/SPLIT   an example a record; prepared beforehand, read without TensorFlow

A record's field data.key is a document; with data.target, it is a question, and that field its answer; data/forms.py has
what else data.form can make of its fields. data.prefix is put before each text or question.

Each source is split once and for all: a document is held out if the hash of its name falls in the held-out share.
"""
import dataclasses
import difflib
import glob
import hashlib
import json
import os
import pathlib
import sysconfig
from collections.abc import Iterator

from jaxlm.data import forms
from jaxlm.errors import UsageError
from jaxlm.schema import Config, DataConfig


class Missing(UsageError):
  """There is no such file or dataset on this machine."""


def is_heldout(name: str, share: float) -> bool:
  digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
  return int.from_bytes(digest, 'big') < share * 2 ** 64


def refusal(source: str) -> str:
  """Why a SOURCE can be read on no machine, or ''."""
  kind, _, rest = source.partition(':')
  near = difflib.get_close_matches(kind, SOURCES, n=1)
  if kind not in SOURCES or bool(rest) == (kind == 'stdlib'):
    return ('wants one of stdlib, text:GLOB, jsonl:GLOB, arrayrecord:GLOB, tfds:NAME/SPLIT'
            + (f'; did you mean {near[0]}?' if near and kind not in SOURCES else ''))
  return 'wants tfds:NAME/SPLIT, as tfds:lm1b/train' if kind == 'tfds' and not rest.rpartition('/')[0] else ''


def check_stated(config: Config) -> None:
  """UsageError if a run, or a task of it, does not say what it trains on."""
  for task in config.tasks or (None,):
    if not (task or config).data.source:
      key = f'tasks.{task.name}.data.source' if task else 'data.source'
      raise UsageError(f'{key}: the config does not say what to train on; set --config.{key}=text:GLOB, or jsonl:, arrayrecord:, tfds: or '
                       'stdlib, the source text of Python itself')


def documents(source: str, data: DataConfig, split: str) -> Iterator[tuple[str, str]]:
  """(name, text) of the documents of `source` in `split`: 'train', 'heldout' or 'all'. Empty ones are left out.

  Raises UsageError naming the source, file or record that cannot be used.
  """
  yield from records(source, dataclasses.replace(data, form='text', target=''), split)


def records(source: str, data: DataConfig, split: str) -> Iterator[tuple]:
  """(name, *fields), as `documents`, the fields as data.form has them: of texts (text,) or, with data.target, (question,
  answer)."""
  kind, _, rest = source.partition(':')
  if why := refusal(source):
    raise UsageError(f'data source {source!r}: {why}')
  if kind in ('stdlib', 'text') and (data.target or data.form != 'text'):
    wants = f'data.target={data.target!r}' if data.target else f'data.key={data.key!r}'
    raise UsageError(f'data source {source!r}: has no field {wants}; jsonl, arrayrecord and tfds have fields')
  for name, fields in SOURCES[kind](rest, lambda record, where: forms.read(record, data, where)):
    if fields and (split == 'all' or is_heldout(name, data.heldout) == (split == 'heldout')):
      yield (name, data.prefix + fields[0], *fields[1:]) if data.prefix else (name, *fields)


def _stdlib(rest: str, read):
  """Whole .py files, UTF-8 ones only (a dozen test files are in other encodings on purpose)."""
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  skip = {'site-packages', 'dist-packages', '__pycache__'}
  for path in sorted(root.rglob('*.py')):
    name = path.relative_to(root).as_posix()
    if skip.isdisjoint(name.split('/')) and path.is_file():
      try:
        text = path.read_bytes().decode()
      except UnicodeDecodeError:
        continue
      yield name, (text,) if text else None


def _files(pattern: str, kind: str) -> Iterator[tuple[str, str]]:
  """(path, name): names are relative to the folder before the first wildcard, so that moving it changes no split."""
  paths = sorted(p for p in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(p))
  if not paths:
    raise Missing(f'data source {kind}:{pattern}: no file matches')
  root = os.path.dirname(pattern.split('*')[0].split('?')[0].split('[')[0])
  for path in paths:
    yield path, os.path.relpath(path, os.path.expanduser(root) or '.')


def _text(pattern: str, read):
  for path, name in _files(pattern, 'text'):
    try:
      text = pathlib.Path(path).read_bytes().decode()
    except UnicodeDecodeError as e:
      raise UsageError(f'{path}: is not UTF-8 (byte {e.start}); convert it, or narrow the glob') from e
    yield name, (text,) if text else None


def _json(line, where: str):
  try:
    return json.loads(line)
  except ValueError as e:
    raise UsageError(f'{where}: is not JSON ({e})') from e


def _jsonl(pattern: str, read):
  for path, name in _files(pattern, 'jsonl'):
    with open(path, 'rb') as f:
      for number, line in enumerate(f, 1):
        if line.strip():
          yield f'{name}:{number}', read(_json(line, where := f'{path}:{number}'), where)


def _arrayrecord(pattern: str, read):
  from grain.sources import ArrayRecordDataSource  # pylint: disable=g-import-not-at-top
  for path, name in _files(pattern, 'arrayrecord'):
    records = ArrayRecordDataSource(path)
    for start in range(0, len(records), 512):  # 8 × faster than one at a time
      for number, record in enumerate(records.__getitems__(range(start, min(start + 512, len(records)))), start):
        yield f'{name}:{number}', read(_json(record, where := f'{path}:{number}'), where)


def _tfds(rest: str, read):
  """A prepared TFDS dataset (any folder on TFDS_DATA_DIR or ~/tensorflow_datasets): never a download."""
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top
  dataset, _, split = rest.rpartition('/')
  try:
    builder = tfds.builder_from_directory(_tfds_folder(dataset))
    records = builder.as_data_source(split)
  except (ValueError, KeyError, NotImplementedError, FileNotFoundError) as e:
    reason = str(e).strip().splitlines()[0]
    raise UsageError(f'data source tfds:{rest}: {reason}') from e
  for number, record in enumerate(records):
    yield f'{rest}:{number}', read(record, f'tfds:{rest}[{number}]')


def _tfds_folder(dataset: str) -> pathlib.Path:
  """…/NAME[/CONFIG]/VERSION of a dataset that `tfds build NAME --file_format=array_record` has prepared."""
  name, _, version = dataset.partition(':')
  root = pathlib.Path(os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')).expanduser()
  found = sorted(p.parent for p in (root / name).rglob('dataset_info.json') if version in ('', p.parent.name))
  if not found:
    raise Missing(f'data source tfds:{dataset}: nothing prepared in {root / name}; run `tfds build {name} '
                  '--file_format=array_record` where there is a network, and set TFDS_DATA_DIR')
  return max(found, key=lambda p: [int(n) if n.isdigit() else 0 for n in p.name.split('.')])


SOURCES = {'stdlib': _stdlib, 'text': _text, 'jsonl': _jsonl, 'arrayrecord': _arrayrecord, 'tfds': _tfds}
