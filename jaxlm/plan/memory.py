"""HBM of one device by class, from the config alone: what the compiler will want, before it is asked.

What lies there between steps is counted exactly, from the arrays of the state. What a step adds is greatest in the backward pass of
the first layer it comes to: gradients, what layers kept for it, and what that layer's own backward pass works on. The last is a
number of arrays of each width, which was fitted to compiled programs (WORKING; `make pods` holds predictions against compilers).
"""
import dataclasses

from jaxlm import tensors
from jaxlm.models import pipeline
from jaxlm.plan.job import ITEM, Job
from jaxlm.schema import ModelConfig

GIB = 2 ** 30
# Arrays of a layer that are there at once in its backward pass, in its tokens × their width; and times its gathered weights, of
# which the TPU's compiler has the next layer's on their way.
WORKING = {'D': 9., 'HK': 3., 'F': 4., 'weights': {'tpu': 2., 'gpu': 1.}}
WHOLE = {'D': 10., 'HK': 4., 'F': 4.}  # what remat=none keeps of a layer
LOGITS = 3.  # float32 arrays of a piece's logits


@dataclasses.dataclass(frozen=True)
class Hbm:
  """GiB of a device."""
  weights: float
  optimizer: float
  gradients: float
  activations: float  # that layers keep for the backward pass
  logits: float       # of a piece, and of the loss's own; 0 where layers want more at their own time
  buffers: float      # what a layer works on, with its weights, gathered
  host: float         # in the host's memory, of what rests or is offloaded there

  @property
  def arguments(self) -> float:
    return self.weights + self.optimizer

  @property
  def temporaries(self) -> float:
    return self.gradients + self.activations + self.logits + self.buffers

  @property
  def peak(self) -> float:
    return self.arguments + self.temporaries


def widths(m: ModelConfig, feed: str, rows: float = 0) -> dict[str, float]:
  """Numbers a token of each of tensors.TENSORS that a layer with this feed makes. rows: of experts a token, top_k if 0."""
  rows = rows or m.moe.top_k
  K, F = m.mla.v or m.K, m.F if feed == 'mlp' else rows * m.moe.F + m.moe.shared
  every = {'block_in': m.D, 'latent': m.mla.q + m.mla.kv + m.mla.rope, 'q': m.H * m.K, 'k': m.G * m.K, 'v': m.G * K,
           'attention': m.H * K, 'attention_out': m.D, 'experts_in': rows * m.D, 'gate': F, 'up': F,
           'experts_out': rows * m.D, 'mlp_out': m.D}
  there = set(tensors.made(m)) - ({'experts_in', 'experts_out'} if feed == 'mlp' else set())
  return {name: size for name, size in every.items() if name in there}


def expert_rows(j: Job) -> float:
  """Rows of experts that a device has room for and works on, a token. How many come, only the router knows: moe.room times the mean, or
  the most that can."""
  moe, experts = j.config.model.moe, j.mesh['expert']
  if experts == 1 or moe.dispatch != 'dropless':
    return moe.top_k
  most = experts * min(moe.top_k, moe.E // experts)
  return min(most, moe.room * moe.top_k) if moe.room else most


def _device_has(j: Job, size: float) -> float:
  """Bytes of a tensor of a layer, of the tokens of a microbatch. Of some a device of mesh.tensor has its heads or its part of the
  ffn; of the others, between blocks, its part of the length."""
  return size * j.tokens * ITEM[j.config.model.dtype] / j.shards('H')


def layer_activations(j: Job, feed: str) -> tuple[float, float]:
  """Bytes that a layer keeps for its backward pass, (on the device, on the host)."""
  m = j.config.model
  sizes = widths(m, feed, expert_rows(j))
  sizes['mlp_out'] = sizes['mlp_out'] if m.norm_place != 'pre' else 0  # nothing reads it
  if m.remat == 'none':
    F = m.F if feed == 'mlp' else expert_rows(j) * (m.moe.F + m.D / 2) + m.moe.shared
    return _device_has(j, WHOLE['D'] * m.D + WHOLE['HK'] * m.H * m.K + WHOLE['F'] * F), 0.
  if m.remat == 'dots':
    return _device_has(j, sum(size for name, size in sizes.items() if name not in ('attention', 'experts_in'))), 0.
  host = set(m.offload.split())
  device = {*tensors.kept(m), 'block_in'} - host
  log_z = 4 * m.H * j.tokens / j.shards('H') if 'attention' in device else 0.
  return (log_z + sum(_device_has(j, sizes.get(name, 0)) for name in device),
          sum(_device_has(j, sizes.get(name, 0)) for name in host))


def in_flight(j: Job) -> float:
  """Of the layers' activations of a microbatch, how many a device holds: of a pipeline, those of its own layers, and its first
  inputs of every tick, bubbles too."""
  stages = j.mesh['stage']
  if stages == 1:
    return 1.
  how = j.config.model.pipeline
  return 1 / (1 - pipeline.bubble(how, stages, how.pieces or stages)) / stages


def hbm(j: Job) -> Hbm:
  bytes_of = lambda section, on_host=False: sum(a.bytes * j.own(a) for a in j.arrays if a.of == section and a.on_host == on_host)
  weights, optimizer = bytes_of('params'), bytes_of('opt')
  # Sums over microbatches beside a microbatch's own; and of a pipeline weights and gradients lie by stage too, while it runs.
  gradients = weights * (1 + (j.config.microbatches > 1) + 2 * (j.mesh['stage'] > 1))
  device, host = (sum(part) for part in zip(*([count * a for a in layer_activations(j, feed)] for feed, count in j.feeds.items())))
  return Hbm(*(b / GIB for b in (weights, optimizer, gradients, in_flight(j) * device, max(0., _logits(j) - _layer(j)), _layer(j),
                                 in_flight(j) * host + bytes_of('opt', True))))


def _layer(j: Job) -> float:
  """Bytes that the backward pass of the greatest layer works on."""
  m = j.config.model
  F = max(expert_rows(j) * (m.moe.F + m.D / 2) + m.moe.shared if feed == 'moe' else m.F for feed in j.feeds)
  tokens = j.tokens / (j.config.model.pipeline.pieces or j.mesh['stage']) if j.mesh['stage'] > 1 else j.tokens
  wide = tokens * ITEM[m.dtype]
  at_work = wide * (WORKING['D'] * m.D + (WORKING['HK'] * m.H * m.K + WORKING['F'] * F) / j.shards('H'))
  return at_work + WORKING['weights']['gpu' if j.pod.is_gpu else 'tpu'] * gathered_layer(j)


def gathered_layer(j: Job) -> float:
  """Bytes of a layer's weights as they are used: in the dtype of compute, or quantised."""
  m = j.config.model
  item = ITEM[m.dtype] if m.matmul == 'full' else 1
  return sum(a.size / j.cut(a.kept) for a in j.arrays if (a.of, a.where) == ('params', 'layers')) / m.N * item


def _logits(j: Job) -> float:
  m, how = j.config.model, j.config.loss
  rows = m.V / j.shards('V')
  piece = LOGITS * 4 * j.tokens * rows / how.chunks
  if how.over == 'length':  # the whole output matrix and its gradient
    return piece + rows * m.D * (ITEM[m.dtype] + 4)
  return piece + rows / how.chunks * m.D * (ITEM[m.dtype] + 4) + 4 * j.tokens * m.D
