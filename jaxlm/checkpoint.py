"""Checkpoints that cannot lie: state, data position, config and tokenizer travel together, sealed, written while training goes on.

    workdir/checkpoints/STEP/state      params, optimizer state, step: one canonical layout (layers stacked), on any mesh; by Orbax
    workdir/checkpoints/STEP/run.json   config, examples consumed, hash of the data, tokenizer, versions
    workdir/checkpoints/STEP/seal.json  checksums of all files, digests of all arrays (seal.py)
    workdir/checkpoints/.newest         the step that became visible last: a listing that lacks it is stale; a folder without it, another
    workdir/quarantine/STEP-…           a step whose bytes are not those that were sealed, kept for a person to look at

A save, in order: 1. the digests of all arrays are computed on the devices, from the very buffers that are saved. 2. The state is
copied to the hosts, and training goes on. 3. Files are written to a temporary folder. 4. The lead seals it: bytes are brought to
disk, read back and checked off. 5. It becomes visible by one rename. 6. At the next step the rename is brought to disk, and only
then an older step is deleted. So a kill at any moment leaves only whole steps, and folders that the next start removes.
"""
import contextlib
import hashlib
import importlib.metadata
import json
import pathlib
import shutil
import time

import jax

from jaxlm import config as configs, digest, hosts, seal
from jaxlm.errors import CheckpointError, StorageError, UsageError
from jaxlm.optimizer import path_of
from jaxlm.schema import CheckpointConfig, Config
from jaxlm.storage import is_full, patiently, sync

TEMPORARY = '.orbax-checkpoint-tmp'
DELETED = '.deleted-'
NEWEST = '.newest'


def steps(workdir: pathlib.Path) -> list[int]:
  """Visible steps, oldest first. CheckpointError if the folder holds something, and nothing of it is a step."""
  folder = workdir / 'checkpoints'
  names = [p.name for p in folder.iterdir() if not p.name.startswith('.')] if folder.is_dir() else []
  is_step = lambda name: name.isdecimal() and str(int(name)) == name
  found = sorted(int(n) for n in names if is_step(n))
  others = [n for n in names if not is_step(n) and TEMPORARY not in n]
  if others and not found:
    raise CheckpointError(f'{folder}: holds {others[0]} and no checkpoint; restore one there, or use another --workdir')
  return found


def run_meta(config: Config, cache, examples: int) -> dict:
  """What travels beside the state. examples: of the run's data, consumed."""
  versions = {name: importlib.metadata.version(name) for name in ('jax', 'flax', 'optax', 'orbax-checkpoint')}
  return {'config': json.loads(configs.to_json(config)), 'examples': examples, 'data_hash': cache.hash,
          'tokenizer': cache.tokenizer.json, 'versions': versions}


def write_sealed(folder: pathlib.Path, step: int, meta: dict, arrays: dict) -> None:
  """What makes a folder with a state a step: run.json, and the seal. arrays: as `digests` has them, on the host."""
  (folder / 'run.json').write_text(json.dumps(meta), encoding='utf-8')
  sha = lambda value: hashlib.sha256(value.encode()).hexdigest()
  seal.write(folder, {
      'step': step, 'arrays': arrays, 'examples': meta['examples'], 'versions': meta.get('versions', {}),
      'hashes': {'config': sha(json.dumps(meta['config'], sort_keys=True)), 'tokenizer': sha(meta['tokenizer']),
                 'data': meta.get('data_hash', '')}})


@jax.jit
def _digest(a):
  on_host = jax.typeof(a).memory_space == jax.memory.Space.Host
  return digest.of_array(jax.device_put(a, jax.memory.Space.Device) if on_host else a)


def digests(tree) -> dict[str, tuple]:
  """path → (shape, dtype, digest on the device) of all arrays of a tree that are on devices."""
  out = {}
  for path, a in jax.tree_util.tree_leaves_with_path(tree):
    if isinstance(a, jax.Array):
      out[path_of(path)] = list(a.shape), str(a.dtype), _digest(a)
      if jax.default_backend() == 'cpu':  # which begins programs in no order: over processes, two would wait for each other
        jax.block_until_ready(out[path_of(path)][2])
  return out


def _on_host(found: dict[str, tuple]) -> dict[str, list]:
  """digests, as the seal has them: the digest in hexadecimal."""
  found = jax.device_get(found)
  return {path: [shape, dtype, ''.join(f'{word:08x}' for word in of.tolist())] for path, (shape, dtype, of) in found.items()}


def hold(step: int, tree, recorded: dict) -> None:
  """Damaged if an array of a tree that was read is not, bit for bit, what its seal says."""
  found = _on_host(digests(tree))
  wrong = [path for path, entry in found.items() if path in recorded and entry != recorded[path]]
  if wrong:
    raise _bad(step, f'the array {wrong[0]} is not what was saved: its digest is another')


class Checkpoints:
  """The checkpoints of a workdir. Orbax is imported when this is made, not before: it takes its time."""

  def __init__(self, workdir: pathlib.Path, options: CheckpointConfig = CheckpointConfig(), read_only: bool = False, say=print,
               until: int | None = None):
    """until: the newest step up to here is kept whatever options say."""
    import orbax.checkpoint as ocp  # pylint: disable=g-import-not-at-top
    self._ocp, self._options, self._read_only, self._say, self._until = ocp, options, read_only, say, until
    self.workdir, self._folder = workdir, (workdir / 'checkpoints').absolute()
    self._newest = self._folder / NEWEST
    self._good: dict[int, dict] = {}  # step → its seal, where all files are as it says
    self._restored = None    # the step whose arrays came back as they were
    self._saving = None      # (step, meta, digests), of a save that is under way
    self._reader = ocp.PyTreeCheckpointer()
    self._writer = None
    if not read_only:
      self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=ocp.options.AsyncOptions(
          post_finalization_callback=self._finish_files, timeout_secs=options.timeout),
          checkpoint_metadata_store=ocp.metadata.metadata_store(enable_write=False),  # which it would write after the seal
          temporary_path_class=_renamed(ocp))
      hosts.lead_first('checkpoints', self._tidy)
    listed = hosts.lead_first('steps', lambda: self._list() if hosts.lead() else [])
    self.found = json.loads(hosts.everyone('steps', json.dumps(listed))[0])

  def _tidy(self) -> None:
    """Removes what a kill left of a save or of a deletion."""
    if hosts.lead():
      self._folder.mkdir(parents=True, exist_ok=True)
      for path in self._folder.iterdir():
        if TEMPORARY in path.name or path.name.startswith(DELETED):
          shutil.rmtree(path)
      if not self._newest.exists():
        self._newest.touch()

  def _list(self) -> list[int]:
    """`steps`, from storage whose listings may be stale. CheckpointError if steps were saved there, and none is left."""
    look = lambda: (steps(self.workdir), self._newest.read_text(encoding='ascii') if self._newest.exists() else '')
    found, text = patiently(str(self._folder), look, self._say)
    last = int(text) if text.isdecimal() else None  # a write that was torn says nothing
    if last is None or last <= max(found, default=-1):
      return found

    def again():
      found = steps(self.workdir)
      if last not in found and not (self._folder / str(last)).exists():
        raise FileNotFoundError(f'step {last}, which was saved last, is not listed')
      return sorted({*found, last})
    try:
      return patiently(str(self._folder), again, self._say)
    except StorageError as e:
      if not found:
        raise CheckpointError(f'{self._folder}: step {last} was saved there, and no step is left; restore one from a copy, or remove '
                              f'{self._newest} to begin anew') from e
      self._say(f'{self._folder}: step {last}, which was saved last, is not there; the newest is {found[-1]}')
      return found

  def save(self, step: int, state, meta: dict) -> bool:
    """Starts a save; returns once the state is copied to the host. False if there is no room, and checkpoint.when_full=skip.
    StorageError for what an earlier save met, or if there is no room."""
    self.finish()
    if not self._has_room(step, state):
      return False
    self._saving = step, meta, digests(state)
    try:
      self._writer.save(self._folder / str(step), args=self._ocp.args.Composite(state=self._ocp.args.PyTreeSave(state)))
    except (OSError, ValueError) as e:  # tensorstore reports a full disk as ValueError
      self._failed(e)
      return False
    return True

  def _has_room(self, step: int, state) -> bool:
    """Whether all of a state fits on the disk, before a byte of it is written."""
    needed = int(1.05 * sum(a.nbytes for a in jax.tree.leaves(state))) + 2 ** 21  # with what Orbax says of them
    free = patiently(str(self._folder), self._free, self._say)
    if needed <= free:
      return True
    text = f'checkpoint {step}: wants {needed / 2 ** 30:.2f} GiB, and {self._folder} has room for {free / 2 ** 30:.2f}'
    if self._options.when_full == 'stop':
      raise StorageError(f'{text}; free some, or set checkpoint.keep lower, or checkpoint.when_full=skip to train on unsaved')
    self._say(f'{text}; not saved')
    return False

  def _free(self) -> int:
    """Bytes. OSError if the folder is not that in which the run began, but one that Orbax made in its place."""
    if not self._newest.exists():
      raise FileNotFoundError(f'{self._newest} is gone: was the workdir moved, or its storage unmounted?')
    return shutil.disk_usage(self._folder).free

  def _finish_files(self) -> None:
    """In Orbax's thread, by the lead, when all of the state is written, before the step becomes visible."""
    step, meta, found = self._saving
    write_sealed(self._temporary(step), step, meta, _on_host(found))

  def _temporary(self, step: int) -> pathlib.Path:
    """Where a step is until it is whole."""
    return pathlib.Path(self._writer.get_temporary_path(self._folder / str(step)).get())

  def check(self) -> None:
    """To be asked at each step. StorageError for what a save in the background met."""
    try:
      self._writer.check_for_errors()
    except (OSError, ValueError, seal.Damaged) as e:
      self._failed(e)
    if self._saving and (self._folder / str(self._saving[0])).exists():
      self._settle()

  def finish(self) -> None:
    """Waits until every save is on disk, and visible. StorageError if one failed."""
    try:
      self._writer.wait_until_finished()
    except (OSError, ValueError, seal.Damaged) as e:
      self._failed(e)
    if self._saving:
      self._settle()

  def _failed(self, e: Exception) -> None:
    """A save did not succeed: StorageError, or with checkpoint.when_full=skip, if the disk is full, a line."""
    step, self._saving = self._saving[0], None
    if hosts.lead():
      for _ in range(20):  # other arrays of it may still be on their way to the disk
        shutil.rmtree(self._temporary(step), ignore_errors=True)
        time.sleep(.05)
        if not self._temporary(step).exists():
          break
    why = 'the disk is full' if is_full(e) else _line(e)
    text = f'checkpoint {step}: cannot be written ({why}); the newest whole one in {self._folder} is {max(self.found, default="none")}'
    if self._options.when_full == 'skip' and is_full(e):
      self._say(f'{text}; not saved')
      return
    raise StorageError(text) from e

  def _settle(self) -> None:
    """The step that was being saved is visible: its name is brought to disk, and then older steps are deleted."""
    step, self._saving = self._saving[0], None
    patiently(str(self._folder), self._free, self._say)
    self.found = sorted({*self.found, step})
    self._good.pop(step, None)
    c = self._options
    kept = {*self.found[-c.keep:], self._restored, *(s for s in self.found if c.keep_every and s % c.keep_every == 0)}
    kept |= {max((s for s in self.found if self._until is not None and s <= self._until), default=None)}
    old, self.found = [s for s in self.found if s not in kept], [s for s in self.found if s in kept]
    if hosts.lead():
      sync(self._folder)
      self._note_newest()
      for s in old:
        gone = self._folder / f'{DELETED}{s}'
        (self._folder / str(s)).rename(gone)
        shutil.rmtree(gone)

  def _note_newest(self) -> None:
    with contextlib.suppress(OSError):  # of a full disk the checkpoints themselves have to say
      self._newest.write_text(str(self.found[-1]), encoding='ascii')

  def close(self) -> None:
    """To be called when all saves are waited for (`finish`), or when there is an error already."""
    self._reader.close()
    if self._writer:
      try:
        self._writer.close()
      except (OSError, ValueError, seal.Damaged) as e:
        self._say(f'checkpoint: cannot be written ({_line(e)})')

  def sealed(self, step: int) -> dict:
    """The seal of a step, all of whose files are as it says. Damaged; StorageError. Each of several processes reads its share."""
    if step not in self._good:
      folder, reason, record = self._folder / str(step), '', {}

      def look():
        if not folder.exists():
          raise seal.Damaged('it was listed, and is not there')
        record = seal.read(folder, step)
        seal.check(folder, record, hosts.process(), hosts.count())
        return record
      try:
        record = patiently(f'checkpoint {step}', look, self._say)
      except seal.Damaged as e:
        reason = str(e)
      reasons = hosts.everyone(f'checkpoint {step}', reason)
      if any(reasons):
        raise _bad(step, next(filter(None, reasons)))
      self._good[step] = record
    return self._good[step]

  def read_meta(self, step: int) -> dict:
    """run.json of a step. Damaged; StorageError."""
    self.sealed(step)
    try:
      return patiently(f'checkpoint {step}', lambda: seal.read_json(self._folder / str(step), 'run.json'), self._say)
    except seal.Damaged as e:
      raise _bad(step, str(e)) from e

  def read_state(self, step: int, abstract):
    """The state of `step` on the shardings of `abstract` (see layout.named); entries it does not have are not read. None:
    all of it as it was saved, numpy arrays as such. Damaged if an array is not, bit for bit, what was saved; UsageError if one
    has another shape or dtype here; StorageError."""
    recorded = self.sealed(step)['arrays']
    for path, a in jax.tree_util.tree_leaves_with_path(abstract):
      shape, dtype, _ = recorded.get(path_of(path), (list(a.shape), str(a.dtype), ''))
      if [shape, dtype] != [list(a.shape), str(a.dtype)]:
        raise UsageError(f'checkpoint {step}: {path_of(path)} is {dtype} {shape}, and here {a.dtype} {list(a.shape)}; set the config so '
                         'that they are the same, or use another --workdir')
    how = {} if abstract is None else {
        'item': abstract, 'partial_restore': True, 'restore_args': self._ocp.checkpoint_utils.construct_restore_args(abstract)}
    try:
      state = self._reader.restore(self._folder / str(step) / 'state', args=self._ocp.args.PyTreeRestore(**how))
    except Exception as e:  # pylint: disable=broad-except  # Orbax raises bare Exception; the files are good
      raise StorageError(f'checkpoint {step}: its files are as they were sealed, but cannot be read ({_line(e)})') from e
    hold(step, state, recorded)
    self._restored = step
    return state

  def newest(self, read):
    """(step, read(step)) of the newest good step, or None if there are no steps at all.

    1. Steps are tried from the newest. 2. What is not damage ends it: another run's config or data (UsageError) is the caller's to
    mend, storage that does not answer (StorageError) proves nothing. 3. A damaged step is named, with the reason; once an older one
    is good, it moves to quarantine/. 4. None good: CheckpointError. Nothing is deleted, and training never starts again at step 0.
    """
    bad = []
    for step in reversed(self.found):
      try:
        result = read(step)
      except seal.Damaged as e:
        self._say(str(e))
        bad.append(step)
        continue
      if bad and not self._read_only:  # to evaluate changes nothing in a workdir
        self._quarantine(bad)
      return step, result
    if bad:
      raise CheckpointError(f'{self._folder}: none of the steps {bad} is good; nothing was changed. Restore one from a copy, or use '
                            'another --workdir')
    return None

  def _quarantine(self, bad: list[int]) -> None:
    self.found = [step for step in self.found if step not in bad]
    if not hosts.lead():
      return
    for step in filter(lambda step: (self._folder / str(step)).exists(), bad):
      target = self.workdir / 'quarantine' / f'{step}-{int(time.time())}'
      target.parent.mkdir(exist_ok=True)
      while target.exists():
        target = target.with_name(f'{target.name}-again')
      shutil.move(self._folder / str(step), target)
      self._say(f'checkpoint {step} was moved to {target}')
    self._note_newest()


def _renamed(ocp):
  """How a step becomes visible: by a rename, and no more. Orbax's own class writes a file first, after the seal, which nothing reads."""
  class Renamed(ocp.path.atomicity.AtomicRenameTemporaryPath):
    async def finalize(self):
      self.get().rename(self.get_final())
  return Renamed


def _bad(step: int, reason: str) -> seal.Damaged:
  return seal.Damaged(f'checkpoint {step} is bad: {reason}')


def _line(e: BaseException) -> str:
  return (str(e).strip() or type(e).__name__).splitlines()[0][:200]
