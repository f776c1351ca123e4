"""Long texts into short ones by an encoder and decoder: configs/finetune/summarisation.py. Data: `jaxlm data fetch docstrings
--out=runs/data`, 7,800 functions of the standard library, each summarised by the first line of its docstring; with a network,
tfds:cnn_dailymail/train with data.key=article and data.target=highlights. Score with `jaxlm eval --metrics=rouge`.

From scratch, a small T5: 2·4,096·D + 3·(4·D² + 3·D·F) + 3·(8·D² + 3·D·F) = 4.0M parameters with D=192, F=384. To start from a T5 that has
read: --config.start.checkpoint=WORKDIR --config.data.tokenizer=start, and the sizes of its config.json.
"""
from ml_collections import ConfigDict


def get_config():
  return ConfigDict(dict(
      steps=1500, batch=16, length=64, log_every=50, save_every=500, eval_every=500,
      model=dict(kind='seq2seq', D=192, H=6, G=6, K=32, F=384, N=3, encoder_N=3, V=4096, position='relative', mlp='geglu', tied=False,
                 dropout=0.1, init_std=0.05),
      objective=dict(name='answer', source=384), loss=dict(chunks=4), optimizer=dict(lr=1e-3, warmup=100, final=0.05),
      data=dict(source='jsonl:runs/data/docstrings.jsonl', key='code', target='summary', tokenizer='bpe:4096', heldout=0.03)))
