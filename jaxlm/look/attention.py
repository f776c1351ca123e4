"""Maps of attention: what the softmax of each layer and head gave each pair of tokens (Bahdanau et al. 2015, figure 3)."""
import base64
import json
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from jaxlm.errors import UsageError
from jaxlm.look import hidden, page, reading

PARTS = ('self', 'memory', 'encoder')


def maps(lm, text: str, source: str | None = None, part: str = 'self') -> list[np.ndarray]:
  """List over layers of float32 [H, L, M]: the weight that query token l gives key token m; each row sums to 1.

  L and M are the tokens of `tokens`. part, of an encoder-decoder: self (the decoder's own), memory (the decoder's to the
  source, which its encoder reads), encoder (the encoder's own). UsageError for a part, text or model that has no such maps.
  """
  r, rows, columns = _read(lm, text, source, part)
  on_host = lambda p_BHLM: np.asarray(jax.device_get(p_BHLM))[0, :, :len(rows), :len(columns)]
  found = hidden.run(lm, [r], lambda x_BLD, kept: on_host(kept[part == 'memory']) if kept else None, maps=True,
                     encoder=part == 'encoder')
  return found[1:]  # no layer has made state 0


def tokens(lm, text: str, source: str | None = None, part: str = 'self') -> tuple[list[str], list[str]]:
  """The query tokens and the key tokens of `maps`, as a person reads them."""
  _, rows, columns = _read(lm, text, source, part)
  return reading.labels(lm.tokenizer, rows), reading.labels(lm.tokenizer, columns)


def _read(lm, text: str, source: str | None, part: str):
  """(what the model reads, its ids of queries, of keys)."""
  kind = lm.config.model.kind
  if part not in PARTS or (part != 'self' and kind != 'seq2seq'):
    wants = ', '.join(PARTS) if kind == 'seq2seq' else f'self: model.kind={kind} has one stack of layers'
    raise UsageError(f'--part={part}: wants {wants}')
  r = reading.read(lm, text, source)
  return r, r.source if part == 'encoder' else r.ids, r.ids if part == 'self' else r.source


def chosen(maps_NHLM: Sequence[np.ndarray], layer: int | None, head: int | None) -> list[tuple[int, int, np.ndarray]]:
  """[(layer, head, float32 [L, M])] of one layer, one head, or of all where it is None; both count from 0. UsageError for
  one that there is not."""
  H = len(maps_NHLM[0])
  for name, value, count in (('layer', layer, len(maps_NHLM)), ('head', head, H)):
    if value is not None and not 0 <= value < count:
      raise UsageError(f'--{name}={value}: the model has {name}s 0 to {count - 1}')
  layers = range(len(maps_NHLM)) if layer is None else [layer]
  return [(n, h, maps_NHLM[n][h]) for n in layers for h in (range(H) if head is None else [head])]


def write(out: pathlib.Path, found: list[tuple[int, int, np.ndarray]], rows: list[str], columns: list[str], title: str) -> None:
  """A picture (.png) or a page (.html) of the maps that `chosen` gives."""
  if out.suffix == '.png':
    from jaxlm.look import pictures  # pylint: disable=g-import-not-at-top  # an optional extra
    pictures.save(pictures.heatmaps(found, rows, columns, title), out)
  else:
    out.write_text(html(found, rows, columns, title), encoding='utf-8')


def html(found: list[tuple[int, int, np.ndarray]], rows: list[str], columns: list[str], title: str) -> str:
  """A page with a small map a head; the one that is clicked is drawn large, with each weight and its tokens on hover.
  Weights are kept to 16 bits."""
  data = [{'name': f'layer {n}, head {h}',
           'weights': base64.b64encode(np.round(p_LM * 65535).astype('<u2').tobytes()).decode()} for n, h, p_LM in found]
  spans = lambda labels: ''.join(f'<span>{page.escape(t)}</span>' for t in labels)
  described = json.dumps({'maps': data, 'columns': len(columns), 'rows': len(rows)}).replace('<', '\\u003c')
  return page.make(title, f'''<div id=small></div><p id=said></p><canvas id=large></canvas>
<h2>queries</h2><p class=tokens id=rows>{spans(rows)}</p><h2>keys</h2><p class=tokens id=columns>{spans(columns)}</p>
<script type="application/json" id=data>{described}</script><script>{SCRIPT}</script>''', STYLE)


STYLE = '''#small canvas { width: 72px; height: 72px; margin: 2px; image-rendering: pixelated; border: 2px solid #ddd }
#small canvas.on { border-color: #c00 } #large { image-rendering: pixelated; border: 1px solid #888; cursor: crosshair }
.tokens span { font-family: monospace; padding: 1px; border: 1px solid #eee } .tokens span.on { background: #fc6 }
#said { font-family: monospace; min-height: 1.3em; white-space: pre-wrap }'''
SCRIPT = r'''
const get = id => document.getElementById(id), data = JSON.parse(get('data').textContent);
const rows = [...get('rows').children], columns = [...get('columns').children], L = data.rows, M = data.columns;
const decode = text => new Uint16Array(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
const maps = data.maps.map(m => ({name: m.name, weights: decode(m.weights)}));
const cell = Math.max(1, Math.min(24, Math.floor(900 / Math.max(L, M))));
let current = null;
function draw(canvas, weights) {
  canvas.width = M; canvas.height = L;
  const context = canvas.getContext('2d'), image = context.createImageData(M, L);
  weights.forEach((w, i) => {
    const light = 255 * (1 - w / 65535);
    image.data.set([light, light, 255 - (255 - light) / 4, 255], 4 * i);
  });
  context.putImageData(image, 0, 0);
}
function choose(map) {
  current = map;
  maps.forEach(m => m.canvas.classList.toggle('on', m === map));
  draw(get('large'), map.weights);
  get('large').style.width = M * cell + 'px';
  get('large').style.height = L * cell + 'px';
  get('said').textContent = map.name;
}
maps.forEach(map => {
  map.canvas = document.createElement('canvas');
  map.canvas.title = map.name;
  draw(map.canvas, map.weights);
  map.canvas.onclick = () => choose(map);
  get('small').append(map.canvas);
});
get('large').onmousemove = event => {
  const l = Math.min(L - 1, Math.max(0, Math.floor(event.offsetY / cell)));
  const m = Math.min(M - 1, Math.max(0, Math.floor(event.offsetX / cell)));
  rows.forEach((span, i) => span.classList.toggle('on', i === l));
  columns.forEach((span, i) => span.classList.toggle('on', i === m));
  const weight = (current.weights[l * M + m] / 65535).toFixed(4);
  const of = (spans, i) => `${spans[i].textContent} (${i})`;
  get('said').textContent = `${current.name}: ${weight}  ${of(rows, l)} looks at ${of(columns, m)}`;
};
choose(maps[0]);
'''
