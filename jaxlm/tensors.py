"""The tensors of a layer, by name, that the forward pass can keep for the backward pass (remat.py sees to it), and its weights, by
path. No jax here."""
import dataclasses

from jaxlm.schema import GATED, ModelConfig, layer_kinds

# The tensors of a layer that can be kept from the forward pass for the backward pass: what a matrix product, a kernel or an
# exchange makes. What else a layer makes is elementwise between these. Bytes a token are those of the sizes, × the dtype's.
TENSORS = {
    'block_in': 'D: what the layer reads; kept in any case, unless all is (remat=none), so that it can only be offloaded',
    'latent': 'mla.q + mla.kv + mla.rope: what queries, keys and values are made from (mla only)',
    'q': 'H · K: queries, not yet normed and turned', 'k': 'G · K: keys, so too', 'v': 'G · K: values',
    'attention': 'H · K: what the kernel makes; and 4 H bytes, log Z, for those kernels that then need not run again (splash, ring)',
    'attention_out': 'D: its projection, before what follows it is normed or added',
    'experts_in': 'top_k · D: rows as the experts get them, sorted, exchanged over mesh.expert (moe only)',
    'gate': 'F, of experts top_k · moe.F: of a gated mlp', 'up': 'F, or so too: the other, or only, one',
    'experts_out': 'top_k · D: what the experts say, before it is weighed (moe only)',
    'mlp_out': 'D: what the mlp adds, of use only where that is normed (norm_place=post, both or after)',
}
REMAT = {  # model.remat → those of TENSORS that it keeps
    'full': (),
    'attention': ('attention',),  # the kernel does not run again
    'qkv': ('latent', 'q', 'k', 'v', 'attention'),  # nor do the matrix products before it
    'minimal': tuple(TENSORS),  # nor does any
}


def made(m: ModelConfig) -> tuple[str, ...]:
  """Those of TENSORS that layers of this model make."""
  feeds = {feed for _, feed in layer_kinds(m)}
  ungated = () if m.mlp in GATED else ('gate',)
  without = (() if m.mla.kv else ('latent',)) + (() if 'moe' in feeds else ('experts_in', 'experts_out'))
  return tuple(name for name in TENSORS if name not in without + ungated)


def kept(m: ModelConfig) -> tuple[str, ...]:
  """Those of TENSORS that are kept for the backward pass, on the device or not; of remat=dots, which goes by operation, none."""
  if m.remat in ('none', 'dots'):
    return tuple(TENSORS) if m.remat == 'none' else ()
  named = (*REMAT[m.remat], *m.save.split(), *m.offload.split())
  return tuple(name for name in TENSORS if name in named)


def weights(m: ModelConfig) -> tuple[str, ...]:
  """Paths of the stacked weights of layers, those that can have a pair of low rank (models/lora.py)."""
  if m.kind == 'ngram':
    return ()
  if m.kind in ('rnn', 'rnn_seq2seq'):
    encoder = ('encoder/layers', *['encoder/backward'] * m.rnn.bidirectional) if m.kind == 'rnn_seq2seq' else ()
    return tuple(f'{stack}/{name}/w' for stack in ('layers', *encoder) for name in 'xh')
  latent = ('q_down', 'q', 'kv_down', 'kv', 'o') if m.mla.q else ('q', 'kv_down', 'kv', 'o')
  mlp = ('gate', 'up', 'down') if m.mlp in GATED else ('up', 'down')

  def of_layers(N: int) -> list[str]:
    feeds = {feed for _, feed in layer_kinds(dataclasses.replace(m, N=N))}
    places = ['mlp'] * ('mlp' in feeds) + ['moe/shared'] * ('moe' in feeds and m.moe.shared > 0)
    heads = latent if m.mla.kv else 'qkvo'
    return [f'attention/{name}' for name in heads] + [f'{place}/{name}' for place in places for name in mlp]
  names = [f'layers/{name}' for name in of_layers(m.N)]
  if m.kind == 'seq2seq':
    names += [f'layers/memory_attention/{name}' for name in 'qkvo']
    names += [f'encoder/layers/{name}' for name in of_layers(m.encoder_N)]
  return tuple(f'{name}/w' for name in names)
