"""What `--topology` names: a pod's chips and how they are wired, checked against the pods that there are. No jax here."""
import dataclasses
import difflib
import itertools
import math
import re

from jaxlm.errors import UsageError
from jaxlm.plan.chips import CHIPS, Chip

_PLANE = ('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
# Shapes a slice can have: of a plane all there are; of cubes of 4×4×4 the small ones, and how many chips the largest has.
PLANES = {'v5e': _PLANE, 'v6e': _PLANE}
SMALL = ('2x2x1', '2x2x2', '2x2x4', '2x4x4')
CUBES = {'v4': 4096, 'v5p': 8960, 'tpu7x': 9216}
GPUS_OF_HOST = (1, 2, 4, 8)
_LONGEST = 28  # cubes of chips in a row, × 4


@dataclasses.dataclass(frozen=True)
class Topology:
  """shape: chips of a slice along each dimension of its torus; of GPUs (hosts, GPUs of a host)."""
  name: str
  kind: str          # a key of CHIPS
  shape: tuple[int, ...]
  slices: int
  chip: Chip

  @property
  def is_gpu(self) -> bool:
    return not self.chip.links

  @property
  def chips(self) -> int:
    return math.prod(self.shape) * self.slices

  @property
  def devices(self) -> int:
    """What JAX counts, and meshes are made of."""
    return self.chips * self.chip.devices

  def ring(self, dimension: int) -> bool:
    """Whether chips along a dimension of the torus close to a ring: planes only where they are 16 long, blocks of whole cubes."""
    return self.shape[dimension] == 16 if self.kind in PLANES else all(n % 4 == 0 for n in self.shape)


def parse(name: str, slices: int = 1) -> Topology:
  """'v5p:4x4x8' or 'h100:16x8' (hosts × GPUs). UsageError, with those near it, for one that does not exist."""
  kind, _, shape = name.partition(':')
  if kind not in CHIPS:
    near = difflib.get_close_matches(kind, CHIPS, 3, 0.3) or list(CHIPS)
    raise UsageError(f'--topology={name}: no chip is named {kind!r}; did you mean {", ".join(near)}? Say it as v5p:4x4x8, or as '
                     'h100:16x8 (hosts × GPUs)')
  sizes = tuple(int(n) for n in shape.split('x')) if re.fullmatch(r'\d+(x\d+)*', shape) else ()
  if kind in PLANES:
    good = 'x'.join(map(str, sorted(sizes))) in PLANES[kind]
  elif kind in CUBES:
    good = len(sizes) == 3 and _cubes(kind, sizes)
  else:
    good = len(sizes) == 2 and sizes[0] > 0 and sizes[1] in GPUS_OF_HOST
  if not good:
    raise UsageError(f'--topology={name}: there is no such {kind} {"cluster" if not CHIPS[kind].links else "slice"}; near it are '
                     f'{", ".join(f"{kind}:{s}" for s in _near(kind, sizes))}')
  if slices < 1 or (slices > 1 and not CHIPS[kind].links):
    raise UsageError(f'--slices={slices}: ' + (
        'wants a count' if slices < 1 else f'{kind} has none; give more hosts, as {kind}:{sizes[0] * slices}x{sizes[1]}'))
  return Topology(name, kind, sizes, slices, CHIPS[kind])


def _cubes(kind: str, sizes) -> bool:
  text = 'x'.join(map(str, sorted(sizes)))
  return text in {'x'.join(sorted(s.split('x'))) for s in SMALL} or (
      all(n % 4 == 0 and 0 < n <= _LONGEST for n in sizes) and math.prod(sizes) <= CUBES[kind])


def _near(kind: str, sizes) -> list[str]:
  """Five shapes whose number of chips is nearest; with as many dimensions as there are, all there is to go by."""
  want = math.prod(sizes) if sizes else 64
  if kind in PLANES:
    there = PLANES[kind]
  elif kind in CUBES:
    rows = itertools.combinations_with_replacement(range(4, _LONGEST + 1, 4), 3)
    there = SMALL + tuple('x'.join(map(str, row)) for row in rows if math.prod(row) <= CUBES[kind])
  else:
    there = tuple(f'{hosts}x8' for hosts in range(1, max(8, want // 4)))
  spread = lambda s: max(map(int, s.split('x'))) / min(map(int, s.split('x')))
  return sorted(there, key=lambda s: (abs(math.log(math.prod(map(int, s.split('x'))) / max(want, 1))), spread(s)))[:5]
