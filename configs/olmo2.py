"""OLMo 2 (Walsh et al. 2025): configs/olmo2.py:SIZE, with SIZE 1b, 7b, 13b or 32b. Norms come after the sublayers, and
queries and keys are normed over all heads at once.

Parameters: 2·100,352·D + N·(2·D·128·(H + G) + 128·(H + G) + 3·D·F + 2·D) + D, as 411.0M + 16·67.1M + 2,048 = 1.48B.
Tokens: 1,024 × 4,096 = 4.2M a step × 950,000 steps = 4T. FLOPs for 7b: ≈ 6 · 6.9B · 4T = 1.7e23.
"""
from ml_collections import ConfigDict

SIZES = {  # D, N, H, G, F, learning rate
    '1b': (2048, 16, 16, 16, 8192, 4e-4),
    '7b': (4096, 32, 32, 32, 11_008, 3e-4),
    '13b': (5120, 40, 40, 40, 13_824, 9e-4),
    '32b': (5120, 64, 40, 8, 27_648, 6e-4),
}


def get_config(size='1b'):
  D, N, H, G, F, lr = SIZES[size]
  return ConfigDict(dict(
      steps=950_000, batch=1024, length=4096, log_every=10, save_every=1000,
      model=dict(D=D, H=H, G=G, K=128, F=F, N=N, V=100_352, tied=False, norm_place='post', qk_norm='all', norm_eps=1e-6,
                 rope=dict(base=500_000.), dtype='bfloat16', remat='full'),
      loss=dict(z_loss=1e-5),
      optimizer=dict(lr=lr, warmup=2000, final=0.1),
      data=dict(tokenizer='bpe:100278'),
  ))
