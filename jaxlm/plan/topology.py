"""What `--topology` names: a pod's chips and how they are wired, checked against the pods that there are. No jax here."""
import dataclasses
import difflib
import math
import re

from jaxlm.errors import UsageError
from jaxlm.plan import cloud, shapes
from jaxlm.plan.chips import CHIPS, Chip


@dataclasses.dataclass(frozen=True)
class Topology:
  """shape: chips of a slice along each dimension of its torus; of GPUs (hosts, GPUs of a host)."""
  name: str
  kind: str          # a key of CHIPS
  shape: tuple[int, ...]
  slices: int
  chip: Chip         # with the network between hosts that a named GPU machine has
  understood: str = ''  # of a cloud's name, what it was taken for; '' of ours

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
    return self.shape[dimension] == 16 if self.kind in shapes.PLANES else all(n % 4 == 0 for n in self.shape)


def parse(name: str, slices: int = 1) -> Topology:
  """'v5p:4x4x8' or 'h100:16x8' (hosts × GPUs), or a cloud's name for one (cloud.py). UsageError, with those near it, for a pod that
  does not exist."""
  known = cloud.named(name)
  kind, _, shape = (known.topology if known else name).partition(':')
  if kind not in CHIPS:
    near = [*difflib.get_close_matches(kind, CHIPS, 3, 0.3), *cloud.like(name)] or list(CHIPS)
    raise UsageError(f'--topology={name}: no chip and no cloud\'s machine is named {kind!r}; did you mean {", ".join(near)}? Say it as '
                     'v5p:4x4x8, as h100:16x8 (hosts × GPUs), or as clouds do: v5p-256, ct5p-hightpu-4t:32, a3-highgpu-8g:16')
  sizes = tuple(int(n) for n in shape.split('x')) if re.fullmatch(r'\d+(x\d+)*', shape) else ()
  if not shapes.exists(kind, sizes):
    near = shapes.near(kind, math.prod(sizes) if sizes else 64)
    raise UsageError(f'--topology={name}: there is no such {kind} {"slice" if CHIPS[kind].links else "cluster"}; near it are '
                     f'{", ".join(f"{kind}:{shapes.written(s)}" for s in near)}')
  if slices < 1 or (slices > 1 and not CHIPS[kind].links):
    raise UsageError(f'--slices={slices}: ' + (
        'wants a count' if slices < 1 else f'{kind} has none; give more hosts, as {kind}:{sizes[0] * slices}x{sizes[1]}'))
  chip = CHIPS[kind]
  if known and known.network:
    chip = dataclasses.replace(chip, out=known.network * 1e9 / 8 / sizes[1])
  ours = f'{kind}:{shape}'
  words = ', '.join(filter(None, (known.words, ours))) if known else ''
  return Topology(ours, kind, sizes, slices, chip, f'{name} = {words}' if known else '')
