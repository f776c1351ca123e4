"""Sources, the token cache and batch(step)."""
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxlm.schema import DataConfig
from jaxlm.data import examples, packing, pipeline, sources, tokenizer, windows
from jaxlm.errors import JaxlmError, UsageError
from tests import common, matrix


def make(texts, tmp_path, **changes):
  c = common.config(**{'data.source': f'text:{texts}/*.txt', 'data.heldout': 0.2, **changes})
  return c, pipeline.prepare(c, tmp_path, lambda _: None)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.text(max_size=5))
def test_permute_is_a_bijection(n, key):
  assert sorted(pipeline.permute(np.arange(n), n, key)) == list(range(n))


def test_permute_depends_on_its_key_and_mixes():
  n = 1000
  a, b = (pipeline.permute(np.arange(n), n, k) for k in ('0/0', '0/1'))
  assert (a == b).mean() < 0.02 and (np.abs(np.diff(a)) == 1).mean() < 0.02
  far = pipeline.permute(np.array([10 ** 14]), 10 ** 15, 'k')  # no table: constant time and memory
  assert 0 <= far[0] < 10 ** 15


def in_order(c, cache, chosen):
  return windows.causal(examples.Task(c, cache.tokenizer), cache.streams['train'], chosen, chosen)


def test_every_token_is_a_target_once_and_documents_never_meet(texts, tmp_path):
  c, cache = make(texts, tmp_path)
  stream = cache.streams['train']
  documents = [t for _, t in sources.documents(c.data.source, c.data, 'train')]
  b = in_order(c, cache, np.arange(stream.windows(c.length)))
  real = b['segments'] > 0
  # Read back in order, the inputs are the documents, each between boundaries.
  ids = np.concatenate([b['tokens'][real], stream.read(stream.tokens - 1, stream.tokens)])
  expected = [i for t in documents for i in (cache.tokenizer.boundary, *cache.tokenizer.encode(t),
                                             cache.tokenizer.boundary)]
  np.testing.assert_array_equal(ids[:len(expected)], expected)
  # Every token but each document's first is a target that counts, once.
  assert b['weights'].sum() == sum(len(cache.tokenizer.encode(t)) + 1 for t in documents)
  for row in range(len(b['tokens'])):
    for segment in range(1, b['segments'][row].max() + 1):
      here = b['segments'][row] == segment
      np.testing.assert_array_equal(b['positions'][row][here], np.arange(here.sum()))
  crossing = (b['tokens'] == cache.tokenizer.boundary) & (b['targets'] == cache.tokenizer.boundary) & real
  assert crossing.sum() > 10 and (b['weights'][crossing] == 0).all()


def test_an_epoch_sees_each_window_once_and_the_next_in_another_order(texts, tmp_path):
  c, cache = make(texts, tmp_path)
  p = pipeline.make(c, cache)
  assert p.windows % c.batch  # an epoch ends inside a batch
  count = 2 * p.windows // c.batch + 1
  rows = np.concatenate([p.rows(s, 0, c.batch)['tokens'] for s in range(count)])
  first, second = rows[:p.windows], rows[p.windows:2 * p.windows]
  order = lambda a: sorted(map(bytes, a))
  assert order(first) == order(second) == order(in_order(c, cache, np.arange(p.windows))['tokens'])
  assert (first != second).any(1).mean() > 0.8


def test_batches_are_the_same_for_any_reader_and_mesh(texts, tmp_path):
  c, cache = make(texts, tmp_path)
  p = pipeline.make(c, cache)
  whole = p.rows(7, 0, 8)
  common.assert_trees_equal(whole, {k: np.concatenate([p.rows(7, 0, 3)[k], p.rows(7, 3, 8)[k]]) for k in whole})
  for sizes in common.MESHES:
    common.assert_trees_equal(p.batch(7, common.mesh_of(*sizes)), whole)
  other = dataclasses.replace(p, config=dataclasses.replace(c, seed=1)).rows(7, 0, 8)
  assert (other['tokens'] != whole['tokens']).any()


def test_held_out_documents_are_never_trained_on_nor_seen_by_the_tokenizer(texts, tmp_path, monkeypatch):
  seen = []
  original = tokenizer.make
  monkeypatch.setattr(packing.tokenizers, 'make', lambda spec, it: original(spec, (seen.append(t) or t for t in it)))
  c = common.config(**{'data.source': f'text:{texts}/*.txt', 'data.heldout': 0.2, 'data.tokenizer': 'bpe:264'})
  packing.build(c.data, tmp_path / 'data', lambda _: None)
  cache = packing.open_cache(c.data, tmp_path / 'data')
  held = {t for _, t in sources.documents(c.data.source, c.data, 'heldout')}
  trained = {t for _, t in sources.documents(c.data.source, c.data, 'train')}
  assert held and trained and not held & trained and len(held | trained) == 60
  assert set(seen) == trained
  stream = cache.streams['train']
  text = cache.tokenizer.decode(stream.read(0, stream.tokens))
  assert all(t in text for t in trained) and not any(t in text for t in held)


def test_the_split_does_not_move_with_the_folder(texts, tmp_path):
  import shutil
  shutil.copytree(texts, tmp_path / 'moved')
  names = [[n for n, _ in sources.documents(f'text:{folder}/*.txt', DataConfig(heldout=0.2), 'heldout')]
           for folder in (texts, tmp_path / 'moved')]
  assert names[0] == names[1]


def damage(cache: pathlib.Path, how: str) -> str:
  part = cache / 'train-00000.bin'
  if how == 'missing':
    part.unlink()
  elif how == 'shorter':
    part.write_bytes(part.read_bytes()[:-2])
  elif how == 'bit':
    raw = bytearray(part.read_bytes())
    raw[100] ^= 1
    part.write_bytes(raw)
  elif how == 'documents':
    part = cache / 'heldout-documents.npy'
    part.unlink()
  elif how == 'manifest':
    part = cache / 'manifest.json'
    part.unlink()
  elif how == 'tokenizer':
    part = cache / 'tokenizer.json'
    part.write_text(part.read_text().replace('true', 'false', 1))
  return part.name


@pytest.mark.parametrize('how', ['missing', 'shorter', 'bit', 'documents', 'manifest', 'tokenizer'])
def test_a_damaged_cache_is_an_error_that_names_the_part(texts, tmp_path, how):
  c, _ = make(texts, tmp_path)
  name = damage(tmp_path / 'data', how)
  with pytest.raises(UsageError, match=name):
    pipeline.prepare(c, tmp_path)


@pytest.mark.parametrize('change', [{'data.source': 'stdlib'}, {'data.heldout': 0.1}, {'data.tokenizer': 'bpe:300'}])
def test_a_cache_of_another_config_is_refused(texts, tmp_path, change):
  make(texts, tmp_path)
  with pytest.raises(UsageError, match=next(iter(change))):
    make(texts, tmp_path, **change)


def test_bpe_is_trained_on_text_without_spaces_in_time_that_grows_as_the_text():
  """Words are cut for it; the merges are those of the text as pieces of that length, and nothing of it is left in the tokenizer."""
  rng = np.random.default_rng(0)
  text = ''.join(np.array(list('acgt'))[rng.integers(0, 4, 400_000)])  # half a minute, in one word
  found = tokenizer.make('bpe:300', iter([text]))
  pieces = [text[i:i + tokenizer.LONGEST] for i in range(0, len(text), tokenizer.LONGEST)]
  assert found.json == tokenizer.make('bpe:300', iter(pieces)).json
  assert 'FixedLength' not in found.json and found.decode(found.encode(text[:5000])) == text[:5000]


def test_a_killed_build_leaves_no_cache_and_the_next_one_succeeds(tmp_path):
  code = ('import pathlib, sys\nfrom jaxlm import schema\nfrom jaxlm.data import packing\n'
          'say = lambda t: print(t, flush=True)\n'
          f'packing.build(schema.DataConfig("stdlib", tokenizer="bytes"), pathlib.Path({str(tmp_path)!r}) / "data", say)\n')
  with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True) as child:
    while 'train:' not in (line := child.stdout.readline()):  # it is writing
      assert line, 'the build ended by itself'
    child.send_signal(signal.SIGKILL)
  left = list(tmp_path.iterdir())
  assert left and not (tmp_path / 'data').exists()
  (tmp_path / 't').mkdir()
  (tmp_path / 't' / 'a.txt').write_text('some text ' * 100)
  make(tmp_path / 't', tmp_path, **{'data.heldout': 0.})
  assert not [p for p in tmp_path.iterdir() if 'tmp' in p.name]
  matrix.record('F17', 'SIGKILL while the token cache is built', 'no cache; the next start builds it', lost=0)


def test_a_data_worker_that_dies_is_an_error_and_leaves_nothing(texts, tmp_path, monkeypatch):
  """The process that builds the cache, as the kernel kills it when memory is short."""
  popen = subprocess.Popen

  class Killed(popen):
    def __init__(self, *args, **kwargs):
      super().__init__(*args, **kwargs)
      self.kill()
  monkeypatch.setattr(packing.subprocess, 'Popen', Killed)
  with pytest.raises(JaxlmError, match='data: the build ended with -9'):
    make(texts, tmp_path)
  monkeypatch.setattr(packing.subprocess, 'Popen', popen)
  make(texts, tmp_path)
  matrix.record('F17', 'the data worker dies', 'an error that says so; the next start builds the cache', lost=0)


def test_shards_that_are_empty_are_no_documents(tmp_path):
  for name, lines in (('a', ''), ('b', '{"text": "one"}\n'), ('c', '\n\n'), ('d', '{"text": "two"}\n')):
    (tmp_path / f'{name}.jsonl').write_text(lines)
  assert texts_of(f'jsonl:{tmp_path}/*.jsonl') == [('b.jsonl:1', 'one'), ('d.jsonl:1', 'two')]
  for name in 'bd':
    (tmp_path / f'{name}.jsonl').write_text('')
  with pytest.raises(UsageError, match='no training document'):
    make(tmp_path, tmp_path, **{'data.source': f'jsonl:{tmp_path}/*.jsonl', 'data.heldout': 0.})
  matrix.record('F17', 'shards that are empty, some or all', 'read past; with nothing at all, an error that says so')


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(texts, tmp_path):
  with pytest.raises(UsageError, match='model.V=64.*257'):
    make(texts, tmp_path, **{'model.V': 64})


def test_too_little_text_is_refused(tmp_path):
  (tmp_path / 'a.txt').write_text('')
  with pytest.raises(UsageError, match='no training document'):
    make(tmp_path, tmp_path, **{'data.heldout': 0.})


def texts_of(source, **changes):
  return list(sources.documents(source, DataConfig(**changes), 'all'))


def test_jsonl_and_its_errors(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "one"}\n\n{"text": "zwei ü"}\n{"text": ""}\n', encoding='utf-8')
  assert texts_of(f'jsonl:{path}') == [('a.jsonl:1', 'one'), ('a.jsonl:3', 'zwei ü')]
  with pytest.raises(UsageError, match="a.jsonl:1: nothing in field 'body' .there is text."):
    texts_of(f'jsonl:{path}', key='body')
  path.write_text('{"text": "one"}\n{"text": \n')
  with pytest.raises(UsageError, match='a.jsonl:2: is not JSON'):
    texts_of(f'jsonl:{path}')
  matrix.record('F17', 'a bad record', 'an error with its file and line, before training')


def test_text_that_is_not_utf8_names_the_file(tmp_path):
  (tmp_path / 'b.txt').write_bytes(b'ok \xff')
  with pytest.raises(UsageError, match='b.txt: is not UTF-8 .byte 3'):
    texts_of(f'text:{tmp_path}/*.txt')


@pytest.mark.parametrize('source', ['text:/nowhere/*.txt', 'stdlib:x', 'csv:x', 'tfds:x', 'tfds:nothing_here/train'])
def test_sources_that_cannot_be_used(source, tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  with pytest.raises(UsageError, match='data source'):
    texts_of(source)


def test_arrayrecord(tmp_path):
  from array_record.python.array_record_module import ArrayRecordWriter
  writer = ArrayRecordWriter(str(tmp_path / 'a.arrayrecord'), 'group_size:1')
  for i in range(700):
    writer.write(json.dumps({'text': f'record {i}'}).encode())
  writer.close()
  found = texts_of(f'arrayrecord:{tmp_path}/*.arrayrecord')
  assert [t for _, t in found] == [f'record {i}' for i in range(700)]


def test_tfds_without_tensorflow(tmp_path, monkeypatch):
  """A dataset prepared as array_record reads back, and tensorflow is never imported."""
  code = f'''
import sys, tensorflow_datasets as tfds
class Tiny(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.0.0')
  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({{'text': tfds.features.Text()}}))
  def _split_generators(self, dl_manager): return {{'train': self._generate_examples()}}
  def _generate_examples(self):
    for i in range(20): yield i, {{'text': f'example {{i}} ü'}}
Tiny(data_dir={str(tmp_path)!r}, file_format='array_record').download_and_prepare()
from jaxlm.schema import DataConfig
from jaxlm.data import sources
for source in ('tfds:tiny/train', 'tfds:tiny:1.0.0/train[:5]'):
  print(*sorted(t for _, t in sources.documents(source, DataConfig(), 'all')), sep=',')
assert 'tensorflow' not in sys.modules
'''
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False,
                       env={**os.environ, 'TFDS_DATA_DIR': str(tmp_path)})
  assert out.returncode == 0, out.stderr
  every, five = out.stdout.split('\n')[-3:-1]
  assert every.split(',') == sorted(f'example {i} ü' for i in range(20))
  assert len(five.split(',')) == 5


def test_stdlib_is_whole_files_and_no_packages():
  found = dict(texts_of('stdlib'))
  assert len(found) > 400 and not any('site-packages' in n for n in found)
  import argparse
  assert found['argparse.py'] == pathlib.Path(argparse.__file__).read_bytes().decode()
  held = [n for n, _ in sources.documents('stdlib', DataConfig(), 'heldout')]
  assert 0.02 < len(held) / len(found) < 0.09


def test_a_boundary_in_the_text_is_text():
  t = tokenizer.make('bytes', iter(()))
  text = f'a {tokenizer.BOUNDARY} b ü\n\t€'
  ids = t.encode(text)
  assert t.boundary not in ids and t.decode(ids) == text and len(ids) == len(text.encode())


def test_bpe_round_trips_and_is_reproducible():
  corpus = ['def f(x):\n  return x + 1\n' * 5, 'naïve λόγος 123   \n']
  a, b = (tokenizer.make('bpe:300', iter(corpus)) for _ in range(2))
  assert a.json == b.json and a.vocab_size <= 300
  for text in [*corpus, 'never seen ☃ \x00 text']:
    assert a.decode(a.encode(text)) == text


def test_a_tokenizer_json_of_ones_own(tmp_path):
  t = tokenizer.make('bpe:300', iter(['some text'] * 3))
  (tmp_path / 'tokenizer.json').write_text(t.json)
  assert tokenizer.make(str(tmp_path / 'tokenizer.json'), iter(())).encode('some') == t.encode('some')
  for bad in ('nope.json', 'bpe:12', 'bpe:x', 'wordpiece'):
    with pytest.raises(UsageError, match='data.tokenizer'):
      tokenizer.make(bad, iter(()))


def test_parts_are_read_across(texts, tmp_path, monkeypatch):
  c, whole = make(texts, tmp_path / 'a')
  monkeypatch.setattr(packing, 'PART_TOKENS', 1000)
  packing.build(c.data, tmp_path / 'b', lambda _: None)
  cut = packing.open_cache(c.data, tmp_path / 'b')
  a, b = whole.streams['train'], cut.streams['train']
  assert len(a.parts) == 1 and len(b.parts) > 3
  np.testing.assert_array_equal(a.read(0, a.tokens), b.read(0, b.tokens))
  np.testing.assert_array_equal(a.read(990, 2500), b.read(990, 2500))
