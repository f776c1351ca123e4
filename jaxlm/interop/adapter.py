"""Pairs of low rank as adapters of peft: `jaxlm export --adapter` writes a folder that PeftModel.from_pretrained lays on the
base model, and `jaxlm import` reads one into a run beside its base.

A pair goes where its weight goes, by the same row of mapping.py: what a row does to the inputs it does to A, what it does to
the outputs to B, and nothing is approximated. Where one foreign tensor holds several weights (queries, keys and values), its
rank is the sum of theirs: the A stand above each other, and each B is zero outside its own weight. The way back takes of
such a tensor, for each weight, what of its B is not zero.
"""
import dataclasses
import functools
import importlib.util
import json
import pathlib
import re
import tempfile

import jax
import numpy as np
import safetensors

from jaxlm import checkpoint, config as configs, lm as lms
from jaxlm.errors import UsageError
from jaxlm.interop import convert, exporting, importing
from jaxlm.interop.huggingface import FLOATS, read_json
from jaxlm.interop.mapping import factors, units
from jaxlm.metrics import say
from jaxlm.models import lora
from jaxlm.schema import Config, LoraConfig, ModelConfig, flatten

PREFIX = 'base_model.model.'  # of every name: peft's wrapper and its model
FILES = ('adapter_config.json', 'adapter_model.safetensors')
HEADS = ('classifier', 'qa_outputs', 'pooler')  # modules of a classifier, which its base may not have: they go along
MERGED = 'export the merged model, without --adapter'
CLASSIFIERS = ('classify', 'tag', 'span')
TASKS = {'lm': 'CAUSAL_LM', 'classify': 'SEQ_CLS', 'tag': 'TOKEN_CLS', 'span': 'QUESTION_ANS', 'none': 'FEATURE_EXTRACTION',
         'mlm': None}  # by model.head; peft has no word for masked language models


def run(lm, out: pathlib.Path, family: str | None, dtype: str, base: str | None) -> dict | None:
  """Writes the pairs of `lm` (loaded with merge=False) to the folder `out` → the parity report, None without peft.

  base: the name or folder of the base model in transformers, to be said there. UsageError if there are no pairs, no family
  holds them, or nobody else has their base.
  """
  if not lm.config.model.lora.rank:
    raise UsageError('--adapter: model.lora.rank=0: the run has no pairs of low rank; leave --adapter out')
  bare = without_pairs(lm)
  _check_start(lm)
  family = exporting.family_of(bare.config.model, family)
  convert.to_config_json(family, bare.config.model)
  config, tensors = contents(lm, family)
  report = None
  with exporting.complete(out) as folder:
    exporting.write_tensors(folder, tensors.items(), dtype)
    (folder / 'model.safetensors').rename(folder / FILES[1])
    exporting.write_json(folder / FILES[0], {**config, 'base_model_name_or_path': base})
    if all(map(importlib.util.find_spec, ('peft', 'torch', 'transformers'))):
      with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f'{out.name}.base.') as temporary:
        exporting.write_model(bare, pathlib.Path(temporary), family, 'float32')
        report = exporting.parity(lm, pathlib.Path(temporary), dtype, folder)
      exporting.write_json(folder / 'parity.json', report)
  size = sum(t.size for t in tensors.values())
  say(f'{out}: {family}, {dtype}, {size / 1e6:.2f}M parameters of rank {config["r"]}; '
      + (exporting.told(report) if report else 'not read back: peft is not installed'))
  return report


def without_pairs(lm):
  """The frozen model alone."""
  m = dataclasses.replace(lm.config.model, lora=LoraConfig())
  return dataclasses.replace(lm, config=dataclasses.replace(lm.config, model=m),
                             params={k: v for k, v in lm.params.items() if k != 'lora'})


def _check_start(lm) -> None:
  """UsageError if the frozen weights are not those that the run started from: then no base would fit the adapter."""
  start, m = pathlib.Path(lm.config.start.checkpoint), without_pairs(lm).config.model
  if not lm.config.start.checkpoint:
    raise UsageError(f"--adapter: start.checkpoint='': the run started from nothing, so that nobody has its base; {MERGED}")
  steps = checkpoint.steps(start)
  if not steps:  # moved, or on another machine: then the person says what the base is
    return
  checkpoints = checkpoint.Checkpoints(start, read_only=True)
  said = checkpoints.read_meta(lm.config.start.step if lm.config.start.step in steps else steps[-1])['config']
  checkpoints.close()
  there = convert.shapes(dataclasses.replace(configs.from_json(json.dumps(said)).model, lora=LoraConfig()))
  for path, shape in convert.shapes(m).items():
    if there.get(path) != shape and not (m.head in CLASSIFIERS and path.split('/')[0] in ('classify', 'pooler')):
      raise UsageError(f'--adapter: {path} is {list(shape)} here, and in start.checkpoint={start} '
                       f'{list(there[path]) if path in there else "it is not there"}; {MERGED}')


def contents(lm, family: str) -> tuple[dict, dict[str, np.ndarray]]:
  """(adapter_config.json, tensors by name) of an LM with pairs."""
  m, rows = without_pairs(lm).config.model, convert.FAMILIES[family].rows_of(lm.config.model)
  pairs, get = lora.flat(lm.params['lora']), functools.partial(exporting.get, lm.params)
  rank, tensors, ranks, modules, fan_in = lm.config.model.lora.rank, {}, {}, set(), False
  for unit in units(rows, m, convert.shapes(m)):
    module = convert.FAMILIES[family].stored(m, unit.theirs).removesuffix('.weight')
    modules.add(module)
    own = [rank if f'{part.path}/a' in pairs else 0 for part in unit.parts]
    if sum(own):
      a_unit, b_unit = _factors(unit, own, family, bool(m.moe.E))
      fan_in |= unit.parts[0].unmerged[0] in a_unit.parts[0].letters
      ranks[module] = sum(own)
      a = [get(f'lora/{part.path}', part.index) for part in a_unit.parts]
      b = [np.zeros(part.shape, np.float32) for part in b_unit.parts]
      for i, at in enumerate(np.cumsum([0, *own[:-1]])):
        if own[i]:
          b[i][at:at + rank] = get(f'lora/{b_unit.parts[i].path}', b_unit.parts[i].index)
      tensors[f'{PREFIX}{module}.lora_A.weight'] = a_unit.to_theirs(a)
      tensors[f'{PREFIX}{module}.lora_B.weight'] = b_unit.to_theirs(b)
  modules |= {row.theirs.removesuffix('.weight') for row in convert.FAMILIES[family].rows if '{' not in row.theirs}
  heads = _heads(lm, family, tensors)
  common = min(ranks.values())
  others = {end: r for r in sorted(set(ranks.values()) - {common})
            for end in _ends({name for name in ranks if ranks[name] == r}, modules)}
  alpha = lm.config.model.lora.alpha / rank  # peft divides by the rank again
  return {
      'peft_type': 'LORA', 'task_type': 'SEQ_2_SEQ_LM' if m.kind == 'seq2seq' else TASKS[m.head], 'inference_mode': True,
      'r': common, 'lora_alpha': _number(alpha * common), 'lora_dropout': 0., 'bias': 'none', 'fan_in_fan_out': fan_in,
      'target_modules': _ends(set(ranks), modules), 'modules_to_save': heads or None, 'rank_pattern': others,
      'alpha_pattern': {end: _number(alpha * r) for end, r in others.items()}, 'use_rslora': False, 'use_dora': False}, tensors


def _factors(unit, ranks: list[int], family: str, mixture: bool):
  path = unit.parts[0].path
  if mixture and 'attention/' not in path:  # it renames these for transformers 5, whose experts are one array
    raise UsageError(f'--adapter: {path}: peft takes it for a part of the experts; {MERGED}')
  try:
    if not unit.theirs.endswith('.weight'):
      raise ValueError(f'{unit.theirs} is no weight')
    return factors(unit, lora.inputs_of(path, len(unit.parts[0].letters) + 1), ranks)
  except ValueError as e:
    raise UsageError(f'--adapter: {path} is no linear layer in {family} ({e}); {MERGED}') from e


def _number(value: float) -> int | float:
  return int(value) if value == int(value) else value


def _ends(chosen: set[str], modules: set[str]) -> list[str]:
  """The shortest ends of names by which peft finds these modules and no others; the whole names if there are none."""
  for length in (1, 2, 3):
    ends = {'.'.join(name.split('.')[-length:]) for name in chosen}
    if {name for name in modules if any(f'.{name}'.endswith(f'.{end}') for end in ends)} == chosen:
      return sorted(ends)
  return sorted(chosen)


def _heads(lm, family: str, tensors: dict) -> list[str]:
  """Adds the weights of a classifier to `tensors` → its modules."""
  m, found = without_pairs(lm).config.model, set()
  if m.head not in CLASSIFIERS:
    return []
  for name, tensor in convert.write(family, m, functools.partial(exporting.get, lm.params)):
    module = re.match(rf'(?:.*\.)?(?:{"|".join(HEADS)})(?=\.)', name)
    if module:
      found.add(module[0])
      tensors[PREFIX + name] = tensor
  return sorted(found)


# ---- the way back

def read(folder: pathlib.Path, workdir: pathlib.Path, overrides) -> Config:
  """Imports the adapter into `workdir`: the base of --config.start.checkpoint, and beside it the pairs, ready to be trained on.
  UsageError for what cannot be read, fits no weight of the base, or is more than pairs."""
  if checkpoint.steps(workdir):
    raise UsageError(f'--workdir={workdir}: has checkpoints already; import into another')
  values = configs.parsed(overrides)
  if own := [key for key in values if key.startswith('model.')]:
    raise UsageError(f'{own[0]}={values[own[0]]}: an adapter has the model of its base; leave it out')
  if not values.get('start.checkpoint'):
    raise UsageError("start.checkpoint='': an adapter wants a base; name a run that has it, --config.start.checkpoint=DIR")
  said, stored = _said(folder), _stored(folder)
  base = lms.load(values['start.checkpoint'], values.get('start.step') or None)
  family, found = _units(folder, base.config.model, stored)
  pairs, heads = _pairs(folder, said, stored, found)
  rank = max(b.shape[0] for layers in pairs.values() for _, b, _ in layers.values())
  scale = next(s for layers in pairs.values() for _, _, s in layers.values())
  config = configs.from_flat({
      **flatten(base.config), 'start.step': base.step, 'data.tokenizer': str(workdir / 'tokenizer.json'), **values,
      'model.lora.rank': rank, 'model.lora.alpha': scale * rank, 'model.lora.targets': f'^({"|".join(sorted(pairs))})$'})
  frozen = lora.flat(base.params)
  arrays = {path: functools.partial(_with_heads, w, heads.get(path, [])) for path, w in frozen.items()}
  shapes = {path: w.shape for path, w in frozen.items()}
  for path, layers in pairs.items():
    for key, shape in zip('ab', lora.pair_shapes(path, frozen[path].shape, rank)):
      shapes[f'lora/{path}/{key}'] = shape
      arrays[f'lora/{path}/{key}'] = functools.partial(_stacked, key, shape, layers, scale)
  say(f'{folder}: {family}, pairs of rank {rank} beside {len(pairs)} weights of {values["start.checkpoint"]}')
  importing.write_run(workdir, config, base.tokenizer.json, {'from': str(folder), 'model_type': family}, shapes,
                      ((path, (), make()) for path, make in arrays.items()))
  return config


def _said(folder: pathlib.Path) -> dict:
  """adapter_config.json over what peft takes for granted. UsageError for a kind of adapter that is more than pairs."""
  file = folder / FILES[0]
  said = {'bias': 'none', 'init_lora_weights': True, 'rank_pattern': {}, 'alpha_pattern': {}, 'r': 8, 'lora_alpha': 8,
          'use_rslora': False} | {k: v for k, v in read_json(file).items() if v is not None}
  known = {'peft_type': ('LORA',), 'bias': ('none',), 'use_rslora': (True, False),
           'init_lora_weights': (True, False, 'gaussian', 'orthogonal', 'eva')}  # others start from a changed base
  off = ('use_dora', 'use_qalora', 'lora_bias', 'layer_replication', 'trainable_token_indices', 'target_parameters',
         'alora_invocation_tokens')
  strange = [key for key, values in known.items() if said.get(key) not in values] + [key for key in off if said.get(key)]
  if strange:
    raise UsageError(f'{file}: {strange[0]}={said.get(strange[0])!r}: known are plain pairs (LoRA); merge it in peft, and import '
                     'the merged model')
  for patterns in ('rank_pattern', 'alpha_pattern'):
    keys = said[patterns] if isinstance(said[patterns], dict) else [said[patterns]]
    odd = [key for key in keys if not isinstance(key, str) or not re.fullmatch(r'[\w.]+', key)]  # nobody's patterns are run
    if odd:
      raise UsageError(f'{file}: {patterns} has {odd[0]!r}: wants names of modules')
  return said


def _number_of(said: dict, key: str, pattern: str, module: str, kinds: tuple) -> float:
  value = next((v for end, v in said[pattern].items() if f'.{module}'.endswith(f'.{end}')), said[key])
  if type(value) not in kinds or not 0 < value < 2 ** 24:
    raise UsageError(f'{FILES[0]}: {key}={value!r} of {module}: wants a number above 0')
  return value


def _stored(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors in float32, by their names without PREFIX."""
  file, out = folder / FILES[1], {}
  if not file.is_file():
    raise UsageError(f'{folder}: has no {FILES[1]}' + (
        '; a .bin is a pickle, which can run code, and is not read' if list(folder.glob('*.bin')) else ''))
  try:
    with safetensors.safe_open(file, framework='np') as f:
      for name in f.keys():
        if not name.startswith(PREFIX) or f.get_slice(name).get_dtype() not in FLOATS:
          raise UsageError(f'{file}: {name} is no float tensor of {PREFIX}*')
        out[name.removeprefix(PREFIX)] = f.get_tensor(name).astype(np.float32)
  except (OSError, safetensors.SafetensorError) as e:
    raise UsageError(f'{file}: cannot be read ({e})') from e
  if not any('.lora_' in name for name in out):
    raise UsageError(f'{file}: has no pairs (lora_A, lora_B)')
  return out


def _units(folder: pathlib.Path, m: ModelConfig, stored: dict) -> tuple[str, dict]:
  """(the first family that holds the base and has all of these tensors, {a name of theirs, of a whole weight: its unit})."""
  whole = {re.sub(r'\.lora_[AB]\.weight$', '.weight', name) for name in stored}
  lost = {}
  for family in convert.holding(m):
    there = {unit.theirs: unit for unit in units(convert.FAMILIES[family].rows_of(m), m, convert.shapes(m))}
    names = convert.FAMILIES[family].named(whole)
    lost[family] = sorted(name for name, theirs in names.items() if theirs not in there)
    if not lost[family]:
      return family, {name: there[theirs] for name, theirs in names.items()}
  nearest = min(lost, key=lambda family: len(lost[family]))
  raise UsageError(f'{folder / FILES[1]}: {lost[nearest][0]} is no tensor of the base, as {nearest} names them')


def _pairs(folder: pathlib.Path, said: dict, stored: dict, found: dict) -> tuple[dict, dict]:
  """({path: {layer: (A [in…, r], B [r, out…], what it is scaled by)}}, {path: [(index, array)] of what is no pair})."""
  pairs, heads = {}, {}
  for name, unit in sorted(found.items()):
    module = name.removesuffix('.weight')
    if name in stored and not any(f'{module}.lora_{side}.weight' in stored for side in 'AB'):
      _check_shape(folder, name, stored[name], unit.shape)
      for part, array in zip(unit.parts, unit.to_ours(stored[name])):
        heads.setdefault(part.path, []).append((part.index, array))
      continue
    try:
      A, B = (stored[f'{module}.lora_{side}.weight'] for side in 'AB')
    except KeyError as e:
      raise UsageError(f'{folder / FILES[1]}: has no {e.args[0]}, the other half of a pair') from e
    path, rank = unit.parts[0].path, _number_of(said, 'r', 'rank_pattern', module, (int,))
    if not lora.STACKED.match(path):
      raise UsageError(f'{folder / FILES[1]}: {module} is no linear layer of a stack, which alone get pairs here')
    a_unit, b_unit = factors(unit, lora.inputs_of(path, len(unit.parts[0].letters) + 1), [rank] + [0] * (len(unit.parts) - 1))
    _check_shape(folder, f'{module}.lora_A', A, a_unit.shape)
    _check_shape(folder, f'{module}.lora_B', B, b_unit.shape)
    scale = _number_of(said, 'lora_alpha', 'alpha_pattern', module, (int, float)) / (rank ** 0.5 if said['use_rslora'] else rank)
    a, = a_unit.to_ours(A)
    for part, b in zip(unit.parts, b_unit.to_ours(B)):
      used = b.reshape(rank, -1).any(1) if len(unit.parts) > 1 and B.any() else np.ones(rank, bool)
      if used.any():
        pairs.setdefault(part.path, {})[part.index[0]] = a[..., used], b[used], scale
  return pairs, heads


def _check_shape(folder: pathlib.Path, name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> None:
  if tensor.shape != shape:
    raise UsageError(f'{folder / FILES[1]}: {name} is {list(tensor.shape)}, where its base and its config want {list(shape)}')


def _with_heads(w, heads: list) -> np.ndarray:
  out = np.array(jax.device_get(w))
  for index, array in heads:
    part = out[index] if index else out
    part[:len(array)] = array  # a padded vocabulary has more rows
  return out


def _stacked(key: str, shape: tuple[int, ...], layers: dict, scale: float) -> np.ndarray:
  """The A or B of all layers; a pair of lower rank, or a layer without, is zero in the rest."""
  out = np.zeros(shape, np.float32)
  for n, (a, b, own) in layers.items():
    if key == 'a':
      out[n, ..., :a.shape[-1]] = a
    else:
      out[n, :len(b)] = b * np.float32(own / scale)
  return out
