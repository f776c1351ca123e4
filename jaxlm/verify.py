"""`jaxlm verify`: is every checkpoint of a workdir, byte for byte and array for array, what was sealed? It needs no config and no model.

A step is good if its files are those of its seal, and if, read back on this machine, each of its arrays has the digest that it had on
the devices it was saved from.
"""
import math
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from jaxlm import seal
from jaxlm.checkpoint import Checkpoints, hold, steps
from jaxlm.errors import CheckpointError, UsageError
from jaxlm.optimizer import path_of

TOGETHER = 2 ** 30  # bytes of arrays that are in memory at once, unless one alone has more


def run(workdir: pathlib.Path, arrays: bool = True, say=print) -> list[dict]:
  """A line and a dict {step, good, reason, files, bytes, arrays, examples} of each step, oldest first. UsageError if there are
  none. arrays: read them back, too."""
  if not steps(workdir):
    raise UsageError(f'--workdir={workdir}: has no checkpoints')
  workdir = workdir.absolute()  # Orbax's metadata want it so
  checkpoints, out = Checkpoints(workdir, read_only=True, say=say), []
  for step in checkpoints.found:
    found = {'step': step, 'good': True, 'reason': ''}
    try:
      record = checkpoints.sealed(step)
      if arrays:
        _read_back(workdir / 'checkpoints' / str(step) / 'state', step, record['arrays'])
      found |= {'files': len(record['files']), 'bytes': sum(size for size, _ in record['files'].values()),
                'arrays': len(record['arrays']), 'examples': record['examples']}
    except seal.Damaged as e:
      found |= {'good': False, 'reason': str(e)}
    say(found['reason'] or f'checkpoint {step} is good: {found["files"]} files, {found["bytes"] / 2 ** 20:,.1f} MiB, {found["arrays"]} arrays'
        + ('' if arrays else ' (not read back)') + f', {found["examples"]:,} examples')
    out.append(found)
  checkpoints.close()
  return out


def refuse_bad(found: list[dict]) -> None:
  """CheckpointError if a step is bad."""
  bad = [f['step'] for f in found if not f['good']]
  if bad:
    raise CheckpointError(f'{len(bad)} of {len(found)} checkpoints are bad: {", ".join(map(str, bad))}; restore them from a copy, or '
                          'train on: a run goes on from the newest good one')


def _read_back(folder: pathlib.Path, step: int, recorded: dict) -> None:
  """Damaged if an array is not what the seal says of it."""
  import orbax.checkpoint as ocp  # pylint: disable=g-import-not-at-top
  here = SingleDeviceSharding(jax.devices()[0])
  with ocp.PyTreeCheckpointer() as reader:
    found, tree = jax.tree_util.tree_flatten_with_path(reader.metadata(folder).item_metadata.tree)
    paths = [path_of(path) for path, _ in found]
    missing = set(recorded) - set(paths)
    if missing:
      raise seal.Damaged(f'checkpoint {step} is bad: the array {min(missing)} is missing')
    for names in _groups(recorded):
      item = tree.unflatten([jax.ShapeDtypeStruct(tuple(recorded[path][0]), recorded[path][1], sharding=here) if path in names
                             else ocp.PLACEHOLDER for path in paths])
      args = ocp.args.PyTreeRestore(item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))
      hold(step, reader.restore(folder, args=args), recorded)


def _groups(recorded: dict):
  """Sets of paths that are read together."""
  group, size = set(), 0
  for path, (shape, dtype, _) in recorded.items():
    more = math.prod(shape) * jnp.dtype(dtype).itemsize
    if group and size + more > TOGETHER:
      yield group
      group, size = set(), 0
    group.add(path)
    size += more
  if group:
    yield group
