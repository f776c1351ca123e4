"""Phi-3 (Abdin et al. 2024): configs/phi3.py:SIZE, with SIZE mini (3.8B) or medium (14B).

Parameters: 2·32,064·D + N·(2·D·K·(H + G) + 3·D·F + 2·D) + D, as 197.0M + 32·113.3M + 3,072 = 3.82B.
Tokens: 1,024 × 4,096 = 4.2M a step × 790,000 steps = 3.3T. FLOPs for mini: ≈ 6 · 3.7B · 3.3T = 7.3e22.
"""
from ml_collections import ConfigDict

SIZES = {'mini': (3072, 32, 32, 32, 96, 8192), 'medium': (5120, 40, 40, 10, 128, 17_920)}  # D, N, H, G, K, F


def get_config(size='mini'):
  D, N, H, G, K, F = SIZES[size]
  return ConfigDict(dict(
      steps=790_000, batch=1024, length=4096, log_every=10, save_every=1000,
      model=dict(D=D, H=H, G=G, K=K, F=F, N=N, V=32_064, tied=False, pattern='local', window=2047, dtype='bfloat16',
                 remat='full'),
      optimizer=dict(lr=3e-4, warmup=2000),
      data=dict(tokenizer='bpe:32000'),
  ))
