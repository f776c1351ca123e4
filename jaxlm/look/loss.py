"""What each token of a text cost a model, in nats, as colours: as scoring.per_token has it, so that they sum to the score."""
import math
import pathlib

import numpy as np
from rich.style import Style
from rich.text import Text

from jaxlm.look import page, reading
from jaxlm.metrics import console, say
from jaxlm.schema import ModelConfig


def shades(nats, m: ModelConfig):
  """From 0 (certain) to 1 (as dear as guessing evenly among all tokens, or dearer)."""
  return np.clip(np.asarray(nats) / math.log(m.vocab or m.V), 0, 1)


def stretches(lm, ids: np.ndarray, nll_L: np.ndarray) -> list[tuple[str, float, list[tuple[str, float]]]]:
  """(text, its nats, [(token, its nats)]) of the runs of tokens t1 … tn that are whole characters, in order."""
  names = reading.labels(lm.tokenizer, ids[1:])
  return [(text, float(nll_L[start:end].sum(dtype=np.float64)), list(zip(names[start:end], map(float, nll_L[start:end]))))
          for start, end, text in reading.stretches(lm.tokenizer, ids[1:])]


def summary(text: str, nll_L: np.ndarray) -> str:
  """Nats and bits of the whole, in a line."""
  nats, size = float(nll_L.sum(dtype=np.float64)), len(text.encode())
  return (f'{len(nll_L):,} tokens, {size:,} bytes, {nats:.2f} nats: {nats / len(nll_L):.4f} a token, '
          f'{nats / math.log(2) / size:.4f} bits a byte')


def show(lm, text: str, ids: np.ndarray, nll_L: np.ndarray, dearest: int = 5) -> None:
  """In the terminal: the text, the dearer the redder, and a line for each of the dearest tokens."""
  line = Text()
  for part, nats, _ in stretches(lm, ids, nll_L):
    light = 255 - int(200 * shades(nats, lm.config.model))
    safe = ''.join(c if c.isprintable() or c in '\n\t' else '\ufffd' for c in part)  # what a text says moves no cursor
    line.append(safe, Style(color='#000000', bgcolor=f'#ff{light:02x}{light:02x}'))
  console.print(line)
  say(summary(text, nll_L))
  names = reading.labels(lm.tokenizer, ids[1:])
  for at in np.argsort(-nll_L, kind='stable')[:dearest]:
    say(f'{nll_L[at]:>8.3f} nats  token {at + 1}: {names[at]}')


def write(lm, out: pathlib.Path, text: str, ids: np.ndarray, nll_L: np.ndarray, title: str) -> None:
  out.write_text(html(lm, text, ids, nll_L, title), encoding='utf-8')


def html(lm, text: str, ids: np.ndarray, nll_L: np.ndarray, title: str) -> str:
  """The text, the dearer the redder; the nats of each token on hover."""
  def span(part, nats, tokens):
    hover = '\n'.join(f'{name}: {n:.4f} nats, p = {math.exp(-n):.4g}' for name, n in tokens)
    return (f'<span title="{page.escape(hover)}" style="background:rgba(255,40,40,{shades(nats, lm.config.model):.2f})">'
            f'{page.escape(part)}</span>')
  body = ''.join(span(*stretch) for stretch in stretches(lm, ids, nll_L))
  return page.make(title, f'<p>{page.escape(summary(text, nll_L))}</p>\n<pre>{body}</pre>', STYLE)


STYLE = 'pre { white-space: pre-wrap; font: 14px/1.6 monospace } pre span:hover { outline: 1px solid #000 }'
