"""`jaxlm export --adapter`: pairs of low rank → a folder that peft's PeftModel.from_pretrained lays on the base model.

A pair goes where its weight goes, by the same row of mapping.py: what a row does to the inputs it does to A, what it does to
the outputs to B, and nothing is approximated. Where one foreign tensor holds several weights (queries, keys and values), its
rank is the sum of theirs: the A stand above each other, and each B is zero outside its own weight.
"""
import dataclasses
import functools
import importlib.util
import json
import pathlib
import re
import tempfile

import numpy as np

from jaxlm import checkpoint, config as configs
from jaxlm.errors import UsageError
from jaxlm.interop import convert, exporting
from jaxlm.interop.mapping import factors, units
from jaxlm.metrics import say
from jaxlm.models import lora
from jaxlm.schema import LoraConfig, ModelConfig

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
