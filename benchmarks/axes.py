"""`make axes`: Explicit against Auto axes, scanned against unrolled layers: Llama-3-8B's step, compiled for 128 chips of v5p.

Each is compiled in a process of its own, one after the other. Writes docs/axes.md. What has been compiled is kept in --workdir,
the program too, and not compiled again. benchmarks/auto_axes.py is the step with Auto axes.

    python benchmarks/axes.py [--workdir=runs/axes] [--only=TEXT]
"""
import argparse
import json
import time

from running import TINY_POD, TINY_STEP, kept, parse, parser

TOPOLOGY = 'v5p:4x4x8'
CHANGES = {'batch': 128, 'mesh.data': 4, 'mesh.fsdp': 32, 'model.remat': 'full', 'loss.over': 'vocabulary'}
SHALLOW = {'model.N': 8}
RUNS = {  # name: what differs; whether with Auto axes
    'Explicit, scanned': ({}, False),
    'Explicit, scanned, loss over vocabulary in 4 pieces': ({'loss.chunks': 4}, False),
    'Explicit, scanned, loss in one piece': ({'loss.over': 'length', 'loss.chunks': 1}, False),
    'Auto, scanned': ({}, True),
    'Auto, scanned, loss in one piece': ({'loss.chunks': 1}, True),
    'Explicit, scanned, 8 layers': (SHALLOW, False),
    'Explicit, unrolled, 8 layers': ({**SHALLOW, 'model.scan': False}, False),
}
SHORT = ('Explicit, scanned', 'Auto, scanned')

KINDS = ('all-gather', 'reduce-scatter', 'all-reduce')
HEAD = """# Explicit against Auto axes, scanned against unrolled

Made by `make axes` (benchmarks/axes.py) with {versions}: one step of Llama-3-8B, 128 rows of 8,192 tokens, bfloat16, full remat,
data 4 × fsdp 32, through the real TPU compiler for v5p:4x4x8, on a CPU. Explicit is this codebase: gathers of weights and sums
of gradients are in the types. Auto is benchmarks/auto_axes.py, the same step as it is usually written: the compiler's partitioner
chooses them (tests/test_axes.py: the losses and gradients are equal). All values are of one chip: peak HBM and arguments in GiB by
the compiler's word; seconds of fusions by its estimate, without attention, which is the same kernel in all; collectives, each as
count: GiB of what is gathered or summed, as often as they run; and seconds of fusions and of collectives that nothing runs
beside, these at the rate of all links. Seconds of compiling are a processor's.

| step | peak HBM | arguments | fusions, s | gathers | reduce-scatters | all-reduces | asynchronous | in all, s | compiled in, s |
|---|---|---|---|---|---|---|---|---|---|
"""
TAIL = """
- Explicit is quicker: by 2% with the loss in one piece, by 10% with it in 16, where Auto gathers and scatters the output matrix once a
  piece. Its sums of gradients, in float32, are twice the bytes of Auto's, which are in its einsums' bfloat16. Gathers of the layers'
  weights are asynchronous in both (jaxlm/xla.py asks for it), the sums of gradients in neither.
- Unrolled, 8 layers are 3% quicker, hold 2.3 times the memory and take 1.5 times as long to compile; what they gain is of the loss, whose
  pieces are unrolled too, and of gathers. Not tried with all 32: the compile time grows with the layers.
- So: Explicit, scanned. It is quicker, needs no more memory than Auto but for 0.2 GiB with the loss in one piece, and a gather that was not
  asked for is an error.
"""


def compiled(flags: argparse.Namespace, name: str) -> dict:
  """One of RUNS, in this process, with its program."""
  import jax  # pylint: disable=g-import-not-at-top
  import auto_axes
  from jaxlm import config as configs, xla
  from jaxlm.plan import compile as compiling, topology as pods
  (changes, auto), start = RUNS[name], time.process_time()
  topology, changes = (TINY_POD, TINY_STEP) if flags.short else (TOPOLOGY, {**CHANGES, **changes})
  config = configs.load('configs/llama3.py:8b', [(key, str(value)) for key, value in changes.items()])
  if auto:
    mesh = auto_axes.make_mesh(config, compiling.devices(pods.parse(topology)))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      lowered = auto_axes.make_step(config, mesh).trace(*auto_axes.abstract(config, mesh)).lower(lowering_platforms=('tpu',))
    found = compiling.of(lowered, mesh, xla.options('', mesh))
  else:
    found = compiling.step(config, topology)
  return {'peak': found.peak, 'arguments': found.arguments, 'cpu': time.process_time() - start, 'jax': jax.__version__,
          'text': found.text}


def counted(program: str) -> dict:
  """What a program says of itself: seconds of its fusions, with its waits too, and (how many run in a step, GiB) of collectives:
  of each of KINDS those that nothing runs beside, and all 'asynchronous' ones."""
  from jaxlm.plan import chips, hlo  # pylint: disable=g-import-not-at-top
  ops, chip = hlo.read(program), chips.CHIPS['v5p']
  total = lambda found: (sum(op.times for op in found), sum(op.times * op.bytes for op in found) / 2 ** 30)
  sent, fusions = hlo.collectives(ops), hlo.seconds(ops, chip.hertz)
  waits = sum(op.times * op.bytes * (2 if op.kind == 'all-reduce' else 1) for op in sent if not op.is_async)
  return {'fusions': fusions, 'all': fusions + waits / (chip.link * chip.links), 'asynchronous': total([op for op in sent if op.is_async]),
          **{kind: total([op for op in sent if op.kind == kind and not op.is_async]) for kind in KINDS}}


def row(name: str, r: dict) -> str:
  pair = lambda p: f'{p[0]}: {p[1]:.1f}' if p[0] else '–'
  return (f'| {name} | {r["peak"]:.2f} | {r["arguments"]:.2f} | {r["fusions"]:.3f} | '
          f'{" | ".join(pair(r[kind]) for kind in (*KINDS, "asynchronous"))} | {r["all"]:.3f} | {r["cpu"]:.0f} |')


def main() -> None:
  p = parser(__doc__, workdir='runs/axes', out='docs')
  p.add_argument('--only', default='', help='those whose name has this')
  p.add_argument('--one', help='compile this one and print what was found')
  flags = parse(p)
  if flags.one:
    print(json.dumps(compiled(flags, flags.one)))
    return
  flags.workdir.mkdir(parents=True, exist_ok=True)
  rows = {}
  for name in SHORT if flags.short else RUNS:
    file = flags.workdir / f'{name}.json'
    if file.exists() or flags.only in name:
      r = kept(flags, file, __file__, f'--one={name}')
      rows[name] = {**r, **counted(r['text'])}
      print(row(name, rows[name]), flush=True)
  text = HEAD.format(versions=f'jax {", ".join(sorted({r["jax"] for r in rows.values()}))}')
  text += '\n'.join(row(name, r) for name, r in rows.items()) + '\n' + TAIL
  (flags.out / 'axes.md').write_text(text, encoding='utf-8')


if __name__ == '__main__':
  main()
