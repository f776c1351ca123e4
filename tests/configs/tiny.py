"""A model so small that its steps cost nothing; ARGUMENT is the glob of its texts."""
from ml_collections import ConfigDict


def get_config(texts):
  return ConfigDict(dict(
      steps=300, batch=8, length=32, log_every=1, save_every=20,
      model=dict(D=16, H=2, G=1, K=8, F=32, N=2, V=264),
      loss=dict(chunks=2),
      optimizer=dict(lr=1e-2, warmup=10),
      data=dict(source=f'text:{texts}', tokenizer='bytes', heldout=0.2),
  ))
