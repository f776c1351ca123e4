"""The shapes that slices and GPU clusters can have, each as its sizes: (4, 4, 8). No jax here.

Sources: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x ("Configurations").
"""
import functools
import itertools
import math

_PLANE = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
PLANES = {'v5e': _PLANE, 'v6e': _PLANE}  # all the shapes that there are
SMALL = ((1, 2, 2), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # less than one cube of 4 × 4 × 4
CUBES = {'v4': 4096, 'v5p': 8960, 'tpu7x': 9216}  # slices of whole cubes: chips that the largest may have
LONGEST = 28  # chips in a row
GPUS_OF_HOST = (1, 2, 4, 8)


@functools.cache
def known(kind: str) -> tuple[tuple[int, ...], ...]:
  """All shapes of a TPU slice, each in ascending order; () for GPUs, of which there can be any number of hosts."""
  if kind in PLANES:
    return PLANES[kind]
  if kind not in CUBES:
    return ()
  whole = itertools.combinations_with_replacement(range(4, LONGEST + 1, 4), 3)
  return SMALL + tuple(shape for shape in whole if math.prod(shape) <= CUBES[kind])


def exists(kind: str, sizes: tuple[int, ...]) -> bool:
  """Whether there is a slice of this shape, in any order of its sizes, or a cluster of (hosts, GPUs of a host)."""
  if kind in PLANES or kind in CUBES:
    return tuple(sorted(sizes)) in known(kind)
  return len(sizes) == 2 and sizes[0] > 0 and sizes[1] in GPUS_OF_HOST


def of_chips(kind: str, chips: int) -> list[tuple[int, ...]]:
  """The shapes of a slice of so many chips, the cloud's default first: the one most like a cube
  (cloud.google.com/tpu/docs/types-topologies)."""
  return sorted((shape for shape in known(kind) if math.prod(shape) == chips), key=sum)


def near(kind: str, chips: int) -> list[tuple[int, ...]]:
  """Five shapes of about as many chips, the nearest first."""
  there = known(kind) or tuple((hosts, 8) for hosts in range(1, max(8, chips // 4)))
  return sorted(there, key=lambda s: (abs(math.log(math.prod(s) / max(chips, 1))), max(s) / min(s)))[:5]


def written(shape: tuple[int, ...]) -> str:
  """(4, 4, 8) → '4x4x8'; of a single board '2x2x1', as its maker writes it."""
  return '2x2x1' if tuple(sorted(shape)) == (1, 2, 2) else 'x'.join(map(str, shape))
