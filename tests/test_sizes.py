"""Every config file and size: its state for a pod, without allocating any of it, and its published parameter count."""
import importlib.util
import math

import jax
import pytest
import torch
import transformers
from jax.sharding import AbstractMesh, AxisType

from jaxlm import config as configs, layout, schema
from jaxlm.interop import convert
from jaxlm.optimizer import make_optimizer
from jaxlm.plan import cost
from jaxlm.plan.shrink import most_tokens
from jaxlm.step import abstract_state
from tests import common


def sizes() -> list[str]:
  out = []
  own = {'configs/ngram.py', 'configs/ladder.py'}  # one has no size before it is counted, the other many: see below
  for path in sorted(set(common.shipped('configs/*.py')) - own):
    spec = importlib.util.spec_from_file_location('c', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out += [f'{path}:{size}' for size in module.SIZES] if hasattr(module, 'SIZES') else [path]
  return [name.removeprefix('configs/').replace('.py', '') for name in out]


# What the models' own pages and papers say, to the last parameter where they do; llama_1b and quickstart are ours.
PUBLISHED = {
    'deepseek_v3': 671_026_419_200,
    'gemma2:2b': 2_614_341_888, 'gemma2:9b': 9_241_705_984, 'gemma2:27b': 27_227_128_320,
    'gemma3:270m': 268_098_176, 'gemma3:1b': 999_885_952, 'gemma3:4b': 3_880_263_168, 'gemma3:12b': 11_766_034_176,
    'gemma3:27b': 27_009_346_304,
    'gpt2:124m': 124_439_808, 'gpt2:355m': 354_823_168, 'gpt2:774m': 774_030_080, 'gpt2:1558m': 1_557_611_200,
    'gpt2_small': 124_439_808,
    'gpt3:125m': '125M', 'gpt3:350m': '356M', 'gpt3:760m': '760M', 'gpt3:1.3b': '1.3B', 'gpt3:2.7b': '2.7B',
    'gpt3:6.7b': '6.7B', 'gpt3:13b': '13B', 'gpt3:175b': '174.6B',  # tables 2.1 and D.1
    'llama2:7b': 6_738_415_616, 'llama2:13b': 13_015_864_320, 'llama2:70b': 68_976_648_192,
    'llama3:1b': 1_235_814_400, 'llama3:3b': 3_212_749_824, 'llama3:8b': 8_030_261_248, 'llama3:70b': 70_553_706_496,
    'llama3:405b': 405_853_388_800, 'llama3_8b': 8_030_261_248, 'llama_1b': 1_040_254_976,
    'mistral': 7_241_732_096, 'mixtral:8x7b': 46_702_792_704, 'mixtral:8x22b': 140_630_071_296,
    'olmo2:1b': 1_484_916_736, 'olmo2:7b': 7_298_617_344, 'olmo2:13b': 13_716_198_400, 'olmo2:32b': 32_234_279_936,
    'phi3:mini': 3_821_079_552, 'phi3:medium': 13_960_238_080,
    'pythia:70m': 70_426_624, 'pythia:160m': 162_322_944, 'pythia:410m': 405_334_016, 'pythia:1b': 1_011_781_632,
    'pythia:1.4b': 1_414_647_808, 'pythia:2.8b': 2_775_208_960, 'pythia:6.9b': 6_857_302_016, 'pythia:12b': 11_846_072_320,
    'quickstart': 1_705_600,
    'qwen2:0.5b': 494_032_768, 'qwen2:1.5b': 1_543_714_304, 'qwen2:7b': 7_615_616_512, 'qwen2:72b': 72_706_203_648,
    'qwen3:0.6b': 596_049_920, 'qwen3:1.7b': 1_720_574_976, 'qwen3:4b': 4_022_468_096, 'qwen3:8b': 8_190_735_360,
    'qwen3:14b': 14_768_307_200, 'qwen3:32b': 32_762_123_264, 'qwen3:30b-a3b': 30_532_122_624,
    'qwen3:235b-a22b': 235_093_634_560,
    'smollm2:135m': 134_515_008, 'smollm2:360m': 361_821_120, 'smollm2:1.7b': 1_711_376_384,
}


# Rows of published weights, padding and tokens that are added later among them, where the tokenizer that a config trains has fewer.
PUBLISHED_ROWS = {'deepseek_v3': {129_280}, 'gemma3': {262_208}, 'olmo2': {100_352}, 'phi3': {32_064}, 'pythia': {50_304, 50_432, 50_688},
                  'qwen2': {151_936, 152_064}, 'qwen3': {151_936}}


def test_no_config_trains_rows_that_only_pad_the_vocabulary():
  """All but the tokens that its tokenizer can have, and that its objective puts in, is beyond model.vocab."""
  seen, published = set(), set()
  for path in common.shipped():
    spec = importlib.util.spec_from_file_location('c', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    choices = next((getattr(module, name) for name in ('SIZES', 'MODELS', 'TEMPLATES', 'ORDERS') if hasattr(module, name)), [None])
    for choice in choices:
      c = configs.load(f'{path}:{choice}' if choice else path)
      family, rows, needed = path.removeprefix('configs/').removesuffix('.py'), c.model.vocab or c.model.V, most_tokens(c)
      seen.add(family)
      if c.data.tokenizer == 'start':  # of a run that is there only then
        continue
      if rows in PUBLISHED_ROWS.get(family, ()):
        published.add((family, rows))
      else:
        assert rows == needed, f'{path}:{choice}: {rows} rows for {needed} tokens; set model.vocab={needed}'
  assert {'gpt2_small', 'ladder', 'finetune/multitask', 'ngram'} < seen
  assert published == {(family, rows) for family, known in PUBLISHED_ROWS.items() for rows in known}


def load(name: str) -> schema.Config:
  file, _, size = name.partition(':')
  return configs.load(f'configs/{file}.py' + (f':{size}' if size else ''))


def count(name: str) -> int:
  return sum(map(math.prod, convert.shapes(load(name).model).values()))


@pytest.mark.parametrize('name', sizes())
def test_state_for_256_devices_and_published_count(name):
  """No large parameter or moment is whole on every device; the planner's estimate is near."""
  c = load(name)
  four = c.model.G % 4 == 0 and c.model.H % 4 == 0
  sizes = {'fsdp': 64, 'tensor': 4 if four else 1}
  mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in layout.AXES), layout.AXES, axis_types=(AxisType.Explicit,) * len(layout.AXES))
  with jax.sharding.use_abstract_mesh(mesh):
    state = abstract_state(c, make_optimizer(c.optimizer, c.steps)[0])
  for a in jax.tree.leaves(state):
    replicated = a.sharding is None or all(axis is None for axis in a.sharding.spec)
    assert not replicated or a.size <= 2 ** 22, a
  allocated = sum(a.size for a in jax.tree.leaves(state['params']))
  assert 0 <= allocated - cost.approximate_params(c.model) < 0.002 * allocated
  published = PUBLISHED[name]
  if isinstance(published, str):
    digits = len(published.partition('.')[2]) - 1 if '.' in published else 0
    number, unit = float(published[:-1]), {'M': 1e6, 'B': 1e9}[published[-1]]
    assert round(count(name) / unit, digits) == number
  else:
    assert count(name) == published


@pytest.mark.parametrize('name', ['deepseek_v3', 'gemma2:27b', 'gemma3:27b', 'gpt2:1558m', 'llama3:3b', 'mistral', 'mixtral:8x7b',
                                  'olmo2:32b', 'phi3:medium', 'pythia:12b', 'qwen2:0.5b', 'qwen3:32b', 'qwen3:30b-a3b'])
def test_transformers_makes_the_same_of_the_exported_config(name):
  """As many parameters, in a model of which nothing is allocated."""
  hf = convert.to_config_json(convert.family_of(load(name).model), load(name).model)
  config = transformers.AutoConfig.for_model(**hf, num_mtp_layers=0) if name == 'deepseek_v3' else transformers.AutoConfig.for_model(**hf)
  with torch.device('meta'):
    peer = transformers.AutoModelForCausalLM.from_config(config)
  extra = [b for key, b in peer.named_buffers() if 'e_score_correction_bias' in key]
  assert sum(p.numel() for p in [*peer.parameters(), *extra]) == count(name)


def test_models_of_the_ladder_are_of_about_one_size():
  spec = importlib.util.spec_from_file_location('c', 'configs/ladder.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  counts = {name: count(f'ladder:{name}') for name in module.MODELS}
  assert len(counts) == 8 and all(1.65e6 < n < 1.77e6 for n in counts.values()), counts
