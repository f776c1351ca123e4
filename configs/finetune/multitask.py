"""Three tasks in one model, as T5 (Raffel et al. 2020, §2.4) is asked: each question begins with the name of its task.

    translate   German to English; `jaxlm data fetch german --out=runs/data`
    field       WordNet's definitions into their 45 fields, as text; `jaxlm data fetch glosses --out=runs/data`
    text        span corruption of the Python standard library, so that the model goes on reading

With a network: translate from tfds:wmt14_translate/de-en/train (de, en), summaries in place of fields from
tfds:cnn_dailymail/train (key article, target highlights, metrics rouge), text from tfds:c4/en/train; a longer length and
source for these. Answers are texts: where a dataset has numbers for labels, write JSON lines.

Parameters, D=192 and F=384: 8,192·D + 3·(4·D² + 3·D·F) + 3·(8·D² + 3·D·F) = 4.2M.
Tokens: a step has 32 rows of 64 tokens a side, of which 2 in 4 are of translate, 1 of field, 1 of text.
"""
from ml_collections import ConfigDict


def get_config():
  return ConfigDict(dict(
      steps=3000, batch=32, length=64, log_every=50, save_every=500, eval_every=500,
      model=dict(kind='seq2seq', D=192, H=6, G=6, K=32, F=384, N=3, encoder_N=3, V=8192, vocab=8100, position='relative',
                 mlp='geglu', dropout=0.1, init_std=0.05),
      objective=dict(source=64), loss=dict(chunks=4),
      optimizer=dict(lr=1.5e-3, warmup=200, schedule='inverse_sqrt', b2=0.98),
      data=dict(tokenizer='bpe:8000', heldout=0.02),  # vocab: and 100 rows for sentinels
      tasks=dict(
          translate=dict(weight=2., prefix='translate German to English: ', metrics='bleu', objective=dict(name='answer'),
                         data=dict(source='jsonl:runs/data/german.jsonl', key='de', target='en')),
          field=dict(weight=1., prefix='field: ', metrics='exact,f1', objective=dict(name='answer'),
                     data=dict(source='jsonl:runs/data/glosses.jsonl', key='text', target='label')),
          text=dict(weight=1., objective=dict(name='spans'), data=dict(source='stdlib')))))
