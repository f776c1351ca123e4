"""How long a step takes, from the config, the mesh and the pod alone.

    step = (matrix products ÷ (peak · share) + attention ÷ (peak · share) + bytes of elementwise work ÷ HBM bandwidth)
           ÷ (1 − bubble of the pipeline) + what of collectives and of the host's memory is not hidden behind these

The shares are the only numbers in it that are not a count or a chip's own: REACHED, fitted on half of the published runs of
plan/published.py and judged on the others (`jaxlm plan --validate`; the table is docs/planner.md).
"""
import dataclasses

from jaxlm import tensors
from jaxlm.plan import cost, traffic
from jaxlm.plan.job import ITEM, Job
from jaxlm.plan.memory import expert_rows, in_flight, layer_activations, widths
from jaxlm.schema import ModelConfig


@dataclasses.dataclass(frozen=True)
class Reached:
  """What programs reach of a maker's peaks."""
  products: float    # of peak FLOP/s, in matrix products
  attention: float   # … in attention's kernels, of scores that are not hidden, where heads are as wide as the chip's matrix unit
  passes: float      # times that all tensors of a layer go through HBM in its forward pass, for all that is elementwise
  weights: float     # of the time that weights and gradients are on their way is not hidden behind the rest
  tensor: float      # … that mesh.tensor's collectives are, which wait for products and products for them


REACHED = {'tpu': Reached(.90, .51, 4.03, .89, .5), 'gpu': Reached(.46, .48, 3.23, .53, 1.)}
# A prediction's error bar: of the published steps that nothing was fitted on, WITHIN were measured inside predicted ± ERROR. Both
# are what published.error makes of the second table of docs/planner.md; a test holds them to it.
ERROR, WITHIN = .15, (11, 12)
# Of HBM bandwidth, that the TPU compiler counts for wholes of zeros: 736,352 cycles of a v5p for the 117 MB of a projection.
_ZEROS = .1


@dataclasses.dataclass(frozen=True)
class Step:
  """Seconds of a step, of a device."""
  products: float
  attention: float
  elementwise: float
  exposed: dict[str, float]  # of each axis of the mesh and of the host's memory, what is not hidden
  bubble: float              # that the pipeline idles

  @property
  def seconds(self) -> float:
    return self.products + self.attention + self.elementwise + sum(self.exposed.values()) + self.bubble

  @property
  def bound_by(self) -> str:
    """The greatest part."""
    parts = {'matrix products': self.products, 'attention': self.attention, 'HBM bandwidth': self.elementwise, 'bubble': self.bubble,
             **{('host memory' if a == 'host' else f'mesh.{a}'): s for a, s in self.exposed.items()}}
    return max(parts, key=parts.get)


def again(m: ModelConfig, feed: str) -> tuple[float, float, float]:
  """(weights that a token meets once more in a layer's backward pass, times that attention runs again, share of the elementwise
  work of a forward pass that is done again)."""
  if m.remat == 'none':
    return 0., 0., 0.
  if m.remat == 'dots':
    return 0., 1., .5
  there = tensors.kept(m)
  missing = sum(weights for name, weights in cost.projections(m).items() if name not in there)
  F, S = (m.F, 1) if feed == 'mlp' else (m.moe.F, m.moe.top_k)
  missing += sum(S * m.D * F for name in ('gate', 'up') if name in widths(m, feed) and name not in there)
  if feed == 'moe' and 'experts_out' not in there:  # their weights' gradient reads them
    missing += S * m.D * F
  sizes = widths(m, feed)
  kept_share = sum(size for name, size in sizes.items() if name in there) / sum(sizes.values())
  return missing, float('attention' not in there), 1 - kept_share / 2


def flops(j: Job) -> tuple[float, float, float]:
  """Of a device and step: (of the layers' matrix products, of the output matrix's, of attention), with all that is computed again;
  hidden scores not counted."""
  c, m = j.config, j.config.model
  tokens = c.batch * c.length / j.pod.devices
  redone = [(count, again(m, feed)) for feed, count in j.feeds.items()]
  rows = m.moe.top_k
  if m.moe.dispatch == 'capacity':
    rows *= m.moe.capacity
  elif j.pod.is_gpu:  # TPUs' kernels visit only rows that came
    rows = expert_rows(j)
  more = (rows - m.moe.top_k) * 3 * m.D * m.moe.F
  head = m.V * m.D
  products = 6 * (cost.weights_of_a_token(m) - head + more * j.feeds.get('moe', 0)) + 2 * sum(count * r[0] for count, r in redone)
  each = 2 * m.H * (m.K + (m.mla.v or m.K)) * cost.scores(m, c.length) / m.N
  attention = each * sum(count * (1 + 2.5 + r[1]) for count, r in redone)  # backward 5 products of what forward are 2 of
  return products * tokens, (6 + 2 * (c.loss.over == 'vocabulary')) * head * tokens, attention * tokens


def elementwise(j: Job, passes: float) -> float:
  """Bytes through HBM of a device and step, beside what matrix products and kernels read and write at full speed."""
  m, c = j.config.model, j.config
  tokens = c.batch * c.length / j.pod.devices
  layers = sum(count * sum(widths(m, feed, expert_rows(j)).values()) * (3 + again(m, feed)[2]) for feed, count in j.feeds.items())
  state = sum(a.bytes * j.own(a) * 2 for a in j.arrays)  # read and written by the optimizer
  gradients = sum(a.bytes * j.own(a) * 4 for a in j.arrays if a.of == 'params')
  logits = 3 * 4 * m.V * tokens
  quantising = 1 if m.matmul == 'full' else 2  # its maxima and rounding go through all tensors once more
  return quantising * passes * layers * ITEM[m.dtype] * tokens + logits + state + gradients + traffic.zeros(j) / _ZEROS


def to_host(j: Job) -> float:
  """Bytes that leave a device for its host's memory in a step; as many come back."""
  activations = sum(count * layer_activations(j, feed)[1] for feed, count in j.feeds.items())
  return activations * j.config.microbatches * in_flight(j) + sum(a.bytes * j.own(a) for a in j.arrays if a.on_host)


def attention_share(j: Job, reached: Reached) -> float:
  """Of peak FLOP/s."""
  return reached.attention * min(1., j.config.model.K / j.pod.chip.unit)


def faster(j: Job) -> float:
  """How many times the rate of bfloat16 products those that model.matmul quantises have."""
  chip = j.pod.chip
  return {'full': 1., 'int8': chip.int8 / chip.bf16, 'fp8': chip.fp8 / chip.bf16}[j.config.model.matmul]


def plain_flops(j: Job) -> float:
  """Of the layers' matrix products, those that model.matmul does not quantise: the gradients of experts' weights, and on GPUs all that
  experts multiply."""
  m = j.config.model
  tokens = j.config.batch * j.config.length / j.pod.devices
  of_experts = j.feeds.get('moe', 0) * 3 * m.D * m.moe.F * tokens
  return 6 * expert_rows(j) * of_experts if j.pod.is_gpu else 2 * m.moe.top_k * of_experts


def step(j: Job, reached: Reached | None = None) -> Step:
  chip, m = j.pod.chip, j.config.model
  reached = reached or REACHED['gpu' if j.pod.is_gpu else 'tpu']
  peak, bandwidth = chip.bf16 / chip.devices, chip.bandwidth / chip.devices
  of_layers, of_head, of_attention = flops(j)
  plain = of_layers if m.matmul == 'full' else plain_flops(j)
  products = (plain + (of_layers - plain) / faster(j) + of_head) / peak / reached.products
  attention = of_attention / peak / attention_share(j, reached)
  work = elementwise(j, reached.passes) / bandwidth
  busy = products + attention + work
  speeds, bytes_in, beside = traffic.speeds(j), traffic.received(j), traffic.beside(j)
  seconds = {axis: bytes_in[axis] / speeds[axis] for axis in speeds}
  seconds['host'] = to_host(j) * chip.devices / chip.host
  shown = {'data': reached.weights, 'fsdp': reached.weights, 'tensor': reached.tensor}
  exposed = {axis: max((needed - beside.get(axis, 0.) / speeds[axis]) * shown.get(axis, 1.), needed - busy)
             for axis, needed in seconds.items() if axis not in ('context', 'host')}
  for axis, cover in (('context', attention), ('host', .5 * busy)):  # sent while these go on
    exposed[axis] = max(0., seconds.get(axis, 0.) - cover)
  return Step(products, attention, work, {a: s for a, s in exposed.items() if s}, busy * (in_flight(j) * j.mesh['stage'] - 1))
