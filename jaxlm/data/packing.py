"""The token cache, and fixed-length windows of it.

A split of the corpus is one stream of tokens, document after document, each [boundary, t1 … tn, boundary]. Window w of
length L is stream[w·L : w·L + L + 1]: L inputs and their L targets, so that every token is a target exactly once an
epoch. Documents never see each other: they differ in segment, positions start again, and the one prediction that would
cross from a document into the next has weight 0.

On disk (`cache`): manifest.json, tokenizer.json, and a split's tokens in parts NAME-00000.bin (uint16 or uint32) with
the start of each document in NAME-documents.npy (int64). All of it appears at once, or not at all. With data.target a
document is [boundary, question, boundary, answer, boundary], and NAME-answers.npy says where each answer starts; a document
of a data.form that marks its tokens has their marks in NAME-marks-00000.bin, beside its part.
"""
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from jaxlm.schema import DataConfig
from jaxlm.data import forms, sources, tokenizer as tokenizers
from jaxlm.errors import JaxlmError, StorageError, UsageError
from jaxlm.storage import sync

SPLITS = ('train', 'heldout')
PART_TOKENS = 2 ** 28
MARKS = np.dtype(np.uint16)
HASHED_BYTES = 2 ** 31   # caches up to this are hashed whenever they are opened; of larger ones only the sizes are checked


@dataclasses.dataclass(frozen=True)
class Stream:
  """One split, memory-mapped. `starts` are document starts, ending with the number of tokens; `answers` where the answer of
  each starts, None if they have none; `marks` the marks of tokens (data/forms.py), in parts as they are."""
  parts: tuple
  part_starts: np.ndarray
  starts: np.ndarray
  answers: np.ndarray | None = None
  marks: tuple | None = None

  @property
  def tokens(self) -> int:
    return int(self.starts[-1])

  def windows(self, length: int) -> int:
    """How many windows of `length` there are; the last may be padded."""
    return max(0, -(-(self.tokens - 1) // length))

  def read(self, start: int, end: int, parts: tuple | None = None) -> np.ndarray:
    """tokens[start:end] across parts, int32; or of other parts that are cut as they are."""
    parts = self.parts if parts is None else parts
    first = int(np.searchsorted(self.part_starts, start, 'right')) - 1
    out = []
    while start < end:
      stop = min(end, int(self.part_starts[first + 1]))
      offset = int(self.part_starts[first])
      out.append(parts[first][start - offset:stop - offset])
      start, first = stop, first + 1
    return np.concatenate(out).astype(np.int32)

  def document(self, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(question, answer) of a document that has one, without their boundaries."""
    start, answer, end = int(self.starts[n]), int(self.answers[n]), int(self.starts[n + 1])
    return self.read(start + 1, answer - 1), self.read(answer, end - 1)

  def marked(self, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, their marks) of a document that has marks, with its boundaries."""
    span = int(self.starts[n]), int(self.starts[n + 1])
    return self.read(*span), self.read(*span, self.marks)

  def slices(self, starts_B: np.ndarray, length: int, since_B: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """stream[start : start + length] of each row → {tokens, segments, positions}, int32 [B, L].

    Segment 0 is padding, outside of the stream; other segments count a row's documents from 1. Positions count from the
    start of the document, or from `since` (by default the row's start) if that is later.
    """
    tokens_BL = np.zeros((len(starts_B), length), np.int32)
    for row, start in enumerate(starts_B):
      first, last = max(0, int(start)), min(int(start) + length, self.tokens)
      if first < last:
        tokens_BL[row, first - start:last - start] = self.read(first, last)
    at_BL = starts_B[:, None].astype(np.int64) + np.arange(length)
    real_BL = (0 <= at_BL) & (at_BL < self.tokens)
    document_BL = np.searchsorted(self.starts, at_BL, 'right') - 1
    segments_BL = np.where(real_BL, document_BL - np.maximum(document_BL[:, :1], 0) + 1, 0).astype(np.int32)
    since_B1 = (starts_B if since_B is None else since_B)[:, None]
    start_BL = np.maximum(self.starts[np.clip(document_BL, 0, len(self.starts) - 1)], since_B1)
    positions_BL = np.where(real_BL, at_BL - start_BL, 0).astype(np.int32)
    return {'tokens': tokens_BL, 'segments': segments_BL, 'positions': positions_BL}


@dataclasses.dataclass(frozen=True)
class Cache:
  manifest: dict
  tokenizer: tokenizers.Tokenizer
  streams: dict[str, Stream]

  @property
  def hash(self) -> str:
    """Of all that decides batch(step): tokens, documents, tokenizer."""
    return self.manifest['hash']


def build(data: DataConfig, cache: pathlib.Path, say=print, tokenizer: tokenizers.Tokenizer | None = None) -> None:
  """Reads the source, makes the tokenizer (unless it is given), and writes the cache. Raises UsageError, StorageError."""
  with whole(cache) as folder:
    say(f'data: reading {data.source}, tokenizer {data.tokenizer}')
    tokenizer = tokenizer or tokenizers.make(data.tokenizer, texts(data))
    (folder / 'tokenizer.json').write_text(tokenizer.json, encoding='utf-8')
    splits = {split: _write_split(data, split, tokenizer, folder, say) for split in SPLITS}
    if not splits['train']['documents']:
      raise UsageError(f'data source {data.source}: no training document in it (data.heldout={data.heldout})')
    manifest = {**_identity(data), 'tokenizer_sha256': tokenizer.sha256, 'splits': splits}
    manifest['hash'] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / 'manifest.json').write_text(json.dumps(manifest, indent=1), encoding='utf-8')


def texts(data: DataConfig) -> Iterator[str]:
  """All texts in the training documents."""
  return (text for _, *fields in sources.records(data.source, data, 'train') for text in forms.texts(data, fields))


@contextlib.contextmanager
def whole(cache: pathlib.Path):
  """A folder that is written to disk and becomes `cache` when the block ends, and is gone if it fails. Raises StorageError."""
  folder = cache.with_name(f'{cache.name}.tmp-{os.getpid()}')
  for old in cache.parent.glob(f'{cache.name}.tmp-*'):  # left by a build that was killed
    if not _alive(int(old.name.rpartition('-')[2])):
      shutil.rmtree(old)
  try:
    folder.mkdir(parents=True)
    yield folder
    for path in folder.iterdir():
      sync(path)
    sync(folder)
    folder.rename(cache)
    sync(cache.parent)
  except OSError as e:
    raise StorageError(f'data cache {cache}: cannot be written ({e.strerror or e}); free it or set '
                       '--config.data.cache') from e
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _identity(data: DataConfig) -> dict:
  """What of the config decides what is in a cache."""
  named = {'text': (), 'tags': ('classes',), 'span': ('context',), 'chat': ('template',)}[data.form]
  said = [name for name in ('target', 'prefix') if getattr(data, name)]
  return {name: getattr(data, name) for name in ('source', 'heldout', 'key', 'tokenizer', *said,
                                                 *(['form', *named] if data.form != 'text' else []))}


def in_memory(data: DataConfig, tokenizer: tokenizers.Tokenizer, records: Sequence[tuple]) -> Stream:
  """The stream of some records (their fields), as it would be in a cache."""
  tokens, marks, starts, answers = [], [], [0], []
  for encoded in forms.encode(tokenizer, data, records):
    tokens += [tokenizer.boundary, *encoded.ids, tokenizer.boundary]
    marks += [0, *(encoded.marks or []), 0]
    answers += [] if encoded.answer is None else [starts[-1] + encoded.answer]
    starts.append(len(tokens))
  return Stream((np.array(tokens),), np.array([0, len(tokens)]), np.array(starts), np.array(answers) if answers else None,
                (np.array(marks),) if data.form != 'text' else None)


def build_apart(data: DataConfig, cache: pathlib.Path, say=print) -> None:
  """`build` in a process of its own, with the system's malloc as it comes: with what memory.py sets the tokenizer's threads
  may wait for each other (27 s for 10). It ends when this process does. Raises what build raises."""
  apart('jaxlm.data.packing', dataclasses.asdict(data), cache, say)


def apart(module: str, what: dict, cache: pathlib.Path, say) -> None:
  """See build_apart; `module` is run, and gets `what` as JSON and the cache."""
  words = [sys.executable, '-m', module, json.dumps(what), str(cache)]
  with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                        env={**os.environ, 'GLIBC_TUNABLES': '', 'PYTHONUNBUFFERED': '1'}) as child:
    try:
      for line in child.stdout:
        say(line.rstrip())
      problem = child.stderr.read().strip()
    except BaseException:  # a signal: raised again, once the child is gone
      child.terminate()
      raise
  if child.returncode:
    kind = {2: UsageError, 13: StorageError}.get(child.returncode, JaxlmError)
    raise kind(problem or f'data cache {cache}: the build ended with {child.returncode}')


def main(make, what: str, cache: str) -> None:
  """What `apart` runs: make(what, cache)."""
  try:
    make(json.loads(what), pathlib.Path(cache))
  except JaxlmError as e:
    print(e, file=sys.stderr)
    sys.exit(e.code)


def _alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return True


def _write_split(data: DataConfig, split: str, tokenizer, folder: pathlib.Path, say) -> dict:
  """Tokenises a split part by part → its entry in the manifest. Memory: a batch of documents."""
  dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2 ** 16 else np.uint32)
  starts, answers, parts, source_hash, size, part = [0], [], [], hashlib.sha256(), 0, None

  def append(name: str, numbers: list[int], kind: np.dtype) -> None:
    with open(folder / name, 'ab') as f:
      f.write(np.array(numbers, kind).tobytes())

  def flush(batch):
    nonlocal part
    for encoded in forms.encode(tokenizer, data, batch):
      if part is None or part['tokens'] >= PART_TOKENS:
        part = {'file': f'{split}-{len(parts):05}.bin', 'tokens': 0}
        parts.append(part)
      if encoded.answer is not None:
        answers.append(starts[-1] + encoded.answer)
      append(part['file'], [tokenizer.boundary, *encoded.ids, tokenizer.boundary], dtype)
      if encoded.marks is not None:
        append(_marks_of(part['file']), [0, *encoded.marks, 0], MARKS)
      part['tokens'] += len(encoded.ids) + 2
      starts.append(starts[-1] + len(encoded.ids) + 2)
    say(f'data: {split}: {len(starts) - 1:,} documents, {starts[-1]:,} tokens')

  batch, waiting = [], 0
  for name, *fields in sources.records(data.source, data, split):
    raw = '\0'.join(f if isinstance(f, str) else json.dumps(f) for f in fields).encode()
    size += len(raw)
    waiting += len(raw)
    source_hash.update(f'{name}\0{hashlib.sha256(raw).hexdigest()}\n'.encode())
    batch.append(fields)
    if waiting > 2 ** 23:
      flush(batch)
      batch, waiting = [], 0
  if batch:
    flush(batch)
  np.save(folder / f'{split}-documents.npy', np.array(starts, np.int64))
  parts.append({'file': f'{split}-documents.npy', 'tokens': 0})
  if data.form != 'text':
    parts += [{'file': _marks_of(p['file']), 'tokens': 0} for p in parts if p['tokens']]
  elif data.target:
    np.save(folder / f'{split}-answers.npy', np.array(answers, np.int64))
    parts.append({'file': f'{split}-answers.npy', 'tokens': 0})
  for part in parts:
    part.update(bytes=(folder / part['file']).stat().st_size, sha256=_sha256(folder / part['file']))
  return {'documents': len(starts) - 1, 'tokens': starts[-1], 'bytes': size, 'dtype': dtype.name,
          'source_sha256': source_hash.hexdigest(), 'parts': parts}


def _marks_of(part: str) -> str:
  """The file of a part's marks: train-00000.bin → train-marks-00000.bin."""
  return '-marks-'.join(part.rsplit('-', 1))


def _sha256(path: pathlib.Path) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def open_cache(data: DataConfig, cache: pathlib.Path) -> Cache:
  """The cache, checked against its manifest and the config. UsageError naming the part that is missing or changed."""
  if not (cache / 'manifest.json').is_file():
    raise UsageError(f'data cache {cache}: manifest.json is missing; remove the folder to build it again')
  manifest = json.loads((cache / 'manifest.json').read_text(encoding='utf-8'))
  identity = _identity(data)
  for field in ('source', 'heldout', 'key', 'target', 'prefix', 'form', *identity):
    found = manifest.get(field, getattr(DataConfig, field))  # a cache of plain texts says nothing of a target or a form
    if found != getattr(data, field):
      raise UsageError(f'data cache {cache}: was built with data.{field}={found!r}, the config has '
                       f'{getattr(data, field)!r}; set --config.data.cache to another folder, or remove this one')
  parts = [p for split in SPLITS for p in manifest['splits'][split]['parts']]
  hashed = sum(p['bytes'] for p in parts) <= HASHED_BYTES
  for part in parts:
    path = cache / part['file']
    if not path.is_file():
      raise UsageError(f'data cache: {path} is missing; remove {cache} to build it again')
    if path.stat().st_size != part['bytes'] or (hashed and _sha256(path) != part['sha256']):
      raise UsageError(f'data cache: {path} is not what was written; remove {cache} to build it again')
  tokenizer = tokenizers.Tokenizer((cache / 'tokenizer.json').read_text(encoding='utf-8'))
  if tokenizer.sha256 != manifest['tokenizer_sha256']:
    raise UsageError(f'data cache: {cache / "tokenizer.json"} is not what was written; remove {cache} to build it again')
  return Cache(manifest, tokenizer, {split: _open_stream(manifest['splits'][split], cache, split) for split in SPLITS})


def _open_stream(entry: dict, cache: pathlib.Path, split: str) -> Stream:
  parts = [p for p in entry['parts'] if p['tokens']]
  maps = tuple(np.memmap(cache / p['file'], np.dtype(entry['dtype']), 'r') for p in parts)
  answers = cache / f'{split}-answers.npy'
  marked = any('-marks-' in p['file'] for p in entry['parts'])
  marks = tuple(np.memmap(cache / _marks_of(p['file']), MARKS, 'r') for p in parts) if marked else None
  return Stream(maps, np.cumsum([0] + [p['tokens'] for p in parts]), np.load(cache / f'{split}-documents.npy'),
                np.load(answers) if answers.exists() else None, marks)


if __name__ == '__main__':
  main(lambda data, cache: build(DataConfig(**data), cache), *sys.argv[1:])
