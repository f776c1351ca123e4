"""Mistral 7B (Jiang et al. 2023): a Llama whose layers all see a window of 4,096 tokens.

Parameters: 2·32,000·4,096 + 32·(2·4,096·128·40 + 3·4,096·14,336 + 2·4,096) + 4,096 = 7.24B.
Tokens: 512 × 8,192 = 4.2M a step. FLOPs of a step: ≈ 6 · 7.24B · 4.2M = 1.8e17, and attention.
"""
from ml_collections import ConfigDict


def get_config():
  return ConfigDict(dict(
      steps=100_000, batch=512, length=8192, log_every=10, save_every=500,
      model=dict(D=4096, H=32, G=8, K=128, F=14_336, N=32, V=32_000, tied=False, pattern='local', window=4096,
                 dtype='bfloat16', remat='full'),
      optimizer=dict(lr=3e-4, warmup=2000),
      data=dict(tokenizer='bpe:32000'),
  ))
