"""`make pods`: known models compiled for pods that are not here, by the pods' own compiler: does the step fit, how fast would it be?

Each is compiled in a process of its own, one after the other (libtpu is held by one). Writes docs/pods.md. What has been compiled
is kept in --workdir and not compiled again.

    python benchmarks/pods.py [--workdir=runs/pods] [--only=TEXT]
"""
import argparse
import json
import pathlib
import resource
import subprocess
import sys

from running import ROOT

FSDP = {'loss.over': 'vocabulary'}
RUNS = {  # name: config, topology, what differs
    '8B, v5p:4x4x8, full remat': ('llama3.py:8b', 'v5p:4x4x8', {**FSDP, 'batch': 128, 'mesh.fsdp': 128}),
    '8B, v5p:4x4x8, full remat, data 4 × fsdp 32': ('llama3.py:8b', 'v5p:4x4x8', {**FSDP, 'batch': 128, 'mesh.data': 4, 'mesh.fsdp': 32}),
    '8B, v5p:4x4x8, no remat, data 4 × fsdp 32': (
        'llama3.py:8b', 'v5p:4x4x8', {**FSDP, 'batch': 128, 'mesh.data': 4, 'mesh.fsdp': 32, 'model.remat': 'none'}),
    '8B, v5e:16x16': ('llama3.py:8b', 'v5e:16x16', {**FSDP, 'batch': 256, 'mesh.fsdp': 32, 'mesh.data': 8}),
}
HEAD = """# Steps compiled for pods that are not here

Made by `make pods` (benchmarks/pods.py) with {versions}: the real TPU compiler, on a CPU. Rows have 8,192 tokens. Peak HBM is the
compiler's, of each chip, beside what the chip has. Seconds of a step: the compiler's estimate for its fusions at the chip's
clock, plus attention, which is a kernel that it does not estimate, at half of the chip's peak; what collectives add where they
are not hidden is not in it. MFU is model FLOPs (docstring of jaxlm/plan/cost.py: causal, nothing recomputed) over that.

| step | peak HBM, GiB | of | fusions, s | attention, s | MFU | compiled in, s | host memory, GiB |
|---|---|---|---|---|---|---|---|
"""


def compiled(name: str) -> dict:
  """One of RUNS, in this process."""
  import jax  # pylint: disable=g-import-not-at-top
  from jaxlm import config as configs
  from jaxlm.plan import chips, compile as compiling, cost, hlo
  file, topology, changes = RUNS[name]
  config = configs.load(f'configs/{file}', [(key, str(value)) for key, value in changes.items()])
  found, chip = compiling.step(config, topology), chips.CHIPS[topology.partition(':')[0]]
  count = 1
  for size in found.mesh.values():
    count *= size
  m = config.model
  forward = 4 * m.H * m.K * cost.scores(m, config.length) * config.batch * config.length / count
  passes = 3.5 + (m.remat == 'full')  # the backward pass makes 5 products of what the forward pass makes 2 of
  fusions, attention = hlo.seconds(found.ops, chip.hertz), passes * forward / (chip.bf16 / 2)
  return {'peak': found.peak, 'hbm': chip.hbm, 'fusions': fusions, 'attention': attention, 'compile': found.seconds,
          'mfu': cost.mfu(config, fusions + attention, count, chip.bf16), 'jax': jax.__version__,
          'host': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', type=pathlib.Path, default=ROOT / 'runs/pods')
  parser.add_argument('--only', default='', help='those whose name has this')
  parser.add_argument('--one', help='compile this one and print what was found')
  flags = parser.parse_args()
  if flags.one:
    print(json.dumps(compiled(flags.one)))
    return
  flags.workdir.mkdir(parents=True, exist_ok=True)
  rows, versions = [], ''
  for name in RUNS:
    file = flags.workdir / f'{name.replace("/", "_")}.json'
    if not file.exists() and flags.only in name:
      print(f'compiling {name} …', flush=True)
      said = subprocess.run([sys.executable, __file__, f'--one={name}'], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
      file.write_text(said.stdout.splitlines()[-1])
    if file.exists():
      r = json.loads(file.read_text())
      versions = f'jax {r["jax"]}'
      rows.append(f'| {name} | {r["peak"]:.2f} | {r["hbm"]} | {r["fusions"]:.3f} | {r["attention"]:.3f} | {r["mfu"]:.1%} | '
                  f'{r["compile"]:.0f} | {r["host"]:.1f} |')
      print(rows[-1], flush=True)
  (ROOT / 'docs/pods.md').write_text(HEAD.format(versions=versions) + '\n'.join(rows) + '\n', encoding='utf-8')


if __name__ == '__main__':
  main()
