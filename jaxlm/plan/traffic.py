"""Bytes that a device receives in a step over each axis of the mesh, and how fast they come, from the config and the wiring alone.

A gather of a whole of S bytes over n devices brings each S · (1 − 1/n), a reduce-scatter as much, an all-reduce twice that. What is
counted is what the compiled programs do (plan/hlo.py reads them).
"""
import itertools
import math

from jaxlm import layout, tensors
from jaxlm.plan.job import ITEM, Job

LANES = 128
_INSIDE = 1e12  # bytes/s between the devices of one chip


def received(j: Job) -> dict[str, float]:
  """Axis → bytes a device and step."""
  out = dict.fromkeys(layout.AXES, 0.)
  for axis, size in itertools.chain(_weights(j), _activations(j)):
    out[axis] += size
  return out


def _over(j: Job, axes, whole: float):
  """A gather of `whole` bytes over several axes, the innermost first."""
  for axis in sorted((a for a in axes if j.mesh[a] > 1), key=layout.AXES.index):
    yield axis, whole * (1 - 1 / j.mesh[axis])
    whole /= j.mesh[axis]


def _weights(j: Job):
  """Weights, gathered in the dtype of compute forward and backward; their gradients, scattered in float32, then summed over data."""
  m, count = j.config.model, j.config.microbatches
  again = 3 if j.pod.is_gpu and m.remat != 'none' else 2  # XLA's GPU compiler gathers once more to recompute; the TPU's has it then
  for a in j.arrays:
    if a.of != 'params':
      continue
    used = a.bytes / j.cut(a.kept)  # of the gathered ones, float32
    narrow = 1 if m.matmul != 'full' and a.where == 'layers' else ITEM[m.dtype]
    times = {'layers': again, 'unembed': 2}.get(a.where, 1)
    # Pieces of less than a row of lanes the TPU's compiler does not gather: it adds up wholes that are 0 elsewhere.
    times *= 2 if not j.pod.is_gpu and m.D // j.cut(a.gathered) < LANES else 1
    for axis, size in _over(j, a.gathered, used):
      yield axis, count * size * (times * narrow / 4 + 1)
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
