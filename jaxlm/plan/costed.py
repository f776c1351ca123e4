"""How long a compiled step takes by its own compiler's estimates."""
from jaxlm.plan import hlo, roofline
from jaxlm.plan.compile import Compiled
from jaxlm.plan.job import Job


def seconds(j: Job, c: Compiled) -> dict[str, float] | None:
  """{'fusions', 'attention', 'waits'} of a device: what the TPU's compiler estimates of its fusions and copies; the kernels of
  attention, of which it says nothing, at the share of peak that roofline.REACHED has; and collectives that nothing runs beside, at
  the rate of all links. None for chips whose compiler estimates nothing, or whose clock is not known."""
  chip = j.pod.chip
  if not chip.hertz:
    return None
  *_, attention = roofline.flops(j)
  kernels = attention / (chip.bf16 / chip.devices) / roofline.attention_share(j, roofline.REACHED['tpu'])
  waits = sum(op.times * op.bytes * (2 if op.kind == 'all-reduce' else 1) for op in hlo.collectives(c.ops) if not op.is_async)
  return {'fusions': hlo.seconds(c.ops, chip.hertz), 'attention': kernels,
          'waits': waits / (chip.link * chip.links / chip.devices)}

