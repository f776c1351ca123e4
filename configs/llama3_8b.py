"""Llama 3 8B (Grattafiori et al. 2024), from scratch; bring its tokenizer.json, or train one of the size.

Parameters: 2 · 128,256·4,096 + 32 × (2·4,096² + 2·4,096·1,024 + 3·4,096·14,336 + 2·4,096) + 4,096 = 8.03B.
Tokens: 512 × 8,192 = 4.2M a step, × 40,000 steps = 168B, near 20 a parameter. FLOPs: ≈ 6 · 8.03B · 168B = 8.1e21.
Memory: 16 bytes a parameter in float32 (weights, gradient, two moments) = 128 GB, cut over mesh.fsdp.
"""
from ml_collections import ConfigDict


def get_config():
  return ConfigDict(dict(
      steps=40_000, batch=512, length=8192, log_every=10, save_every=500, eval_every=2000,
      model=dict(D=4096, H=32, G=8, K=128, F=14_336, N=32, V=128_256, tied=False, rope=dict(base=500_000.), dtype='bfloat16',
                 remat='full'),
      loss=dict(chunks=16),
      optimizer=dict(lr=3e-4, warmup=2000),
      data=dict(tokenizer='bpe:128256'),
      checkpoint=dict(keep_every=5000),
  ))
