"""The layers of a decoder: N blocks, their weights stacked, run as few compiled loops.

Weights are always stacked over the layers that have them ([N, …]; mlp and moe over the layers of their kind), the one
layout there is on disk. Layers of several kinds (a pattern, dense layers before mixtures) run as stages: a scan over
the repeats of a period, such as local local global; `stages` finds them.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlm import layout
from jaxlm.kernels.patterns import Rows
from jaxlm.models.attention import MEMORY, Attention, LatentAttention
from jaxlm.models.layers import NORMS, Dropout, Mlp
from jaxlm.models.moe import Moe
from jaxlm.remat import remat, tag
from jaxlm.schema import ModelConfig, layer_kinds


class Block(nn.Module):
  """x + attention(norm(x)), then, with an encoder's memory, the same across to it, then x + mlp(norm(x))
  → (x_BLD, what `attend` kept: [of itself, of the memory], what a mixture reports, or {}).

  narrow: between the sublayers x is cut over mesh.tensor too, along its length (Korthikanti et al. 2022, §4.2.2): each
  sublayer gathers what it reads and scatters what it writes, which costs no more than the sum it would do else.
  """
  cfg: ModelConfig
  kind: tuple[str, str]  # words of the pattern; 'mlp' | 'moe'
  train: bool = False
  across: bool = False
  narrow: bool = False

  @nn.compact
  def __call__(self, x_BLD, positions_BL, real_BL, attend, memory_BMD=None):
    cfg, (where, feed) = self.cfg, self.kind
    norm = lambda place, name, a: NORMS[cfg.norm](cfg, name=name)(a) if cfg.norm_place in (place, 'both') else a
    after = lambda name, a: NORMS[cfg.norm](cfg, name=name)(a) if cfg.norm_place == 'after' else a
    wide = lambda a: jax.sharding.reshard(a, layout.spec('BLD')) if self.narrow else a
    narrow = lambda a: jax.sharding.reshard(a, layout.spec('BLD', 'residual')) if self.narrow else a
    dropout = Dropout(cfg.dropout, self.train)
    drop = lambda place, name, tensor, a: dropout(norm(place, name, tag(narrow(a), tensor)))
    x_BLD = tag(x_BLD, 'block_in')
    layer = (LatentAttention if cfg.mla.kv else Attention)(cfg, where, name='attention')
    y_BLD, kept = layer(wide(norm('pre', 'norm1', x_BLD)), positions_BL, attend)
    kept = [kept]
    y_BLD = drop('post', 'norm1_out', 'attention_out', y_BLD)
    if cfg.parallel:
      residual_BLD = x_BLD + y_BLD
    else:
      x_BLD = residual_BLD = after('norm1', x_BLD + y_BLD)
    if self.across:
      layer = Attention(cfg, MEMORY, name='memory_attention')
      y_BLD, of_memory = layer(wide(norm('pre', 'norm_memory', x_BLD)), positions_BL, attend, memory_BMD)
      x_BLD = residual_BLD = after('norm_memory', x_BLD + drop('post', 'norm_memory_out', 'attention_out', y_BLD))
      kept.append(of_memory)
    h_BLD, report = wide(norm('pre', 'norm2', x_BLD)), {}
    if feed == 'moe':
      y_BLD, report = Moe(cfg, name='moe')(h_BLD, real_BL)
    else:
      y_BLD = Mlp(cfg, cfg.F, name='mlp')(h_BLD)
    y_BLD = drop('post', 'norm2_out', 'mlp_out', y_BLD)
    return after('norm2', residual_BLD + y_BLD), kept, report


@dataclasses.dataclass(frozen=True)
class Stage:
  """Layers start … start + repeats · len(period), whose kinds are `period` again and again."""
  start: int
  period: tuple[tuple[str, str], ...]
  repeats: int


@functools.cache
def stages(kinds: tuple[tuple[str, str], ...]) -> tuple[Stage, ...]:
  """The stages that compile the fewest blocks, and of those the fewest stages (so that little is left unrolled)."""
  best = {len(kinds): (0, 0, ())}
  for start in reversed(range(len(kinds))):
    options = []
    for p in range(1, len(kinds) - start + 1):
      period, repeats = kinds[start:start + p], 1
      while True:
        end = start + p * repeats
        blocks, count, rest = best[end]
        options.append((blocks + p, count + 1, (Stage(start, period, repeats), *rest)))
        if kinds[end:end + p] != period:
          break
        repeats += 1
    best[start] = min(options, key=lambda o: o[:2])
  return best[0][2]


def init(cfg: ModelConfig, key, across: bool = False) -> dict:
  """Fresh weights of the layers (across: that attend to a memory too). Layer n is made from its own key, whatever its
  neighbours are."""
  kinds = layer_kinds(cfg)
  keys = jax.random.split(key, cfg.N)
  x_BLD = some_input(cfg)
  zeros_BL = jnp.zeros(x_BLD.shape[:2], jnp.int32, out_sharding=layout.spec('BL'))
  no_scores = lambda where, q, k, v: (jnp.zeros((*q.shape[:3], v.shape[-1]), out_sharding=layout.spec('BLHK')), None)

  def stacked(kind, keys):
    block = Block(cfg, kind, across=across, parent=None)
    fresh = lambda key: block.init(key, x_BLD, zeros_BL, zeros_BL == 0, no_scores, x_BLD if across else None)['params']
    return jax.lax.scan(lambda _, key: (None, fresh(key)), None, keys)[1]
  feeds = sorted({feed for _, feed in kinds})
  tree = stacked(kinds[0], keys)  # what is common to all layers, and all there is if they are of one kind
  if len(feeds) > 1:
    for feed in feeds:
      mine = [n for n, kind in enumerate(kinds) if kind[1] == feed]
      tree[feed] = stacked(('global', feed), keys[jnp.array(mine)])[feed]
  return tree


def some_input(cfg: ModelConfig):
  """Hidden states of a token on each device, for init functions that want to see their input."""
  return jnp.zeros((layout.shards('B'), layout.shards('L'), cfg.D), out_sharding=layout.spec('BLD'))


def run(cfg: ModelConfig, layers: dict, x_BLD, rows: Rows, attend_of, dropout_key=None, memory_BMD=None, kinds=None):
  """x_BLD through all layers → (x_BLD, reports of the mixtures stacked over them, {} if there is none).

  attend_of(rows): what attends in these rows, see models/attention.py; segment 0 is padding, which no router counts; dropout
  only with a key; memory_BMD: what an encoder made, for layers that attend to it; kinds: of the layers that there are, if
  not all of the model's.
  """
  kinds, reports, attend = kinds or layer_kinds(cfg), [], attend_of(rows)
  narrow = layout.shards('H') > 1 and x_BLD.shape[1] % layout.shards('L', 'residual') == 0
  x_BLD = jax.sharding.reshard(x_BLD, layout.spec('BLD', 'residual' if narrow else 'act'))
  keys = jax.random.split(dropout_key, cfg.N) if dropout_key is not None else None
  places = _places(kinds)
  for stage in stages(kinds):
    size = len(stage.period)
    inputs = []  # of each layer of the period: what differs from repeat to repeat, [repeats, …]
    for j in range(size):
      feed = stage.period[j][1]
      strides = {name: (places[stage.start + j], sum(k[1] == feed for k in stage.period)) if name == feed
                 else (stage.start + j, size) for name in layers if name == feed or name not in ('mlp', 'moe')}
      params = {name: _every(layers[name], *strides[name], stage.repeats) for name in strides}
      inputs.append((params, _every(keys, stage.start + j, size, stage.repeats)))
    body = functools.partial(_period, cfg, stage, narrow, rows, attend, memory_BMD)
    x_BLD, report = jax.lax.scan(body, x_BLD, inputs, unroll=1 if cfg.scan else stage.repeats)
    if report:
      reports.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), report))
  x_BLD = jax.sharding.reshard(x_BLD, layout.spec('BLD'))
  return x_BLD, jax.tree.map(lambda *a: jnp.concatenate(a) if len(a) > 1 else a[0], *reports) if reports else {}


def _places(kinds) -> list[int]:
  """Of each layer: which of the layers of its kind of mlp it is."""
  return [sum(other[1] == kind[1] for other in kinds[:n]) for n, kind in enumerate(kinds)]


def _every(tree, start: int, stride: int, count: int):
  """`count` layers of stacked arrays, from `start` on, `stride` apart. No copy where that is all of them."""
  return jax.tree.map(lambda a: a[start:start + stride * (count - 1) + 1:stride], tree)


def _period(cfg: ModelConfig, stage: Stage, narrow: bool, rows: Rows, attend, memory_BMD, x_BLD, inputs):
  """One period of a stage. Reports have a leading axis over its mixtures."""
  reports = []
  for kind, (params, key) in zip(stage.period, inputs):
    def block(params, x_BLD, key, memory_BMD, kind=kind):
      x_BLD, _, report = Block(cfg, kind, key is not None, memory_BMD is not None, narrow, parent=None).apply(
          {'params': params}, x_BLD, rows.positions_BL, rows.segments_BL > 0, attend, memory_BMD,
          rngs={'dropout': key} if key is not None else None)
      return x_BLD, report
    # Common subexpressions are only safe from being merged again within a loop.
    block = remat(cfg, block, prevent_cse=not cfg.scan or stage.repeats == 1)
    x_BLD, report = block(params, x_BLD, key, memory_BMD)
    reports += [report] if report else []
  return x_BLD, jax.tree.map(lambda *a: jnp.stack(a), *reports) if reports else {}


def unstack(cfg: ModelConfig, layers: dict) -> list[dict]:
  """The weights of each layer apart, as generation wants them: a slice of a stack would be copied at every token."""
  kinds = layer_kinds(cfg)
  take = lambda tree, n: jax.tree.map(lambda a: a[n], tree)
  return [{name: take(layers[name], place if name == feed else n) for name in layers
           if name == feed or name not in ('mlp', 'moe')} for n, ((_, feed), place) in enumerate(zip(kinds, _places(kinds)))]
