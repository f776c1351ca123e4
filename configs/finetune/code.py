"""A function's body from its head and what it is for, by a decoder that has read code: configs/finetune/code.py[:RANK]. It
starts from the run of `make quickstart` (runs/quickstart); all of it is trained, or, with a RANK, only pairs of that rank
beside its weights (LoRA). Data: `jaxlm data fetch docstrings --out=runs/data`, 7,800 functions of the standard library; any JSON
lines with two fields will do.

Some of these functions are in what the quickstart has read: what it says of held-out ones is no measure of what it knows. For
that, hold out whole files: --config.data.source='jsonl:…' of your own.
"""
from ml_collections import ConfigDict


def get_config(rank='0'):
  return ConfigDict(dict(
      steps=600, batch=16, length=384, log_every=50, save_every=200, eval_every=200,
      model=dict(D=128, H=2, G=1, K=64, F=384, N=6, V=4096,  # configs/quickstart.py's
                 lora=dict(rank=int(rank), alpha=2. * max(1, int(rank)), targets='(attention|mlp)/.*/w')),
      objective=dict(name='answer'), loss=dict(chunks=8),
      optimizer=dict(lr=1e-3 if int(rank) else 2e-4, warmup=50, final=0.05, weight_decay=0.),
      start=dict(checkpoint='runs/quickstart'),
      data=dict(source='jsonl:runs/data/docstrings.jsonl', key='head', target='body', tokenizer='start', heldout=0.03)))
