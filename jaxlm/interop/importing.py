"""`jaxlm import`: a foreign checkpoint → a workdir with step 0, a tensor at a time, from file to file.

The arrays are written in the layout that Orbax reads (zarr, one folder an array), so that a checkpoint that was
imported is restored like any other, each device reading its shard. Nothing shows in the workdir until all is written.
"""
import dataclasses
import json
import math
import pathlib
import re
import shutil

from jaxlm import checkpoint, config as configs, report
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UsageError
from jaxlm.interop import convert
from jaxlm.interop.gguf import GgufFile
from jaxlm.interop.huggingface import Folder
from jaxlm.interop.mapping import STACK
from jaxlm.schema import Config
from jaxlm.storage import sync

CHUNK = 4 * 2 ** 20  # elements of a zarr chunk: what is written at a time
LENGTH = 2048        # of imported models: what eval takes for its context, if the model reaches that far
SOURCE = 512         # tokens that T5, whose positions have no end, was trained to read
LAYERS = ('num_hidden_layers', 'n_layer', 'num_layers', 'num_decoder_layers', 'encoder_layers', 'decoder_layers')
VAST = 2 ** 24       # no model has a size above it; and rope makes an array of a head's size before tensors are looked at


def open_source(path: str):
  """A Hugging Face folder or a GGUF file. UsageError if it is neither."""
  source = pathlib.Path(path)
  return GgufFile(source) if source.suffix == '.gguf' else Folder(source)


def config_of(source, tokenizer: Tokenizer, tokenizer_file: pathlib.Path, vocab_multiple: int, overrides) -> Config:
  """The config of the run that the source becomes. UsageError if it makes none, whatever the overrides."""
  try:
    counts = map(source.config.get, LAYERS)
    layers = max((n for n in counts if isinstance(n, int)), default=0)
    if layers > len(source.names()):
      raise UsageError(f'config.json: {layers} layers (num_hidden_layers) are more than its {len(source.names())} tensors')
    model = convert.to_model(source.family, source.config)
    P = model.get('P')
    positions = P - model.get('first_position', 0) if type(P) is int else P
    reach = positions or source.config.get('max_position_embeddings') or LENGTH
    if type(reach) is not int:
      raise UsageError(f'config.json: max_position_embeddings={reach!r} is no count')
    kind = model.get('kind', 'decoder')
    length = min(reach, LENGTH, source.sentence_length() or LENGTH if kind == 'encoder' else LENGTH)
    ends, starts = source.ends(), source.starts() if kind == 'seq2seq' else []
    never = source.never()
    for key, ids in (('eos_token_id', ends), ('decoder_start_token_id', starts), ('bad_words_ids', never)):
      strange = [i for i in ids if type(i) is not int or not 0 <= i < tokenizer.vocab_size or tokenizer.text_of(i) is None]
      if strange:
        raise UsageError(f'{key}={strange[0]!r} is no token of its tokenizer')
    classes = ''
    if kind == 'encoder':
      model |= source.sentence_vector()
      classes = '|'.join(source.classes()) if model['head'] in ('classify', 'tag') else ''
    values = {**{f'model.{k}': v for k, v in model.items()}, **objective_of(model, length), 'length': length, 'loss.chunks': 1,
              'data.tokenizer': str(tokenizer_file), 'data.stop': ' '.join(map(tokenizer.text_of, ends)),
              'data.start': ''.join(map(tokenizer.text_of, starts)), 'data.never': ' '.join(map(tokenizer.text_of, never)),
              'data.classes': classes}
    vast = [k for k, v in model.items() if type(v) is int and v > VAST]
    if vast:
      raise UsageError(f'config.json: model.{vast[0]}={model[vast[0]]:.1e} is more than any model has')
    trial = configs.from_flat(values).model
    convert.shapes(trial)
  except UsageError as e:
    raise UsageError(f'{source.path}: {e}') from e
  except (ArithmeticError, ValueError) as e:  # numbers that are none, or such that rope has no frequencies
    raise UsageError(f'{source.path}: config.json: makes no model ({type(e).__name__}: {str(e).splitlines()[0]})') from e
  if trial.V % vocab_multiple:
    values |= {'model.V': -(-trial.V // vocab_multiple) * vocab_multiple, 'model.vocab': trial.V}
  return configs.from_flat({**values, **configs.parsed(overrides)})


def objective_of(model: dict, length: int) -> dict:
  """Keys of an objective that a model of this kind can be trained on further, T5's with its own (`model`: our keys)."""
  kind = model.get('kind', 'decoder')
  if kind == 'seq2seq':
    if model.get('position') == 'relative':
      return {'objective.name': 'spans', 'objective.source': min(length, SOURCE)}
    return {'objective.name': 'prefix', 'objective.source': length}
  return {'objective.name': 'mask'} if kind == 'encoder' else {}


def tokenizer_of(source, path: str | None) -> Tokenizer:
  """The tokenizer.json of `path`, or the source's own. UsageError if it is none."""
  if path and not pathlib.Path(path).is_file():
    raise UsageError(f'--tokenizer={path}: no such file')
  try:
    return Tokenizer(pathlib.Path(path).read_text(encoding='utf-8') if path else source.tokenizer())
  except UsageError as e:
    raise UsageError(str(e) if str(source.path) in str(e) else f'{path or source.path}: {e}') from e
  except Exception as e:  # pylint: disable=broad-except  # tokenizers raises bare Exception for what it cannot read
    raise UsageError(f'{path or source.path}: its tokenizer cannot be read ({type(e).__name__}: {e})') from e


def run(path: str, workdir: pathlib.Path, tokenizer_path: str | None, vocab_multiple: int, overrides, say) -> Config:
  """Imports `path` into `workdir`. UsageError for what cannot be read, or a workdir that has checkpoints."""
  if checkpoint.steps(workdir):
    raise UsageError(f'--workdir={workdir}: has checkpoints already; import into another')
  if vocab_multiple < 1:
    raise UsageError(f'--vocab_multiple={vocab_multiple}: wants 1 or more')
  source = open_source(path)
  tokenizer = tokenizer_of(source, tokenizer_path)
  config = config_of(source, tokenizer, workdir / 'tokenizer.json', vocab_multiple, overrides)
  if tokenizer.vocab_size > config.model.V:
    raise UsageError(f'{path}: its tokenizer has {tokenizer.vocab_size} tokens, its model rows for {config.model.V}')
  shapes = convert.shapes(dataclasses.replace(config.model, vocab=0))
  say(f'{path}: {source.model_type}, {sum(map(math.prod, shapes.values())) / 1e6:.1f}M parameters\n{configs.summary(config)}')
  write_run(workdir, config, tokenizer.json, {'from': str(path), 'model_type': source.model_type}, shapes,
            convert.read(source, config.model))
  return config


def write_run(workdir: pathlib.Path, config: Config, tokenizer: str, imported: dict, shapes: dict[str, tuple[int, ...]],
              items) -> None:
  """Makes `workdir` a run with these arrays as its step 0 (shapes, items: as write_arrays), or leaves it as it was."""
  workdir.mkdir(parents=True, exist_ok=True)
  temporary = workdir / '.import'
  shutil.rmtree(temporary, ignore_errors=True)
  meta = {'config': json.loads(configs.to_json(config)), 'examples': 0, 'tokenizer': tokenizer, 'imported': imported}
  try:
    step = temporary / 'checkpoints' / '0'
    (step / 'state').mkdir(parents=True)
    with report.progress('importing', sum(map(math.prod, shapes.values()))) as tick:
      write_arrays(step / 'state', shapes, items, tick)
    checkpoint.write_sealed(step, 0, meta, {})  # no array of it was on a device
    (workdir / 'tokenizer.json').write_text(tokenizer, encoding='utf-8')
    (workdir / 'config.json').write_text(configs.to_json(config), encoding='utf-8')
    (workdir / 'checkpoints').mkdir(exist_ok=True)
    step.rename(workdir / 'checkpoints' / '0')
    sync(workdir / 'checkpoints')
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def write_arrays(folder: pathlib.Path, shapes: dict[str, tuple[int, ...]], items, progress=None) -> None:
  """{path: shape} and (path, index, array) items → an Orbax item of {'params': …}; what no item covers is 0."""
  import tensorstore as ts  # pylint: disable=g-import-not-at-top
  context = ts.Context({'data_copy_concurrency': {'limit': 1}, 'file_io_concurrency': {'limit': 2},
                        'cache_pool': {'total_bytes_limit': 0}})
  tree, arrays = {}, {}
  for path, shape in shapes.items():
    keys = ('params', *path.split('/'))
    spec = {'driver': 'zarr', 'store_data_equal_to_fill_value': True,  # Orbax takes a chunk that is not there for damage
            'kvstore': {'driver': 'file', 'path': str((folder / '.'.join(keys)).absolute())},
            'metadata': {'shape': shape, 'chunks': _chunks(path, shape), 'dtype': '<f4', 'fill_value': 0.,
                         'compressor': {'id': 'zstd', 'level': 1}}}
    arrays[path] = ts.open(spec, create=True, context=context).result()
    tree[str(keys)] = {'key_metadata': [{'key': k, 'key_type': 2} for k in keys], 'value_metadata': {
        'value_type': 'jax.Array', 'skip_deserialize': False, 'write_shape': list(shape)}}
  for path, index, array in items:
    (arrays[path][index] if index else arrays[path]).write(array).result()
    if progress:
      progress(array.size)
  (folder / '_METADATA').write_text(json.dumps({
      'tree_metadata': tree, 'use_ocdbt': False, 'use_zarr3': False, 'store_array_data_equal_to_fill_value': True,
      'custom_metadata': None}), encoding='utf-8')


def _chunks(path: str, shape: tuple[int, ...]) -> list[int]:
  """Chunks of at most CHUNK elements, none of which two foreign tensors share."""
  alone = 2 if re.match(r'layers/moe/(gate|up|down)$', path) else 1 if STACK.match(path) else 0
  chunks, room = [], CHUNK
  for size in reversed(shape[alone:]):
    chunks.insert(0, min(size, max(1, room)))
    room //= size
  return [1] * alone + chunks
