"""The logit lens (nostalgebraist 2020): what the model would say if it ended after each of its layers.

A hidden state goes through what the last one goes through: the norm that ends the stack, an encoder's transform, the
output matrix. Row 0 is of the embeddings, row n of what comes out of layer n, the last is the model's own answer.
"""
import functools
import pathlib

import jax
import numpy as np

from jaxlm.errors import UsageError
from jaxlm.look import hidden, page, reading
from jaxlm.models import embedding, heads, output
from jaxlm.schema import ModelConfig


@functools.partial(jax.jit, static_argnums=0)
def _logits(cfg: ModelConfig, params, x_BLD):
  if cfg.kind != 'rnn':
    x_BLD = embedding.final_norm(cfg, params, x_BLD)
  if cfg.kind == 'encoder':
    x_BLD = heads.transform(cfg, params, x_BLD)
  return output.logits(cfg, output.Hidden(x_BLD, embedding.unembedding(cfg, params), {}))


def _each(lm, text: str, source: str | None, see) -> list:
  """[see(float32 logits [L, V])] of the states, one at a time: all of them may not fit."""
  m = lm.config.model
  if m.head not in ('lm', 'mlm') or (m.kind == 'encoder' and m.head != 'mlm'):
    raise UsageError(f'model.head={m.head}: the lens wants a model that predicts tokens, of head lm or mlm')
  r = reading.read(lm, text, source)
  return hidden.run(lm, [r], lambda x_BLD, _: see(np.asarray(jax.device_get(_logits(m, lm.params, x_BLD)))[0, :len(r.ids)]))


def lens(lm, text: str, source: str | None = None) -> np.ndarray:
  """float32 logits [N + 1, L, V] of the tokens of reading.read; source: what an encoder-decoder's encoder reads. UsageError
  for a model that predicts no tokens."""
  return np.stack(_each(lm, text, source, lambda logits_LV: logits_LV))


def likeliest(lm, text: str, k: int = 5, source: str | None = None) -> tuple[np.ndarray, np.ndarray]:
  """(int32 ids, float32 probabilities) [N + 1, L, k] of the k likeliest tokens, the likeliest first. Errors as lens."""
  def see(logits_LV):
    p_LV = np.exp(logits_LV - logits_LV.max(-1, keepdims=True))
    p_LV /= p_LV.sum(-1, keepdims=True)
    ids_LK = np.argsort(-p_LV, -1, kind='stable')[:, :k]
    return ids_LK.astype(np.int32), np.take_along_axis(p_LV, ids_LK, -1)
  ids, probabilities = zip(*_each(lm, text, source, see))
  return np.stack(ids), np.stack(probabilities)


def write(lm, out: pathlib.Path, ids_NLK: np.ndarray, p_NLK: np.ndarray, columns: list[str], title: str) -> None:
  """A picture (.png) of the likeliest token in each place, or a page (.html) that shows the others too, on hover."""
  names_NLK = [[reading.labels(lm.tokenizer, ids_K) for ids_K in ids_LK] for ids_LK in ids_NLK]
  if out.suffix == '.png':
    from jaxlm.look import pictures  # pylint: disable=g-import-not-at-top  # an optional extra
    pictures.save(pictures.cells([[names[0] for names in row] for row in names_NLK], p_NLK[..., 0], columns, title), out)
  else:
    out.write_text(html(names_NLK, p_NLK, columns, title), encoding='utf-8')


def html(names_NLK: list[list[list[str]]], p_NLK: np.ndarray, columns: list[str], title: str) -> str:
  """The table, the last layer on top."""
  def cell(names, p_K):
    all_of_them = '\n'.join(f'{p:.4f} {name}' for name, p in zip(names, p_K))
    return (f'<td title="{page.escape(all_of_them)}" style="background:rgba(60,120,200,{p_K[0]:.2f})">'
            f'{page.escape(names[0])}<br><small>{p_K[0]:.2f}</small></td>')
  head = ''.join(f'<th>{page.escape(t)}</th>' for t in columns)
  rows = [f'<tr><th>after {n}</th>' + ''.join(map(cell, names_NLK[n], p_NLK[n])) + '</tr>'
          for n in reversed(range(len(p_NLK)))]
  return page.make(title, f'<table><tr><th>layers \\ read up to</th>{head}</tr>\n' + '\n'.join(rows) + '</table>', STYLE)


STYLE = '''table { border-collapse: collapse }
td, th { font: 12px monospace; border: 1px solid #ddd; padding: 2px 5px; text-align: center }
th { background: #f4f4f4; white-space: nowrap }'''
