"""The gate of `make pods`: small steps of every kind, through the compiler of every generation of chip: does the step compile?

Each chip's are compiled in a process of their own, by the JAX of the Python that runs this. What has been compiled is kept in
--workdir, by version of JAX, and only programs that are not there are compiled; the table, docs/gate.md, has all versions that are there.

    python benchmarks/gate.py [--workdir=runs/pods] [--only=CHIP]
"""
import json
import time

from running import TINY_POD, TINY_STEP, again, parse as flags_of, parser

from jaxlm import config as configs
from jaxlm.schema import flatten

CHIPS = {'v4': 'v4:2x2x2', 'v5e': 'v5e:2x4', 'v5p': 'v5p:2x2x2', 'v6e': 'v6e:2x4', 'tpu7x': 'tpu7x:2x2x1', 'h100': 'h100:1x8'}
SIZES = {'model.D': 256, 'model.H': 4, 'model.G': 4, 'model.K': 128, 'model.F': 512, 'model.N': 4, 'model.V': 1024,
         'model.dtype': 'bfloat16', 'model.remat': 'full', 'batch': 16, 'length': 512, 'loss.chunks': 2, 'loss.over': 'vocabulary'}
MIXTURE = {'model.moe.E': 8, 'model.moe.F': 512}
PROGRAMS = {
    'decoder': {'mesh.fsdp': 4, 'mesh.tensor': 2},
    'gradients summed in bfloat16': {'mesh.fsdp': 8, 'model.reduce_dtype': 'bfloat16'},
    'mixture': {**MIXTURE, 'mesh.fsdp': 8},
    'mixture over mesh.expert': {**MIXTURE, 'mesh.fsdp': 2, 'mesh.expert': 4, 'model.moe.room': 2.},
    'ring over mesh.context': {'mesh.fsdp': 4, 'mesh.context': 2},
    'pipeline': {'mesh.fsdp': 4, 'mesh.stage': 2, 'model.pipeline.rounds': 2},
    'int8 projections': {'mesh.fsdp': 8, 'model.matmul': 'int8'},
    'int8 experts over mesh.expert': {**MIXTURE, 'mesh.fsdp': 2, 'mesh.expert': 4, 'model.moe.room': 2., 'model.matmul': 'int8'},
    'fp8 projections and experts': {**MIXTURE, 'mesh.fsdp': 8, 'model.matmul': 'fp8'},
    'layer inputs and moments offloaded': {'mesh.fsdp': 8, 'model.offload': 'block_in attention', 'optimizer.offload': True},
}
SHORT = {'v5e': TINY_POD}
HEAD = """# What compiles where

Made by `make pods` (benchmarks/gate.py): small steps of every kind, through the real compilers of every generation of chip, on a CPU.
A cell has, for each version of JAX ({versions}), "yes" and the share of the bytes of collectives that go on beside other
work, or else what JAX or the compiler says.

"""


def compiled(chip: str, topology: str, programs: dict[str, dict]) -> dict:
  """Program → {'says': '' or why it does not compile, 'hidden': share}, in this process."""
  import jax  # pylint: disable=g-import-not-at-top
  from jaxlm.errors import UsageError
  from jaxlm.plan import compile as compiling, costed, search
  from jaxlm.plan.topology import parse
  from jaxlm.validate import filled
  out, pod = {}, parse(topology)
  for name, changes in programs.items():
    config, start = configs.from_flat({**SIZES, **changes}), time.process_time()
    try:
      sent = costed.sent(search.plan(config, filled(config.mesh, pod.devices), pod).job, compiling.step(config, topology))
      out[name] = {'says': '', 'hidden': sum(s.bytes * s.hidden for s in sent) / sum(s.bytes for s in sent)}
    except (jax.errors.JaxRuntimeError, compiling.DoesNotFit, UsageError, NotImplementedError, TypeError, ValueError) as e:
      out[name] = {'says': str(e).splitlines()[0][:200], 'hidden': 0.}
    out[name]['cpu'] = time.process_time() - start
  return {'jax': jax.__version__, 'chip': chip, 'programs': out}


def kept(flags, file, chip: str, programs) -> dict[str, dict]:
  """What `compiled` says of the programs, from `file`; those that it lacks are compiled and added to it."""
  have = json.loads(file.read_text(encoding='utf-8'))['programs'] if file.exists() else {}
  if missing := [name for name in programs if name not in have]:
    print(f'{file.name}: {", ".join(missing)} …', flush=True)
    r = json.loads(again(flags, __file__, f'--one={chip}', *(f'--program={name}' for name in missing)).splitlines()[-1])
    have = r['programs'] = {**have, **r['programs']}
    file.write_text(json.dumps(r), encoding='utf-8')
  return have


def table(found: dict[str, dict[str, dict]], chips, programs) -> str:
  """found: version of JAX → chip → program → what `compiled` says."""
  cell = lambda r: '–' if r is None else r['says'] or f"yes {r['hidden']:.0%}"
  lines = ['| program | ' + ' | '.join(chips) + ' |', '|---' * (len(chips) + 1) + '|']
  for name in programs:
    cells = [' / '.join(cell(of.get(chip, {}).get(name)) for of in found.values()) for chip in chips]
    lines.append('| ' + ' | '.join([name, *cells]) + ' |')
  return HEAD.format(versions=' / '.join(found)) + '\n'.join(lines) + '\n'


def main() -> None:
  p = parser(__doc__, workdir='runs/pods', out='docs')
  p.add_argument('--only', default='', help='this chip')
  p.add_argument('--one', help='compile for this chip and print what was found')
  p.add_argument('--program', action='append', help='of --one; may be given again')
  flags = flags_of(p)
  chips, programs = CHIPS, PROGRAMS
  if flags.short:  # all keys of the step that pods.py compiles
    tiny = configs.load('configs/llama3.py:8b', [(key, str(value)) for key, value in TINY_STEP.items()])
    chips, programs = SHORT, {'decoder': flatten(tiny)}
  if flags.one:
    print(json.dumps(compiled(flags.one, chips[flags.one], {name: programs[name] for name in flags.program})))
    return
  import jax  # pylint: disable=g-import-not-at-top
  folder = flags.workdir / 'gate'
  (folder / jax.__version__).mkdir(parents=True, exist_ok=True)
  for chip in chips:
    if flags.only in ('', chip):
      for name, r in kept(flags, folder / jax.__version__ / f'{chip}.json', chip, programs).items():
        print(f'jax {jax.__version__}, {chip}, {name}: {r["says"] or "compiles"} ({r["cpu"]:.0f} s of CPU)', flush=True)
  found = {version.name: {file.stem: json.loads(file.read_text())['programs'] for file in version.glob('*.json')}
           for version in sorted(folder.iterdir())}
  (flags.out / 'gate.md').write_text(table(found, chips, programs), encoding='utf-8')


if __name__ == '__main__':
  main()
