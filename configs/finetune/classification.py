"""Texts into classes by an encoder: configs/finetune/classification.py[:CLASSES], CLASSES with | between, by default spam and ham.
Data: `jaxlm data fetch spam --out=runs/data`, 6,000 mails; with a network, with the CLASSES 0|1, tfds:imdb_reviews/train, or
tfds:glue/sst2/train with data.key=sentence; of both, the field is label.

From scratch, a small BERT: 4,096·D + 4·(4·D² + 2·D·F) + positions and pooler = 1.4M parameters with D=128, F=512. To start from an encoder that
has read: --config.start.checkpoint=WORKDIR --config.data.tokenizer=start, and the sizes of its config.json.
"""
from ml_collections import ConfigDict


def get_config(classes='ham|spam'):
  return ConfigDict(dict(
      steps=600, batch=32, length=256, log_every=50, save_every=300, eval_every=200,
      model=dict(kind='encoder', D=128, H=4, G=4, K=32, F=512, N=4, V=4096, P=256, norm='layer', norm_place='pre', embed_norm=True,
                 position='learned', mlp='gelu_exact', bias='all', head='classify', pooler=True, C=len(classes.split('|')),
                 dropout=0.1),
      objective=dict(name='classify'), optimizer=dict(lr=1e-3, warmup=60, final=0.05),
      data=dict(source='jsonl:runs/data/spam.jsonl', target='label', classes=classes, tokenizer='bpe:4096', heldout=0.1)))
