"""`jaxlm look WHAT`: its flags, and a function each for what can be looked at.

    attention   the maps of a layer and head, or of all, as a picture (.png) or a page (.html)
    lens        the likeliest token after each layer, as a picture or a page
    loss        the nats of each token, in the terminal or as a page
    probe       linear probes of each layer, as a table and JSON
"""
import pathlib
from collections.abc import Callable

from absl import flags

from jaxlm.errors import UsageError

# Flags of some of them only: name → which.
BELONGS = {
    'text': ('attention', 'lens', 'loss', 'probe'), 'file': ('attention', 'lens', 'loss'), 'source': ('attention', 'lens'),
    'out': ('attention', 'lens', 'loss'), 'layer': ('attention',), 'head': ('attention',), 'part': ('attention',),
    'top': ('lens',), 'context': ('loss', 'probe'), 'stride': ('loss',), 'batch': ('loss', 'probe'), 'data': ('probe',),
    'label': ('probe',), 'layers': ('probe',), 'pool': ('probe',), 'folds': ('probe',), 'seed': ('probe',), 'json': ('probe',)}


def define(f: flags.FlagValues) -> None:
  """The flags of `look`, besides --workdir, --step and --mesh."""
  string = lambda name, default, text: flags.DEFINE_string(name, default, text, flag_values=f)
  integer = lambda name, default, text: flags.DEFINE_integer(name, default, text, flag_values=f)
  string('text', None, 'the text to look at; probe: the field of a record that holds it (default: text)')
  string('file', None, 'attention, lens, loss: a file with the text, in place of --text')
  string('source', None, 'attention, lens: what the encoder of an encoder-decoder reads')
  string('out', None, 'attention, lens: a .png or .html to write; loss: an .html (default: colours in the terminal)')
  integer('layer', None, 'attention: one layer, from 0 (default: all)')
  integer('head', None, 'attention: one head, from 0 (default: all)')
  string('part', 'self', 'attention of an encoder-decoder: self | memory (the decoder\'s) | encoder')
  integer('top', 5, 'lens: so many of the likeliest tokens on hover')
  integer('context', None, 'loss: tokens a window; probe: tokens of a text at most (default: the run\'s length)')
  integer('stride', None, 'loss: tokens a window scores after the first (default: half of context)')
  string('data', None, 'probe: a file of JSON lines')
  string('label', None, 'probe: the field of a record that is to be read off')
  string('layers', 'all', 'probe: all, or after how many layers, as 0,6,12; 0: the embeddings')
  string('pool', 'mean', 'probe: mean | last | first token of a text')
  integer('folds', 5, 'probe: of the cross-validation')
  integer('seed', 0, 'probe: of the folds')
  integer('batch', 16, 'loss, probe: rows at a time; changes speed only')
  string('json', None, 'probe: write the result to this file too')


def run(f, what: str, load: Callable, write_json: Callable[[str, dict], None]) -> None:
  """Runs `jaxlm look WHAT`; load(f): the model. Raises UsageError, of the flags before the model is loaded."""
  if what not in COMMANDS:
    raise UsageError(f'look {what}: wants one of {", ".join(COMMANDS)}')
  for name, owners in BELONGS.items():
    if f[name].present and what not in owners:
      raise UsageError(f'look {what}: --{name} belongs to look {", ".join(owners)}')
  if f.batch < 1:
    raise UsageError(f'--batch={f.batch}: wants at least 1')
  COMMANDS[what](f, load, write_json)


def _text(f) -> str:
  """What --text or --file says."""
  if (f.text is None) == (f.file is None):
    raise UsageError('look wants one of --text=… and --file=…')
  text = f.text
  if f.file is not None:
    try:
      text = pathlib.Path(f.file).read_bytes().decode()
    except OSError as e:
      raise UsageError(f'--file={f.file}: cannot be read ({e.strerror})') from e
    except UnicodeDecodeError as e:
      raise UsageError(f'--file={f.file}: is not UTF-8 (byte {e.start}); convert it') from e
  if not text:
    raise UsageError(f'--{"text" if f.file is None else "file"}: the text is empty')
  return text


def _out(f, *suffixes: str) -> pathlib.Path:
  """The file to write."""
  out = pathlib.Path(f.out or '')
  if out.suffix not in suffixes:
    raise UsageError(f'--out={f.out or ""}: wants a file that ends in {" or ".join(suffixes)}')
  if not out.parent.is_dir():
    raise UsageError(f'--out={out}: there is no folder {out.parent}; make it first')
  if out.suffix == '.png':
    from jaxlm.look import pictures  # noqa: F401  pylint: disable=g-import-not-at-top,unused-import  # missing: said now
  return out


def _title(f, what: str) -> str:
  return f'{what}, {pathlib.Path(f.workdir).resolve().name}'


def _attention(f, load, write_json):
  text, out = _text(f), _out(f, '.png', '.html')
  lm = load(f)
  from jaxlm.look import attention  # pylint: disable=g-import-not-at-top
  found = attention.chosen(attention.maps(lm, text, f.source, f.part), f.layer, f.head)
  attention.write(out, found, *attention.tokens(lm, text, f.source, f.part), _title(f, 'Attention'))
  _wrote(out, f'{len(found)} maps of {found[0][2].shape[0]} × {found[0][2].shape[1]} tokens')


def _lens(f, load, write_json):
  text, out = _text(f), _out(f, '.png', '.html')
  if f.top < 1:
    raise UsageError(f'--top={f.top}: wants at least 1')
  lm = load(f)
  from jaxlm.look import lens, reading  # pylint: disable=g-import-not-at-top
  ids_NLK, p_NLK = lens.likeliest(lm, text, f.top, f.source)
  columns = reading.labels(lm.tokenizer, reading.read(lm, text, f.source).ids)
  lens.write(lm, out, ids_NLK, p_NLK, columns, _title(f, 'Logit lens'))
  _wrote(out, f'the likeliest tokens after 0 to {len(p_NLK) - 1} layers at {len(columns)} positions')


def _loss(f, load, write_json):
  text, out = _text(f), _out(f, '.html') if f.out is not None else None
  lm = load(f)
  from jaxlm import scoring  # pylint: disable=g-import-not-at-top
  from jaxlm.look import loss
  context = f.context if f.context is not None else lm.config.length
  stride = f.stride if f.stride is not None else max(1, context // 2)
  ids, nll_S = scoring.per_token(lm, text, context, stride, f.batch)
  if out is None:
    loss.show(lm, text, ids, nll_S)
  else:
    loss.write(lm, out, text, ids, nll_S, _title(f, 'Loss'))
    _wrote(out, loss.summary(text, nll_S))


def _probe(f, load, write_json):
  for name in ('data', 'label'):
    if not f[name].value:
      raise UsageError(f'look probe: wants --{name}=…')
  words = f.layers.split(',')
  if f.layers != 'all' and not all(w.isdecimal() for w in words):
    raise UsageError(f'--layers={f.layers}: wants all, or counts of layers, as 0,6,12')
  if f.context is not None and f.context < 1:
    raise UsageError(f'--context={f.context}: wants at least 1')
  from jaxlm.look import probe  # pylint: disable=g-import-not-at-top  # an optional extra
  texts, labels = probe.read(f.data, f.text or 'text', f.label)
  lm = load(f)
  context = f.context if f.context is not None else lm.config.length
  result = probe.probe(lm, texts, labels, None if f.layers == 'all' else [int(w) for w in words], f.pool, f.folds, f.seed,
                       f.batch, context)
  probe.show(result)
  if f.json:
    write_json(f.json, {**result, 'data': f.data, 'label': f.label})


def _wrote(out: pathlib.Path, what: str) -> None:
  from jaxlm.metrics import say  # pylint: disable=g-import-not-at-top
  say(f'{out}: {what}')


COMMANDS = {'attention': _attention, 'lens': _lens, 'loss': _loss, 'probe': _probe}
