"""Clouds' names of slices and machines, as this codebase names pods: 'v5p-256' is v5p:4x4x8, 'a3-highgpu-8g:16' is h100:16x8. No jax.

Three kinds of name are known: a TPU accelerator type with a count (v5p-256, v5litepod-64) or a shape (tpu7x-4x4x8), as gcloud and
xpk write it; GKE's label with a topology (tpu-v5p-slice:4x4x8); and a machine type, one or several of it (ct5p-hightpu-4t:32).
"""
import dataclasses
import difflib
import math
import re

from jaxlm.errors import UsageError
from jaxlm.plan import shapes


@dataclasses.dataclass(frozen=True)
class Named:
  """What a cloud's name stands for."""
  topology: str     # our name
  words: str = ''   # how its count was understood: '32 hosts of 4 chips = 128 chips'
  network: int = 0  # of GPUs, Gb/s between hosts that the cloud gives each of them; 0: what chips.py says


@dataclasses.dataclass(frozen=True)
class Machine:
  kind: str            # a key of chips.CHIPS
  each: int            # chips or GPUs of one
  network: int = 0     # of GPU machines, Gb/s of all the adapters through which its GPUs reach other hosts
  alone: bool = False  # no slice has two of it


# Prefix of an accelerator type → (our chip, what its count has for each chip). docs.cloud.google.com/tpu/docs/v5p and …/v4: v5p-256 has
# 256 TensorCores, 128 chips, 4x4x8; v5e and v6e have one TensorCore a chip. TPU7x's page names shapes alone; that tpu7x-128 is 4x4x4 is
# github.com/AI-Hypercomputer: xpk's src/xpk/core/system_characteristics.py and maxtext's accelerator_to_spec_map.py.
ACCELERATORS = {'v4': ('v4', 2), 'v5p': ('v5p', 2), 'v5litepod': ('v5e', 1), 'v5e': ('v5e', 1), 'v6e': ('v6e', 1), 'tpu7x': ('tpu7x', 2)}
# cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus: labels cloud.google.com/gke-tpu-accelerator
LABELS = {'tpu-v4-podslice': 'v4', 'tpu-v5-lite-podslice': 'v5e', 'tpu-v5p-slice': 'v5p', 'tpu-v6e-slice': 'v6e'}
MACHINES = {
    # The same page: chips of a machine. A machine of 8 chips is a whole slice; larger slices are made of machines of 4.
    'ct4p-hightpu-4t': Machine('v4', 4), 'ct5p-hightpu-4t': Machine('v5p', 4), 'tpu7x-standard-4t': Machine('tpu7x', 4),
    'ct5lp-hightpu-4t': Machine('v5e', 4), 'ct5lp-hightpu-8t': Machine('v5e', 8, alone=True),
    'ct6e-standard-4t': Machine('v6e', 4), 'ct6e-standard-8t': Machine('v6e', 8, alone=True),
    # cloud.google.com/compute/docs/gpus and …/gpus/gpu-network-bandwidth: adapters for GPUs alone, where there are such (A3 High 4 of
    # 200 Gb/s, A3 Mega 8 of 200, A3 Ultra and A4 8 of 400), or else all (A2).
    'a2-highgpu-8g': Machine('a100-40gb', 8, 100), 'a2-ultragpu-8g': Machine('a100', 8, 100), 'a3-highgpu-8g': Machine('h100', 8, 800),
    'a3-megagpu-8g': Machine('h100', 8, 1600), 'a3-ultragpu-8g': Machine('h200', 8, 3200), 'a4-highgpu-8g': Machine('b200', 8, 3200),
    # docs.aws.amazon.com/ec2/latest/instancetypes/ac.html. The A100 of P4d have 40 GB, those of P4de 80.
    'p4d.24xlarge': Machine('a100-40gb', 8, 400), 'p4de.24xlarge': Machine('a100', 8, 400), 'p5.48xlarge': Machine('h100', 8, 3200),
    'p5e.48xlarge': Machine('h200', 8, 3200), 'p5en.48xlarge': Machine('h200', 8, 3200), 'p6-b200.48xlarge': Machine('b200', 8, 3200),
    # learn.microsoft.com/azure/virtual-machines: nda100-v4-series, ndm-a100-v4-series and sizes/gpu-accelerated/ndh100v5-series,
    # nd-h200-v5-series: an InfiniBand adapter a GPU, of 200 or 400 Gb/s.
    'standard_nd96asr_v4': Machine('a100-40gb', 8, 1600), 'standard_nd96amsr_a100_v4': Machine('a100', 8, 1600),
    'standard_nd96isr_h100_v5': Machine('h100', 8, 3200), 'standard_nd96isr_h200_v5': Machine('h200', 8, 3200),
}
_COUNTED = re.compile(rf'({"|".join(ACCELERATORS)})-(\d+)')
_SHAPED = re.compile(rf'({"|".join((*ACCELERATORS, *LABELS))})[-:](\d+(?:x\d+)+)')
_SEVERAL = re.compile(r'([a-z][\w.-]*)(?:(?:\s*[:×]\s*|\s+x\s*)(\d+))?')


def named(name: str, said: str = '') -> Named | None:
  """What a cloud's name stands for; None if it is no cloud's. UsageError if it is one and nothing has so many chips. said: how the
  user gave it, which the error begins with; '' is --topology."""
  said = said or f'--topology={name}'
  text = name.strip().lower()
  if found := _COUNTED.fullmatch(text):
    return _accelerator(said, found[1], int(found[2]))
  if found := _SHAPED.fullmatch(text):
    topology = f'{LABELS.get(found[1]) or ACCELERATORS[found[1]][0]}:{found[2]}'
    return None if topology == text else Named(topology)
  found = _SEVERAL.fullmatch(text)
  if found and found[1] in MACHINES:
    return _machines(said, found[1], int(found[2] or 1))
  return None


def ours(name: str, said: str = '') -> str:
  """Our name for a pod: of a cloud's name what it stands for, any other as it is. UsageError as `named`."""
  found = named(name, said)
  return found.topology if found else name


def like(name: str) -> list[str]:
  """The known names that an unknown one is spelt most like, at most three."""
  slices = [_counted(prefix, shape) for prefix, (kind, _) in ACCELERATORS.items() for shape in shapes.known(kind)]
  return difflib.get_close_matches(re.split(r'[:×\s]', name.strip().lower())[0], [*MACHINES, *LABELS, *slices], 3, .6)


def _counted(prefix: str, shape: tuple[int, ...]) -> str:
  return f'{prefix}-{math.prod(shape) * ACCELERATORS[prefix][1]}'


def _accelerator(said: str, prefix: str, count: int) -> Named:
  kind, cores = ACCELERATORS[prefix]
  counts = f'{prefix}-N counts {"TensorCores, 2 a chip" if cores == 2 else "chips"}'
  found = shapes.of_chips(kind, count // cores) if count % cores == 0 else []
  if not found:
    near = dict.fromkeys(_counted(prefix, shape) for shape in shapes.near(kind, count // cores))
    raise UsageError(f'{said}: {counts}, and no {kind} slice has {count:,} of them; near it are {", ".join(near)}')
  return Named(f'{kind}:{shapes.written(found[0])}', f'{_chips(found)}{f" ({counts})" if cores == 2 else ""}')


def _machines(said: str, machine: str, count: int) -> Named:
  m = MACHINES[machine]
  if count < 1:
    raise UsageError(f'{said}: wants a count of hosts, as {machine}:16')
  if m.alone and count > 1:
    four = machine.removesuffix('-8t') + '-4t'
    raise UsageError(f'{said}: no slice has several {machine}; say {four}:{2 * count}, hosts of 4 chips')
  hosts = f'{count:,} host{"s" if count > 1 else ""} of {m.each}'
  if m.network:
    return Named(f'{m.kind}:{count}x{m.each}', f'{hosts} {m.kind}, {m.network:,} Gb/s from a host to others', m.network)
  found = shapes.of_chips(m.kind, count * m.each)
  if not found:
    near = dict.fromkeys(f'{machine}:{math.prod(shape) // m.each}' for shape in shapes.near(m.kind, count * m.each))
    raise UsageError(f'{said}: no {m.kind} slice has {count * m.each:,} chips; near it are {", ".join(near)}')
  return Named(f'{m.kind}:{shapes.written(found[0])}', f'{hosts} chips = {_chips(found)}')


def _chips(found: list[tuple[int, ...]]) -> str:
  """Of the slices of a count of chips, how many chips, and that there are several of them."""
  return f'{math.prod(found[0]):,} chips' + (f', the default of {len(found)} shapes' if len(found) > 1 else '')
