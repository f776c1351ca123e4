"""Config: ml_collections files and command-line overrides → frozen dataclasses, checked once.

One alphabet names sizes here, suffixes of arrays, einsum subscripts and rows of the sharding table:

    B batch   L length   M memory/key length   D model   H query heads   G key-value heads   K head dim
    F ffn     V vocab    N layers              P positions

A config file (`configs/*.py`) has `get_config()` that returns a ConfigDict stating only what differs from the
defaults below. Nothing in this module imports jax: a bad config is refused before any device is touched.
"""
import ast
import dataclasses
import difflib
import importlib.util
import json
import pathlib
import re
import typing

from ml_collections import ConfigDict

from jaxlm.errors import UsageError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder. GPT-2: norm='layer', position='learned', mlp='gelu', bias=True. Llama: the defaults."""
  D: int = 256              # model width
  H: int = 4                # query heads
  G: int = 4                # key-value heads (grouped-query attention when G < H)
  K: int = 64               # head dim
  F: int = 768              # ffn width
  N: int = 4                # layers
  V: int = 4096             # vocabulary rows; at least the tokenizer's, and a multiple of mesh.tensor
  P: int = 0                # learned positions; 0 with rope
  norm: str = 'rms'         # rms | layer
  position: str = 'rope'    # rope | learned
  mlp: str = 'swiglu'       # swiglu | gelu (tanh approximation, as GPT-2)
  bias: bool = False        # biases in projections, and in layer norms
  tied: bool = True         # the output matrix is the embedding
  norm_eps: float = 1e-5
  rope_base: float = 10_000.
  dropout: float = 0.
  init_std: float = 0.02    # of embeddings and projections; those back into the residual get ÷ √(2N)
  dtype: str = 'float32'    # of compute: float32 | bfloat16; master weights are always float32
  attention: str = 'auto'   # auto | dot_product | blocked
  remat: str = 'none'       # what the backward pass recomputes: none | dots | full
  scan: bool = True         # True: one compiled layer, looped; False: unrolled (on CPU 7% faster, compiles longer)


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Cross entropy in `chunks` pieces of the length, so that [B, L, V] never exists at once."""
  chunks: int = 8
  z_loss: float = 0.        # × log²Z, added to the training loss (PaLM, §5)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The optimizer (a key of optimizer.OPTIMIZERS) and its learning-rate schedule (a key of SCHEDULES).

  muon (Jordan 2024): the matrices of the layers are updated by orthogonalised momentum, scaled to AdamW's usual size
  (× 0.2 √max(fan-in, fan-out), Liu et al. 2025), so that one `lr` serves them and AdamW for the rest.
  """
  name: str = 'adamw'
  lr: float = 3e-4
  schedule: str = 'cosine'  # constant | cosine | linear | wsd | inverse_sqrt
  warmup: int = 100         # steps of linear warmup from 0
  decay: float = 0.2        # wsd: the share of steps that decays
  final: float = 0.1        # learning rate at the last step, as a share of lr
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  no_decay: str = r'scale|bias'  # paths (as layers/q/w) that match are not decayed
  clip: float = 1.          # by global norm; 0 is off


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices an axis; one of them may be -1: what is left."""
  data: int = 1             # replicas: only gradients cross it
  fsdp: int = -1            # batch and weights are cut over it; weights are gathered a layer at a time
  tensor: int = 1           # heads, ffn and vocabulary are cut over it


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What to train on. Tokens are written once to `cache`, then memory-mapped."""
  source: str = 'stdlib'    # stdlib | text:GLOB | jsonl:GLOB | arrayrecord:GLOB | tfds:NAME/SPLIT
  heldout: float = 0.05     # share of documents, by hash of their name, never trained on
  tokenizer: str = 'bpe:4096'  # bpe:SIZE (trained on the documents) | bytes | a tokenizer.json
  cache: str = ''           # a folder; '' is data/ in the workdir
  key: str = 'text'         # the field that holds the text: jsonl, arrayrecord, tfds


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  keep: int = 3             # the newest so many
  keep_every: int = 0       # and each step that is a multiple of this; 0 is none


@dataclasses.dataclass(frozen=True)
class Config:
  """A run."""
  steps: int = 1000
  batch: int = 16           # sequences a step, over all devices
  length: int = 256         # tokens a sequence
  microbatches: int = 1     # a step's batch is worked off in so many pieces
  seed: int = 0
  log_every: int = 10
  save_every: int = 200
  eval_every: int = 0       # 0: no held-out loss during training
  eval_windows: int = 64    # held-out windows of `length` for eval_every
  compile_cache: str = ''   # a folder; '' is compile_cache/ in the workdir
  model: ModelConfig = ModelConfig()
  loss: LossConfig = LossConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  data: DataConfig = DataConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()


# What may differ between a checkpoint and the run that goes on from it: none of these changes what a step computes
# from the same state and data, except `steps`, which people raise to train on.
FREE = re.compile(r'(steps|log_every|save_every|eval_every|eval_windows|compile_cache|mesh\..*|checkpoint\..*|'
                  r'data\.cache|microbatches|loss\.chunks|model\.(attention|remat|scan))$')

CHOICES = {
    'model.norm': ('rms', 'layer'), 'model.position': ('rope', 'learned'), 'model.mlp': ('swiglu', 'gelu'),
    'model.dtype': ('float32', 'bfloat16'), 'model.attention': ('auto', 'dot_product', 'blocked'),
    'model.remat': ('none', 'dots', 'full'), 'optimizer.name': ('adamw', 'muon'),
    'optimizer.schedule': ('constant', 'cosine', 'linear', 'wsd', 'inverse_sqrt'),
}
# Keys that may be zero; every other number but the mesh's is above it.
ZERO_OK = re.compile(r'(seed|eval_every|model\.(P|dropout)|loss\.z_loss|data\.heldout|checkpoint\.keep_every|'
                     r'optimizer\.(warmup|decay|final|weight_decay|clip|b1|b2))$')


def flatten(config, prefix: str = '') -> dict:
  """A dataclass (or dict) of dataclasses → {'model.D': 256, …} in order of declaration."""
  items = ({f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
           if dataclasses.is_dataclass(config) else config)
  flat = {}
  for name, value in items.items():
    nested = dataclasses.is_dataclass(value) or isinstance(value, (dict, ConfigDict))
    flat.update(flatten(value, f'{prefix}{name}.') if nested else {prefix + name: value})
  return flat


_DEFAULTS = flatten(Config())
_SECTIONS = tuple(f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type))


def from_flat(values: dict) -> Config:
  """{'model.D': 512, …} over the defaults → a Config that is checked. Raises UsageError in one line."""
  merged = dict(_DEFAULTS)
  for key, value in values.items():
    if key not in merged:
      raise UsageError(f'config has no key {key!r} (value {value!r}){nearest(key)}')
    merged[key] = _convert(key, value, type(_DEFAULTS[key]))
  sections = {s: {k.split('.')[1]: v for k, v in merged.items() if k.startswith(s + '.')} for s in _SECTIONS}
  kinds = typing.get_type_hints(Config)
  config = Config(**{k: v for k, v in merged.items() if '.' not in k},
                  **{s: kinds[s](**values) for s, values in sections.items()})
  validate(config)
  return config


def nearest(key: str) -> str:
  """'; did you mean …?' with the known keys most like `key`, or all of its section."""
  leaf = key.split('.')[-1]
  near = [k for k in _DEFAULTS if k.split('.')[-1].lower() == leaf.lower()]
  near = near or difflib.get_close_matches(key, _DEFAULTS, n=3, cutoff=0.75)
  if not near:
    leaves = difflib.get_close_matches(leaf, [k.split('.')[-1] for k in _DEFAULTS], n=2, cutoff=0.6)
    near = [k for k in _DEFAULTS if k.split('.')[-1] in leaves]
  if near:
    return f'; did you mean {" or ".join(near[:3])}?'
  section = key.split('.')[0]
  known = [k for k in _DEFAULTS if k.startswith(section + '.')] or [k for k in _DEFAULTS if '.' not in k]
  return f'; there are {", ".join(known)}'


def _convert(key: str, value, kind: type):
  """`value` as `kind` where nothing is lost (an int is a float; a text is only itself), else UsageError."""
  if kind is float and type(value) is int:
    return float(value)
  if type(value) is kind:
    return value
  raise UsageError(f'{key} wants {_KIND[kind]}, not {value!r} ({type(value).__name__})')


_KIND = {int: 'an integer, as 12', float: 'a number, as 0.1', bool: 'true or false', str: 'a text'}


def _parse(key: str, text: str):
  """An override's text as a value of the key's type; what cannot be one is left for _convert to refuse."""
  kind = type(_DEFAULTS.get(key))
  if kind is str:
    return text
  if kind is bool and text.lower() in ('true', 'false', '1', '0'):
    return text.lower() in ('true', '1')
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def load(path: str, overrides: typing.Sequence[tuple[str, str]] = ()) -> Config:
  """The Config of `path` ('configs/x.py' or 'configs/x.py:argument'), with ('optimizer.lr', '3e-4') overrides.

  A config file is Python code and runs as such: treat it as you treat a script.
  """
  file, _, argument = path.partition(':')
  if not pathlib.Path(file).is_file():
    near = difflib.get_close_matches(file, [str(p) for p in pathlib.Path('configs').glob('*.py')], n=2)
    raise UsageError(f'--config={path}: no such file{"; did you mean " + " or ".join(near) + "?" if near else ""}')
  spec = importlib.util.spec_from_file_location('jaxlm_config_file', file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'get_config'):
    raise UsageError(f'--config={path}: the file has no get_config()')
  values = flatten(module.get_config(*([argument] if argument else [])))
  values.update({key: _parse(key, text) for key, text in overrides})
  return from_flat(values)


def to_json(config: Config) -> str:
  return json.dumps(dataclasses.asdict(config), indent=1, ensure_ascii=False)


def from_json(text: str) -> Config:
  return from_flat(flatten(json.loads(text)))


def approximate_params(m: ModelConfig) -> int:
  """Parameters but norms and biases, with no model built; models.decoder.count_params counts them all."""
  layer = 2 * m.D * m.K * (m.H + m.G) + (3 if m.mlp == 'swiglu' else 2) * m.D * m.F
  return m.N * layer + (m.V * (1 if m.tied else 2) + m.P) * m.D


def summary(config: Config) -> str:
  """What differs from the defaults, a line a section."""
  changed = {k: v for k, v in flatten(config).items() if v != _DEFAULTS[k]}
  rows = {}
  for key, value in changed.items():
    section, _, leaf = key.rpartition('.')
    rows.setdefault(section or 'run', []).append(f'{leaf}={value}')
  return '\n'.join(f'  {section:<10} {" ".join(parts)}' for section, parts in rows.items())


def refuse_change(saved: Config, config: Config) -> None:
  """UsageError naming the first field in which a checkpoint's config differs, unless the field is free."""
  old, new = flatten(saved), flatten(config)
  for key in old:
    if old[key] != new[key] and not FREE.match(key):
      raise UsageError(f'the checkpoint is of another run: {key} was {old[key]!r} and is now {new[key]!r}; '
                       f'set --config.{key}={old[key]} to go on, or another --workdir to start anew')


def validate(c: Config) -> None:
  """Every check that needs no device. Raises UsageError: the key, its value, the mend."""
  flat, m = flatten(c), c.model

  def need(ok: bool, key: str, mend: str):
    if not ok:
      raise UsageError(f'{key}={flat[key]!r}: {mend}')

  for key, choices in CHOICES.items():
    near = difflib.get_close_matches(flat[key], choices, n=1, cutoff=0.3)
    need(flat[key] in choices, key, f'wants one of {", ".join(choices)}{"; did you mean " + near[0] + "?" if near else ""}')
  for key, value in flat.items():
    if type(value) in (int, float) and not key.startswith('mesh.'):
      need(value > 0 or (value == 0 and ZERO_OK.match(key)), key, 'wants a number above 0')
  for key in ('model.dropout', 'data.heldout', 'optimizer.decay', 'optimizer.b1', 'optimizer.b2'):
    need(0 <= flat[key] < 1, key, 'wants a number from 0 up to, not including, 1')
  need(m.H % m.G == 0, 'model.G', f'does not divide model.H={m.H}')
  if m.position == 'learned':
    need(m.P >= c.length, 'model.P', f'learned positions must cover length={c.length}')
  else:
    need(m.P == 0, 'model.P', 'only position=learned has positions; set 0')
    need(m.K % 2 == 0, 'model.K', 'rope turns pairs: wants an even head dim')
  need(c.batch % c.microbatches == 0, 'microbatches', f'does not divide batch={c.batch}')
  need(c.length % c.loss.chunks == 0, 'loss.chunks', f'does not divide length={c.length}')
  try:
    re.compile(c.optimizer.no_decay)
  except re.error as e:
    need(False, 'optimizer.no_decay', f'is no regular expression ({e})')
  sizes = {axis: flat[f'mesh.{axis}'] for axis in ('data', 'fsdp', 'tensor')}
  for axis, size in sizes.items():
    need(size >= 1 or size == -1, f'mesh.{axis}', 'wants a count of devices, or -1 for what is left')
  fill = [axis for axis, size in sizes.items() if size == -1]
  need(len(fill) < 2, f'mesh.{(fill or ["fsdp"])[-1]}', f'only one axis may be -1, and {fill[:1]} is')
  if -1 not in (sizes['data'], sizes['fsdp'], sizes['tensor']):
    check_mesh(c, sizes)


def check_mesh(c: Config, sizes: dict) -> None:
  """Everything that a mesh of these sizes must divide. Raises UsageError."""
  rows = sizes['data'] * sizes['fsdp']
  per = c.batch // c.microbatches
  if per % rows:
    raise UsageError(f'batch={c.batch} in {c.microbatches} microbatches gives {per} sequences, which mesh.data × '
                     f'mesh.fsdp = {rows} does not divide; set batch to a multiple of {rows * c.microbatches}')
  cut = {'H': sizes['tensor'], 'G': sizes['tensor'], 'F': sizes['tensor'], 'V': sizes['tensor'], 'D': sizes['fsdp']}
  for letter, size in cut.items():
    value = getattr(c.model, letter)
    if value % size:
      axis = 'fsdp' if letter == 'D' else 'tensor'
      raise UsageError(f'model.{letter}={value}: mesh.{axis}={size} does not divide it; '
                       f'the next that fits is {-(-value // size) * size}')
