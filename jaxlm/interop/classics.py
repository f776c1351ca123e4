"""The encoders and the encoder-decoders that are known, as families.py says the decoders: BERT, RoBERTa, T5, BART, Marian.

What a model ends in is the class that config.json names under architectures, and partly only its tensors tell (settle).
"""
from jaxlm.errors import UsageError
from jaxlm.interop import pieces
from jaxlm.interop.mapping import Family, Row
from jaxlm.schema import ModelConfig

ACTIVATIONS = {'gelu': 'gelu_exact', 'gelu_new': 'gelu', 'gelu_pytorch_tanh': 'gelu', 'relu': 'relu',
               'silu': 'silu', 'swish': 'silu'}
FEEDS = {'gated-gelu': 'geglu', 'gated-silu': 'swiglu', **ACTIVATIONS}  # T5's gelu is the tanh approximation when gated
HEADS = {'Model': 'none', 'ForMaskedLM': 'mlm', 'ForPreTraining': 'mlm', 'ForSequenceClassification': 'classify',
         'ForTokenClassification': 'tag', 'ForQuestionAnswering': 'span'}


# ---- tensors

def _linear(theirs: str, ours: str, w: str, bias: str, head: str = '') -> tuple[Row, ...]:
  return (Row(f'{theirs}.weight', {f'{ours}/w': w}, head=head), Row(f'{theirs}.bias', {f'{ours}/bias': bias}, head=head))


def _norm(theirs: str, ours: str) -> tuple[Row, ...]:
  return Row(f'{theirs}.weight', {f'{ours}/scale': 'D>D'}), Row(f'{theirs}.bias', {f'{ours}/bias': 'D>D'})


def _attention(theirs: str, ours: str, names: tuple[str, ...]) -> tuple[Row, ...]:
  """names: of the projections to queries, keys, values and out of them."""
  specs = (('q', 'DHK>(HK)D', 'HK>(HK)'), ('k', 'DGK>(GK)D', 'GK>(GK)'),
           ('v', 'DGK>(GK)D', 'GK>(GK)'), ('o', 'HKD>D(HK)', 'D>D'))
  return sum((_linear(theirs + name, f'{ours}/{x}', w, bias) for name, (x, w, bias) in zip(names, specs)), ())


def _mlp(up: str, down: str, ours: str) -> tuple[Row, ...]:
  return _linear(up, f'{ours}/up', 'DF>FD', 'F>F') + _linear(down, f'{ours}/down', 'FD>DF', 'D>D')


def _bert_rows(body: str, transform: tuple[str, str], logits: str, pooler: tuple[Row, ...],
               classes: dict[str, str]) -> tuple[Row, ...]:
  """transform: its dense layer and its norm; logits: what the output matrix and its bias are under; classes: of each head."""
  at, dense, norm = f'{body}encoder.layer.{{n}}.', *transform
  tables = {'word_embeddings': {'embed': 'VD>VD'}, 'position_embeddings': {'positions': 'PD>PD'},
            'token_type_embeddings': {'types': 'TD>TD'}}
  return (tuple(Row(f'{body}embeddings.{name}.weight', ours) for name, ours in tables.items())
          + _norm(f'{body}embeddings.LayerNorm', 'embed_norm')
          + _attention(at + 'attention.', 'layers/attention', ('self.query', 'self.key', 'self.value', 'output.dense'))
          + _norm(at + 'attention.output.LayerNorm', 'layers/norm1') + _norm(at + 'output.LayerNorm', 'layers/norm2')
          + _mlp(at + 'intermediate.dense', at + 'output.dense', 'layers/mlp')
          + _linear(dense, 'transform', 'DK>KD', 'K>K') + _norm(norm, 'transform/norm')
          + (Row(f'{logits}.bias', {'unembed_bias': 'V>V'}), Row(f'{logits}.decoder.weight', {'unembed': 'VD>VD'}))
          + pooler + sum((_linear(name, 'classify', 'DC>CD', 'C>C', head) for head, name in classes.items()), ()))


def _pooler(theirs: str, head: str = '') -> tuple[Row, ...]:
  return _linear(theirs, 'pooler', 'DK>KD', 'K>K', head)


def _t5_stack(body: str, ours: str, feed: int) -> tuple[Row, ...]:
  """feed: which of a block's sublayers is the mlp."""
  at, mlp, its = f'{body}block.{{n}}.layer.', f'{body}block.{{n}}.layer.{feed}.DenseReluDense.', f'{ours}layers/'
  return (_attention(f'{at}0.SelfAttention.', f'{its}attention', 'qkvo') + _norm(f'{at}0.layer_norm', f'{its}norm1')
          + (Row(f'{body}block.0.layer.0.SelfAttention.relative_attention_bias.weight', {f'{ours}relative': 'PH>PH'}),
             Row(f'{mlp}wi.weight', {f'{its}mlp/up/w': 'DF>FD'}, unless=f'{its}mlp/gate/w'),
             Row(f'{mlp}wi_0.weight', {f'{its}mlp/gate/w': 'DF>FD'}),
             Row(f'{mlp}wi_1.weight', {f'{its}mlp/up/w': 'DF>FD'}, when=f'{its}mlp/gate/w'),
             Row(f'{mlp}wo.weight', {f'{its}mlp/down/w': 'FD>DF'}))
          + _norm(f'{at}{feed}.layer_norm', f'{its}norm2') + _norm(f'{body}final_layer_norm', f'{ours}norm'))


def _bart_stack(body: str, ours: str) -> tuple[Row, ...]:
  at, its, names = f'{body}layers.{{n}}.', f'{ours}layers/', ('q_proj', 'k_proj', 'v_proj', 'out_proj')
  return (_attention(at + 'self_attn.', its + 'attention', names) + _norm(at + 'self_attn_layer_norm', its + 'norm1')
          + _attention(at + 'encoder_attn.', its + 'memory_attention', names)
          + _norm(at + 'encoder_attn_layer_norm', its + 'norm_memory')
          + _mlp(at + 'fc1', at + 'fc2', its + 'mlp') + _norm(at + 'final_layer_norm', its + 'norm2')
          + (Row(body + 'embed_positions.weight', {ours + 'positions': 'PD>PD'}),)
          + _norm(body + 'layernorm_embedding', ours + 'embed_norm'))


BART_ROWS = ((Row('model.shared.weight', {'embed': 'VD>VD'}), Row('lm_head.weight', {'unembed': 'VD>VD'}),
              Row('final_logits_bias', {'unembed_bias': 'V>()V'}))
             + _bart_stack('model.encoder.', 'encoder/') + _bart_stack('model.decoder.', ''))
T5_ROWS = ((Row('shared.weight', {'embed': 'VD>VD'}), Row('lm_head.weight', {'unembed': 'VD>VD'}))
           + _t5_stack('encoder.', 'encoder/', 1) + _t5_stack('decoder.', '', 2)
           + _attention('decoder.block.{n}.layer.1.EncDecAttention.', 'layers/memory_attention', 'qkvo')
           + _norm('decoder.block.{n}.layer.1.layer_norm', 'layers/norm_memory'))


# ---- config.json

def _activation(name: str, known: dict[str, str]):
  def read(hf):
    if hf[name] not in known:
      raise UsageError(f'config.json: {name}={hf[name]!r}: known are {", ".join(known)}')
    return {'mlp': known[hf[name]]}
  return read, lambda m: {name: next((theirs for theirs, ours in known.items() if ours == m.mlp), None) or next(iter(known))}


def _head(name: str, *without: str):
  """Which head there is, from the class's name: `name` and a key of HEADS, but for those that this family is `without`."""
  kinds = {kind: head for kind, head in HEADS.items() if kind not in without}

  def read(hf):
    said = next(iter(hf.get('architectures') or []), '')
    kind = said.removeprefix(name)
    if not said.startswith(name) or kind not in kinds:
      raise UsageError(
          f'config.json: architectures={hf.get("architectures")!r}: wants one of {", ".join(name + k for k in kinds)}')
    head = kinds[kind]
    labels = len(hf['id2label']) if hf.get('id2label') else hf.get('num_labels') or 2
    return {'head': head, 'C': labels if head in ('classify', 'tag', 'span') else 2 if kind == 'ForPreTraining' else 0,
            'pooler': head == 'classify' or bool(hf.get('add_pooling_layer', kind in ('Model', 'ForPreTraining'))),
            'output_bias': head == 'mlm', 'tied': head != 'mlm' or bool(hf.get('tie_word_embeddings', True))}

  def write(m: ModelConfig):
    fitting = [kind for kind, head in kinds.items()
               if head == m.head and (head != 'mlm' or (kind == 'ForPreTraining') == bool(m.C))]
    labels = {str(c): f'LABEL_{c}' for c in range(m.C)}
    return {'architectures': [name + (fitting or ['ForMaskedLM'])[0]], 'tie_word_embeddings': m.tied,
            'add_pooling_layer': m.pooler,
            **({} if m.head == 'mlm' or not m.C else {'id2label': labels, 'label2id': {v: int(k) for k, v in labels.items()}})}
  return read, write


def _settle_bert(body: str):
  """Files of one class differ in whether the pooler and the classifier of pairs, which it does not use, were kept."""
  def settle(config: dict, names: set[str]) -> dict:
    out = {**config, 'add_pooling_layer': f'{body}pooler.dense.weight' in names}
    if config.get('architectures') == ['BertForMaskedLM'] and 'cls.seq_relationship.weight' in names:
      out['architectures'] = ['BertForPreTraining']
    return out
  return settle


def _settle_t5(config: dict, names: set[str]) -> dict:
  """transformers 5 writes tie_word_embeddings=true of T5 v1.1 too, beside an output matrix of its own where there is one."""
  tied = config.get('tie_word_embeddings', True)
  scaled = config.get('scale_decoder_outputs', tied)
  return {**config, 'scale_decoder_outputs': scaled,
          'tie_word_embeddings': bool((tied and scaled) or 'lm_head.weight' not in names)}


def _settle_bart(config: dict, names: set[str]) -> dict:
  return {**config, 'final_logits_bias': 'final_logits_bias' in names}


def _bert(name: str, *more, without: tuple[str, ...] = (), activations=None):
  ours = {'kind': 'encoder', 'norm': 'layer', 'norm_place': 'after', 'embed_norm': True, 'position': 'learned', 'bias': 'all'}
  sizes = {'hidden_size': 'D', 'num_attention_heads': 'H', 'num_hidden_layers': 'N', 'intermediate_size': 'F',
           'layer_norm_eps': 'norm_eps', 'max_position_embeddings': 'P', 'type_vocab_size': 'T'}
  return (pieces.keys(sizes, layer_norm_eps=1e-12, type_vocab_size=2), pieces.vocabulary(), pieces.heads(),
          _activation('hidden_act', activations or ACTIVATIONS), _head(name, *without), *more,
          pieces.fixed({'position_embedding_type': 'absolute', 'is_decoder': False, 'add_cross_attention': False}, ours))


def _first_position():
  """RoBERTa counts positions from the row after that of its padding token."""
  return lambda hf: {'first_position': hf['pad_token_id'] + 1}, lambda m: {'pad_token_id': m.first_position - 1}


def _t5():
  sizes = {'d_model': 'D', 'num_heads': 'H', 'd_kv': 'K', 'd_ff': 'F', 'num_layers': 'encoder_N',
           'layer_norm_epsilon': 'norm_eps',
           'relative_attention_num_buckets': 'relative.buckets', 'relative_attention_max_distance': 'relative.distance'}

  def read(hf):
    tied = hf.get('tie_word_embeddings', True)
    return {'G': hf['num_heads'], 'N': hf['num_layers'] if hf.get('num_decoder_layers') is None else hf['num_decoder_layers'],
            'tied': tied, 'logit_scale': hf['d_model'] ** -0.5 if hf.get('scale_decoder_outputs', tied) else 1.}

  def write(m):
    return {'num_decoder_layers': m.N, 'tie_word_embeddings': m.tied, 'scale_decoder_outputs': m.logit_scale != 1}
  ours = {'kind': 'seq2seq', 'norm': 'rms', 'position': 'relative', 'attention_scale': 1., 'bias': 'none'}
  return (pieces.keys(sizes, relative_attention_num_buckets=32, relative_attention_max_distance=128, layer_norm_epsilon=1e-6),
          pieces.vocabulary(), (read, write), _activation('feed_forward_proj', FEEDS),
          pieces.fixed({'is_encoder_decoder': True}, ours))


def _bart(position: str, embed_norm: bool, theirs: dict):
  """The sizes of a BART are said of its encoder and of its decoder, and are known only where they agree."""
  sizes = {'d_model': 'D', 'encoder_layers': 'encoder_N', 'decoder_layers': 'N', 'encoder_attention_heads': 'H',
           'encoder_ffn_dim': 'F', 'scale_embedding': 'scale_embedding', 'tie_word_embeddings': 'tied'}
  offset = 2  # rows of the table before the first position

  def read(hf):
    for name in ('attention_heads', 'ffn_dim'):
      if hf[f'decoder_{name}'] != hf[f'encoder_{name}']:
        raise UsageError(
            f'config.json: decoder_{name}={hf[f"decoder_{name}"]!r}: wants that of the encoder, {hf[f"encoder_{name}"]!r}')
    learned = {'P': hf['max_position_embeddings'] + offset, 'first_position': offset} if position == 'learned' else {}
    return {'K': hf['d_model'] // hf['encoder_attention_heads'], 'G': hf['encoder_attention_heads'],
            'output_bias': bool(hf.get('final_logits_bias', True)), **learned}

  def write(m):
    return {'decoder_attention_heads': m.H, 'decoder_ffn_dim': m.F, 'final_logits_bias': m.output_bias,
            **({'max_position_embeddings': m.P - offset} if position == 'learned' else {})}
  ours = {'kind': 'seq2seq', 'norm': 'layer', 'norm_place': 'after', 'norm_eps': 1e-5, 'bias': 'all', 'position': position,
          'embed_norm': embed_norm}
  return (pieces.keys(sizes, scale_embedding=False, tie_word_embeddings=True), pieces.vocabulary(), (read, write),
          _activation('activation_function', ACTIVATIONS),
          pieces.fixed({'is_encoder_decoder': True, 'normalize_before': False, 'add_final_layer_norm': False, **theirs}, ours))


_OLD_NORMS = ((r'LayerNorm\.gamma$', 'LayerNorm.weight'), (r'LayerNorm\.beta$', 'LayerNorm.bias'))
_TIED = r'(encoder|decoder)\.embed_tokens\.weight$|lm_head\.weight$'

CLASSICS = {  # by config.json's model_type
    'bert': Family(
        'BertModel',
        _bert_rows('bert.', ('cls.predictions.transform.dense', 'cls.predictions.transform.LayerNorm'), 'cls.predictions',
                   _pooler('bert.pooler.dense'),
                   {'mlm': 'cls.seq_relationship', 'classify tag': 'classifier', 'span': 'qa_outputs'}),
        _bert('Bert'), r'embeddings\.position_ids$|cls\.predictions\.decoder\.(weight|bias)$',
        'bert.', _OLD_NORMS, _settle_bert('bert.')),
    'roberta': Family(
        'RobertaModel',
        _bert_rows('roberta.', ('lm_head.dense', 'lm_head.layer_norm'), 'lm_head',
                   _pooler('roberta.pooler.dense', 'mlm none tag span') + _pooler('classifier.dense', 'classify'),
                   {'classify': 'classifier.out_proj', 'tag': 'classifier', 'span': 'qa_outputs'}),
        _bert('Roberta', _first_position(), without=('ForPreTraining',), activations={'gelu': 'gelu_exact'}),  # its head's
        r'embeddings\.position_ids$|lm_head\.decoder\.(weight|bias)$', 'roberta.', _OLD_NORMS, _settle_bert('roberta.')),
    't5': Family('T5ForConditionalGeneration', T5_ROWS, _t5(),
                 _TIED + r'|EncDecAttention\.relative_attention_bias\.weight$', settle=_settle_t5),
    'bart': Family('BartForConditionalGeneration', BART_ROWS,
                   _bart('learned', True, {'normalize_embedding': True, 'static_position_embeddings': False}),
                   _TIED, 'model.', settle=_settle_bart),
    'marian': Family('MarianMTModel', BART_ROWS,
                     _bart('sinusoidal', False, {'normalize_embedding': False, 'static_position_embeddings': True,
                                                 'share_encoder_decoder_embeddings': True}),
                     _TIED + r'|embed_positions\.weight$', 'model.', settle=_settle_bart),
}
