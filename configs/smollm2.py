"""SmolLM2 (Ben Allal et al. 2025): configs/smollm2.py:SIZE, with SIZE 135m, 360m or 1.7b. `make smollm2` brings weights.

Parameters: 49,152·D + N·(2·D·64·(H + G) + 3·D·F + 2·D) + D, as 28.3M + 30·3,540,096 + 576 = 134.5M.
Tokens: 1,024 × 2,048 = 2.1M a step × 950,000 steps = 2T. FLOPs for 135m: ≈ 6 · 134.5M · 2T = 1.6e21.
"""
from ml_collections import ConfigDict

SIZES = {  # D, N, H, G, F, rope base, learning rate
    '135m': (576, 30, 9, 3, 1536, 100_000., 3e-3),
    '360m': (960, 32, 15, 5, 2560, 100_000., 3e-3),
    '1.7b': (2048, 24, 32, 32, 8192, 130_000., 5e-4),
}


def get_config(size='135m'):
  D, N, H, G, F, base, lr = SIZES[size]
  return ConfigDict(dict(
      steps=950_000, batch=1024, length=2048, log_every=20, save_every=2000,
      model=dict(D=D, H=H, G=G, K=64, F=F, N=N, V=49_152, rope=dict(base=base), dtype='bfloat16', remat='dots'),
      optimizer=dict(lr=lr, schedule='wsd', warmup=2000, final=0.),
      data=dict(tokenizer='bpe:49152'),
  ))
