"""Pictures by matplotlib (the extra `look`), drawn by Agg: no screen is needed, and no state of pyplot is touched."""
import warnings
from collections.abc import Sequence

import numpy as np

from jaxlm.errors import UsageError, extra

try:
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
except ImportError as e:
  raise UsageError(f'--out: a .png wants matplotlib: {extra("look")}; or name a .html ({e})') from e

DPI = 100
TOKEN, SMALL, CELL, MARGIN = 0.22, 1.6, (0.9, 0.3), 1.2  # inches: a token of one map, one map of many, a cell, labels
MOST = 400  # tokens that a picture can show


def _figure(width: float, height: float, title: str) -> Figure:
  figure = Figure((width, height))
  FigureCanvasAgg(figure)
  figure.suptitle(title, fontsize=9, parse_math=False, y=1 - 0.05 / height, va='top')
  return figure


def _axes(figure: Figure, left: float, top: float, width: float, height: float):
  """Axes at a place in inches from the top left corner."""
  w, h = figure.get_size_inches()
  return figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))


def _check(*labels: Sequence[str]) -> None:
  longest = max(map(len, labels))
  if longest > MOST:
    raise UsageError(f'--out: the text has {longest} tokens, and a .png shows at most {MOST}; shorten it, or name a .html')


def heatmaps(found: list[tuple[int, int, np.ndarray]], rows: list[str], columns: list[str], title: str) -> Figure:
  """Maps (layer, head, [L, M]). One alone has its tokens beside it, 22 pixels each, in margins of 120 (left, top) and 30;
  of many each gets a square of 160 pixels, a row a layer, below 40 for the title. White is 0, dark is 1."""
  _check(rows, columns)
  if len(found) == 1:
    n, h, p_LM = found[0]
    width, height = TOKEN * len(columns), TOKEN * len(rows)
    figure = _figure(width + MARGIN + 0.3, height + MARGIN + 0.3, f'{title}: layer {n}, head {h}')
    axes = _axes(figure, MARGIN, MARGIN, width, height)
    axes.imshow(p_LM, cmap='Blues', vmin=0, vmax=1, aspect='auto')
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(range(len(rows)), rows, fontsize=7, parse_math=False)
    return figure
  layers, heads = (sorted({which[i] for which in found}) for i in (0, 1))
  figure = _figure(SMALL * len(heads), SMALL * len(layers) + 0.4, title)
  for n, h, p_LM in found:
    axes = _axes(figure, SMALL * heads.index(h) + 0.1, SMALL * layers.index(n) + 0.6, SMALL - 0.2, SMALL - 0.3)
    axes.imshow(p_LM, cmap='Blues', vmin=0, vmax=1, aspect='auto')
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(f'layer {n}, head {h}', fontsize=6, pad=2)
  return figure


def cells(texts_NL: list[list[str]], p_NL: np.ndarray, columns: list[str], title: str) -> Figure:
  """A table of texts, a row a state of the residual stream, the first at the bottom, coloured by p_NL; 90 × 30 pixels a
  cell, in margins of 120 (left, top) and 30."""
  _check(columns)
  N, L = p_NL.shape
  figure = _figure(CELL[0] * L + MARGIN + 0.3, CELL[1] * N + MARGIN + 0.3, title)
  axes = _axes(figure, MARGIN, MARGIN, CELL[0] * L, CELL[1] * N)
  axes.imshow(p_NL, cmap='Blues', vmin=0, vmax=1, aspect='auto', origin='lower')
  axes.xaxis.tick_top()
  axes.set_xticks(range(L), columns, rotation=90, fontsize=7, parse_math=False)
  axes.set_yticks(range(N), [f'after {n}' for n in range(N)], fontsize=7)
  for n, row in enumerate(texts_NL):
    for l, text in enumerate(row):
      axes.text(l, n, text if len(text) < 13 else text[:12] + '…', fontsize=6, ha='center', va='center', parse_math=False,
                color='white' if p_NL[n, l] > 0.6 else 'black')
  return figure


def save(figure: Figure, out) -> None:
  """A PNG of the figure's inches × DPI."""
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'Glyph .* missing')  # a token in a script that the font lacks is drawn as a box
    figure.savefig(out, dpi=DPI)
