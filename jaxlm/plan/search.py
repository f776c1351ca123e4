"""Which mesh, remat and microbatches to take on a pod: all that could be are counted, none is compiled.

What the command line states is fixed; of the rest everything is tried that the model's and the batch's sizes allow. Of each mesh
the fastest way to remember or recompute that fits is kept. What is refused comes with its reason.
"""
import collections
import dataclasses
import itertools

from jaxlm import layout
from jaxlm.errors import UsageError
from jaxlm.plan import cost, memory, roofline, traffic
from jaxlm.plan.job import Arrays, Job, arrays, job
from jaxlm.plan.topology import Topology
from jaxlm.schema import Config
from jaxlm.validate import check_mesh

ROOM = .95  # of HBM that a prediction may fill, which is off by some percent
# (model.remat, model.save, model.offload), from what computes least to what keeps least. remat=none is not among them: it keeps what is
# elementwise too, for which Llama-3-8B on v5p:4x4x8 took 74 GiB and 1.422 s of fusions, where minimal took 28 GiB and 1.252 s.
WAYS = (('minimal', '', ''), ('qkv', '', ''), ('attention', '', ''), ('full', '', ''), ('full', '', 'block_in'))
MICROBATCHES = (1, 2, 4, 8, 16)
MOST = {'tensor': 32, 'stage': 16, 'expert': 64}  # beyond these they are never better; and stages are for many devices
STAGES_FROM = 512


@dataclasses.dataclass(frozen=True)
class Plan:
  """A way to run a config on a pod, and what it costs."""
  job: Job
  hbm: memory.Hbm
  step: roofline.Step

  @property
  def config(self) -> Config:
    return self.job.config

  @property
  def limit(self) -> float:
    """GiB of HBM of a device."""
    return self.job.pod.chip.hbm / self.job.pod.chip.devices

  @property
  def fits(self) -> bool:
    return self.hbm.peak <= self.limit

  @property
  def mfu(self) -> float:
    return cost.mfu(self.config, self.step.seconds, self.job.pod.chips, self.job.pod.chip.bf16)

  @property
  def stated(self) -> dict:
    """The keys that make the config this plan."""
    c, m = self.config, self.config.model
    keys = {f'mesh.{axis}': size for axis, size in self.job.mesh.items() if size > 1 or axis == 'fsdp'}
    more = {'model.save': m.save, 'model.offload': m.offload}
    return keys | {'model.remat': m.remat, 'microbatches': c.microbatches} | {key: value for key, value in more.items() if value}

  def why_not(self) -> str:
    """'' if it fits."""
    if self.hbm.peak <= ROOM * self.limit:
      return ''
    parts = {f.name: getattr(self.hbm, f.name) for f in dataclasses.fields(self.hbm) if f.name != 'host'}
    return f'needs {self.hbm.peak:.1f} of {self.limit:g} GiB: {max(parts, key=parts.get)}'


def plan(config: Config, sizes: dict[str, int], pod: Topology, traced: tuple[Arrays, ...] | None = None) -> Plan:
  """Of a config as it is, on a mesh of these sizes. UsageError if they divide something badly. traced: job.arrays, if known."""
  check_mesh(config, sizes)
  j = job(config, sizes, pod, traced)
  return Plan(j, memory.hbm(j), roofline.step(j))


def search(config: Config, pod: Topology, fixed: frozenset[str]) -> tuple[list[Plan], dict[str, list[str]]]:
  """(plans that fit, the fastest first; reason → the meshes that it rules out). fixed: keys of the config not to be changed."""
  found, refused, traced = [], collections.defaultdict(list), arrays(config)
  for sizes in meshes(config, pod, fixed):
    best, reason = _best(config, sizes, pod, fixed, traced)
    if best:
      found.append(best)
    else:
      refused[reason].append(' × '.join(f'{axis} {size}' for axis, size in sizes.items() if size > 1) or 'one device')
  return sorted(found, key=lambda p: p.step.seconds), dict(refused)


def _best(config, sizes, pod, fixed, traced) -> tuple[Plan | None, str]:
  """(the fastest that fits on this mesh, '') or (None, why there is none: what the way that keeps least wants)."""
  ways = WAYS if not fixed & {'model.remat', 'model.save', 'model.offload'} else (None,)
  reason = ''
  for count in MICROBATCHES if 'microbatches' not in fixed else (config.microbatches,):  # more only if need be
    plans = []
    for way in ways if config.batch % count == 0 else ():
      names = dict(zip(('remat', 'save', 'offload'), way)) if way else {}
      try:
        p = plan(dataclasses.replace(config, microbatches=count, model=dataclasses.replace(config.model, **names)), sizes, pod, traced)
      except UsageError as e:
        reason = reason or str(e)
        continue
      plans.append(p)
    good = [p for p in plans if not p.why_not()]
    if good:
      return min(good, key=lambda p: p.step.seconds), ''
    if not plans:  # it is the mesh that does not do, or so many microbatches
      break
    reason = min(plans, key=lambda p: p.hbm.peak).why_not()
  return None, reason


def meshes(config: Config, pod: Topology, fixed: frozenset[str]):
  """All meshes of the pod's devices that keep what is fixed, worth a thought for this model."""
  m, n = config.model, pod.devices
  own = {axis: getattr(config.mesh, axis) for axis in layout.AXES if f'mesh.{axis}' in fixed}
  own = {axis: size for axis, size in own.items() if size != -1}
  inner = {'tensor': pod.shape[1] if pod.is_gpu else MOST['tensor'], 'expert': min(m.moe.E, MOST['expert']) if m.moe.E else 1,
           'context': n if config.length >= 32_768 or n > config.batch else 1,
           'stage': MOST['stage'] if n >= STAGES_FROM and m.kind == 'decoder' else 1}
  choices = {axis: [own[axis]] if axis in own else [d for d in _divisors(n) if d <= most] for axis, most in inner.items()}
  for tensor, expert, context, stage in itertools.product(*(choices[a] for a in ('tensor', 'expert', 'context', 'stage'))):
    left, exact = divmod(n, tensor * expert * context * stage)
    if exact or not left:
      continue
    for data in [own['data']] if 'data' in own else _divisors(left):
      if left % data == 0 and data % pod.slices == 0 and own.get('fsdp', left // data) == left // data:
        yield {'data': data, 'stage': stage, 'fsdp': left // data, 'expert': expert, 'context': context, 'tensor': tensor}


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]
