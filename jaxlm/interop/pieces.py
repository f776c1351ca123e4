"""Parts of a Hugging Face config.json that more than one family shares: each reads it into our keys, and writes it back.

A piece is (read, write): read(hf) → {'rope.base': …} of our model keys, write(m) → keys of config.json.
"""
import math

from jaxlm.errors import UsageError
from jaxlm.schema import ModelConfig, layer_kinds


def keys(names: dict[str, str], **missing):
  """A key of theirs is a key of ours: {'hidden_size': 'D'}. `missing`: what an absent or null one means."""
  def read(hf):
    values = {ours: hf[theirs] if hf.get(theirs) is not None else missing.get(theirs) for theirs, ours in names.items()}
    lost = [theirs for theirs, ours in names.items() if values[ours] is None]
    if lost:
      raise UsageError(f'config.json: has no {lost[0]}')
    return values

  def write(m):
    return {theirs: _get(m, ours) for theirs, ours in names.items()}
  return read, write


def _get(m: ModelConfig, key: str):
  for part in key.split('.'):
    m = getattr(m, part)
  return m


def fixed(theirs: dict, ours: dict):
  """What is always so in a family: keys of theirs with the one value that is known (absent is as good), and ours."""
  def read(hf):
    for key, value in theirs.items():
      if hf.get(key) is not None and hf[key] != value:
        raise UsageError(f'config.json: {key}={hf[key]!r}: this family is known only with {value!r}')
    return ours
  return read, lambda m: theirs


def vocabulary(name: str = 'vocab_size'):
  """Their vocabulary has no padding of ours."""
  return lambda hf: {'V': hf[name]}, lambda m: {name: m.vocab or m.V}


def heads(head_dim: str = '', kv: str = ''):
  """K and G, where they are stated or follow from the width and the query heads (which `keys` reads)."""
  def read(hf):
    H = hf.get('num_attention_heads') or hf.get('n_head') or hf.get('num_heads')
    D = hf.get('hidden_size') or hf.get('n_embd')
    return {'K': (hf.get(head_dim) if head_dim else None) or D // H, 'G': (hf.get(kv) if kv else None) or H}

  def write(m):
    return {**({head_dim: m.K} if head_dim else {}), **({kv: m.G} if kv else {})}
  return read, write


def ffn(name: str):
  """A width of the mlp that is 4 D where it is null."""
  return lambda hf: {'F': hf.get(name) or 4 * (hf.get('hidden_size') or hf['n_embd'])}, lambda m: {name: m.F}


def caps():
  """Caps on scores and logits, null for none."""
  names = {'attn_logit_softcapping': 'attention_cap', 'final_logit_softcapping': 'logit_cap'}
  return (lambda hf: {ours: float(hf.get(theirs) or 0) for theirs, ours in names.items()},
          lambda m: {theirs: getattr(m, ours) or None for theirs, ours in names.items()})


def query_scale():
  """Gemma's query_pre_attn_scalar: scores are divided by its root."""
  def read(hf):
    return {'attention_scale': 0. if hf['query_pre_attn_scalar'] == hf['head_dim'] else hf['query_pre_attn_scalar'] ** -0.5}
  return read, lambda m: {'query_pre_attn_scalar': max(1, round(m.attention_scale ** -2)) if m.attention_scale else m.K}


def _period(kinds: list[str]) -> str:
  """The shortest pattern that gives these kinds."""
  for p in range(1, len(kinds) + 1):
    if all(kind == kinds[n % p] for n, kind in enumerate(kinds)):
      return ' '.join(kinds[:p])
  raise ValueError('no layers')


def windows(kinds: list[str], window) -> dict:
  return {'pattern': _period(kinds), 'window': window if 'local' in kinds else 0}


def window_everywhere(switch: str = ''):
  """sliding_window: null or a number for all layers; `switch` is a key that must be true for it to count."""
  def read(hf):
    on = hf.get('sliding_window') and (not switch or hf.get(switch))
    return windows(['local' if on else 'global'], hf.get('sliding_window'))

  def write(m):
    return {'sliding_window': m.window or None, **({switch: bool(m.window)} if switch else {})}
  return read, write


def window_by_layer(default, more=lambda m: {}):
  """layer_types, or in older files what default(hf, n) says of layer n: local? `more` is written beside."""
  def read(hf):
    types = hf.get('layer_types') or ['sliding_attention' if default(hf, n) else 'full_attention'
                                      for n in range(hf['num_hidden_layers'])]
    names = {'sliding_attention': 'local', 'full_attention': 'global'}
    strange = [t for t in types if t not in names]
    if strange:
      raise UsageError(f'config.json: layer_types has {strange[0]!r}; known are {", ".join(names)}')
    if len(types) != hf['num_hidden_layers']:
      raise UsageError(f'config.json: layer_types has {len(types)} layers, num_hidden_layers is {hf["num_hidden_layers"]}')
    return windows([names[t] for t in types], hf.get('sliding_window'))

  def write(m):
    types = ['sliding_attention' if where == 'local' else 'full_attention' for where, _ in layer_kinds(m)]
    return {'layer_types': types, 'sliding_window': m.window or None, **more(m)}
  return read, write


def _mscale(factor: float, mscale: float) -> float:
  return 0.1 * mscale * math.log(factor) + 1. if factor > 1 else 1.


def _read_rope(p: dict, hf: dict) -> dict:
  """One rope_parameters of transformers 5, or what older files say at the top level."""
  kind = p.get('rope_type', p.get('type', 'default'))
  out = {'rope.base': float(p['rope_theta']), 'rope.share': float(p.get('partial_rotary_factor') or 1.)}
  if kind == 'default':
    return out
  if kind not in ('linear', 'llama3', 'yarn') or not p.get('truncate', True):
    raise UsageError(f'config.json: rope_type={kind!r} is not known here (default, linear, llama3, yarn are)')
  out |= {'rope.scaling': kind, 'rope.factor': float(p['factor'])}
  if kind != 'linear':
    out['rope.original'] = p.get('original_max_position_embeddings') or hf['max_position_embeddings']
  if kind == 'llama3':
    out |= {'rope.low': float(p['low_freq_factor']), 'rope.high': float(p['high_freq_factor'])}
  if kind == 'yarn':
    both = p.get('mscale') and p.get('mscale_all_dim')
    usual = (_mscale(p['factor'], p['mscale']) / _mscale(p['factor'], p['mscale_all_dim']) if both
             else _mscale(p['factor'], 1.))
    out |= {'rope.low': float(p.get('beta_slow') or 1), 'rope.high': float(p.get('beta_fast') or 32),
            'rope.magnitude': float(p.get('attention_factor') or usual)}
  return out


def _write_rope(m: ModelConfig) -> dict:
  r = m.rope
  out = {'rope_theta': r.base, 'rope_type': 'default' if r.scaling == 'none' else r.scaling}
  if r.share != 1:
    out['partial_rotary_factor'] = r.share
  if r.scaling != 'none':
    out['factor'] = r.factor
  if r.scaling in ('llama3', 'yarn'):
    out['original_max_position_embeddings'] = r.original
  if r.scaling == 'llama3':
    out |= {'low_freq_factor': r.low, 'high_freq_factor': r.high}
  if r.scaling == 'yarn':
    out |= {'beta_slow': r.low, 'beta_fast': r.high, 'attention_factor': r.magnitude}
  return out


def _rope_of(hf: dict, theta: str, share: str, base: float) -> dict:
  old = {'rope_theta': hf.get(theta) or base, 'partial_rotary_factor': hf.get(share) or 1.}
  return {**old, **(hf.get('rope_scaling') or {}), **(hf.get('rope_parameters') or {})}


def rope(theta: str = 'rope_theta', share: str = 'partial_rotary_factor', base: float = 10_000.):
  """Rotary positions, in the words of transformers 5 (rope_parameters) or of older files."""
  return lambda hf: _read_rope(_rope_of(hf, theta, share, base), hf), lambda m: {'rope_parameters': _write_rope(m)}


def rope_latent():
  """DeepSeek's: YaRN's mscale_all_dim also scales the scores, by its square."""
  def read(hf):
    p = _rope_of(hf, 'rope_theta', '', 10_000.)
    out, K = _read_rope(p, hf), hf['qk_nope_head_dim'] + hf['qk_rope_head_dim']
    if out.get('rope.scaling') and p.get('mscale_all_dim'):
      out['attention_scale'] = round(K ** -0.5 * _mscale(p['factor'], p['mscale_all_dim']) ** 2, 12)
    return out

  def write(m):
    p = _write_rope(m)
    if m.attention_scale and m.rope.factor > 1:
      p['mscale_all_dim'] = ((m.attention_scale * m.K ** 0.5) ** 0.5 - 1) / (0.1 * math.log(m.rope.factor))
    return {'rope_parameters': p}
  return read, write


def rope_two():
  """Gemma 3's: local layers have a base of their own."""
  def read(hf):
    p = hf.get('rope_parameters') or {}
    if 'full_attention' in p:
      full, local = p['full_attention'], p['sliding_attention']
    else:
      full = {'rope_theta': hf.get('rope_theta') or 1e6, **(hf.get('rope_scaling') or {})}
      local = {'rope_theta': hf.get('rope_local_base_freq') or 1e4}
    return {**_read_rope(full, hf), 'rope.local_base': float(local['rope_theta'])}

  def write(m):
    return {'rope_parameters': {'full_attention': _write_rope(m),
                                'sliding_attention': {'rope_type': 'default', 'rope_theta': m.rope.local_base}}}
  return read, write
