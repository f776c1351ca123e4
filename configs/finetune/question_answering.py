"""What of a text answers a question, by an encoder: configs/finetune/question_answering.py. Data: `jaxlm data fetch meanings
--out=runs/data`, 29,000 questions for the definition of a word among four; with a network, tfds:squad/train (its fields are
these, so only data.source changes; and length, to 384).

From scratch, a small BERT: 6,000·D + 4·(4·D² + 2·D·F) + positions = 1.6M parameters with D=128, F=512. To start from an encoder that has read:
--config.start.checkpoint=WORKDIR --config.data.tokenizer=start, and the sizes of its config.json.
"""
from ml_collections import ConfigDict


def get_config():
  return ConfigDict(dict(
      steps=2000, batch=32, length=128, log_every=50, save_every=500, eval_every=500,
      model=dict(kind='encoder', D=128, H=4, G=4, K=32, F=512, N=4, V=6000, P=128, T=2, norm='layer', norm_place='pre', embed_norm=True,
                 position='learned', mlp='gelu_exact', bias='all', head='span', C=2, dropout=0.1),
      objective=dict(name='span'), optimizer=dict(lr=1e-3, warmup=100, final=0.05),
      data=dict(source='jsonl:runs/data/meanings.jsonl', form='span', key='question', context='context', target='answers',
                tokenizer='bpe:6000', heldout=0.02)))
