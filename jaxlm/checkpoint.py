"""Checkpoints: state, data position, config and tokenizer travel together, written by Orbax while training goes on.

    workdir/checkpoints/STEP/state   params, optimizer state, step: one canonical layout (layers stacked), on any mesh
    workdir/checkpoints/STEP/run     JSON: config, examples consumed, hash of the data, tokenizer, versions
    workdir/quarantine/STEP-…        a step that could not be read, kept for a person to look at

A step becomes visible by one rename at the end of its save, so a kill at any moment leaves only whole steps (and
temporary folders, removed at the next start).
"""
import importlib.metadata
import json
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp

from jaxlm import config as configs, layout
from jaxlm.schema import CheckpointConfig, Config
from jaxlm.errors import CheckpointError, StorageError, UsageError

TEMPORARY = '.orbax-checkpoint-tmp'


def steps(workdir: pathlib.Path) -> list[int]:
  """Visible steps, oldest first. CheckpointError if the folder holds something, and nothing of it is a step."""
  folder = workdir / 'checkpoints'
  names = [p.name for p in folder.iterdir() if not p.name.startswith('.')] if folder.is_dir() else []
  found = sorted(int(n) for n in names if n.isdigit())
  others = [n for n in names if not n.isdigit() and TEMPORARY not in n]
  if others and not found:
    raise CheckpointError(f'{folder}: holds {others[0]} and no checkpoint; restore one there, or use another --workdir')
  return found


def run_meta(config: Config, cache, step: int) -> dict:
  """What travels beside the state."""
  versions = {name: importlib.metadata.version(name) for name in ('jax', 'flax', 'optax', 'orbax-checkpoint')}
  return {'config': json.loads(configs.to_json(config)), 'examples': step * config.batch, 'data_hash': cache.hash,
          'tokenizer': cache.tokenizer.json, 'versions': versions}


def skeleton(workdir: pathlib.Path, meta: dict) -> pathlib.Path:
  """Makes checkpoint 0 in `workdir` with `meta` and no arrays yet → its folder for them (interop/importing.py)."""
  checkpoints = Checkpoints(workdir)
  checkpoints.save(0, {'params': {}}, meta)
  checkpoints.finish()
  checkpoints.close()
  folder = workdir / 'checkpoints' / '0' / 'state'
  shutil.rmtree(folder)
  folder.mkdir()
  return folder


class Checkpoints:
  """The checkpoints of a workdir. Orbax is imported when this is made, not before: it takes its time."""

  def __init__(self, workdir: pathlib.Path, options: CheckpointConfig = CheckpointConfig(), read_only: bool = False):
    import orbax.checkpoint as ocp  # pylint: disable=g-import-not-at-top
    self._ocp = ocp
    self.workdir, self._read_only = workdir, read_only
    self.found = steps(workdir)
    self._manager = ocp.CheckpointManager(
        (workdir / 'checkpoints').absolute(), item_names=('state', 'run'),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else options.keep, keep_period=options.keep_every or None,
            read_only=read_only, create=not read_only, cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=True))

  def save(self, step: int, state, meta: dict) -> None:
    """Starts a save; returns once the state is copied to the host. Raises StorageError for an earlier save's error."""
    ocp = self._ocp
    try:
      self._manager.check_for_errors()
      self._manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), run=ocp.args.JsonSave(meta)))
    except (OSError, ValueError) as e:  # tensorstore reports a full disk as ValueError
      raise StorageError(f'checkpoint: cannot be written ({e})') from e

  def finish(self) -> None:
    """Waits until every save is on disk. StorageError if one failed."""
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except (OSError, ValueError) as e:
      raise StorageError(f'checkpoint: cannot be written ({e})') from e

  def close(self) -> None:
    self._manager.close()

  def read_meta(self, step: int) -> dict:
    return self._manager.restore(step, args=self._ocp.args.Composite(run=self._ocp.args.JsonRestore()))['run']

  def read_state(self, step: int, abstract):
    """The state of `step` on the shardings of `abstract` (see layout.named); entries it does not have are not read. None:
    all of it as it was saved, numpy arrays as such."""
    if abstract is None:
      return self._manager.restore(step, args=self._ocp.args.Composite(state=self._ocp.args.PyTreeRestore()))['state']
    restore = self._ocp.args.PyTreeRestore(
        item=abstract, partial_restore=True, restore_args=self._ocp.checkpoint_utils.construct_restore_args(abstract))
    return self._manager.restore(step, args=self._ocp.args.Composite(state=restore))['state']

  def newest(self, read, say=print):
    """read(step) of the newest step for which it succeeds, or None if there are no steps at all.

    1. Steps are tried from the newest. 2. UsageError (another run's config or data) is the caller's to mend: it stops
    here. 3. A step that cannot be read is named, with the reason; once an older one is good, it moves to quarantine/.
    4. None good: CheckpointError. Nothing is deleted, and training never starts again at step 0.
    """
    bad = []
    for step in reversed(self.found):
      try:
        result = read(step)
      except UsageError:
        raise
      except Exception as e:  # pylint: disable=broad-except  # Orbax raises bare Exception for damaged arrays
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        say(f'checkpoint {step} cannot be read: {reason}')
        bad.append(step)
        continue
      for broken in [] if self._read_only else bad:  # to evaluate changes nothing in a workdir
        self._quarantine(broken, say)
      return step, result
    if bad:
      raise CheckpointError(f'{self.workdir / "checkpoints"}: none of the steps {bad} can be read; nothing was changed. '
                            'Restore one from a copy, or use another --workdir')
    return None

  def _quarantine(self, step: int, say) -> None:
    target = self.workdir / 'quarantine' / f'{step}-{int(time.time())}'
    target.parent.mkdir(exist_ok=True)
    shutil.move(self.workdir / 'checkpoints' / str(step), target)
    self._manager.reload()
    say(f'checkpoint {step} was moved to {target}')


def resume(checkpoints: Checkpoints, config: Config, cache, abstract, mesh, fresh_opt, say=print):
  """(step, state) of the newest good checkpoint of this run, or None to start anew.

  An imported checkpoint has parameters only: the optimizer's state is fresh_opt(params), and the model alone must be the
  same. abstract may be None (see read_state). UsageError naming the first field in which the checkpoint is of another run,
  or if its data is other data.
  """
  def read(step):
    meta = checkpoints.read_meta(step)
    saved = configs.from_json(json.dumps(meta['config']))
    if 'imported' in meta:
      configs.refuse_other_model(saved, config)
      params = checkpoints.read_state(step, {'params': layout.named(abstract['params'], mesh)})['params']
      return {'params': params, 'opt': fresh_opt(params), 'step': jnp.int32(0)}
    configs.refuse_change(saved, config)
    if meta['data_hash'] != cache.hash:
      raise UsageError(f'checkpoint {step} was trained on other tokens than the data cache holds '
                       f'(hash {meta["data_hash"][:12]}, now {cache.hash[:12]}); bring its cache back, or use another '
                       '--workdir')
    return checkpoints.read_state(step, None if abstract is None else layout.named(abstract, mesh))
  return checkpoints.newest(read, say)


def load(workdir: pathlib.Path, abstract_params, step: int | None = None, say=print):
  """(step, config, tokenizer json, params on the current mesh) of a finished or running job.

  abstract_params(config) → abstract params under the mesh (None: see read_state), and the mesh. Raises UsageError if there
  is no checkpoint or not this step; CheckpointError if none is good.
  """
  if not steps(workdir):
    raise UsageError(f'--workdir={workdir}: has no checkpoints; train there first')
  checkpoints = Checkpoints(workdir, read_only=True)
  if step is not None:
    if step not in checkpoints.found:
      raise UsageError(f'--step={step}: the checkpoints of {workdir} are {checkpoints.found}')
    checkpoints.found = [step]

  def read(step):
    meta = checkpoints.read_meta(step)
    config = configs.from_json(json.dumps(meta['config']))
    abstract, mesh = abstract_params(config)
    wanted = None if abstract is None else {'params': layout.named(abstract, mesh)}
    params = checkpoints.read_state(step, wanted)['params']
    return config, meta['tokenizer'], params
  step, (config, tokenizer, params) = checkpoints.newest(read, say)
  checkpoints.close()
  return step, config, tokenizer, jax.block_until_ready(params)
