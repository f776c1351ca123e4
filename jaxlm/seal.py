"""The seal of a checkpoint: its last file, by which bad bytes are told from good ones, with no model and no jax.

    seal.json   format, step
                files     of every other file of the step: its size, and the checksum of its bytes
                arrays    of every array that came from a device: shape, dtype, and the digest of its bits (digest.py)
                hashes    of config, tokenizer and data
                examples  of the run's data that were consumed; versions of the libraries
                seal      the checksum of all that

Checksums are XXH3 (128 bits): they find damage, not malice. Who can write into a checkpoint can seal it, too.
"""
import concurrent.futures
import json
import os
import pathlib
import re

import xxhash

from jaxlm import storage
from jaxlm.errors import CheckpointError

FORMAT = 1
NAME = 'seal.json'
MARKER = 'commit_success.txt'  # Orbax's own, which steps of earlier versions have besides what is sealed
_MARKED = rb'Checkpoint commit was successful to [^\n]*/%d'
LIMIT = 2 ** 28  # bytes of a JSON file of a checkpoint
_PIECE = 2 ** 22
_THREADS = 8


class Damaged(CheckpointError):
  """Bytes that are not those that were sealed: which, and why."""


def write(folder: pathlib.Path, said: dict) -> None:
  """Seals a step's folder, with all that it holds on disk: files, then their folders, then the seal."""
  names = _names(folder)
  checksums = _each(lambda name: _checksum(folder / name, sync=True), names)
  record = {'format': FORMAT, **said, 'files': {name: [size, checksum] for name, (size, checksum) in zip(names, checksums)}}
  record['seal'] = _of_record(record)
  with open(folder / NAME, 'x', encoding='utf-8') as file:
    json.dump(record, file)
    file.flush()
    os.fsync(file.fileno())
  for inner in {folder, *((folder / name).parent for name in names)}:
    storage.sync(inner)


def read(folder: pathlib.Path, step: int) -> dict:
  """The seal of a step's folder, itself good. Damaged; OSError if the storage does not answer."""
  record = read_json(folder, NAME)
  if not isinstance(record, dict) or record.get('seal') != _of_record(record):
    raise Damaged(f'{NAME} is damaged: its own checksum is another')
  missing = {'format', 'step', 'files', 'arrays', 'examples'} - set(record)
  if missing:
    raise Damaged(f'{NAME} does not say {min(missing)}')
  if record['format'] != FORMAT:
    raise Damaged(f'{NAME} has format {record["format"]}; this version reads {FORMAT}')
  if record['step'] != step:
    raise Damaged(f'{NAME} is of step {record["step"]}, not of step {step}')
  return record


def check(folder: pathlib.Path, record: dict, share: int = 0, of: int = 1) -> None:
  """Damaged if the files of a step's folder are not those of its seal. share, of: of several processes each reads its share of
  the bytes."""
  files, there = record['files'], set(_names(folder))
  if MARKER in there - set(files) and re.fullmatch(_MARKED % record['step'], _start(folder / MARKER)):
    there.remove(MARKER)
  for what, names in (('is missing', set(files) - there), ('is not of this step', there - set(files))):
    if names:
      raise Damaged(f'{min(names)} {what}')

  def look(name):
    size, checksum = files[name]
    found = (folder / name).stat().st_size
    if found != size:
      raise Damaged(f'{name} has {found} bytes, not {size}')
    if _checksum(folder / name)[1] != checksum:
      raise Damaged(f'{name} is damaged: its checksum is another')
  _each(look, sorted(files)[share::of])


def read_json(folder: pathlib.Path, name: str):
  """The value of a JSON file of a step. Damaged if it is none, or larger than LIMIT."""
  path = folder / name
  try:
    if path.is_symlink() or path.stat().st_size > LIMIT:
      raise Damaged(f'{name} is a link, or larger than {LIMIT >> 20} MiB')
    return json.loads(path.read_bytes())
  except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
    raise Damaged(f'{name} is missing') from e
  except (ValueError, RecursionError) as e:
    raise Damaged(f'{name} is damaged: it is no JSON') from e


def _names(folder: pathlib.Path) -> list[str]:
  """Of all files in a folder but the seal, relative to it. Damaged by what is no file."""
  found = []

  def fail(e):
    raise e
  for here, folders, files in os.walk(folder, onerror=fail):
    for name in (*folders, *files):
      path = pathlib.Path(here, name)
      if path.is_symlink() or not (path.is_dir() or path.is_file()):
        raise Damaged(f'{path.relative_to(folder)} is a link, or no file')
    found += [str(pathlib.Path(here, name).relative_to(folder)) for name in files]
  return sorted(set(found) - {NAME})


def _start(path: pathlib.Path) -> bytes:
  """The first bytes of a file, as many as a path can have, and more than a marker's."""
  with open(path, 'rb') as file:
    return file.read(2 ** 13)


def _checksum(path: pathlib.Path, sync: bool = False) -> tuple[int, str]:
  """(size, checksum) of a file; with sync, once its bytes are on disk."""
  size, state, piece = 0, xxhash.xxh3_128(), bytearray(_PIECE)
  try:
    with open(path, 'rb', buffering=0) as file:
      if sync:
        os.fsync(file.fileno())
      while count := file.readinto(piece):
        state.update(memoryview(piece)[:count])
        size += count
  except (FileNotFoundError, IsADirectoryError) as e:
    raise Damaged(f'{path.name} is missing') from e
  return size, f'xxh3:{state.hexdigest()}'


def _each(f, names):
  """[f(name), …], several at a time; the first error is raised."""
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return list(pool.map(f, names))


def _of_record(record: dict) -> str:
  rest = {key: value for key, value in record.items() if key != 'seal'}
  return f'xxh3:{xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True).encode())}'
