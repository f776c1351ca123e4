"""Llama 2 (Touvron et al. 2023): configs/llama2.py:SIZE, with SIZE 7b, 13b or 70b. Bring its tokenizer.json.

Parameters: 2·32,000·D + N·(2·D·K·(H + G) + 3·D·F + 2·D) + D, as 2·131M + 32·202.4M + 4,096 = 6.74B.
Tokens: 1,024 × 4,096 = 4.2M a step × 480,000 steps = 2.0T. FLOPs for 7b: ≈ 6 · 6.74B · 2T = 8.1e22.
"""
from ml_collections import ConfigDict

SIZES = {  # D, N, H, G, F, learning rate
    '7b': (4096, 32, 32, 32, 11_008, 3e-4),
    '13b': (5120, 40, 40, 40, 13_824, 3e-4),
    '70b': (8192, 80, 64, 8, 28_672, 1.5e-4),
}


def get_config(size='7b'):
  D, N, H, G, F, lr = SIZES[size]
  return ConfigDict(dict(
      steps=480_000, batch=1024, length=4096, log_every=10, save_every=1000,
      model=dict(D=D, H=H, G=G, K=128, F=F, N=N, V=32_000, tied=False, dtype='bfloat16', remat='full'),
      optimizer=dict(lr=lr, warmup=2000, final=0.1),
      data=dict(tokenizer='bpe:32000'),
  ))
