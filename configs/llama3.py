"""Llama 3.1 and 3.2 (Grattafiori et al. 2024): configs/llama3.py:SIZE, with SIZE 1b, 3b, 8b, 70b or 405b. Bring its
tokenizer.json.

Parameters: (1 or 2)·128,256·D + N·(2·D·K·(H + G) + 3·D·F + 2·D) + D, as 2·525.3M + 32·218.1M + 4,096 = 8.03B.
Tokens: 1,024 × 8,192 = 8.4M a step. FLOPs of a step for 405b: ≈ 6 · 405B · 8.4M = 2.0e19, and attention.
The rope scaling is that of the published weights, which reach 131,072 tokens; from scratch, leave it (rope.scaling=none).
"""
from ml_collections import ConfigDict

SIZES = {  # D, N, H, G, K, F, tied, rope factor, learning rate
    '1b': (2048, 16, 32, 8, 64, 8192, True, 32., 3e-4),
    '3b': (3072, 28, 24, 8, 128, 8192, True, 32., 3e-4),
    '8b': (4096, 32, 32, 8, 128, 14_336, False, 8., 3e-4),
    '70b': (8192, 80, 64, 8, 128, 28_672, False, 8., 1.5e-4),
    '405b': (16_384, 126, 128, 8, 128, 53_248, False, 8., 8e-5),
}


def get_config(size='8b'):
  D, N, H, G, K, F, tied, factor, lr = SIZES[size]
  return ConfigDict(dict(
      steps=100_000, batch=1024, length=8192, log_every=10, save_every=500,
      model=dict(D=D, H=H, G=G, K=K, F=F, N=N, V=128_256, tied=tied, dtype='bfloat16', remat='full',
                 rope=dict(base=500_000., scaling='llama3', factor=factor, original=8192, low=1., high=4.)),
      loss=dict(chunks=16),
      optimizer=dict(lr=lr, warmup=8000),
      data=dict(tokenizer='bpe:128256'),
      checkpoint=dict(keep_every=5000),
  ))
