"""Interpolated modified Kneser-Ney n-grams (Chen & Goodman 1998): configs/ngram.py:ORDER, with ORDER 1 to 7, over bytes.

Parameters: a key and a count, 12 bytes, for each different gram of 1 to ORDER symbols that the text has: at most ORDER ·
tokens, as 5 · 100M · 12 = 6 GB for 100 MB of noise; of source text it is a twentieth of that. Nothing is trained: the
text is read ORDER times, at a sort of its symbols each.
Over tokens: --config.data.tokenizer=bpe:4096 --config.model.V=4096.
"""
from ml_collections import ConfigDict


ORDERS = {str(order): order for order in range(1, 8)}


def get_config(order='5'):
  return ConfigDict(dict(
      steps=1,
      model=dict(kind='ngram', V=257, ngram=dict(order=ORDERS[order])),
      data=dict(tokenizer='bytes'),
  ))
