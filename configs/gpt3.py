"""GPT-3 (Brown et al. 2020, table 2.1): configs/gpt3.py:SIZE, with SIZE 125m, 350m, 760m, 1.3b, 2.7b, 6.7b, 13b or 175b.

Layers alternate between dense attention and a local band (§2.1, after Sparse Transformer, Child et al. 2019); the paper
does not tell the band's width, here it is 256, as in GPT-Neo. Where the paper's head counts do not divide its widths
(1.3b: 24 heads of 128 in 2,048; 13b: 5,140), the nearest that do are taken: 16 heads of 128, and 5,120.
Parameters: 50,257·D + 2,048·D + N·(12·D² + 13·D) + 2·D, as 52,305·12,288 + 96·1,812,099,072 + 24,576 = 174.6B.
Tokens: 300B; 175b takes 1,563 × 2,048 = 3.2M a step × 93,750 steps. FLOPs: 6 · 174.6B · 300B = 3.14e23 (table D.1).
"""
from ml_collections import ConfigDict

SIZES = {  # D, N, H, K, sequences a step, learning rate
    '125m': (768, 12, 12, 64, 256, 6e-4),
    '350m': (1024, 24, 16, 64, 256, 3e-4),
    '760m': (1536, 24, 16, 96, 256, 2.5e-4),
    '1.3b': (2048, 24, 16, 128, 512, 2e-4),
    '2.7b': (2560, 32, 32, 80, 512, 1.6e-4),
    '6.7b': (4096, 32, 32, 128, 1024, 1.2e-4),
    '13b': (5120, 40, 40, 128, 1024, 1e-4),
    '175b': (12_288, 96, 96, 128, 1536, 0.6e-4),
}


def get_config(size='125m'):
  D, N, H, K, batch, lr = SIZES[size]
  return ConfigDict(dict(
      steps=int(300e9 / (batch * 2048)), batch=batch, length=2048, log_every=20, save_every=1000,
      model=dict(D=D, H=H, G=H, K=K, F=4 * D, N=N, V=50_304, vocab=50_257, P=2048, norm='layer', position='learned',
                 mlp='gelu', bias='all', pattern='global local', window=256, dtype='bfloat16', remat='full'),
      optimizer=dict(lr=lr, warmup=int(375e6 / (batch * 2048)), final=0.1),
      data=dict(tokenizer='bpe:50257'),
  ))
