"""Pythia (Biderman et al. 2023), GPT-NeoX's architecture: configs/pythia.py:SIZE, with SIZE 70m, 160m, 410m, 1b, 1.4b, 2.8b,
6.9b or 12b.

Parameters: 2·V·D + N·(12·D² + 13·D) + 2·D, as 2·50,304·512 + 6·3,152,384 + 1,024 = 70.4M.
Tokens: 1,024 × 2,048 = 2.1M a step × 143,000 steps = 300B. FLOPs for 12b: ≈ 6 · 11.8B · 300B = 2.1e22.
"""
from ml_collections import ConfigDict

SIZES = {  # D, N, H, V, learning rate
    '70m': (512, 6, 8, 50_304, 1e-3),
    '160m': (768, 12, 12, 50_304, 6e-4),
    '410m': (1024, 24, 16, 50_304, 3e-4),
    '1b': (2048, 16, 8, 50_304, 3e-4),
    '1.4b': (2048, 24, 16, 50_304, 2e-4),
    '2.8b': (2560, 32, 32, 50_304, 1.6e-4),
    '6.9b': (4096, 32, 32, 50_432, 1.2e-4),
    '12b': (5120, 36, 40, 50_688, 1.2e-4),
}


def get_config(size='70m'):
  D, N, H, V, lr = SIZES[size]
  return ConfigDict(dict(
      steps=143_000, batch=1024, length=2048, log_every=20, save_every=1000,
      model=dict(D=D, H=H, G=H, K=D // H, F=4 * D, N=N, V=V, norm='layer', mlp='gelu_exact', bias='all', parallel=True,
                 tied=False, rope=dict(share=0.25), dtype='bfloat16', remat='full'),
      optimizer=dict(lr=lr, warmup=1430, final=0.1),
      data=dict(tokenizer='bpe:50254'),
  ))
