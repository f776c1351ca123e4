"""A small Llama on the Python standard library's source text, in minutes on two CPU cores.

Parameters: 4 layers × (2·256·4·64 + 2·256·2·64 + 3·256·768) + 4,096·256 = 4.2M.
Tokens: 1,500 steps × 8 × 256 = 3.1M of an epoch's 9.1M.
"""
from ml_collections import ConfigDict


def get_config():
  return ConfigDict(dict(
      steps=1500, batch=8, length=256, log_every=20, save_every=300,
      model=dict(D=256, H=4, G=2, K=64, F=768, N=4, V=4096, scan=False),
      loss=dict(chunks=4),
      optimizer=dict(name='muon', lr=4e-3, schedule='wsd', warmup=50, decay=0.4, final=0.02),
      data=dict(source='stdlib', tokenizer='bpe:4096'),
  ))
