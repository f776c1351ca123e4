"""jaxlm on one GPU, in one command that wants no network and takes less than 8 minutes. docs/gpu.md says how to run it.

    benchmarks/gpu.sh [--dry-run] [--parts=attention,train,torch,plan,checkpoint] [--out=FOLDER]

Each part (gpu_parts.py) is a process of its own, so that it has all of the GPU's memory and takes no other part with it when it dies.
What it finds is printed, and written to gpu.json and gpu.md in --out, as soon as it is there:

    attention   cuDNN's attention (jaxlm/kernels/cudnn.py), forward and backward, against `plain` in float32 on the same arrays
    train       30 steps of configs/llama_1b.py on made-up tokens, with the remat that the planner takes; then its checkpoint
    torch       the same model and batch: transformers' LlamaForCausalLM, torch.compile, flash attention, fused AdamW
    plan        what `jaxlm plan` says of that step, with nothing compiled
    checkpoint  what was saved, restored and compared bit for bit; 32 tokens generated from it

--dry-run does all of it on the CPU with a tiny model; its figures mean nothing. Exits with 1 if a part fails.
"""
import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time

from absl import logging

import running
from gpu_parts import PARTS, WARMUP, config_of, note, shown
from jaxlm.errors import UsageError
from jaxlm.plan.chips import CHIPS

LIMIT = 465  # seconds, of all parts together; and of each:
LIMITS = {'attention': 100, 'train': 220, 'torch': 200, 'plan': 60, 'checkpoint': 150}
TABLE = ['| a training step | step, s | tokens/s | MFU | peak, GiB | compiled in, s |', '|---|---|---|---|---|---|']
ERRORS = ['| attention | kernel | output | gradient of q | of k | of v | |', '|---|---|---|---|---|---|---|']


def report(r: dict) -> str:
  """gpu.md, of what gpu.json has so far."""
  lines = [f'# jaxlm on one {r["device"]}', '',
           f'Made by `benchmarks/gpu.sh` (benchmarks/gpu.py) with {r["versions"]}: configs/llama_1b.py, {r["work"]}; the median of those',
           f'after the first {WARMUP}. MFU is of {CHIPS[r["chip"]].bf16 / 1e12:.0f} TFLOP/s.', '']
  if r['dry_run']:
    lines += ['**A dry run on a CPU, of a tiny model: the figures mean nothing.**', '']
  lines += TABLE
  for part, name in (('train', 'jaxlm, remat={remat}'), ('torch', 'transformers in torch'), ('plan', 'as `jaxlm plan` predicts it')):
    if f := r.get(part):
      lines.append(f'| {name.format(**f)} | {f["step_seconds"]:.4f} | {f["tokens_per_second"]:,.0f} | {f["mfu"]:.1%} | '
                   f'{shown(f["peak_gib"])} | {shown(f.get("compile_seconds"))} |')
  if 'attention' in r:
    lines += ['', 'Differences from `plain` in float32, as shares of the largest value:', '', *ERRORS]
  for a in r.get('attention', []):
    errors = ' | '.join(f'{error:.4f}' for error in a['errors'].values())
    lines.append(f'| {a["case"]} | {a["kernel"]} | {errors} | {"good" if a["good"] else "BAD"} |')
  lines.append('')
  if f := r.get('saved'):
    lines.append(f'- Checkpoint: {f["gib"]:.2f} GiB; training waits {f["stall_seconds"]:.1f} s for it; it is sealed and visible after '
                 f'{f["save_seconds"]:.1f} s.')
  if f := r.get('restored'):
    lines.append(f'- Restored in {f["restore_seconds"]:.1f} s by another process: {f["arrays"] - len(f["wrong"])} of {f["arrays"]} '
                 'arrays are bit for bit those that were trained.')
  if f := r.get('generated'):
    lines.append(f'- Generated, greedy: {f["tokens"]} tokens in {f["seconds"]:.2f} s; their logits are off by {f["error"]:.4f} of the largest '
                 'from those of one forward pass.')
  lines += [f'- {part} failed: {why}.' for part, why in r.get('failed', {}).items()]
  return '\n'.join(lines) + '\n'


def record(flags: argparse.Namespace, **found) -> None:
  """Adds to gpu.json what was found, and writes gpu.md anew."""
  file = flags.out / 'gpu.json'
  result = {**(json.loads(file.read_text(encoding='utf-8')) if file.exists() else {}), **found}
  file.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')
  (flags.out / 'gpu.md').write_text(report(result), encoding='utf-8')


def device_of(flags: argparse.Namespace) -> tuple[str, str]:
  """(its name, its kind in plan/chips.py) of this machine's GPU. UsageError if there is none that is known."""
  if flags.dry_run:
    return 'CPU', 'h100'
  if not shutil.which('nvidia-smi'):
    raise UsageError('no nvidia-smi, so no GPU here; --dry-run does all of it on the CPU')
  said = subprocess.run(['nvidia-smi', '--query-gpu=name', '--format=csv,noheader'], check=True, capture_output=True, text=True).stdout
  name = said.splitlines()[0]
  kind = next((kind for kind in CHIPS if kind.upper() in name), None)
  if not kind:
    raise UsageError(f'{name} is no chip that jaxlm/plan/chips.py knows')
  return name, kind


def run(flags: argparse.Namespace, part: str, seconds: float | None) -> str:
  """A part, in a process of its own that may take so many seconds; in short mode, in this one → '' or why it failed."""
  words = [f'--part={part}', f'--chip={flags.chip}', f'--out={flags.out}', f'--workdir={flags.workdir}', *['--dry-run'] * flags.dry_run]
  if flags.short:
    print(running.again(flags, __file__, *words), end='')
    return ''
  path = os.pathsep.join(filter(None, [str(running.ROOT), os.environ.get('PYTHONPATH')]))
  env = {**os.environ, 'PYTHONPATH': path, 'XLA_PYTHON_CLIENT_MEM_FRACTION': '.92'}
  if flags.dry_run or part == 'plan':
    env['JAX_PLATFORMS'] = 'cpu'
    env.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')  # most of a dry run is compiling
  try:
    code = subprocess.run([sys.executable, __file__, *words], env=env, timeout=seconds, check=False).returncode
  except subprocess.TimeoutExpired:
    return f'not done after {seconds:g} s'
  return f'exit code {code}' if code else ''


def main() -> None:
  p = running.parser(__doc__, workdir='runs/gpu/run', out='runs/gpu')
  p.add_argument('--dry-run', action='store_true', help='a tiny model on the CPU')
  p.add_argument('--parts', default=','.join(PARTS))
  p.add_argument('--part', help='do this one, in this process')
  p.add_argument('--chip')
  flags = running.parse(p, dry_run=True)
  if flags.part:
    logging.set_verbosity(logging.FATAL)  # Orbax warns of what jaxlm means to do
    for found in PARTS[flags.part](flags):
      record(flags, **found)
    return
  parts = flags.parts.split(',')
  if unknown := set(parts) - set(PARTS):
    p.error(f'--parts={flags.parts}: {min(unknown)!r} is none of {", ".join(PARTS)}')
  try:
    name, flags.chip = device_of(flags)
  except UsageError as e:
    p.error(str(e))
  shutil.rmtree(flags.workdir, ignore_errors=True)
  flags.out.mkdir(parents=True, exist_ok=True)
  (flags.out / 'gpu.json').unlink(missing_ok=True)
  config, failed, end = config_of(flags), {}, time.monotonic() + LIMIT
  versions = ', '.join(f'{package} {importlib.metadata.version(package)}' for package in ('jax', 'flax', 'torch', 'transformers'))
  record(flags, device=name, chip=flags.chip, dry_run=flags.dry_run, versions=f'{versions}, Python {platform.python_version()}',
         work=f'{config.batch} rows of {config.length:,} tokens, {config.steps} steps')
  note(f'gpu: {name}; {versions}')
  for part in parts:
    why = run(flags, part, None if flags.dry_run else max(0., min(LIMITS[part], end - time.monotonic())))
    if why:
      failed[part] = why
      note(f'{part} FAILED: {why}')
      record(flags, failed=failed)
  print((flags.out / 'gpu.md').read_text(encoding='utf-8'))
  sys.exit(1 if failed else 0)


if __name__ == '__main__':
  main()
