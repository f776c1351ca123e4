"""How long a compiled step takes by its own compiler's estimates."""
import re

from jaxlm.kernels import grouped
from jaxlm.plan import hlo, roofline
from jaxlm.plan.compile import Compiled
from jaxlm.plan.job import Job


def seconds(j: Job, c: Compiled) -> dict[str, float] | None:
  """{'fusions', 'kernels', 'waits'} of a device: what the TPU's compiler estimates of its fusions and copies; the kernels of
  attention and of experts, of which it says nothing, at the shares of peak that roofline.REACHED has; and collectives that nothing
  runs beside, at the rate of all links. None for chips whose compiler estimates nothing, or whose clock is not known."""
  chip = j.pod.chip
  if not chip.hertz:
    return None
  *_, attention = roofline.flops(j)
  kernels = attention / (chip.bf16 / chip.devices) / roofline.attention_share(j, roofline.REACHED['tpu']) + _experts(j, c.ops)
  waits = sum(op.times * op.bytes * (2 if op.kind == 'all-reduce' else 1) for op in hlo.collectives(c.ops) if not op.is_async)
  return {'fusions': hlo.seconds(c.ops, chip.hertz), 'kernels': kernels,
          'waits': waits / (chip.link * chip.links / chip.devices)}


def _experts(j: Job, ops: list[hlo.Op]) -> float:
  """Of grouped products, were experts even: as other products, or as fast as HBM feeds a kernel's tiles; of each expert but the
  first, a tile is visited twice."""
  moe, chip = j.config.model.moe, j.pod.chip
  rows = j.tokens / (j.config.model.pipeline.pieces or j.mesh['stage']) * moe.top_k
  flops = 2 * rows * j.config.model.D * moe.F / j.shards('F')
  out = 0.
  for op in hlo.kernels(ops):
    kind = re.match(r't?gmm\b', op.name)
    if kind:
      high, deep, wide = grouped.PRODUCT if kind[0] == 'gmm' else grouped.OUTER
      a, b = (high, wide) if kind[0] == 'gmm' else (deep, wide)  # products are over what is left, and read both of these
      rate = min(roofline.REACHED['tpu'].products * chip.bf16, a * b / (a + b) * chip.bandwidth) / chip.devices
      out += op.times * flops * (1 + (moe.E / j.shards('E') - 1) * high / rows) / rate
  return out
