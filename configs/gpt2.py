"""GPT-2 (Radford et al. 2019): configs/gpt2.py:SIZE, with SIZE 124m, 355m, 774m or 1558m.

Parameters: 50,257·D + 1,024·D + N·(12·D² + 13·D) + 2·D, as 51,281·768 + 12·7,087,872 + 1,536 = 124.4M (the vocabulary's
rows are padded to 50,304). Tokens: 512 × 1,024 = 524,288 a step, × 19,073 steps = 10.0B, as nanoGPT's short run.
FLOPs for 124m: ≈ 6 · 124M · 10B = 7.5e18, and attention.
"""
from ml_collections import ConfigDict

SIZES = {  # D, N, H, learning rate
    '124m': (768, 12, 12, 6e-4),
    '355m': (1024, 24, 16, 3e-4),
    '774m': (1280, 36, 20, 2.5e-4),
    '1558m': (1600, 48, 25, 2e-4),
}


def get_config(size='124m'):
  D, N, H, lr = SIZES[size]
  return ConfigDict(dict(
      steps=19_073, batch=512, length=1024, microbatches=8, log_every=20, save_every=1000, eval_every=1000,
      model=dict(D=D, H=H, G=H, K=64, F=4 * D, N=N, V=50_304, vocab=50_257, P=1024, norm='layer', position='learned',
                 mlp='gelu', bias='all', dtype='bfloat16', remat='dots'),
      optimizer=dict(lr=lr, warmup=700, final=0.1),
      data=dict(tokenizer='bpe:50257'),
  ))
