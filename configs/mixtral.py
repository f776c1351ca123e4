"""Mixtral (Jiang et al. 2024): configs/mixtral.py:SIZE, with SIZE 8x7b or 8x22b. Eight experts a layer, two a token.

Parameters: 2·V·D + N·(2·D·128·(H + 8) + 8·D + 8·3·D·F + 2·D) + D, as 0.26B + 32·1.451B = 46.7B, of which 12.9B a token.
Tokens: 1,024 × 4,096 = 4.2M a step. FLOPs of a step for 8x7b: ≈ 6 · 12.9B · 4.2M = 3.2e17, and attention.
"""
from ml_collections import ConfigDict

SIZES = {'8x7b': (4096, 32, 32, 14_336, 32_000), '8x22b': (6144, 56, 48, 16_384, 32_768)}  # D, N, H, F, V


def get_config(size='8x7b'):
  D, N, H, F, V = SIZES[size]
  return ConfigDict(dict(
      steps=100_000, batch=1024, length=4096, log_every=10, save_every=500,
      model=dict(D=D, H=H, G=8, K=128, F=F, N=N, V=V, tied=False, rope=dict(base=1_000_000.), dtype='bfloat16',
                 remat='full', moe=dict(E=8, F=F, top_k=2, balance_loss=0.02, z_loss=1e-3)),
      optimizer=dict(lr=3e-4, warmup=2000),
      data=dict(tokenizer=f'bpe:{V}'),
  ))
