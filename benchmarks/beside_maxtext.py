"""`make pods-beside-maxtext`: the same recipes compiled by jaxlm and by MaxText, for the same pod, by the same compiler, and counted alike.

Each step is compiled in a process of its own, MaxText's in its own venv; what has been compiled is kept in --workdir and not compiled
again. Writes docs/beside_maxtext.md.

    python benchmarks/beside_maxtext.py --maxtext=PYTHON [--workdir=runs/maxtext] [--only=TEXT]
"""
import dataclasses
import json
import pathlib
import subprocess
import time

from running import ROOT, TINY_POD, TINY_STEP, kept, parse as flags_of, parser

VERSION = '0.2.5'  # of MaxText
LENGTH = 8192
RECIPES = {  # name: (jaxlm's config, topology, what differs), (MaxText's model, its name of the topology, its remat)
    'Llama-3-8B, v5p:4x4x8, full remat': (
        ('llama3.py:8b', 'v5p:4x4x8', {'batch': 128, 'mesh.data': 4, 'mesh.fsdp': 32}), ('llama3.1-8b', 'v5p-256', 'full')),
    'Llama-3-8B, v5p:4x4x8, minimal remat': (
        ('llama3.py:8b', 'v5p:4x4x8', {'batch': 128, 'mesh.data': 4, 'mesh.fsdp': 32, 'model.remat': 'minimal'}),
        ('llama3.1-8b', 'v5p-256', 'minimal')),
    'Llama-3-8B, v6e:16x16, full remat': (
        ('llama3.py:8b', 'v6e:16x16', {'batch': 256, 'mesh.data': 8, 'mesh.fsdp': 32}), ('llama3.1-8b', 'v6e-256', 'full')),
    'Llama-3-70B, v6e:16x16, full remat': (
        ('llama3.py:70b', 'v6e:16x16', {'batch': 256, 'mesh.data': 4, 'mesh.fsdp': 64}), ('llama3.1-70b', 'v6e-256', 'full')),
}
SHORT = {'tiny': (('llama3.py:8b', TINY_POD, TINY_STEP), ('', '', ''))}
PROGRAMS = ('jaxlm', 'MaxText', "MaxText, jaxlm's options")
HEAD = """# Beside MaxText

Made by `make pods-beside-maxtext` (benchmarks/beside_maxtext.py): the same model, pod, mesh, batch ({length:,} tokens a row) and remat,
compiled by jaxlm and by MaxText {version}'s train_compile (attention=flash), by the same compiler ({versions}), on a CPU.

MaxText is compiled by its defaults, which ask the compiler for nothing; and, where there is a third row, with the compiler options that
jaxlm chooses for the chip (jaxlm/xla.py), so that what the options bring and what the program brings can be told apart. All is of one
device and one step. Peak HBM is the compiler's. Fusions are the compiler's own estimate. "Gathered", "scattered" and "summed" are GiB
of collectives, and the share of them that goes on beside other work; waits are what is left, by the schedule and the rate of the links
(jaxlm/plan/costed.py). The kernels of attention, of which the compiler says nothing, are taken to be equal in MFU.

| recipe | program | peak, GiB | fusions, s | beside MaxText's | gathered | scattered | summed | waits, s | MFU |
|---|---|---|---|---|---|---|---|---|---|
"""


def job_of(recipe: str):
  """The planner's view of a recipe: (config, job)."""
  from jaxlm import config as configs  # pylint: disable=g-import-not-at-top
  from jaxlm.plan import search
  from jaxlm.plan.topology import parse
  from jaxlm.validate import filled
  (file, topology, changes), _ = {**RECIPES, **SHORT}[recipe]
  changes = {'loss.over': 'vocabulary', 'length': LENGTH, **changes}
  config, pod = configs.load(f'configs/{file}', [(key, str(value)) for key, value in changes.items()]), parse(topology)
  return config, search.plan(config, filled(config.mesh, pod.devices), pod).job


def compiled(recipe: str) -> dict:
  """jaxlm's step, compiled in this process."""
  import jax  # pylint: disable=g-import-not-at-top
  from jaxlm.plan import compile as compiling
  config, job = job_of(recipe)
  c = compiling.step(config, job.pod.name)
  return {'jax': jax.__version__, 'peak': c.peak, 'arguments': c.arguments, 'text': c.text, 'seconds': c.seconds}


def maxtexts(python: str, recipe: str, file: pathlib.Path, options: bool) -> dict:
  """MaxText's step, compiled in a process of its own; kept in `file`."""
  if file.exists():
    return json.loads(file.read_text(encoding='utf-8'))
  from jaxlm import xla  # pylint: disable=g-import-not-at-top
  config, job = job_of(recipe)
  _, (model, topology, remat) = RECIPES[recipe]
  ours = xla.TPU[{'v5p': 'TPU v5p', 'v6e': 'TPU v6e'}[job.pod.kind]] if options else {}
  new = file.with_suffix('.new')
  subprocess.run([
      python, __file__, f'--step={new}', f'model_name={model}', f'compile_topology={topology}',
      'compile_topology_num_slices=1', f'per_device_batch_size={config.batch // job.pod.devices}', f'max_target_length={config.length}',
      f'ici_data_parallelism={job.mesh["data"]}', f'ici_fsdp_parallelism={job.mesh["fsdp"]}', f'remat_policy={remat}', 'attention=flash',
      'dataset_type=synthetic', 'enable_checkpointing=false', 'run_name=compiled', f'base_output_directory={file.parent}',
      'compile_xla_flags=' + ' '.join(f'--{name}={str(value).lower()}' for name, value in ours.items())],
      cwd=file.parent, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  new.rename(file)
  return json.loads(file.read_text(encoding='utf-8'))


def maxtexts_step(out: str, keys: list[str]) -> None:
  """MaxText's own train_compile, by a Python that has it, in this process; what it compiles is written to `out`."""
  # pylint: disable=g-import-not-at-top,import-error
  import jax
  import maxtext
  from absl import app
  from maxtext.trainers.pre_train import train_compile
  compiling, start = train_compile.jit_and_compile, time.monotonic()

  def written(*args, **kwargs):
    compiled = compiling(*args, **kwargs)
    memory = compiled.memory_analysis()
    pathlib.Path(out).write_text(json.dumps({
        'jax': jax.__version__, 'peak': memory.peak_memory_in_bytes / 2 ** 30, 'arguments': memory.argument_size_in_bytes / 2 ** 30,
        'text': compiled.as_text(), 'seconds': time.monotonic() - start}), encoding='utf-8')
    return compiled
  train_compile.jit_and_compile = written
  app.run(train_compile.main, argv=['train_compile', str(pathlib.Path(maxtext.__file__).parent / 'configs/base.yml'), *keys])


def counted(recipe: str, r: dict) -> dict:
  """What a program says of itself, whoever wrote it."""
  from jaxlm.plan import compile as compiling, cost, costed, hlo  # pylint: disable=g-import-not-at-top
  config, job = job_of(recipe)
  c = compiling.Compiled({}, r['arguments'], 0., r['peak'], r['seconds'], '', hlo.read(r['text']))
  seconds = costed.seconds(job, c)
  sent = {s.kind: s for s in costed.sent(job, c)}
  return {**seconds, 'peak': c.peak, 'sent': {kind: dataclasses.asdict(s) for kind, s in sent.items()},
          'mfu': cost.mfu(config, sum(seconds.values()), job.pod.chips, job.pod.chip.bf16)}


def row(recipe: str, program: str, found: dict, beside: float | None) -> str:
  def sent(kind):
    s = found['sent'].get(kind)
    return f'{s["bytes"] / 2 ** 30:.1f}, {s["hidden"]:.0%}' if s else '–'
  ratio = f'{found["fusions"] / beside:.2f}' if beside else '–'
  return '| ' + ' | '.join([recipe, program, f'{found["peak"]:.2f}', f'{found["fusions"]:.3f}', ratio, sent('all-gather'),
                            sent('reduce-scatter'), sent('all-reduce'), f'{found["waits"]:.3f}', f'{found["mfu"]:.1%}']) + ' |'


def main() -> None:
  p = parser(__doc__, workdir='runs/maxtext', out='docs')
  p.add_argument('--maxtext', help='the Python that has MaxText')
  p.add_argument('--only', default='', help='recipes whose name has this')
  p.add_argument('--one', help='compile jaxlm\'s step of this recipe and print it')
  p.add_argument('--step', help='compile MaxText\'s step, of its KEY=VALUE that follow, and write it to this file')
  p.add_argument('keys', nargs='*', help='with --step')
  flags = flags_of(p)
  if flags.step:
    maxtexts_step(flags.step, flags.keys)
    return
  if flags.one:
    print(json.dumps(compiled(flags.one)))
    return
  flags.workdir.mkdir(parents=True, exist_ok=True)
  rows, versions = [], ''
  for recipe in SHORT if flags.short else RECIPES:
    files = {program: flags.workdir / f'{recipe}, {program}.json' for program in PROGRAMS}
    if flags.only not in recipe and not all(file.exists() for file in files.values()):
      continue
    found = {'jaxlm': kept(flags, files['jaxlm'], __file__, f'--one={recipe}')}
    versions = f'jax {found["jaxlm"]["jax"]}'
    for program in PROGRAMS[1:]:  # in short mode, MaxText's are jaxlm's
      found[program] = found['jaxlm'] if flags.short else maxtexts(flags.maxtext, recipe, files[program], program != 'MaxText')
    all_counted = {program: counted(recipe, r) for program, r in found.items()}
    for program, c in all_counted.items():
      rows.append(row(recipe, program, c, all_counted['MaxText']['fusions']))
      print(rows[-1], flush=True)
  (flags.out / 'beside_maxtext.md').write_text(
      HEAD.format(length=LENGTH, version=VERSION, versions=versions) + '\n'.join(rows) + '\n', encoding='utf-8')


if __name__ == '__main__':
  main()
