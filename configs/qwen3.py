"""Qwen3 (Yang et al. 2025): configs/qwen3.py:SIZE, with SIZE 0.6b, 1.7b, 4b, 8b, 14b or 32b, and the mixtures 30b-a3b and
235b-a22b (128 experts, 8 a token). Queries and keys are normed; no biases.

Parameters: (1 or 2)·151,936·D + N·(256·D·(H + G) + 256 + 3·D·F + 2·D) + D, as 155.6M + 28·15.7M + 1,024 = 596M.
Tokens: 1,024 × 4,096 = 4.2M a step. FLOPs of a step for 8b: ≈ 6 · 7.6B · 4.2M = 1.9e17, and attention.
"""
from ml_collections import ConfigDict

SIZES = {  # D, N, H, G, F, tied
    '0.6b': (1024, 28, 16, 8, 3072, True),
    '1.7b': (2048, 28, 16, 8, 6144, True),
    '4b': (2560, 36, 32, 8, 9728, True),
    '8b': (4096, 36, 32, 8, 12_288, False),
    '14b': (5120, 40, 40, 8, 17_408, False),
    '32b': (5120, 64, 64, 8, 25_600, False),
    '30b-a3b': (2048, 48, 32, 4, 6144, False),
    '235b-a22b': (4096, 94, 64, 4, 12_288, False),
}
EXPERT_F = {'30b-a3b': 768, '235b-a22b': 1536}


def get_config(size='0.6b'):
  D, N, H, G, F, tied = SIZES[size]
  moe = dict(E=128, F=EXPERT_F[size], top_k=8, balance_loss=1e-3) if size in EXPERT_F else {}
  return ConfigDict(dict(
      steps=100_000, batch=1024, length=4096, log_every=10, save_every=500,
      model=dict(D=D, H=H, G=G, K=128, F=F, N=N, V=151_936, tied=tied, qk_norm='head', norm_eps=1e-6,
                 rope=dict(base=1_000_000.), dtype='bfloat16', remat='full', moe=moe),
      optimizer=dict(lr=3e-4, warmup=2000),
      data=dict(tokenizer='bpe:151643'),
  ))
