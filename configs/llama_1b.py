"""A Llama of 1.2B parameters (the shape of Llama 3.2 1B, with its own 32k vocabulary).

Parameters: 32,768·2,048 + 16 × (2·2,048² + 2·2,048·512 + 3·2,048·8,192 + 2·2,048) + 2,048 = 1.04B.
Tokens: 512 × 4,096 = 2.1M a step, × 12,000 steps = 25B. FLOPs: ≈ 6 · 1.04B · 25B = 1.6e20, and attention.
"""
from ml_collections import ConfigDict


def get_config():
  return ConfigDict(dict(
      steps=12_000, batch=512, length=4096, log_every=10, save_every=500, eval_every=1000,
      model=dict(D=2048, H=32, G=8, K=64, F=8192, N=16, V=32_768, rope=dict(base=500_000.), dtype='bfloat16', remat='dots'),
      optimizer=dict(lr=6e-4, warmup=1000),
      data=dict(tokenizer='bpe:32768'),
      checkpoint=dict(keep_every=2000),
  ))
