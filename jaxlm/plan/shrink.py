"""A run made so small that a machine without accelerators can rehearse it. Every axis of the mesh that is used stays used, and what
layers and meshes want of sizes stays so: what divides what, grouped heads, kinds of layers, dense layers before mixtures, groups
of experts, padded rows of the vocabulary. Nothing here imports jax.

A small size is at least a floor, and a multiple of what must divide it. An axis becomes one of its divisors, so that sizes which
the whole mesh divides never grow.
"""
import dataclasses
import math

from jaxlm.data.tokenizer import SENTINELS
from jaxlm.errors import UsageError
from jaxlm.schema import (
    Config, DataConfig, MeshConfig, ModelConfig, ObjectiveConfig, StartConfig, layer_kinds, lead, of_task, selected, span_lengths)
from jaxlm.validate import HEADS, check_mesh, validate

DEVICES = 16    # that a machine is asked for, unless the axes need more
MOST = 64       # all six axes, two devices each
LENGTH = 64
CHAT = 256      # the length of chats, whose templates are long where the tokenizer is small
STEPS = 3       # one to save, two to go on with: the second update needs the optimizer's state of the first
SIZES = {'D': 64, 'F': 128, 'G': 2, 'K': 16, 'moe.F': 32, 'rank': 16, 'rotated': 8}  # floors


def fewer(sizes: dict[str, int], devices: int = 0) -> dict[str, int]:
  """The largest mesh of at most so many devices whose axes divide those of `sizes`, none of them 1 that was not; where there is a
  choice, axes shrink alike. devices = 0: DEVICES, or what one of each costs. UsageError if there is none."""
  factors = {axis: _primes(size) for axis, size in sizes.items()}
  small = {axis: (found.pop(0) if found else 1) for axis, found in factors.items()}
  least = math.prod(small.values())
  limit = devices or max(DEVICES, least)
  if least > limit or limit > MOST:
    used = ' × '.join(f'{axis} {size}' for axis, size in sizes.items() if size > 1)
    raise UsageError(f'mesh {used}: needs {least} devices to use all of its axes, and a rehearsal has {MOST} at most' if least > MOST
                     else f'--devices={limit}: {used} needs {least} at least to use all of its axes; set {least} to {MOST}')
  while True:
    room = [axis for axis, left in factors.items() if left and left[0] * math.prod(small.values()) <= limit]
    if not room:
      return small
    axis = max(room, key=lambda axis: sizes[axis] // small[axis])
    small[axis] *= factors[axis].pop(0)


def _primes(n: int) -> list[int]:
  """Its prime factors, the least first."""
  for p in range(2, math.isqrt(n) + 1):
    if n % p == 0:
      return [p, *_primes(n // p)]
  return [n] if n > 1 else []


def shrunk(c: Config, mesh: dict[str, int]) -> Config:
  """The run `c` for a mesh that `fewer` made: STEPS steps, each saved and logged. Its data and cache are the caller's to replace.
  Its tokenizer has few tokens, its parameters are fresh. UsageError if there is no such run."""
  floor = CHAT if 'chat' in {run.data.form for run in _runs(c)} else LENGTH
  length = _fit(c.length, math.lcm(2 * mesh['context'] * mesh['tensor'], 4), floor)
  model = _model(c.model, mesh)
  objective = lambda o: _objective(o, c.length, length)
  small = dataclasses.replace(
      c, steps=STEPS, length=length, microbatches=min(c.microbatches, 2), log_every=1, save_every=1,
      eval_every=STEPS if c.eval_every else 0, eval_windows=min(c.eval_windows, 8), compile_cache='',
      objective=objective(c.objective), mesh=MeshConfig(**mesh), start=StartConfig(), data=_data(c.data),
      optimizer=dataclasses.replace(c.optimizer, warmup=min(c.optimizer.warmup, 1)),
      checkpoint=dataclasses.replace(c.checkpoint, keep=STEPS),
      tasks=tuple(dataclasses.replace(task, objective=objective(task.objective),
                                      data=dataclasses.replace(task.data, heldout=_heldout(task.data))) for task in c.tasks))
  pieces = (model.pipeline.pieces or mesh['stage']) if mesh['stage'] > 1 else 1
  rows = mesh['data'] * mesh['fsdp'] * mesh['expert'] * small.microbatches * pieces
  small = dataclasses.replace(small, batch=rows * max(1, min(2, c.batch // rows)))

  window = model.window and max(min(model.window, 8), model.window * length // c.length)
  first = model.first and max(1, min(model.first, window // 2 or model.first, length // 4))
  reach = max(length, lead(small).objective.source) + model.first_position
  model = dataclasses.replace(model, window=window, first=first, P=reach if model.P else 0)
  chunks = 2 if c.loss.chunks > 1 and _targets(dataclasses.replace(small, model=model)) % 2 == 0 else 1
  tokens = most_tokens(small)
  padded = 0 < model.vocab < model.V
  V = _fit(tokens + padded, mesh['tensor'] * mesh['stage'] * chunks, tokens + padded)
  small = dataclasses.replace(small, model=dataclasses.replace(model, V=V, vocab=tokens if model.vocab else 0),
                              loss=dataclasses.replace(c.loss, chunks=chunks))
  validate(small)
  check_mesh(small, mesh)
  return small


def _fit(value: int, unit: int, floor: int) -> int:
  """The least multiple of `unit` that is not under min(value, floor): never more than a value that is such a multiple."""
  return -(-min(value, floor) // unit) * unit


def _model(m: ModelConfig, mesh: dict[str, int]) -> ModelConfig:
  """All of a model but what its length and its vocabulary decide."""
  tensor = mesh['tensor']
  evenly = lambda value, unit: math.lcm(unit, 2) if value % 2 == 0 else unit  # halves of a width are a thing of some layers
  G = _fit(m.G, tensor, SIZES['G'])
  rounds = _primes(m.pipeline.rounds)[0] if m.pipeline.rounds > 1 else 1
  pipeline = dataclasses.replace(m.pipeline, rounds=rounds, pieces=min(m.pipeline.pieces, 2 * mesh['stage']))
  shared = mesh['fsdp'] * mesh['stage'] * mesh['expert']
  mla = dataclasses.replace(m.mla, kv=_fit(m.mla.kv, shared, SIZES['rank']), q=_fit(m.mla.q, shared, SIZES['rank']), v=min(m.mla.v, SIZES['K']),
                            rope=min(m.mla.rope, SIZES['rotated']))
  small = dataclasses.replace(
      m, D=_fit(m.D, evenly(m.D, shared), SIZES['D']),
      G=G, H=G * min(m.H // m.G, 4), K=_head_dim(m), F=_fit(m.F, evenly(m.F, tensor), SIZES['F']), encoder_N=min(m.encoder_N, 2),
      attention='auto' if m.attention == 'splash' else m.attention, pipeline=pipeline, mla=mla, moe=_moe(m, mesh),
      lora=dataclasses.replace(m.lora, rank=min(m.lora.rank, 4)))
  return dataclasses.replace(small, N=_layers(m, mesh['stage'], rounds))


def _head_dim(m: ModelConfig) -> int:
  """The least from the floor on of which rope turns pairs, as of the whole one."""
  if m.mla.kv:
    rotated = min(m.mla.rope, SIZES['rotated'])
    return rotated + min(m.K - m.mla.rope, SIZES['rotated'])
  turns = lambda K: m.position != 'rope' or K * m.rope.share % 2 == 0 < K * m.rope.share
  return next(K for K in range(min(m.K, SIZES['K']), m.K + 1) if turns(K) or K == m.K)


def _moe(m: ModelConfig, mesh: dict[str, int]):
  """The fewest experts that mesh.expert and the groups divide and of which a token leaves some out, if it did."""
  moe = m.moe
  if not moe.E:
    return moe
  good = lambda E: (E > moe.top_k or E == moe.E) and E // moe.groups * moe.top_groups >= moe.top_k and E // moe.groups >= min(
      2, moe.E // moe.groups)
  unit = math.lcm(moe.groups, mesh['expert'])
  F = lambda whole: _fit(whole, math.lcm(mesh['tensor'], 2 - whole % 2), SIZES['moe.F'])
  return dataclasses.replace(moe, E=next(E for E in range(unit, moe.E + 1, unit) if good(E)), F=F(moe.F), shared=F(moe.shared))


def _layers(m: ModelConfig, stages: int, rounds: int) -> int:
  """The fewest that have all kinds of layers, end where in the pattern the whole model does, and are of equal runs."""
  runs, kinds = stages * rounds, layer_kinds(m)
  period = math.lcm(len(m.pattern.split()), m.moe.every if m.moe.E else 1)

  def good(n):
    equal = stages == 1 or kinds[:n] == kinds[:n // runs] * runs
    return n % (runs if stages > 1 else 1) == 0 and (m.N - n) % period == 0 and set(kinds[:n]) == set(kinds) and equal
  return next(n for n in range(min(m.N, 2 * runs if stages > 1 else 2), m.N + 1) if good(n) or n == m.N)


def _objective(o: ObjectiveConfig, whole: int, length: int) -> ObjectiveConfig:
  """What an encoder reads shrinks as the length does."""
  source = o.source and max(8, o.source * length // whole // 8 * 8)
  small = dataclasses.replace(o, source=source)
  while o.name == 'spans' and small.source > 8 and span_lengths(small)[1] > length:
    small = dataclasses.replace(small, source=small.source - 8)
  return small


def _targets(c: Config) -> int:
  """Of a row, or, of several tasks, what divides all of theirs."""
  return math.gcd(*(1 if r.objective.name in HEADS else selected(r) if r.model.kind == 'encoder' else r.length for r in _runs(c)))


def _runs(c: Config) -> list[Config]:
  return [of_task(c, task) for task in c.tasks] or [c]


def _heldout(data: DataConfig) -> float:
  return 0.25 if data.heldout else 0.


def _data(data: DataConfig) -> DataConfig:
  """A tokenizer that trains at once; tokens that are named in another's vocabulary are not in it."""
  kind, _, size = data.tokenizer.partition(':')
  own = kind == 'bpe'
  names = {} if own else dict(stop='', never='', start='')
  return dataclasses.replace(data, tokenizer=f'bpe:{min(int(size), 512)}' if own and size.isdigit() else 'bytes', cache='',
                             heldout=_heldout(data), **names)


def most_tokens(c: Config) -> int:
  """Rows of the vocabulary that a run with a tokenizer `bpe:SIZE` or `bytes` can come to need; 0 for any other tokenizer."""
  kind, _, size = c.data.tokenizer.partition(':')
  tokens = int(size) if kind == 'bpe' and size.isdigit() else 257 if kind == 'bytes' else 0
  names = {run.objective.name for run in _runs(c)}
  return tokens and tokens + (SENTINELS if 'spans' in names else 1 if names & {'mask', 'pairs'} else 0)
