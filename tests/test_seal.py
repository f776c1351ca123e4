"""A checkpoint that cannot lie: whatever happens to its bytes is seen, named, and never trained on (F5, F6, F7, F10, F21, F23)."""
import json
import os
import random
import shutil
import time

import jax
import numpy as np
import pytest

from jaxlm import checkpoint, cli, seal, storage, train as training, verify
from jaxlm.checkpoint import Checkpoints, digests, hold, steps, write_sealed
from jaxlm.errors import CheckpointError, StorageError
from tests import common, matrix
from tests.test_checkpoint import losses, run_config, state_of


@pytest.fixture(scope='module')
def run(texts, tmp_path_factory):
  """Saved at 3, 6, 9 and 12."""
  workdir = tmp_path_factory.mktemp('sealed')
  training.train(run_config(texts), workdir)
  return workdir


@pytest.fixture
def copy(run, tmp_path):
  shutil.copytree(run, tmp_path / 'run')
  return tmp_path / 'run'


def files_of(step):
  return sorted(path for path in step.rglob('*') if path.is_file())


def good(workdir, step):
  checkpoints = Checkpoints(workdir, read_only=True)
  try:
    checkpoints.read_meta(step)
    return True
  except seal.Damaged:
    return False
  finally:
    checkpoints.close()


def kind_of(path, step):
  """The class of a file: arrays, their indices, metadata, …"""
  name = str(path.relative_to(step))
  return next((kind for kind, mark in (('array data', '/d/'), ('manifest', 'manifest'), ('seal', 'seal.json'), ('run', 'run.json'))
               if mark in name), path.name)


def flipped(path, place, bit):
  with open(path, 'r+b') as file:
    file.seek(place)
    byte = file.read(1)
    file.seek(place)
    file.write(bytes([byte[0] ^ bit]))


def test_a_flipped_bit_of_whatever_file_and_a_file_too_many_are_named_by_verify(copy):
  """There is no file that is not sealed. Orbax would leave one of its own."""
  folder, said = copy / 'checkpoints' / '12', []
  bad = lambda: [f['reason'] for f in verify.run(copy, arrays=False, say=said.append) if not f['good']]
  files = files_of(folder)
  assert len(files) > 8 and bad() == []
  for path in files:
    place, bit = path.stat().st_size // 2, 4
    flipped(path, place, bit)
    (reason,), name = bad(), str(path.relative_to(folder))
    assert reason.startswith(f'checkpoint 12 is bad: {name} is damaged'), reason
    flipped(path, place, bit)
  for inner in {folder, *(path.parent for path in files)}:
    for name in ('more', seal.MARKER + '2', '.hidden', seal.MARKER if inner == folder else seal.NAME):
      (inner / name).write_text('x')
      assert bad() == [f'checkpoint 12 is bad: {(inner / name).relative_to(folder)} is not of this step']
      (inner / name).unlink()
  assert bad() == []


def test_what_orbax_wrote_into_steps_of_earlier_versions_is_known_by_what_it_says(copy):
  folder, record = copy / 'checkpoints' / '12', seal.read(copy / 'checkpoints' / '12', 12)
  text = f'Checkpoint commit was successful to {copy}/moved since/checkpoints/12'
  (folder / seal.MARKER).write_text(text)
  seal.check(folder, record)
  for other in (text[1:], text + '0', text.replace('/12', '/1'), text + '\n', ''):
    (folder / seal.MARKER).write_text(other)
    with pytest.raises(seal.Damaged, match=f'{seal.MARKER} is not of this step'):
      seal.check(folder, record)


def test_each_flipped_bit_is_seen(copy):
  """A thousand, over every class of file, the seal too."""
  folder, rng, trials, seen = copy / 'checkpoints' / '12', random.Random(0), 0, {}
  by_kind = {}
  for path in files_of(folder):
    by_kind.setdefault(kind_of(path, folder), []).append(path)
  assert {'array data', 'manifest', 'seal', 'run'} <= set(by_kind)
  record = seal.read(folder, 12)
  each = -(-1000 // len(by_kind))
  for kind, paths in by_kind.items():
    for _ in range(each):
      path = rng.choice([p for p in paths if p.stat().st_size])
      place, bit = rng.randrange(path.stat().st_size), 1 << rng.randrange(8)
      flipped(path, place, bit)
      try:
        seal.check(folder, record if kind != 'seal' else seal.read(folder, 12))
      except seal.Damaged:
        seen[kind] = seen.get(kind, 0) + 1
      flipped(path, place, bit)
      trials += 1
  assert seen == {kind: each for kind in by_kind}, 'silent flips'
  seal.check(folder, seal.read(folder, 12))  # all are mended again
  matrix.record('F5', f'a flipped bit in {", ".join(sorted(by_kind))}', '0 silent', trials)


def test_each_array_is_held_against_what_was_on_the_device(copy):
  """Files that were sealed with other bits in them: of each array of the state one bit, which only its digest can tell."""
  folder = copy / 'checkpoints' / '12'
  state = jax.device_get(state_of(copy, 12))
  recorded = seal.read(folder, 12)['arrays']
  assert len(jax.tree.leaves(state)) == len(recorded) > 20
  hold(12, state_on_device(state), recorded)
  rng, trials = random.Random(1), 0
  leaves, tree = jax.tree.flatten(state)
  for n, leaf in enumerate(leaves):
    raw = np.array(leaf)
    flat = raw.reshape(-1).view(np.uint8)
    place = rng.randrange(flat.size)
    flat[place] ^= 1 << rng.randrange(8)
    with pytest.raises(seal.Damaged, match='its digest is another'):
      hold(12, state_on_device(tree.unflatten([*leaves[:n], raw, *leaves[n + 1:]])), recorded)
    trials += 1
  matrix.record('F5', 'a flipped bit of an array that was read', '0 silent', trials)


def state_on_device(state):
  return jax.tree.map(jax.numpy.asarray, state)


def resealed(folder, step):
  """Seals it anew, as someone might who does not know that its arrays are others."""
  record = seal.read(folder, step)
  (folder / seal.NAME).unlink()
  seal.write(folder, {key: record[key] for key in ('step', 'arrays', 'examples', 'versions', 'hashes')})


def test_a_state_of_another_step_under_a_fresh_seal_is_seen_by_its_digests(texts, run, copy, capsys):
  folder = copy / 'checkpoints' / '12'
  shutil.rmtree(folder / 'state')
  shutil.copytree(copy / 'checkpoints' / '9' / 'state', folder / 'state')
  resealed(folder, 12)
  training.train(run_config(texts), copy)
  out = capsys.readouterr().out
  assert 'checkpoint 12 is bad: the array' in out and 'goes on from step 9' in out
  assert losses(copy) == losses(run)
  common.assert_trees_equal(state_of(copy, 12), state_of(run, 12))


def largest(folder):
  return max(files_of(folder), key=lambda path: path.stat().st_size)


def swap(folder):
  a, b = sorted(files_of(folder / 'state'), key=lambda path: path.stat().st_size)[-2:]
  a.rename(folder / 'x'), b.rename(a), (folder / 'x').rename(b)


def cut(folder, share):
  with open(largest(folder), 'r+b') as file:
    file.truncate(int(file.seek(0, 2) * share))


def zeros(folder):
  with open(largest(folder), 'r+b') as file:
    file.seek(file.seek(0, 2) // 2)
    file.write(bytes(256))


DAMAGE = {  # what is done to the folder of step 12, and what the line says
    'a file is deleted': (lambda f: largest(f).unlink(), 'is missing'),
    'a file is cut to half': (lambda f: cut(f, .5), 'bytes, not'),
    'a file is empty': (lambda f: cut(f, 0), '0 bytes, not'),
    'a byte is added': (lambda f: largest(f).open('ab').write(b'0'), 'bytes, not'),
    'zeros in a file': (zeros, 'checksum'),
    'two files are swapped': (swap, ''),
    'a file of another step': (lambda f: shutil.copy(f.parent / '9' / 'run.json', f / 'run.json'), 'run.json'),
    'a file too many': (lambda f: (f / 'state' / 'more').write_text('x'), 'state/more is not of this step'),
    'the folder of another step': (lambda f: (shutil.rmtree(f), shutil.copytree(f.parent / '9', f)), 'is of step 9, not of step 12'),
    'the seal is gone': (lambda f: (f / seal.NAME).unlink(), 'seal.json is missing'),
    'the seal is no JSON': (lambda f: (f / seal.NAME).write_text('{'), 'seal.json is damaged'),
    'the seal is a list': (lambda f: (f / seal.NAME).write_text('[]'), 'seal.json is damaged'),
    'the seal is deep': (lambda f: (f / seal.NAME).write_text('[' * 100_000), 'seal.json is damaged'),
    'the seal is huge': (lambda f: os.truncate(f / seal.NAME, 2 ** 30), 'larger than 256 MiB'),
    'the seal is a pickle': (lambda f: (f / seal.NAME).write_bytes(b'\x80\x04cos\nsystem\n'), 'seal.json is damaged'),
    'a link': (lambda f: (f / 'state' / 'link').symlink_to('/etc/passwd'), 'state/link is a link'),
    'run.json is a link': (lambda f: ((f / 'run.json').unlink(), (f / 'run.json').symlink_to('/etc/passwd')), 'run.json is a link'),
    'a pipe': (lambda f: os.mkfifo(f / 'state' / 'pipe'), 'state/pipe is a link, or no file'),
    'an empty folder': (lambda f: (shutil.rmtree(f), f.mkdir()), 'seal.json is missing'),
    'a file': (lambda f: (shutil.rmtree(f), f.write_text('')), 'seal.json is missing'),
}


@pytest.mark.parametrize('what', DAMAGE)
def test_a_damaged_step_is_named_and_the_one_before_is_used(copy, what, capsys):
  damage, words = DAMAGE[what]
  damage(copy / 'checkpoints' / '12')
  begun = time.monotonic()
  checkpoints = Checkpoints(copy)
  step, meta = checkpoints.newest(checkpoints.read_meta)
  seconds = time.monotonic() - begun
  assert step == 9 and meta['examples'] == 72
  said = capsys.readouterr().out
  assert 'checkpoint 12 is bad: ' in said and words in said
  assert steps(copy) == [3, 6, 9] and [p.name.split('-')[0] for p in (copy / 'quarantine').iterdir()] == ['12']
  checkpoints.close()
  matrix.record('F21' if 'seal is' in what or 'link' in what or 'pipe' in what else 'F6', what, 'named, the one before is used', lost=3,
                detect=seconds)


def test_paths_in_a_seal_lead_nowhere(copy):
  """A seal is believed of nothing but its own step's files."""
  folder = copy / 'checkpoints' / '12'
  record = seal.read(folder, 12)
  (folder / seal.NAME).unlink()
  for name in ('../9/run.json', '/etc/passwd'):
    with pytest.raises(seal.Damaged, match='is missing'):
      seal.check(folder, {**record, 'files': {**record['files'], name: [0, '']}})


def test_newest_two_bad_and_all_bad(texts, run, copy, capsys):
  for step in (12, 9):
    cut(copy / 'checkpoints' / str(step), .5)
  training.train(run_config(texts), copy)
  assert 'goes on from step 6' in capsys.readouterr().out and losses(copy) == losses(run)
  matrix.record('F7', 'the newest two are bad', 'the third is used, the end is the unbroken run\'s', lost=6)
  for step in steps(copy):
    cut(copy / 'checkpoints' / str(step), .5)
  before = {path: path.read_bytes() for path in files_of(copy / 'checkpoints')}
  with pytest.raises(CheckpointError, match=r'none of the steps \[12, 9, 6, 3\] is good') as e:
    training.train(run_config(texts, steps=20), copy)
  assert e.value.code == 3 and {path: path.read_bytes() for path in files_of(copy / 'checkpoints')} == before
  matrix.record('F7', 'all are bad', 'exit code 3, nothing touched')


def test_verify_needs_no_model_and_names_what_is_bad(copy, tmp_path, monkeypatch):
  with monkeypatch.context() as here:
    here.chdir(tmp_path)
    cli.run(['verify', f'--workdir={copy.name}', f'--json={tmp_path / "out.json"}'])
  found = json.loads((tmp_path / 'out.json').read_text())['checkpoints']
  assert [f['step'] for f in found] == [3, 6, 9, 12] and all(f['good'] and f['examples'] == 8 * f['step'] for f in found)
  zeros(copy / 'checkpoints' / '9')
  shutil.rmtree(copy / 'checkpoints' / '6' / 'state')
  shutil.copytree(copy / 'checkpoints' / '3' / 'state', copy / 'checkpoints' / '6' / 'state')
  resealed(copy / 'checkpoints' / '6', 6)
  said = []
  assert [f['step'] for f in verify.run(copy, arrays=False, say=said.append) if not f['good']] == [9]
  with pytest.raises(CheckpointError, match='2 of 4 checkpoints are bad: 6, 9'):
    verify.refuse_bad(verify.run(copy, say=said.append))
  assert any('checkpoint 6 is bad: the array' in line for line in said)
  assert not (copy / 'quarantine').exists()  # it changes nothing


def test_steps_go_by_their_number_and_their_seal_not_by_clocks(copy):
  """999,999 → 1,000,000; a step that is older by its files' times; folders that are no steps."""
  checkpoints = copy / 'checkpoints'
  for old, new in ((9, 999_999), (12, 1_000_000)):
    folder = checkpoints / str(new)
    (checkpoints / str(old)).rename(folder)
    meta = seal.read_json(folder, 'run.json')
    (folder / seal.NAME).unlink()
    write_sealed(folder, new, meta, {})
  for path in (checkpoints / '1000000').rglob('*'):
    os.utime(path, (0, 0))
  for path in (checkpoints / '3').rglob('*'):
    os.utime(path, (2 ** 33, 2 ** 33))
  for name in ('0012', '7.orbax-checkpoint-tmp', '.deleted-4', '-5', '٣', '6.bak'):
    (checkpoints / name).mkdir()
  assert steps(copy) == [3, 6, 999_999, 1_000_000]
  made = Checkpoints(copy)
  assert made.newest(made.read_meta)[0] == 1_000_000
  assert sorted(p.name for p in checkpoints.iterdir() if not p.name.isascii() or not p.name.isdigit() or p.name == '0012') == [
      '-5', '.newest', '0012', '6.bak', '٣']  # leftovers of saves and deletions are gone, what others put there is not
  made.close()
  matrix.record('F23', 'clocks, 999,999 → 1,000,000, leftovers', 'by number and seal')


def test_storage_that_does_not_answer_is_asked_again_and_never_taken_for_damage(texts, run, copy, monkeypatch, capsys):
  monkeypatch.setattr(storage, 'FIRST_WAIT', .001)
  real, fails = seal._checksum, []

  def flaky(path, sync=False):
    if fails and fails[0]:
      fails[0] -= 1
      raise TimeoutError(110, 'Connection timed out')
    return real(path, sync)
  monkeypatch.setattr(seal, '_checksum', flaky)
  fails[:] = [3]
  assert good(copy, 12) and 'asked again' in capsys.readouterr().out
  matrix.record('F10', 'a store that errs three times', 'asked again')
  fails[:] = [10 ** 9]
  with pytest.raises(StorageError, match=r'checkpoint 12: the storage does not answer, after 6 tries \(.*timed out') as e:
    training.train(run_config(texts, steps=20), copy)
  assert e.value.code == 13 and steps(copy) == [3, 6, 9, 12] and not (copy / 'quarantine').exists()
  matrix.record('F10', 'a store that does not answer', 'exit code 13 after 6 tries, nothing moved')


def test_a_stale_listing_is_not_believed(texts, copy, monkeypatch, capsys):
  """Listings of a store may lack the newest step for a while, or for good, or hold one that is gone."""
  monkeypatch.setattr(storage, 'FIRST_WAIT', .001)
  real, lacks = checkpoint.steps, [2]

  def stale(workdir):
    lacks[0] -= 1
    return [step for step in real(workdir) if step != 12 or lacks[0] < 0]
  monkeypatch.setattr(checkpoint, 'steps', stale)
  monkeypatch.setattr(checkpoint.pathlib.Path, 'exists', lambda path: path.name != '12' and os.path.exists(path))
  assert Checkpoints(copy, read_only=True).found == [3, 6, 9, 12] and 'step 12, which was saved last, is not listed' in capsys.readouterr().out
  monkeypatch.undo()
  lacks[0] = 10 ** 9
  monkeypatch.setattr(checkpoint, 'steps', stale)
  assert Checkpoints(copy, read_only=True).found == [3, 6, 9, 12]  # by its name it is there
  matrix.record('F10', 'a listing that lacks the newest step', 'asked again, and by name; the newest is restored', trials=2)
  monkeypatch.setattr(checkpoint, 'steps', lambda workdir: [*real(workdir), 15])
  made = Checkpoints(copy)
  assert made.newest(made.read_meta)[0] == 12 and 'checkpoint 15 is bad: it was listed, and is not there' in capsys.readouterr().out
  made.close()
  monkeypatch.undo()
  assert steps(copy) == [3, 6, 9, 12] and not (copy / 'quarantine').exists()
  matrix.record('F10', 'a listing that holds a step that is gone', 'the one before')


def test_a_run_whose_steps_are_gone_does_not_begin_anew(texts, copy, monkeypatch, capsys):
  monkeypatch.setattr(storage, 'FIRST_WAIT', .001)
  shutil.rmtree(copy / 'checkpoints' / '12')
  assert good(copy, 9) and 'step 12, which was saved last, is not there; the newest is 9' in capsys.readouterr().out
  for step in (3, 6, 9):
    shutil.rmtree(copy / 'checkpoints' / str(step))
  with pytest.raises(CheckpointError, match='step 12 was saved there, and no step is left; .*newest to begin anew') as e:
    training.train(run_config(texts, steps=20), copy)
  assert e.value.code == 3
  matrix.record('F10', 'a listing without any step', 'exit code 3, nothing written')


def test_digests_are_those_of_any_mesh(run):
  """What was saved from 4 × 2 devices is, bit for bit, what is there on others."""
  recorded = seal.read(run / 'checkpoints' / '12', 12)['arrays']
  state = state_of(run, 12)
  for sizes in ((1, 1, 1), (2, 2, 2)):
    mesh = common.mesh_of(*sizes)
    with jax.set_mesh(mesh):
      there = jax.device_put(state, jax.NamedSharding(mesh, jax.P()))
      hold(12, there, recorded)
      assert len(digests(there)) == len(recorded)
