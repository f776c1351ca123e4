"""How long a compiled step takes by its own compiler's estimates."""
import collections
import dataclasses
import re

from jaxlm.kernels import grouped, grouped_scaled
from jaxlm.plan import hlo, roofline
from jaxlm.plan.compile import Compiled
from jaxlm.plan.job import Job


@dataclasses.dataclass(frozen=True)
class Sent:
  """What a device sends by collectives in a step: bytes, and of these the share that goes on beside other work, by kind."""
  kind: str
  bytes: float
  hidden: float


def seconds(j: Job, c: Compiled) -> dict[str, float] | None:
  """{'fusions', 'kernels', 'waits'} of a device: what the TPU's compiler estimates of its fusions and copies; the kernels of
  attention and of experts, of which it says nothing, at the shares of peak that roofline.REACHED has; and what of the collectives
  is waited for. None for chips whose compiler estimates nothing, or whose clock is not known."""
  if not j.pod.chip.hertz:
    return None
  waits, _ = _schedule(j, c.ops)
  return {'fusions': hlo.seconds(c.ops, j.pod.chip.hertz), 'kernels': sum(_kernels(j, c.ops).values()), 'waits': waits}


def sent(j: Job, c: Compiled) -> list[Sent]:
  """The collectives of a step, by kind, the most bytes first. Where nothing is known of time, what is asynchronous counts as hidden."""
  total, hidden = collections.Counter(), collections.Counter()
  _, shares = _schedule(j, c.ops)
  for op, share in shares:
    total[op.kind] += op.times * op.bytes
    hidden[op.kind] += op.times * op.bytes * share
  return [Sent(kind, size, hidden[kind] / size) for kind, size in total.most_common() if size]


def _schedule(j: Job, ops: list[hlo.Op]) -> tuple[float, list[tuple[hlo.Op, float]]]:
  """(seconds that a device waits for collectives, (collective, share of it that is hidden) for each): the compiled schedule, played
  with the compiler's cycles and with links that serve one collective after another. The body of a loop is played once and counts as
  often as it runs; a collective that ends in the next turn of its loop counts as hidden."""
  chip = j.pod.chip
  if not chip.hertz:
    return 0., [(op, float(op.is_async)) for op in hlo.collectives(ops) if op.bytes]
  kernels = _kernels(j, ops)
  rate = chip.link * max(chip.links, 1) / chip.devices
  needs = {op.name: op.bytes * (2 if op.kind == 'all-reduce' else 1) / rate for op in hlo.collectives(ops)}
  now = free = waits = 0.
  ends, waited = {}, {}
  for op in ops:
    if op.kind in hlo.COLLECTIVES:  # a fusion that has one has its name too
      ends[op.name] = free = max(free, now) + needs[op.name]
    ended = op.waits_for if op.kind == 'done' else op.name if op.kind in hlo.COLLECTIVES and not op.is_async else ''
    if ended in ends:
      waited[ended] = max(0., ends.pop(ended) - now)
      waits += op.times * waited[ended]
      now += waited[ended]
    now += op.cycles / chip.hertz + kernels.get(op.name, 0.) / op.times
  return waits, [(op, 1 - min(1., waited.get(op.name, 0.) / needs[op.name])) for op in hlo.collectives(ops) if op.bytes]


def _kernels(j: Job, ops: list[hlo.Op]) -> dict[str, float]:
  """Seconds in a step of each kernel that was written by hand, by name: attention's share its time evenly."""
  *_, attention = roofline.flops(j)
  chip, found = j.pod.chip, _experts(j, ops)
  total = attention / (chip.bf16 / chip.devices) / roofline.attention_share(j, roofline.REACHED['gpu' if j.pod.is_gpu else 'tpu'])
  others = [op for op in hlo.kernels(ops) if op.name not in found and 'splash' in op.name]
  runs = sum(op.times for op in others)
  return found | ({op.name: total * op.times / runs for op in others} or {'attention': total})


def _experts(j: Job, ops: list[hlo.Op]) -> dict[str, float]:
  """Of grouped products, by name, were experts even: as other products, or as fast as HBM feeds a kernel's tiles; of each expert but the
  first, a tile is visited twice."""
  moe, chip, small = j.config.model.moe, j.pod.chip, j.pod.kind == 'v4'
  rows = j.tokens / (j.config.model.pipeline.pieces or j.mesh['stage']) * moe.top_k
  flops = 2 * rows * j.config.model.D * moe.F / j.shards('F')
  tiles, values = grouped.SMALL if small else grouped.LARGE, grouped_scaled.SMALL if small else grouped_scaled.LARGE
  kinds = {  # name of a kernel: its tile's rows, the two sides that are read for each product, bytes of a value, rate
      'gmm': (tiles.product[0], (tiles.product[0], tiles.product[2]), 2, chip.bf16), 'tgmm': (tiles.outer[0], tiles.outer[1:], 2, chip.bf16),
      'gmm_scaled': (values[0], (values[0], values[2]), 1, chip.bf16 * roofline.faster(j))}
  out = {}
  for op in hlo.kernels(ops):
    kind = re.match(r'gmm_scaled|t?gmm', op.name)
    if kind:
      high, (a, b), item, peak = kinds[kind[0]]
      rate = min(roofline.REACHED['tpu'].products * peak, 2 / item * a * b / (a + b) * chip.bandwidth) / chip.devices
      out[op.name] = op.times * flops * (1 + (moe.E / j.shards('E') - 1) * high / rows) / rate
  return out
