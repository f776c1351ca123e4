"""Qwen2 and Qwen2.5 (Yang et al. 2024): configs/qwen2.py:SIZE, with SIZE 0.5b, 1.5b, 7b or 72b. Biases in q, k and v only.

Parameters: (1 or 2)·V·D + N·(2·D·K·(H + G) + K·(H + 2·G) + 3·D·F + 2·D) + D, as 136.1M + 24·14.9M + 896 = 494M.
Tokens: 1,024 × 4,096 = 4.2M a step. FLOPs of a step for 7b: ≈ 6 · 7.1B · 4.2M = 1.8e17, and attention.
"""
from ml_collections import ConfigDict

SIZES = {  # D, N, H, G, K, F, V, tied
    '0.5b': (896, 24, 14, 2, 64, 4864, 151_936, True),
    '1.5b': (1536, 28, 12, 2, 128, 8960, 151_936, True),
    '7b': (3584, 28, 28, 4, 128, 18_944, 152_064, False),
    '72b': (8192, 80, 64, 8, 128, 29_568, 152_064, False),
}


def get_config(size='0.5b'):
  D, N, H, G, K, F, V, tied = SIZES[size]
  return ConfigDict(dict(
      steps=100_000, batch=1024, length=4096, log_every=10, save_every=500,
      model=dict(D=D, H=H, G=G, K=K, F=F, N=N, V=V, tied=tied, bias='qkv', norm_eps=1e-6, rope=dict(base=1_000_000.),
                 dtype='bfloat16', remat='full'),
      optimizer=dict(lr=3e-4, warmup=2000),
      data=dict(tokenizer='bpe:151643'),
  ))
