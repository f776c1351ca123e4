"""A model run layer after layer, so that what is between its layers can be looked at: hidden states, weights of attention.

The layers are the model's own (stack.Block, rnn.layer); state 0 is what goes into the first layer, state n what comes out
of layer n, before the norm that may end the stack. Of an encoder-decoder either side can be looked at.
"""
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import layout
from jaxlm.data import pipeline
from jaxlm.errors import UsageError
from jaxlm.kernels import on_mesh
from jaxlm.kernels.patterns import Rows
from jaxlm.look.reading import Reading, to_encoder
from jaxlm.models import attention, embedding, relative, rnn, seq2seq, stack
from jaxlm.schema import ModelConfig, layer_kinds

PLACES = 16  # rows have a multiple of so many places, so that few lengths are compiled
POOLS = ('mean', 'last', 'first')


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _block(cfg: ModelConfig, kind, maps: bool, params, x_BLD, rows, bias_HLM, memory_BMD, memory_rows):
  """(x_BLD after one layer, [p_BHLM of itself, of the memory] or Nones)."""
  def attend(where, q_BLHK, k_BMGK, v_BMGK):
    across = where == attention.MEMORY
    arrays = (q_BLHK, k_BMGK, v_BMGK, rows, memory_rows if across else rows, None if across else bias_HLM)
    how = attention.how(cfg, where)
    return on_mesh.shown(how, *arrays) if maps else (on_mesh.attend(cfg, how, *arrays), None)
  block = stack.Block(cfg, kind, across=memory_BMD is not None)
  return block.apply({'params': params}, x_BLD, rows.positions_BL, rows.segments_BL > 0, attend, memory_BMD)[:2]


@functools.partial(jax.jit, static_argnums=0)
def _into(cfg: ModelConfig, table_VD, around, batch):
  """(x_BLD that goes into the first layer, the bias of relative positions or None)."""
  x_BLD, places_L = embedding.embed(cfg, table_VD, around, batch), jnp.arange(batch['tokens'].shape[1])
  return x_BLD, relative.bias(cfg, around['relative'], places_L, places_L) if cfg.position == 'relative' else None


_unstack = jax.jit(stack.unstack, static_argnums=0)
_encode = jax.jit(seq2seq.encode, static_argnums=0)


def _attentive(cfg: ModelConfig, params, batch, see: Callable, maps: bool, around=None, memory_BMD=None) -> list:
  around = params if around is None else around
  x_BLD, bias_HLM = _into(cfg, params['embed'], around, batch)
  out, rows = [see(x_BLD, [])], Rows(batch['segments'], batch['positions'])
  memory_rows = None if memory_BMD is None else Rows(batch['input_segments'], batch['input_segments'])
  for kind, weights in zip(layer_kinds(cfg), _unstack(cfg, around['layers'])):
    x_BLD, kept = _block(cfg, kind, maps, weights, x_BLD, rows, bias_HLM, memory_BMD, memory_rows)
    out.append(see(x_BLD, kept))
  return out


def _encoder_decoder(cfg: ModelConfig, params, batch, see: Callable, maps: bool, encoder: bool) -> list:
  if not encoder:
    return _attentive(cfg, params, batch, see, maps, memory_BMD=_encode(cfg, params, batch)[0])
  its = {name: batch['inputs' if name == 'tokens' else f'input_{name}'] for name in ('tokens', 'segments', 'positions')}
  return _attentive(seq2seq.encoder_of(cfg), params, its, see, maps, params['encoder'])


@functools.partial(jax.jit, static_argnums=0)
def _cell(cfg: ModelConfig, params, n, x_BLD, keep_BL, carry):
  own, state = jax.tree.map(lambda a: a[n], params), jax.tree.map(lambda a: a[:, n], carry)
  return rnn.layer(cfg, own, x_BLD, keep_BL.T, jnp.ones_like(keep_BL.T), state)[0]


def _recurrent(cfg: ModelConfig, params, batch, see: Callable) -> list:
  x_BLD, _ = _into(cfg, params['embed'], {}, batch)
  out, carry = [see(x_BLD, [])], rnn.empty_carry(cfg, x_BLD.shape[0])
  for n in range(cfg.N):
    x_BLD = _cell(cfg, params['layers'], n, x_BLD, batch['positions'] > 0, carry)
    out.append(see(x_BLD, []))
  return out


def run(lm, readings: Sequence[Reading], see: Callable, maps: bool = False, encoder: bool = False) -> list:
  """[see(x_BLD, weights) of states 0 … N] of a pass over some texts, under the mesh of `lm`; rows beyond the texts are
  empty. x_BLD is on the devices, in the compute dtype; weights: with `maps`, [p_BHLM of the layer itself, of its memory],
  float32; encoder: the layers of a seq2seq's encoder in place of its decoder's.

  UsageError for maps of a model that has none.
  """
  m = lm.config.model
  if maps and m.kind == 'rnn':
    raise UsageError('model.kind=rnn: a recurrent model has no attention to show; look lens, loss and probe take it')
  size = -(-len(readings) // lm.rows_multiple) * lm.rows_multiple
  arrays = _rows([r.ids for r in readings], size, ('tokens', 'segments', 'positions'))
  if m.kind == 'seq2seq':
    arrays |= _rows([r.source for r in readings], size, ('inputs', 'input_segments', 'input_positions'))
  with jax.set_mesh(lm.mesh):
    batch = pipeline.place(lambda low, high: {k: a[low:high] for k, a in arrays.items()}, size, lm.mesh)
    if m.kind == 'rnn':
      return _recurrent(m, lm.params, batch, see)
    if m.kind == 'seq2seq':
      return _encoder_decoder(m, lm.params, batch, see, maps, encoder)
    return _attentive(m, lm.params, batch, see, maps)


def _rows(ids: list[np.ndarray], size: int, names: tuple[str, str, str]) -> dict[str, np.ndarray]:
  """(tokens, segments, positions) [size, L] of texts, one a row, from the left; 0 is padding."""
  arrays = [np.zeros((size, -(-max(map(len, ids)) // PLACES) * PLACES), np.int32) for _ in names]
  for b, row in enumerate(ids):
    for array_BL, values in zip(arrays, (row, 1, np.arange(len(row)))):
      array_BL[b, :len(row)] = values
  return dict(zip(names, arrays))


def states(lm, texts: Sequence[str], batch: int = 16) -> list[list[np.ndarray]]:
  """List over states 0 … N of list over texts of float32 [L, D], for the tokens of reading.read; of an encoder-decoder,
  those of its encoder. Errors: see run."""
  found = _batches(lm, texts, batch, lambda lengths, x_BLD: [row[:n] for row, n in zip(_host(x_BLD), lengths)])
  return [[x_LD for _, x_LD in sorted(layer, key=lambda pair: pair[0])] for layer in found]


def pooled(lm, texts: Sequence[str], pool: str = 'mean', batch: int = 16, context: int | None = None) -> np.ndarray:
  """float32 [N + 1, texts, D]: states 0 … N, one vector a text: the mean over its tokens (with what opens and closes it),
  or the last or the first one's. context: tokens at most that a text has, the rest is cut off. Errors: see run."""
  if pool not in POOLS:
    raise UsageError(f'--pool={pool}: wants one of {", ".join(POOLS)}')

  def see(lengths, x_BLD):
    at_L, n_B = np.arange(x_BLD.shape[1]), np.pad(lengths, (0, x_BLD.shape[0] - len(lengths)), constant_values=1)
    weights_BL = {'mean': (at_L < n_B[:, None]) / n_B[:, None], 'last': at_L == n_B[:, None] - 1,
                  'first': np.broadcast_to(at_L == 0, x_BLD.shape[:2])}[pool].astype(np.float32)
    return list(_host(_pool(x_BLD, jax.device_put(weights_BL, layout.spec('BL'))))[:len(lengths)])
  found = _batches(lm, texts, batch, see, context)
  return np.stack([np.stack([x_D for _, x_D in sorted(layer, key=lambda pair: pair[0])]) for layer in found])


@jax.jit
def _pool(x_BLD, weights_BL):
  return jnp.einsum('BLD,BL->BD', x_BLD.astype(jnp.float32), weights_BL, precision='highest')


def _host(a) -> np.ndarray:
  return np.asarray(jax.device_get(a), np.float32)


def _batches(lm, texts: Sequence[str], batch: int, see: Callable, context: int | None = None) -> list[list[tuple]]:
  """List over states of [(which text, what `see(lengths, x_BLD)` says of it)]; texts of a length go together."""
  if not texts:
    raise UsageError('there is no text to look at')
  encoder = lm.config.model.kind == 'seq2seq'
  readings = [to_encoder(lm, text) for text in texts]
  if context is not None:
    readings = [Reading(*(None if ids is None else ids[:context] for ids in r)) for r in readings]
  length = lambda r: len(r.source if encoder else r.ids)
  order = sorted(range(len(texts)), key=lambda i: length(readings[i]))
  out: list[list[tuple]] = []
  for start in range(0, len(order), batch):
    mine = order[start:start + batch]
    lengths = np.array([length(readings[i]) for i in mine])
    found = run(lm, [readings[i] for i in mine], lambda x_BLD, _, lengths=lengths: see(lengths, x_BLD), encoder=encoder)
    out = out or [[] for _ in found]
    for layer, rows in zip(out, found):
      layer += zip(mine, rows)
  return out
