"""Recurrent encoder and decoder (Cho et al. 2014; Sutskever et al. 2014): the decoder starts from the encoder's last state,
and with attention looks at all of its outputs at every token. A row holds one text and its source; a document that starts
within the decoder's row has no source, and starts from zeros.
"""
import jax
import jax.numpy as jnp

from jaxlm import layout
from jaxlm.models import embedding, output, rnn
from jaxlm.models.layers import Dropout, contract, normal, use
from jaxlm.models.output import Hidden, Training
from jaxlm.schema import ModelConfig


def init_params(cfg: ModelConfig, key) -> dict:
  """Fresh parameters: the decoder's layers, the encoder's under 'encoder' (backward ones too), and what attention adds."""
  keys = jax.random.split(key, 8)
  weight = lambda n: normal(cfg.init_std, 'DK')(keys[n], (cfg.D, cfg.D))
  params = {**embedding.init_vocabulary(cfg, keys[0]), 'layers': rnn.init_layers(cfg, keys[1]),
            'encoder': {'layers': rnn.init_layers(cfg, keys[2])}}
  if cfg.rnn.bidirectional:
    params['encoder']['backward'] = rnn.init_layers(cfg, jax.random.fold_in(key, 1))
  if cfg.rnn.attention != 'none':
    params['attention'] = {'memory': weight(3), 'state': weight(4), 'context': weight(5)}
  if cfg.rnn.attention == 'bahdanau':
    params['attention'] |= {'query': weight(6), 'feed': weight(7), 'score': jnp.full(cfg.D, cfg.D ** -0.5, jnp.float32)}
  return params


def encode(cfg: ModelConfig, params: dict, batch: dict, key=None):
  """(memory_BMD, the state after the last real token, which are real) of batch['inputs']. A state passes by the others
  unchanged; what two directions make is added up."""
  real_BM = batch['input_segments'] == batch['segments'][:, :1]  # of the document that the row goes on with
  real_BM &= batch['input_segments'] > 0
  x_BMD = embedding.look_up(params['embed'], batch['inputs'], jnp.dtype(cfg.dtype))
  B = x_BMD.shape[0]
  keep_BM = (batch['input_positions'] > 0) | ~real_BM
  memory_BMD, state = rnn.layers(cfg, params['encoder']['layers'], x_BMD, keep_BM, rnn.empty_carry(cfg, B), key, real_BM)
  if cfg.rnn.bidirectional:
    flip = lambda a: jnp.flip(a, 1)
    back_BMD, last = rnn.layers(cfg, params['encoder']['backward'], flip(x_BMD), jnp.ones_like(keep_BM), rnn.empty_carry(cfg, B),
                                key, flip(real_BM))
    memory_BMD, state = memory_BMD + flip(back_BMD), jax.tree.map(jnp.add, state, last)
  return memory_BMD, state, real_BM


def remember(cfg: ModelConfig, params: dict, batch: dict, key=None) -> dict:
  """What the decoder takes from the source: {'state': its first one, 'memory' [B, M, D], 'keys' [B, M, K], 'seen' [B, M]}."""
  memory_BMD, state, seen_BM = encode(cfg, params, batch, key)
  out = {'state': state, 'memory': memory_BMD, 'seen': seen_BM}
  if cfg.rnn.attention != 'none':
    out['keys'] = contract('BMD,DK->BMK', None, memory_BMD, params['attention']['memory'])
  return out


def _look(cfg: ModelConfig, attention: dict, source: dict, h_BD, has_B):
  """context_BD: the memory, weighed by how it answers the query h; zeros where there is no source."""
  if cfg.rnn.attention == 'bahdanau':
    query_BK = jnp.einsum('BD,DK->BK', h_BD, attention['query'])
    s_BM = jnp.einsum('BMK,K->BM', jnp.tanh(source['keys'] + query_BK[:, None]), attention['score'].astype(h_BD.dtype))
  else:
    s_BM = jnp.einsum('BK,BMK->BM', h_BD, source['keys'])
  seen_BM = source['seen'] & has_B[:, None]
  p_BM = jax.nn.softmax(jnp.where(seen_BM, s_BM.astype(jnp.float32), -1e30), -1)
  return jnp.einsum('BM,BMD->BD', jnp.where(seen_BM, p_BM, 0.).astype(h_BD.dtype), source['memory'])


def _finish(cfg: ModelConfig, attention: dict, h_BD, context_BD):
  """Luong et al. 2015, eq. 5: tanh of h and the context together."""
  product = lambda a_BD, name: jnp.einsum('BD,DK->BK', a_BD, attention[name])
  return jnp.tanh(product(h_BD, 'state') + product(context_BD, 'context'))


def gathered(params: dict, dtype) -> dict:
  """The weights of the loop over time as it wants them: gathered once."""
  def of(path, w):
    dims = 'NDJK' if w.ndim == 4 else 'DK' if w.ndim == 2 else ''
    return use(w, dims, dtype) if dims else w.astype(dtype)
  return jax.tree_util.tree_map_with_path(of, {k: params[k] for k in ('layers', 'attention') if k in params})


def step(cfg: ModelConfig, weights: dict, source: dict, state: dict, has_B, x_BD, keep_B, key=None):
  """One token of the decoder: (state, has_B, x_BD to make logits of). state {'h': [B, N, D], …}; has_B: the document has a
  source, until another one starts (keep 0)."""
  keep_B, has_B = keep_B.astype(bool), has_B & keep_B.astype(bool)
  state = jax.tree.map(lambda a: jnp.where(keep_B[:, None, None], a, 0), state)
  attention, context_BD, after = cfg.rnn.attention, None, []
  if attention == 'bahdanau':  # asked by the state before, and a part of the first layer's input
    context_BD = _look(cfg, weights['attention'], source, state['h'][:, -1], has_B)
    x_BD += jnp.einsum('BD,DK->BK', context_BD, weights['attention']['feed'])
  for n in range(cfg.N):
    own = jax.tree.map(lambda a, n=n: a[n], weights['layers'])
    mine = jax.tree.map(lambda a, n=n: a[:, n], state)
    of_x, of_h = (rnn.gates(a, own[name]['w'], own[name]['bias']) for a, name in ((x_BD, 'x'), (mine['h'], 'h')))
    mine = rnn.CELLS[cfg.rnn.cell][1](of_x, of_h, mine)
    x_BD = mine['h']
    if key is not None:
      x_BD = Dropout(cfg.dropout, True).apply({}, x_BD, rngs={'dropout': jax.random.fold_in(key, n)})
    after.append(mine)
  state = jax.tree.map(lambda *a: jnp.stack(a, 1), *after)
  if attention == 'luong':  # asked by the state after
    context_BD = _look(cfg, weights['attention'], source, x_BD, has_B)
  return state, has_B, x_BD if context_BD is None else _finish(cfg, weights['attention'], x_BD, context_BD)


def teacher_share(cfg: ModelConfig, step_number):
  """Share of inputs that are the text's: constant, or k / (k + e^(step/k)) of it (Bengio et al. 2015, §2.4)."""
  k = cfg.rnn.sampling
  return cfg.rnn.teacher * (k / (k + jnp.exp(jnp.minimum(step_number / k, 80.))) if k else 1.)


def forward(cfg: ModelConfig, params: dict, batch: dict, training: Training | None = None, carry=None) -> Hidden:
  """batch: as of seq2seq. In training with rnn.teacher below 1 or rnn.sampling, an input is with that probability not the
  text's token but the model's own likeliest after the one before."""
  dropout, dtype = training and training.dropout, jnp.dtype(cfg.dtype)
  source = remember(cfg, params, batch, dropout)
  weights = gathered(params, dtype)
  unembedding = embedding.unembedding(cfg, params)
  whole = output.gathered(Hidden(source['memory'], unembedding, {}))  # once, not at every token
  own_inputs = training is not None and (cfg.rnn.teacher < 1 or cfg.rnn.sampling > 0)
  table_VD = jax.sharding.reshard(params['embed'].astype(dtype), jax.P(None, None))
  look_up = lambda token_B: table_VD.at[token_B].get(out_sharding=layout.spec('BD'))

  def body(carried, now):
    state, has_B, last_BD = carried
    t, token_B, keep_B = now
    if own_inputs:
      own_BV = output.finish(cfg, output.unembed(whole, last_BD[:, None]))[:, 0]
      own_B = jnp.argmax(jax.sharding.reshard(own_BV, layout.spec('B') + (None,)), -1).astype(jnp.int32)
      chance_B = jax.random.uniform(jax.random.fold_in(training.noise, t), token_B.shape, out_sharding=layout.spec('B'))
      teach_B = (chance_B < teacher_share(cfg, training.step)) | (keep_B == 0) | (t == 0)
      token_B = jnp.where(teach_B, token_B, jax.lax.stop_gradient(own_B))
    key = None if dropout is None else jax.random.fold_in(dropout, t)
    state, has_B, x_BD = step(cfg, weights, source, state, has_B, look_up(token_B), keep_B, key)
    return (state, has_B, x_BD), x_BD
  keep_BL = _goes_on(batch)
  first = (source['state'], source['seen'].any(-1), jnp.zeros_like(source['state']['h'][:, 0]))
  L = batch['tokens'].shape[1]
  _, x_LBD = jax.lax.scan(body, first, (jnp.arange(L), batch['tokens'].T, keep_BL.T))
  return Hidden(jnp.moveaxis(x_LBD, 0, 1), unembedding, {}, carry)


def _goes_on(batch: dict):
  """1 where a token of the decoder goes on with what came before: not where another document starts; at the row's start,
  where the source is of its document."""
  segments_BL = batch['segments']
  of_source_B1 = (batch['input_segments'] == segments_BL[:, :1]).any(-1, keepdims=True)
  same_BL = segments_BL[:, 1:] == segments_BL[:, :-1]
  return jnp.concatenate([of_source_B1, same_BL], 1).astype(jnp.int32)
