"""German to English: configs/finetune/translation.py:MODEL, where MODEL is transformer (Vaswani et al. 2017) or gru (Cho et al.
2014, with the attention of Luong et al. 2015). Data: `jaxlm data fetch german --out=runs/data`, 43,000 pairs of sentences,
messages and phrases; any JSON lines with two fields will do, and with a network tfds:wmt14_translate/de-en/train.

Parameters: transformer 6,000·D + 3·(4·D² + 2·D·F) + 3·(8·D² + 2·D·F) = 3.7M with D=192, F=512; gru 6,000·D + 3·6·D² (encoders
that read forwards and backwards, and the decoder) + 5·D² (attention) = 3.7M with D=292.
Tokens: a step packs 32 rows of 64 tokens a side.
"""
from ml_collections import ConfigDict

MODELS = {
    'transformer': dict(kind='seq2seq', D=192, H=6, G=6, K=32, F=512, N=3, encoder_N=3, norm='layer', norm_place='pre',
                        position='sinusoidal', mlp='relu', bias='all', scale_embedding=True, dropout=0.1, init_std=0.05),
    'gru': dict(kind='rnn_seq2seq', D=292, N=1, init_std=0.06, dropout=0.1,
                rnn=dict(cell='gru', attention='luong', bidirectional=True)),  # bahdanau holds B·L·M·D at once
}


def get_config(model='transformer'):
  rows = {'transformer': 32, 'gru': 64}[model]  # a recurrent model reads a pair a row
  return ConfigDict(dict(
      steps=2000, batch=rows, length=64, log_every=50, save_every=500, eval_every=500,
      model=dict(V=6000, **MODELS[model]), objective=dict(name='answer', source=64), loss=dict(chunks=4, smoothing=0.1),
      optimizer=dict(lr=1.5e-3, warmup=200, schedule='inverse_sqrt', b2=0.98),
      data=dict(source='jsonl:runs/data/german.jsonl', key='de', target='en', tokenizer='bpe:6000', heldout=0.02)))
