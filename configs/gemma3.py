"""Gemma 3, the language model (Gemma Team 2025): configs/gemma3.py:SIZE, with SIZE 270m, 1b, 4b, 12b or 27b. Five local
layers to a global one, each kind with its own rope base; queries and keys are normed.

Parameters: V·D + N·(2·D·K·(H + G) + 2·K + 3·D·F + 4·D) + D, as 302.0M + 26·26.8M + 1,152 = 1.00B.
Tokens: 1,024 × 8,192 = 8.4M a step. FLOPs of a step for 12b: ≈ 6 · 11.8B · 8.4M = 5.9e17, and attention.
The scaled rope is that of the published weights from 4b on, which reach 131,072 tokens.
"""
from ml_collections import ConfigDict

SIZES = {  # D, N, H, G, K, F, V, window, what scores are divided by the root of
    '270m': (640, 18, 4, 1, 256, 2048, 262_144, 512, 256),
    '1b': (1152, 26, 4, 1, 256, 6912, 262_144, 512, 256),
    '4b': (2560, 34, 8, 4, 256, 10_240, 262_208, 1024, 256),
    '12b': (3840, 48, 16, 8, 256, 15_360, 262_208, 1024, 256),
    '27b': (5376, 62, 32, 16, 128, 21_504, 262_208, 1024, 168),
}


def get_config(size='1b'):
  D, N, H, G, K, F, V, window, scalar = SIZES[size]
  scaled = {} if window == 512 else dict(scaling='linear', factor=8.)
  return ConfigDict(dict(
      steps=100_000, batch=1024, length=8192, log_every=10, save_every=500,
      model=dict(D=D, H=H, G=G, K=K, F=F, N=N, V=V, mlp='geglu', norm_place='both', norm_offset=1., norm_eps=1e-6,
                 qk_norm='head', pattern='local local local local local global', window=window,
                 attention_scale=0. if scalar == K else scalar ** -0.5, scale_embedding=True,
                 rope=dict(base=1_000_000., local_base=10_000., **scaled), dtype='bfloat16', remat='full'),
      loss=dict(chunks=16),
      optimizer=dict(lr=3e-4, warmup=2000),
      data=dict(tokenizer='bpe:262144'),
  ))
