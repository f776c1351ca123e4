"""`make recommend`: configs/pods.json, the mesh and remat that the planner takes for each known model on pods that people have.

`--config=configs/llama3.py:8b@v5p:4x4x8` uses them. Where a model does not fit with the batch of its config, the file says why.

    python benchmarks/recommend.py
"""
import importlib.util
import json

import running
from running import ROOT

from jaxlm import config as configs
from jaxlm.plan import search
from jaxlm.plan.topology import parse

TOPOLOGIES = ('v5e:16x16', 'v5p:4x4x8', 'v5p:8x8x8', 'v5p:16x16x16', 'v6e:16x16')
FILES = ('deepseek_v3', 'gemma2', 'gemma3', 'gpt2', 'gpt3', 'llama2', 'llama3', 'llama3_8b', 'llama_1b', 'mistral', 'mixtral', 'olmo2',
         'phi3', 'pythia', 'qwen2', 'qwen3', 'smollm2')


def names() -> list[str]:
  """'llama3.py:8b' of each file and size."""
  out = []
  for file in FILES:
    spec = importlib.util.spec_from_file_location(file, ROOT / f'configs/{file}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out += [f'{file}.py:{size}' for size in module.SIZES] if hasattr(module, 'SIZES') else [f'{file}.py']
  return out


def recommended(name: str, topology: str) -> dict | str:
  """Keys of the config, or why there are none. The vocabulary is cut for the loss only where its length will not do."""
  pod, reason = parse(topology), ''
  for over in ('length', 'vocabulary'):
    config = configs.load(f'configs/{name}', [('loss.over', over)])
    found, refused = search.search(config, pod, frozenset({'loss.over'}))
    if found:
      return {**found[0].stated, **({'loss.over': over} if over != 'length' else {})}
    reason = max(refused, key=lambda why: (why.startswith('needs '), len(refused[why])))
  return reason


def main() -> None:
  flags, table = running.parse(running.parser(__doc__, out='configs')), {}
  for name in names()[-1:] if flags.short else names():
    table[name] = {topology: recommended(name, topology) for topology in (TOPOLOGIES[:1] if flags.short else TOPOLOGIES)}
    print(name, table[name], flush=True)
  (flags.out / 'pods.json').write_text(written(table), encoding='utf-8')


def written(table: dict) -> str:
  """As JSON, a line a pod."""
  models = [f'{json.dumps(name)}: {{\n' + ',\n'.join(f'  {json.dumps(pod)}: {json.dumps(keys)}' for pod, keys in pods.items()) + '}'
            for name, pods in table.items()]
  return '{\n' + ',\n'.join(models) + '}\n'


if __name__ == '__main__':
  main()
