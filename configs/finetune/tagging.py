"""A tag for each word by an encoder: configs/finetune/tagging.py. Data: `jaxlm data fetch brown --out=runs/data`, 57,000 sentences whose
words have a part of speech; with a network, tfds:conll2003/train with data.key=tokens, data.target=ner and the classes 0|1|…|8.

From scratch, a small BERT: 4,096·D + 3·(4·D² + 2·D·F) + positions = 1.2M parameters with D=128, F=512. To start from an encoder that has read:
--config.start.checkpoint=WORKDIR --config.data.tokenizer=start, and the sizes of its config.json.
"""
from ml_collections import ConfigDict

BROWN = '''
' '' ( ) * , -- . : `` abl abn abx ap ap$ at be bed bedz beg bem ben ber bez cc cd cd$ cs do dod doz dt dt$ dti dts
dtx ex fw hv hvd hvg hvn hvz in jj jj$ jjr jjs jjt md nil nn nn$ nns nns$ np np$ nps nps$ nr nr$ nrs od pn pn$ pp$
pp$$ ppl ppls ppo pps ppss ql qlp rb rb$ rbr rbt rn rp to uh vb vbd vbg vbn vbz wdt wp$ wpo wps wql wrb
'''  # without what follows a -, + or *


def get_config():
  classes = BROWN.split()
  return ConfigDict(dict(
      steps=1500, batch=64, length=64, log_every=50, save_every=500, eval_every=500,
      model=dict(kind='encoder', D=128, H=4, G=4, K=32, F=512, N=3, V=4096, P=64, norm='layer', norm_place='pre', embed_norm=True,
                 position='learned', mlp='gelu_exact', bias='all', head='tag', C=len(classes), dropout=0.1),
      objective=dict(name='tag'), optimizer=dict(lr=1e-3, warmup=100, final=0.05),
      data=dict(source='jsonl:runs/data/brown.jsonl', form='tags', key='words', target='tags', classes='|'.join(classes),
                tokenizer='bpe:4096', heldout=0.02)))
