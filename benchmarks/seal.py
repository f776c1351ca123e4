"""What a sealed checkpoint costs: `python benchmarks/seal.py [--gib=0.6] [--workdir=runs/seal]`.

A state of random float32 arrays is saved and restored as a run does it (jaxlm/checkpoint.py), five times; medians. Stall: what the
training loop waits in save(). Seal: reading all files back for their checksums, beside a plain read of the same bytes, both from the
page cache. Restart to first step: `jaxlm train` of the quickstart model from its checkpoint.
"""
import json
import pathlib
import shutil
import statistics
import time

import jax
import jax.numpy as jnp
from running import TINY_RUN, measured, parse, parser

from jaxlm import seal
from jaxlm.checkpoint import Checkpoints, digests
from jaxlm.schema import CheckpointConfig

INTERVAL = 600  # seconds between saves
SHORT = ('--config.data.source=text:jaxlm/*.py', '--config.data.tokenizer=bytes', *TINY_RUN)


def timed(f):
  begun = time.perf_counter()
  out = f()
  return time.perf_counter() - begun, out


def plain_read(folder: pathlib.Path) -> int:
  piece, size = bytearray(2 ** 22), 0
  for path in folder.rglob('*'):
    if path.is_file():
      with open(path, 'rb', buffering=0) as file:
        while count := file.readinto(piece):
          size += count
  return size


def main() -> None:
  p = parser(__doc__, workdir='runs/seal')
  p.add_argument('--gib', type=float, default=.6)
  flags = parse(p, gib=.01)
  shutil.rmtree(flags.workdir, ignore_errors=True)
  n = int(flags.gib * 2 ** 30 / 4 / 24 / 4096)
  make = jax.jit(lambda key: {f'a{i}': jax.random.normal(jax.random.fold_in(key, i), (n, 4096)) for i in range(24)})
  state = {'params': jax.block_until_ready(make(jax.random.key(0)))}
  meta = {'config': {}, 'examples': 0, 'tokenizer': '', 'data_hash': ''}
  checkpoints = Checkpoints(flags.workdir, CheckpointConfig(keep=2))
  checkpoints.save(1, state, meta)  # what is compiled, is
  checkpoints.finish()
  found = {name: [] for name in ('digests', 'stall', 'save', 'plain', 'seal', 'restore')}
  for step in range(2, 3 if flags.short else 7):
    found['digests'].append(timed(lambda: jax.block_until_ready([of for *_, of in digests(state).values()]))[0])
    begun = time.perf_counter()
    found['stall'].append(timed(lambda: checkpoints.save(step, state, meta))[0])
    checkpoints.finish()
    found['save'].append(time.perf_counter() - begun)
    folder = flags.workdir / 'checkpoints' / str(step)
    record = seal.read(folder, step)
    for _ in range(3):
      found['plain'].append(timed(lambda: plain_read(folder))[0])
      found['seal'].append(timed(lambda: seal.check(folder, record))[0])
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    fresh = Checkpoints(flags.workdir, read_only=True)
    found['restore'].append(timed(lambda: jax.block_until_ready(fresh.read_state(step, abstract)))[0])
    fresh.close()
  checkpoints.close()
  size = plain_read(folder)
  m = {name: statistics.median(values) for name, values in found.items()}
  print(f'{sum(a.nbytes for a in jax.tree.leaves(state)) / 2 ** 20:,.0f} MiB of state, {size / 2 ** 20:,.0f} MiB of files, two cores')
  print(f'stall of a save: {m["stall"]:.2f} s, {m["stall"] / INTERVAL:.2%} of a {INTERVAL // 60}-minute interval '
        f'(of which digests on the device {m["digests"]:.2f} s); on disk, sealed and visible after {m["save"]:.2f} s')
  print(f'seal, all files checked: {m["seal"]:.3f} s, {m["seal"] / m["plain"]:.2f} × a plain read of the same bytes ({m["plain"]:.3f} s)')
  print(f'restore, with checksums and digests: {m["restore"]:.2f} s')
  shutil.rmtree(flags.workdir)
  run = flags.workdir / 'run'
  words = ['train', '--config=configs/quickstart.py', f'--workdir={run}', '--config.log_every=1', *(SHORT if flags.short else ())]
  for start, steps in enumerate((1,) if flags.short else (5, 6, 7, 8)):
    out = measured(flags, *words, f'--config.steps={steps}', '--config.optimizer.schedule=constant').out
    first = next(line for line in out.splitlines() if line.startswith('first step after'))
    print(first, '(restart)' if start else '(cold)', flush=True)
  print(json.dumps(m))


if __name__ == '__main__':
  main()
