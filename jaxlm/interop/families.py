"""The families that are known: for each, how its config.json and its tensors are ours (mapping.py, pieces.py).

A new dense family is an entry of FAMILIES and a config file. That both directions are inverse to each other, and that
logits and gradients equal the family's own code, is tested for all of them in tests/test_families.py.
"""
import itertools

from jaxlm.interop import pieces
from jaxlm.interop.classics import CLASSICS
from jaxlm.interop.mapping import Family, Row

NORMS = {'layers/norm1/scale': 'input_layernorm', 'layers/norm2/scale': 'post_attention_layernorm'}
NORMS_AROUND = {'layers/norm1/scale': 'input_layernorm', 'layers/norm1_out/scale': 'post_attention_layernorm',
                'layers/norm2/scale': 'pre_feedforward_layernorm', 'layers/norm2_out/scale': 'post_feedforward_layernorm'}
NORMS_AFTER = {'layers/norm1_out/scale': 'post_attention_layernorm', 'layers/norm2_out/scale': 'post_feedforward_layernorm'}


def _top(body: str = 'model.', embed: str = 'embed_tokens', norm: str = 'norm', head: str = 'lm_head') -> tuple[Row, ...]:
  return (Row(f'{body}{embed}.weight', {'embed': 'VD>VD'}), Row(f'{body}{norm}.weight', {'norm/scale': 'D>D'}),
          Row(f'{body}{norm}.bias', {'norm/bias': 'D>D'}), Row(f'{head}.weight', {'unembed': 'VD>VD'}))


def _norms(names: dict[str, str]) -> tuple[Row, ...]:
  return tuple(Row(f'model.layers.{{n}}.{theirs}.weight', {ours: 'D>D'}) for ours, theirs in names.items())


def _attention(qk_norm: str = 'head') -> tuple[Row, ...]:
  at, us = 'model.layers.{n}.self_attn.', 'layers/attention/'
  q_norm, k_norm = ('K>K', 'K>K') if qk_norm == 'head' else ('HK>(HK)', 'GK>(GK)')
  return (Row(at + 'q_proj.weight', {us + 'q/w': 'DHK>(HK)D'}), Row(at + 'q_proj.bias', {us + 'q/bias': 'HK>(HK)'}),
          Row(at + 'k_proj.weight', {us + 'k/w': 'DGK>(GK)D'}), Row(at + 'k_proj.bias', {us + 'k/bias': 'GK>(GK)'}),
          Row(at + 'v_proj.weight', {us + 'v/w': 'DGK>(GK)D'}), Row(at + 'v_proj.bias', {us + 'v/bias': 'GK>(GK)'}),
          Row(at + 'o_proj.weight', {us + 'o/w': 'HKD>D(HK)'}),
          Row(at + 'q_norm.weight', {us + 'q_norm/scale': q_norm}), Row(at + 'k_norm.weight', {us + 'k_norm/scale': k_norm}))


def _gated(theirs: str, ours: str, names=('gate_proj', 'up_proj', 'down_proj'), expert: bool = False) -> tuple[Row, ...]:
  leaf = '' if expert else '/w'
  return tuple(Row(f'model.layers.{{n}}.{theirs}.{name}.weight', {f'layers/{ours}/{kind}{leaf}': spec})
               for name, kind, spec in zip(names, ('gate', 'up', 'down'), ('DF>FD', 'DF>FD', 'FD>DF')))


def _two_layer(prefix: str, up: str, down: str, spec_up: str, spec_down: str) -> tuple[Row, ...]:
  return (Row(f'{prefix}{up}.weight', {'layers/mlp/up/w': spec_up}), Row(f'{prefix}{up}.bias', {'layers/mlp/up/bias': 'F>F'}),
          Row(f'{prefix}{down}.weight', {'layers/mlp/down/w': spec_down}),
          Row(f'{prefix}{down}.bias', {'layers/mlp/down/bias': 'D>D'}))


def _layer_norms(prefix: str, first: str, second: str) -> tuple[Row, ...]:
  return tuple(Row(f'{prefix}{theirs}.{leaf}', {f'layers/{ours}/{mine}': 'D>D'})
               for theirs, ours in ((first, 'norm1'), (second, 'norm2')) for leaf, mine in (('weight', 'scale'), ('bias', 'bias')))


DENSE = _top() + _attention() + _gated('mlp', 'mlp')
SIZES = {'hidden_size': 'D', 'num_attention_heads': 'H', 'num_hidden_layers': 'N', 'rms_norm_eps': 'norm_eps',
         'tie_word_embeddings': 'tied'}


def _llama_like(*more, tied: bool = False, act: str = 'hidden_act', fixed_theirs=None, fixed_ours=None, rope=None,
                F: str = 'intermediate_size', **fields):
  """The pieces of a family that differs from Llama by `more`."""
  usual = {'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False}
  theirs = {**(usual if act == 'hidden_act' else {'hidden_activation': 'gelu_pytorch_tanh', 'attention_bias': False}),
            **(fixed_theirs or {})}
  return (pieces.keys({**SIZES, F: 'F', **fields}, tie_word_embeddings=tied), pieces.vocabulary(),
          pieces.heads('head_dim', 'num_key_value_heads'), pieces.fixed(theirs, fixed_ours or {}), rope or pieces.rope(), *more)


def _gemma(*more, rope=None):
  ours = {'norm_place': 'both', 'norm_offset': 1., 'mlp': 'geglu', 'scale_embedding': True}
  return _llama_like(pieces.query_scale(), pieces.caps(), *more, tied=True, act='hidden_activation', rope=rope,
                     fixed_theirs={'use_bidirectional_attention': False}, fixed_ours=ours)


def _gpt(fields: dict, *more, theirs: dict, ours: dict):
  return (pieces.keys(fields, tie_word_embeddings=True), pieces.vocabulary(), pieces.heads(), *more,
          pieces.fixed(theirs, {'norm': 'layer', **ours}))


def _neo_types():
  """GPT-Neo's attention_types: [[['global', 'local'], 12]]."""
  def read(hf):
    kinds = list(itertools.islice((kind for words, count in hf['attention_types'] for _ in range(count) for kind in words),
                                  hf['num_layers'] + 1))
    if len(kinds) != hf['num_layers']:
      raise pieces.UsageError(f'config.json: attention_types is not of num_layers={hf["num_layers"]} layers')
    return pieces.windows(kinds, hf['window_size'])

  def write(m):
    words = m.pattern.split()
    kinds = [words[n % len(words)] for n in range(m.N)]
    return {'attention_types': [[[kind], 1] for kind in kinds], 'window_size': m.window or 256}
  return read, write


def _experts_mixtral():
  return pieces.keys({'num_local_experts': 'moe.E', 'num_experts_per_tok': 'moe.top_k', 'intermediate_size': 'moe.F'})


def _experts_qwen():
  """Layers that are no mixture are either the first so many, or all but each so many-th."""
  read_keys, write_keys = pieces.keys({'num_experts_per_tok': 'moe.top_k', 'moe_intermediate_size': 'moe.F',
                                       'norm_topk_prob': 'moe.normalize'}, norm_topk_prob=False)

  def read(hf):
    dense, step = hf.get('mlp_only_layers') or [], hf.get('decoder_sparse_step') or 1
    if dense != list(range(len(dense))) or (dense and step != 1):
      raise pieces.UsageError(f'config.json: mlp_only_layers={dense}: only the first so many are known to be dense')
    return {**read_keys(hf), 'moe.E': hf.get('num_experts') or hf['num_local_experts'], 'moe.first': len(dense),
            'moe.every': step}

  def write(m):
    return {**write_keys(m), 'num_experts': m.moe.E, 'num_local_experts': m.moe.E,
            'mlp_only_layers': list(range(m.moe.first)) if m.moe.every == 1 else [], 'decoder_sparse_step': m.moe.every}
  return read, write


def _deepseek_sizes():
  names = {'n_routed_experts': 'moe.E', 'moe_intermediate_size': 'moe.F', 'num_experts_per_tok': 'moe.top_k',
           'n_group': 'moe.groups', 'topk_group': 'moe.top_groups', 'routed_scaling_factor': 'moe.scale',
           'norm_topk_prob': 'moe.normalize', 'first_k_dense_replace': 'moe.first', 'kv_lora_rank': 'mla.kv',
           'qk_rope_head_dim': 'mla.rope', 'v_head_dim': 'mla.v', 'q_lora_rank': 'mla.q'}
  read_keys, write_keys = pieces.keys(names, q_lora_rank=0, n_group=1, topk_group=1)

  def read(hf):
    return {**read_keys(hf), 'K': hf['qk_nope_head_dim'] + hf['qk_rope_head_dim'], 'G': hf['num_attention_heads'],
            'moe.shared': hf['n_shared_experts'] * hf['moe_intermediate_size'],
            'moe.score': 'sigmoid', 'moe.bias': True}

  def write(m):
    return {**write_keys(m), 'q_lora_rank': m.mla.q or None, 'qk_nope_head_dim': m.K - m.mla.rope,
            'head_dim': m.mla.rope, 'n_shared_experts': m.moe.shared // max(m.moe.F, 1), 'rope_interleave': True}
  return read, write


_H, _NEOX, _NEO, _LATENT = 'transformer.h.{n}.', 'gpt_neox.layers.{n}.', 'transformer.h.{n}.', 'model.layers.{n}.self_attn.'
_QKV = lambda theirs, w, b, join: (
    Row(theirs + '.weight', {f'layers/attention/{x}/w': w.replace('H', h) for x, h in zip('qkv', 'HGG')}, join),
    Row(theirs + '.bias', {f'layers/attention/{x}/bias': b.replace('H', h) for x, h in zip('qkv', 'HGG')}, join))
_O = lambda theirs, spec: (Row(theirs + '.weight', {'layers/attention/o/w': spec}),
                           Row(theirs + '.bias', {'layers/attention/o/bias': 'D>D'}))

GPT2 = Family(
    'GPT2LMHeadModel',
    _top('transformer.', 'wte', 'ln_f') + (Row('transformer.wpe.weight', {'positions': 'PD>PD'}),)
    + _QKV(_H + 'attn.c_attn', 'DHK>D(HK)', 'HK>(HK)', 'H') + _O(_H + 'attn.c_proj', 'HKD>(HK)D')
    + _layer_norms(_H, 'ln_1', 'ln_2') + _two_layer(_H, 'mlp.c_fc', 'mlp.c_proj', 'DF>DF', 'FD>FD'),
    _gpt({'n_embd': 'D', 'n_head': 'H', 'n_layer': 'N', 'n_positions': 'P', 'layer_norm_epsilon': 'norm_eps',
          'tie_word_embeddings': 'tied'}, pieces.ffn('n_inner'),
         theirs={'activation_function': 'gelu_new', 'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False,
                 'add_cross_attention': False},
         ours={'position': 'learned', 'mlp': 'gelu', 'bias': 'all'}),
    ignored=r'attn\.(bias|masked_bias)$|lm_head\.weight$')

GPT_NEO = Family(
    'GPTNeoForCausalLM',
    _top('transformer.', 'wte', 'ln_f') + (Row('transformer.wpe.weight', {'positions': 'PD>PD'}),)
    + tuple(Row(f'{_NEO}attn.attention.{x}_proj.weight', {f'layers/attention/{x}/w': spec})
            for x, spec in zip('qkv', ('DHK>(HK)D', 'DGK>(GK)D', 'DGK>(GK)D')))
    + _O(_NEO + 'attn.attention.out_proj', 'HKD>D(HK)') + _layer_norms(_NEO, 'ln_1', 'ln_2')
    + _two_layer(_NEO, 'mlp.c_fc', 'mlp.c_proj', 'DF>FD', 'FD>DF'),
    _gpt({'hidden_size': 'D', 'num_heads': 'H', 'num_layers': 'N', 'max_position_embeddings': 'P',
          'layer_norm_epsilon': 'norm_eps', 'tie_word_embeddings': 'tied'}, pieces.ffn('intermediate_size'), _neo_types(),
         theirs={'activation_function': 'gelu_new'},
         ours={'position': 'learned', 'mlp': 'gelu', 'bias': 'not_qkv', 'attention_scale': 1.}),
    ignored=r'attention\.(bias|masked_bias)$|lm_head\.weight$')

GPT_NEOX = Family(
    'GPTNeoXForCausalLM',
    _top('gpt_neox.', 'embed_in', 'final_layer_norm', 'embed_out')
    + _QKV(_NEOX + 'attention.query_key_value', 'DHK>(HK)D', 'HK>(HK)', 'K')  # fused within each head
    + _O(_NEOX + 'attention.dense', 'HKD>D(HK)') + _layer_norms(_NEOX, 'input_layernorm', 'post_attention_layernorm')
    + _two_layer(_NEOX, 'mlp.dense_h_to_4h', 'mlp.dense_4h_to_h', 'DF>FD', 'FD>DF'),
    (pieces.keys({'hidden_size': 'D', 'num_attention_heads': 'H', 'num_hidden_layers': 'N', 'intermediate_size': 'F',
                  'layer_norm_eps': 'norm_eps', 'tie_word_embeddings': 'tied', 'use_parallel_residual': 'parallel'},
                 tie_word_embeddings=False, use_parallel_residual=True),
     pieces.vocabulary(), pieces.heads(), pieces.rope('rotary_emb_base', 'rotary_pct'),
     pieces.fixed({'hidden_act': 'gelu', 'attention_bias': True}, {'norm': 'layer', 'mlp': 'gelu_exact', 'bias': 'all'})),
    ignored=r'attention\.(bias|masked_bias|rotary_emb\.inv_freq)$|embed_out\.weight$')

_qwen_windows = lambda: pieces.window_by_layer(
    lambda hf, n: bool(hf.get('use_sliding_window') and hf.get('sliding_window')) and n >= hf.get('max_window_layers', 0),
    lambda m: {'use_sliding_window': bool(m.window), 'max_window_layers': m.N})

FAMILIES = {  # by config.json's model_type; encoders and encoder-decoders are in classics.py
    'gpt2': GPT2,
    'gpt_neo': GPT_NEO,  # GPT-3's alternation of dense and locally banded layers, with open weights
    'gpt_neox': GPT_NEOX,
    'llama': Family('LlamaForCausalLM', DENSE + _norms(NORMS), _llama_like()),
    'mistral': Family('MistralForCausalLM', DENSE + _norms(NORMS), _llama_like(pieces.window_everywhere())),
    'qwen2': Family('Qwen2ForCausalLM', DENSE + _norms(NORMS), _llama_like(_qwen_windows(), fixed_ours={'bias': 'qkv'})),
    'qwen3': Family('Qwen3ForCausalLM', DENSE + _norms(NORMS), _llama_like(_qwen_windows(), fixed_ours={'qk_norm': 'head'})),
    'gemma2': Family('Gemma2ForCausalLM', DENSE + _norms(NORMS_AROUND),
                     _gemma(pieces.window_by_layer(lambda hf, n: (n + 1) % 2 == 1))),
    'gemma3_text': Family(
        'Gemma3ForCausalLM', DENSE + _norms(NORMS_AROUND),
        _gemma(pieces.window_by_layer(lambda hf, n: (n + 1) % hf.get('sliding_window_pattern', 6) != 0),
               pieces.fixed({}, {'qk_norm': 'head'}), rope=pieces.rope_two())),
    'olmo2': Family('Olmo2ForCausalLM', _top() + _attention('all') + _gated('mlp', 'mlp') + _norms(NORMS_AFTER),
                    _llama_like(fixed_ours={'norm_place': 'post', 'qk_norm': 'all'})),
    'phi3': Family(
        'Phi3ForCausalLM',
        _top() + _norms(NORMS) + _QKV(_LATENT + 'qkv_proj', 'DHK>(HK)D', 'HK>(HK)', 'H')
        + (Row(_LATENT + 'o_proj.weight', {'layers/attention/o/w': 'HKD>D(HK)'}),
           Row('model.layers.{n}.mlp.gate_up_proj.weight', {'layers/mlp/gate/w': 'DF>FD', 'layers/mlp/up/w': 'DF>FD'}, 'F'),
           Row('model.layers.{n}.mlp.down_proj.weight', {'layers/mlp/down/w': 'FD>DF'})),
        _llama_like(pieces.window_everywhere())),
    'mixtral': Family(
        'MixtralForCausalLM',
        _top() + _attention() + _norms(NORMS) + (Row('model.layers.{n}.block_sparse_moe.gate.weight',
                                                     {'layers/moe/router': 'DE>ED'}),)
        + _gated('block_sparse_moe.experts.{e}', 'moe', ('w1', 'w3', 'w2'), expert=True),
        _llama_like(pieces.window_everywhere(), _experts_mixtral())),
    'qwen3_moe': Family(
        'Qwen3MoeForCausalLM',
        DENSE + _norms(NORMS) + (Row('model.layers.{n}.mlp.gate.weight', {'layers/moe/router': 'DE>ED'}),)
        + _gated('mlp.experts.{e}', 'moe', expert=True),
        _llama_like(pieces.window_everywhere('use_sliding_window'), _experts_qwen(), fixed_ours={'qk_norm': 'head'})),
    'deepseek_v3': Family(
        'DeepseekV3ForCausalLM',
        _top() + _norms(NORMS) + _gated('mlp', 'mlp') + _gated('mlp.experts.{e}', 'moe', expert=True)
        + _gated('mlp.shared_experts', 'moe/shared')
        + (Row('model.layers.{n}.mlp.gate.weight', {'layers/moe/router': 'DE>ED'}),
           Row('model.layers.{n}.mlp.gate.e_score_correction_bias', {'layers/moe/bias': 'E>E'}),
           Row(_LATENT + 'q_proj.weight', {'layers/attention/q/w': 'DHK>(HK~)D'}, unless='layers/attention/q_down/w'),
           Row(_LATENT + 'q_a_proj.weight', {'layers/attention/q_down/w': 'DR>RD'}),
           Row(_LATENT + 'q_a_layernorm.weight', {'layers/attention/q_norm/scale': 'R>R'}),
           Row(_LATENT + 'q_b_proj.weight', {'layers/attention/q/w': 'RHK>(HK~)R'}, when='layers/attention/q_down/w'),
           Row(_LATENT + 'kv_a_proj_with_mqa.weight', {'layers/attention/kv_down/w': 'DR>R~D'}),
           Row(_LATENT + 'kv_a_layernorm.weight', {'layers/attention/kv_norm/scale': 'R>R'}),
           Row(_LATENT + 'kv_b_proj.weight', {'layers/attention/kv/w': 'RHK>(HK)R'}),
           Row(_LATENT + 'o_proj.weight', {'layers/attention/o/w': 'HKD>D(HK)'})),
        _llama_like(_deepseek_sizes(), rope=pieces.rope_latent(), fixed_theirs={'rope_interleave': True}),
        ignored=r'rotary_emb\.inv_freq$|lm_head\.weight$|^model\.layers\.61\.'),  # 61: DeepSeek-V3's extra predictor
    **CLASSICS,
}
