"""Tiny random encoders and encoder-decoders, in transformers: the references of tests/test_classics.py."""
import torch
import transformers

V = 272
_BERT = dict(hidden_size=32, num_attention_heads=4, intermediate_size=48, num_hidden_layers=3,
             vocab_size=V, max_position_embeddings=64)
_ROBERTA = dict(_BERT, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2)
_T5 = dict(vocab_size=V, d_model=32, d_kv=6, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4,
           pad_token_id=0, eos_token_id=1,
           decoder_start_token_id=0, relative_attention_num_buckets=8, relative_attention_max_distance=20)
_BART = dict(vocab_size=V, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
             encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, forced_eos_token_id=None, init_std=0.2)
_MARIAN = dict(_BART, pad_token_id=V - 1, eos_token_id=0, decoder_start_token_id=V - 1)

# name → (class, config class, its arguments)
LMS = {
    'bert': ('BertForMaskedLM', 'BertConfig', _BERT),
    'bert, pairs': ('BertForPreTraining', 'BertConfig', dict(_BERT, hidden_act='gelu_new')),
    'roberta': ('RobertaForMaskedLM', 'RobertaConfig', _ROBERTA),
    't5': ('T5ForConditionalGeneration', 'T5Config', _T5),
    't5 1.1': ('T5ForConditionalGeneration', 'T5Config', dict(_T5, feed_forward_proj='gated-gelu', tie_word_embeddings=False)),
    'bart': ('BartForConditionalGeneration', 'BartConfig', _BART),
    'bart, scaled': ('BartForConditionalGeneration', 'BartConfig',
                     dict(_BART, scale_embedding=True, activation_function='relu')),
    'marian': ('MarianMTModel', 'MarianConfig', dict(_MARIAN, scale_embedding=True, activation_function='swish')),
    'marian, unscaled': ('MarianMTModel', 'MarianConfig', dict(_MARIAN, activation_function='relu')),
}
HEADS = {
    'bert, bare': ('BertModel', 'BertConfig', _BERT),
    'bert, classes': ('BertForSequenceClassification', 'BertConfig', dict(_BERT, num_labels=3)),
    'bert, tags': ('BertForTokenClassification', 'BertConfig', dict(_BERT, num_labels=5)),
    'bert, spans': ('BertForQuestionAnswering', 'BertConfig', _BERT),
    'roberta, bare': ('RobertaModel', 'RobertaConfig', _ROBERTA),
    'roberta, classes': ('RobertaForSequenceClassification', 'RobertaConfig', dict(_ROBERTA, num_labels=3)),
    'roberta, tags': ('RobertaForTokenClassification', 'RobertaConfig', dict(_ROBERTA, num_labels=5)),
    'roberta, spans': ('RobertaForQuestionAnswering', 'RobertaConfig', _ROBERTA),
}
ALL = {**LMS, **HEADS}


def make(name: str, seed: int = 0, **changes):
  """The tiny model with noise on every parameter and on the bias of the logits, so that norms of 1 and biases of 0 hide
  nothing; its own output matrix where the family has one; eager attention, in float32."""
  cls, config, arguments = ALL[name]
  config = getattr(transformers, config)(**{**arguments, **changes}, attn_implementation='eager')
  torch.manual_seed(seed)  # of the initialisation: what other tests drew is no part of it
  model = getattr(transformers, cls)(config).float().eval()
  if name == 't5 1.1':  # transformers 5 ties it until a file says otherwise
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for key, p in [*model.named_parameters(), *model.named_buffers()]:
      if p.dtype.is_floating_point and p.requires_grad or 'logits_bias' in key:
        p.add_(0.1 * torch.randn(p.shape, generator=generator))
  return model


def outputs(model, **batch):
  """What its class is for: logits, scores of both ends side by side, or hidden states."""
  out = model(**batch)
  if 'start_logits' in out:
    return torch.stack([out.start_logits, out.end_logits], -1)
  return next(out[key] for key in ('prediction_logits', 'logits', 'last_hidden_state') if key in out)
