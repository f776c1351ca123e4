"""Whether devices that should hold the same bits do: what a chip that computes wrong (silent data corruption) betrays.

Each device makes the digest of its own piece of every array (digest.py); nothing but the digests crosses the network. Devices whose
pieces are the same part of an array, as all are along mesh.data, must agree; the one that the others outvote is named. All processes
see the whole table and so decide alike. What rests in the host's memory (optimizer.offload) is not compared.
"""
import collections
import functools

import jax
import numpy as np
from jax import P

from jaxlm import digest
from jaxlm.errors import ReplicaError
from jaxlm.optimizer import path_of


def _on_device(tree) -> dict:
  """path → array."""
  found = {path_of(path): a for path, a in jax.tree_util.tree_flatten_with_path(tree)[0]}
  return {path: a for path, a in found.items() if a.sharding.memory_kind != 'pinned_host'}


@functools.cache
def _table(mesh: jax.sharding.Mesh, specs: tuple):
  """The jitted: arrays → digests [devices of the mesh in order, arrays, 2], on every device."""
  def own(*pieces):
    return jax.numpy.stack([digest.of_array(piece) for piece in pieces])[None]

  def table(*arrays):
    each = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=P(mesh.axis_names), check_vma=False)(*arrays)
    return jax.sharding.reshard(each, P())
  return jax.jit(table)


def differing(tree) -> list[tuple[str, list[jax.Device]]]:
  """Of arrays on one Explicit mesh, the current one: (path, devices whose copy differs from most of its copies; all that have one,
  where there is no most), of those for which there are any."""
  arrays = _on_device(tree)
  mesh = next(iter(arrays.values())).sharding.mesh
  specs = tuple(a.sharding.spec for a in arrays.values())
  digests = np.asarray(jax.device_get(_table(mesh, specs)(*arrays.values())))
  row = {device: n for n, device in enumerate(mesh.devices.flat)}
  found = []
  for n, (path, a) in enumerate(arrays.items()):
    copies = collections.defaultdict(list)
    for device, index in a.sharding.devices_indices_map(a.shape).items():
      copies[tuple((s.start, s.stop) for s in index)].append(device)
    wrong = []
    for devices in copies.values():
      said = {device: tuple(digests[row[device], n]) for device in devices}
      (most, count), *others = collections.Counter(said.values()).most_common()
      if others:
        wrong += [device for device in devices if said[device] != most or count <= len(devices) / 2]
    if wrong:
      found.append((path, wrong))
  return found


def check(tree, step: int, saved: int) -> None:
  """ReplicaError naming the devices that differ, if any do."""
  found = differing(tree)
  if found:
    path, devices = found[0]
    named = ' and '.join(f'{device} of process {device.process_index}' for device in devices)
    raise ReplicaError(f'step {step}: {path} on {named} is not what its replicas hold'
                       + (f', nor are {len(found) - 1} more arrays' if len(found) > 1 else '')
                       + f'; nothing was saved since checkpoint {saved}. Take the machine out, and run the same command again')
