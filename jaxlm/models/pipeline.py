"""Layers cut over mesh.stage: microbatches follow each other through the stages (Huang et al. 2019, GPipe).

Interleaved (Narayanan et al. 2021, §2.2): with `rounds` above 1 each stage has several runs of layers, far apart in the model,
and a microbatch passes all stages that often; the stages are idle for 1/rounds of the time.

    stage 0 | 0 1 2 3 0'1'2'3'          4 microbatches, 2 stages, 2 rounds (the second has ')
    stage 1 |   0 1 2 3 0'1'2'3'

The schedule is one scan over ticks. At a tick all stages do their run of layers at once (a vmap over an axis that lies on
mesh.stage), then each hands its result to the next; the last hands it to the first. The backward pass is the scan's own. At rest
weights are cut over mesh.stage by their width, as over mesh.fsdp, and not by layers, so that a checkpoint knows nothing of
stages or rounds; once a step they are brought to their stages, 4 bytes a parameter ÷ devices each.
"""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import layout
from jaxlm.kernels.patterns import Rows
from jaxlm.models import stack
from jaxlm.schema import ModelConfig, PipelineConfig, layer_kinds

AXIS = 'stage'


def ticks(pieces: int, stages: int, rounds: int) -> int:
  return (rounds - 1) * max(pieces, stages) + pieces + stages - 1


def bubble(how: PipelineConfig, stages: int, pieces: int) -> float:
  """The share of its ticks that a stage is idle."""
  return 1 - pieces * how.rounds / ticks(pieces, stages, how.rounds)


def _pieces(how: PipelineConfig, stages: int, rows: int) -> int:
  """Microbatches of a batch of which each device has `rows`; of one that is not the training's own, the most that divide it."""
  return math.gcd(how.pieces or stages, rows)


def run(cfg: ModelConfig, layers: dict, x_BLD, rows: Rows, attend_of):
  """As stack.run, without dropout."""
  S, rounds = layout.stages(), cfg.pipeline.rounds
  pieces = _pieces(cfg.pipeline, S, x_BLD.shape[0] // layout.shards('B'))
  every, count = max(pieces, S), ticks(pieces, S, rounds)  # ticks from round to round, and in all
  kinds = layer_kinds(cfg)[:cfg.N // (S * rounds)]
  u_TS = np.arange(count)[:, None] - np.arange(S)[None]  # since the first microbatch came
  busy_TS = (u_TS >= 0) & (u_TS % every < pieces) & (u_TS // every < rounds)
  round_TS = np.clip(u_TS // every, 0, rounds - 1).astype(np.int32)

  weights = jax.tree.map(functools.partial(_by_stage, S, rounds), layers)
  stage = jax.vmap(lambda params, x_BLD, rows: stack.run(cfg, params, x_BLD, rows, attend_of, kinds=kinds), spmd_axis_name=AXIS)
  x_PBLD, rows_PBL = layout.deal(pieces, (x_BLD, rows))
  waiting_SPBLD = _spread(S, x_PBLD)  # what the first stage is to get; of the others, nothing reads it
  first_S = jnp.arange(S, out_sharding=jax.P(AXIS)) == 0

  def tick(carry, now):
    waiting_SPBLD, x_SBLD, rows_SBL = carry
    t, rounds_S = now
    piece = jnp.minimum(t % every, pieces - 1)
    pick = lambda mine, other: jnp.where(first_S.reshape(S, *[1] * (other.ndim - 1)), mine, other)
    x_SBLD = pick(jax.lax.dynamic_index_in_dim(waiting_SPBLD, piece, 1, keepdims=False), x_SBLD)
    come = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, piece, 0, keepdims=False)[None], rows_PBL)
    rows_SBL = jax.tree.map(pick, come, rows_SBL)
    x_SBLD, report = stage(jax.tree.map(functools.partial(_of_round, rounds_S), weights), x_SBLD, rows_SBL)
    x_SBLD, rows_SBL = _hand_on((x_SBLD, rows_SBL))
    left = t - (S - 1)  # whose last stage this tick was
    place = jnp.clip(left % every, 0, pieces - 1)
    before_SBLD = jax.lax.dynamic_index_in_dim(waiting_SPBLD, place, 1, keepdims=False)
    arrived_SBLD = jnp.where((left >= 0) & (left % every < pieces), x_SBLD, before_SBLD)
    waiting_SPBLD = jax.lax.dynamic_update_index_in_dim(waiting_SPBLD, arrived_SBLD, place, 1)
    return (waiting_SPBLD, x_SBLD, rows_SBL), report

  empty = jax.tree.map(lambda a: jnp.zeros_like(_spread(S, a[0])), (x_PBLD, rows_PBL))
  (waiting_SPBLD, *_), reports = jax.lax.scan(tick, (waiting_SPBLD, *empty), (jnp.arange(count), jnp.asarray(round_TS)))
  x_PBLD = jnp.sum(jnp.where(first_S.reshape(S, 1, 1, 1, 1), waiting_SPBLD, 0), 0)  # from the first stage to all
  return layout.collect(x_PBLD), _over_layers(reports, busy_TS, round_TS, rounds, pieces)


def _spread(S: int, a):
  """[…] → [S, …], one on each stage."""
  spec = jax.P(AXIS, *jax.typeof(a).sharding.spec)
  return jnp.broadcast_to(a[None], (S, *a.shape), out_sharding=spec)


def _by_stage(S: int, rounds: int, w):
  """Stacked weights [N, …] → [S, rounds, N / (S · rounds), …], each stage's own: layer n is of run n // (N / (S · rounds)), and
  runs go to the stages in turn."""
  without = lambda axis: tuple(a for a in axis if a != AXIS) if isinstance(axis, tuple) else axis
  spec = jax.typeof(w).sharding.spec
  w = jnp.reshape(w, (rounds, S, -1, *w.shape[1:]), out_sharding=jax.P(None, None, None, *spec[1:]))
  return jnp.moveaxis(jax.sharding.reshard(w, jax.P(None, AXIS, None, *map(without, spec[1:]))), 1, 0)


def _of_round(rounds_S, w):
  """The run of layers that each stage is at."""
  spec = jax.typeof(w).sharding.spec
  take = lambda w, n: jax.lax.dynamic_index_in_dim(w, n[0], 1, keepdims=False)
  return jax.shard_map(take, in_specs=(spec, jax.P(AXIS)), out_specs=jax.P(spec[0], *spec[2:]))(
      w, jax.sharding.reshard(rounds_S, jax.P(AXIS)))


def _hand_on(tree):
  def one(a):
    spec = jax.typeof(a).sharding.spec
    S = a.shape[0]
    move = lambda a: jax.lax.ppermute(a, AXIS, [(n, (n + 1) % S) for n in range(S)])
    return jax.shard_map(move, in_specs=spec, out_specs=spec)(a)
  return jax.tree.map(one, tree)


def _over_layers(reports, busy_TS, round_TS, rounds: int, pieces: int):
  """What mixtures report at each tick, [T, S, layers of a run, …], as of whole batches, [layers, …]: counts add up, and of
  means of microbatches it is the mean."""
  share_TSR = (busy_TS[..., None] & (round_TS[..., None] == np.arange(rounds))).astype(np.float32)

  def one(name, a):
    a = jax.sharding.reshard(a, jax.P())
    total = jnp.einsum('TSN...,TSR->RSN...', a, share_TSR)
    return total.reshape(-1, *a.shape[3:]) / (1 if name in ('load_E', 'dropped') else pieces)
  return {name: one(name, a) for name, a in reports.items()}
