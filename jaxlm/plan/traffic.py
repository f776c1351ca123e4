"""Bytes that a device receives in a step over each axis of the mesh, and how fast they come, from the config and the wiring alone.

A gather of a whole of S bytes over n devices brings each S · (1 − 1/n), a reduce-scatter as much, an all-reduce twice that. What is
counted is what the compiled programs do (plan/hlo.py reads them).
"""
import itertools
import math

from jaxlm import layout, tensors
from jaxlm.plan.job import ITEM, Job

_INSIDE = 1e12  # bytes/s between the devices of one chip
_SYNCHRONOUS = 'v4'  # the kind whose all-reduces nothing runs beside: it has no SparseCores that could carry them (jaxlm/xla.py)


def received(j: Job) -> dict[str, float]:
  """Axis → bytes a device and step."""
  out = _total(_weights(j), _activations(j))
  for axis, size in sums(j).items():
    out[axis] += size
  return out


def summed(j: Job, axes: tuple[str, ...]) -> bool:
  """Whether the TPU compiler adds wholes up where weights are gathered over these axes of the mesh, and gradients scattered.

  It has no all-gather over all the chips of a slice that is three rings at once (v4, v5p and TPU7x in whole cubes). In its place a device
  writes its piece into a whole of zeros, and an all-reduce adds the wholes of all devices: twice the bytes of a gather, and zeros
  to write. It gathers over any smaller group, and over a whole slice that is a plane or less than a cube, however narrow the pieces
  are; only small arrays are added up there too (of 8 MB over v6e:16x16, not of 33), which is not counted. Seen in programs of libtpu
  0.0.42 and 0.0.52, with pieces of 16 to 512 columns.
  """
  return not j.pod.is_gpu and len(j.pod.shape) == 3 and j.pod.ring(0) and j.cut(axes) * j.pod.slices == j.pod.devices


def sums(j: Job) -> dict[str, float]:
  """Axis → bytes a device and step more than gathers and scatters would bring, where wholes are added up in their place. TPU7x scatters
  gradients all the same."""
  scatters = 0 if j.pod.kind == 'tpu7x' else 1
  return _total((axis, j.config.microbatches * size * (reads + scatters))
                for a, used, reads in _uses(j) if summed(j, a.gathered) for axis, size in _over(j, a.gathered, used))


def beside(j: Job) -> dict[str, float]:
  """Those bytes of `sums` that come beside other work, and are waited for only where they outlast it."""
  return {} if j.pod.kind == _SYNCHRONOUS else sums(j)


def zeros(j: Job) -> float:
  """Bytes of zeros that a device writes in a step, for wholes to be added up."""
  return sum(j.config.microbatches * used * reads for a, used, reads in _uses(j) if summed(j, a.gathered))


def _total(*parts) -> dict[str, float]:
  out = dict.fromkeys(layout.AXES, 0.)
  for axis, size in itertools.chain(*parts):
    out[axis] += size
  return out


def _over(j: Job, axes, whole: float):
  """A gather of `whole` bytes over several axes, the innermost first."""
  for axis in sorted((a for a in axes if j.mesh[a] > 1), key=layout.AXES.index):
    yield axis, whole * (1 - 1 / j.mesh[axis])
    whole /= j.mesh[axis]


def _uses(j: Job):
  """Of each kind of weights: its arrays, float32 bytes of what a device gathers of them, and how many such a microbatch reads: forward and
  backward, in the dtype of compute. XLA's GPU compiler gathers once more to recompute; the TPU's has them then."""
  m = j.config.model
  again = 3 if j.pod.is_gpu and m.remat != 'none' else 2
  for a in j.arrays:
    if a.of == 'params':
      narrow = 1 if m.matmul != 'full' and a.where == 'layers' else ITEM[m.dtype]
      yield a, a.bytes / j.cut(a.kept), {'layers': again, 'unembed': 2}.get(a.where, 1) * narrow / 4


def _weights(j: Job):
  """Weights, gathered; their gradients, scattered in float32, then summed over data."""
  count = j.config.microbatches
  for a, used, reads in _uses(j):
    for axis, size in _over(j, a.gathered, used):
      yield axis, count * size * (reads + 1)
    for axis in set(layout.axes('B') + ('context',)) - set(a.gathered) - set(a.kept):
      yield axis, count * 2 * used / j.cut(a.gathered) * (1 - 1 / j.mesh[axis])


def _activations(j: Job):
  m, mesh = j.config.model, j.mesh
  item, again = ITEM[m.dtype], 0. if m.remat in ('none', 'dots') else 1.
  passes = j.config.microbatches * m.N
  wide = j.tokens * m.D * item  # of the hidden states of whole rows
  if mesh['tensor'] > 1:  # sequence-sharded: two gathers and two scatters a layer forward, as many back
    yield 'tensor', passes * (8 + 3 * again) * wide * (1 - 1 / mesh['tensor'])
  if mesh['context'] > 1:
    keys = j.tokens * (m.G * m.K + m.G * (m.mla.v or m.K)) / j.shards('G')
    runs_again = again and 'attention' not in tensors.kept(m)
    yield 'context', passes * keys * (mesh['context'] - 1) * (item * (2 + runs_again) + 4)
  if mesh['expert'] > 1:
    rows = wide * m.moe.top_k * (1 - 1 / mesh['expert'])
    yield 'expert', j.config.microbatches * j.feeds['moe'] * 2 * rows * (2 + again)
  if mesh['stage'] > 1:
    yield 'stage', j.config.microbatches * 2 * wide * m.pipeline.rounds


def speeds(j: Job) -> dict[str, float]:
  """Axis → bytes/s that a device receives over it, of axes that have more than one device."""
  return (_gpu_speeds if j.pod.is_gpu else _tpu_speeds)(j)


def _gpu_speeds(j: Job) -> dict[str, float]:
  """Inside a host NVLink; an axis that leaves it comes in by the adapters of all its GPUs that a host has, and is shared there."""
  chip, left, out = j.pod.chip, j.pod.shape[1], {}
  for axis in reversed(layout.AXES):
    size = j.mesh[axis]
    here = math.gcd(size, left)
    left //= here
    if size > 1:
      out[axis] = chip.link if here == size else min(chip.link, chip.out * here)
  return out


def _tpu_speeds(j: Job) -> dict[str, float]:
  """Axes get whole dimensions of the torus from the innermost on, or parts of them, where they are lines and no rings. Of the
  devices of one chip each has its part of the links. mesh.data has also to go through the network between slices."""
  pod, chip, out = j.pod, j.pod.chip, {}
  free = {n: size for n, size in enumerate(pod.shape)}
  inside = chip.devices
  for axis in reversed(layout.AXES):
    size = j.mesh[axis] // (pod.slices if axis == 'data' else 1)
    speed = 0.
    if j.mesh[axis] == 1:
      continue
    own = math.gcd(inside, size)
    inside, size = inside // own, size // own
    while size > 1 and (some := _dimensions(free, size)):
      for n in some:
        part = math.gcd(size, free[n])
        ring = part == pod.shape[n] and pod.ring(n) and part > 2
        speed += chip.link / chip.devices * (2 if ring else 1)
        size, free[n] = size // part, free[n] // part
    out[axis] = speed or _INSIDE
    if axis == 'data' and pod.slices > 1:
      out[axis] = 1 / (1 / out[axis] + pod.slices / j.mesh['data'] * chip.devices / chip.out)
  return out


def _dimensions(free: dict[int, int], size: int) -> tuple[int, ...]:
  """Dimensions of the torus for an axis of this size: as many whole ones as make it, or else the greatest that is left."""
  if size == 1:
    return ()
  there = [n for n in free if math.gcd(free[n], size) > 1]
  for count in range(len(there), 0, -1):
    for some in itertools.combinations(there, count):
      if math.prod(free[n] for n in some) == size:
        return some
  return (max(there, key=lambda n: math.gcd(free[n], size)),) if there else ()
