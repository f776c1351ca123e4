"""Interpolated modified Kneser-Ney n-grams (Chen & Goodman 1998): configs/ngram.py:ORDER, with ORDER 1 to 7, over bytes.

Parameters: a key and a count, 8 + 4 bytes, for each different gram of 1 to ORDER symbols that the text has. 94.5 MB of source
text have 0.0002 + 0.017 + 0.241 + 1.04 + 2.69 = 3.99M of them up to order 5: 48 MB; as 29.9M tokens of bpe:4096, 25.5M: 306 MB.
Nothing is trained: the text is read ORDER times, and each time its symbols are sorted, a batch at a time.
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
