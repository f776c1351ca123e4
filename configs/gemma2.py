"""Gemma 2 (Riviere et al. 2024): configs/gemma2.py:SIZE, with SIZE 2b, 9b or 27b. Local and global layers in turn, norms
before and after each sublayer, caps on scores and logits.

Parameters: 256,000·D + N·(2·D·K·(H + G) + 3·D·F + 4·D) + D, as 589.8M + 26·77.9M + 2,304 = 2.61B.
Tokens: 1,024 × 8,192 = 8.4M a step. FLOPs of a step for 9b: ≈ 6 · 9.2B · 8.4M = 4.7e17, and attention.
"""
from ml_collections import ConfigDict

SIZES = {  # D, N, H, G, K, F, what scores are divided by the root of
    '2b': (2304, 26, 8, 4, 256, 9216, 256),
    '9b': (3584, 42, 16, 8, 256, 14_336, 256),
    '27b': (4608, 46, 32, 16, 128, 36_864, 144),
}


def get_config(size='2b'):
  D, N, H, G, K, F, scalar = SIZES[size]
  return ConfigDict(dict(
      steps=100_000, batch=1024, length=8192, log_every=10, save_every=500,
      model=dict(D=D, H=H, G=G, K=K, F=F, N=N, V=256_000, mlp='geglu', norm_place='both', norm_offset=1., norm_eps=1e-6,
                 pattern='local global', window=4096, attention_scale=0. if scalar == K else scalar ** -0.5,
                 attention_cap=50., logit_cap=30., scale_embedding=True, dtype='bfloat16', remat='full'),
      loss=dict(chunks=16),
      optimizer=dict(lr=3e-4, warmup=2000),
      data=dict(tokenizer='bpe:256000'),
  ))
