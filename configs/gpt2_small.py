"""GPT-2 small, 124M (Radford et al. 2019), trained as nanoGPT does.

Parameters: 50,304·768 + 1,024·768 + 12 × (12·768² + 13·768) + 2·768 = 124.5M (vocabulary 50,257 padded to 50,304).
Tokens: 512 × 1,024 = 524,288 a step, × 19,073 steps = 10.0B. FLOPs: ≈ 6 · 124M · 10B = 7.4e18, and attention.
"""
from ml_collections import ConfigDict


def get_config():
  return ConfigDict(dict(
      steps=19_073, batch=512, length=1024, microbatches=8, log_every=20, save_every=1000, eval_every=1000,
      model=dict(D=768, H=12, G=12, K=64, F=3072, N=12, V=50_304, vocab=50_257, P=1024, norm='layer', position='learned',
                 mlp='gelu', bias='all', dropout=0., dtype='bfloat16'),
      optimizer=dict(lr=6e-4, warmup=700, final=0.1),
      data=dict(tokenizer='bpe:50257'),
  ))
