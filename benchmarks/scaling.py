"""`make scaling`: 70B from 64 to 8,192 chips of v5p, weak and strong: MFU predicted and by the compiler's word, and what bounds each.

Weak: 1 sequence of 8,192 a chip. Strong: 1,024 sequences in all, whatever the chips. Each point takes the best mesh that the
planner finds; those of COMPILED are compiled for the pod too, each in a process of its own, once (--workdir keeps what was found).
Writes docs/scaling.md and docs/scaling.png.

    python benchmarks/scaling.py [--workdir=runs/scaling] [--cached]
"""
import argparse
import json
import pathlib

import matplotlib
from running import TINY_POD, TINY_STEP, kept, parse as flags_of, parser

from jaxlm import config as configs
from jaxlm.plan import command, compile as compiling, legend, search
from jaxlm.plan.topology import parse

PODS = (('v5p:4x4x4', 1), ('v5p:4x4x8', 1), ('v5p:4x8x8', 1), ('v5p:8x8x8', 1), ('v5p:8x8x16', 1), ('v5p:8x16x16', 1), ('v5p:16x16x16', 1),
        ('v5p:16x16x16', 2))
COMPILED = {'weak': (64, 512, 4096, 8192), 'strong': (4096,)}
BATCH = {'weak': lambda chips: chips, 'strong': lambda chips: 1024}
STATED = {'loss.over': 'vocabulary'}
SHORT = ((TINY_POD, 1),)
HEAD = """# 70B from 64 to 8,192 chips

Made by `make scaling` (benchmarks/scaling.py): Llama-3-70B on v5p, rows of 8,192 tokens; 8,192 chips are two slices of
16 × 16 × 16. Weak: a row a chip; strong: 1,024 rows in all. Times and MFU are predicted, with the planner's error bar
([planner.md](planner.md)); where an MFU is compiled, it is costed by the TPU compiler from the compiled step (jaxlm/plan/costed.py),
with the peak of HBM that it wants, of 95 GiB.

![MFU over chips](scaling.png)

| chips | scaling | mesh and remat | step predicted | MFU predicted | MFU compiled | peak GiB predicted | compiled | bound by | waits for |
|---|---|---|---|---|---|---|---|---|---|
"""


def best(flags: argparse.Namespace, kind: str, topology: str, slices: int):
  pod = parse(topology, slices)
  stated = {'batch': BATCH[kind](pod.chips), **(TINY_STEP if flags.short else STATED)}
  config = configs.load('configs/llama3.py:70b', [(key, str(value)) for key, value in stated.items()])
  found, _ = search.search(config, pod, frozenset(stated))
  return found[0] if found else None


def one(flags: argparse.Namespace, kind: str, topology: str, slices: int) -> dict:
  p = best(flags, kind, topology, slices)
  return command.entry(p, compiling.step(p.config, topology, slices))


def main() -> None:
  p = parser(__doc__, workdir='runs/scaling', out='docs')
  p.add_argument('--one', nargs=3, help='kind topology slices: compile this one and print what was found')
  p.add_argument('--cached', action='store_true', help='compile nothing: take what is there')
  flags = flags_of(p)
  if flags.one:
    print(json.dumps(one(flags, *flags.one[:2], int(flags.one[2]))))
    return
  flags.workdir.mkdir(parents=True, exist_ok=True)
  lines, drawn = [], {}
  for kind in BATCH:
    for topology, slices in SHORT if flags.short else PODS:
      p = best(flags, kind, topology, slices)
      if p is None:
        lines.append(f'| {parse(topology, slices).chips:,} | {kind} | nothing fits | | | | | | | |')
        continue
      file = flags.workdir / f'{kind}_{topology.replace(":", "_")}_{slices}.json'
      wanted = (flags.short or p.job.pod.chips in COMPILED[kind]) and not flags.cached
      e = kept(flags, file, __file__, '--one', kind, topology, str(slices)) if wanted or file.exists() else command.entry(p)
      compiled = e['compiled']
      drawn.setdefault(kind, []).append((p.job.pod.chips, e['predicted_mfu'], compiled and compiled['mfu']))
      waits = ', '.join(f'{axis} {s:.2f} s' for axis, s in e['seconds']['exposed'].items() if s > .01 * e['predicted_step_seconds'])
      stated = ' '.join(f'{key.removeprefix("mesh.").removeprefix("model.")}={value}' for key, value in e['config'].items())
      lines.append(f'| {p.job.pod.chips:,} | {kind} | {stated} | {legend.predicted_seconds(e["predicted_step_seconds"])} | '
                   f'{legend.predicted_mfu(e["predicted_mfu"])} | '
                   + (f'{compiled["mfu"]:.1%}' if compiled else '') + f' | {e["predicted_hbm_gib"]["peak"]:.1f} | '
                   + (f'{e["hbm_gib"]["peak"]:.1f}' if compiled else '') + f' | {e["bound_by"]} | {waits} |')
      print(lines[-1], flush=True)
  (flags.out / 'scaling.md').write_text(HEAD + '\n'.join(lines) + '\n', encoding='utf-8')
  draw(drawn, flags.out / 'scaling.png')


def draw(drawn: dict, file: pathlib.Path) -> None:
  matplotlib.use('Agg')
  from matplotlib import pyplot  # pylint: disable=g-import-not-at-top
  figure, axes = pyplot.subplots(figsize=(7, 4), layout='constrained')
  for kind, color in (('weak', 'tab:blue'), ('strong', 'tab:orange')):
    points = drawn.get(kind, [])
    axes.plot([x for x, _, _ in points], [100 * y for _, y, _ in points], color=color, marker='.', label=f'{kind}, predicted')
    compiled = [(x, 100 * z) for x, _, z in points if z]
    axes.plot(*zip(*compiled), linestyle='none', marker='o', markerfacecolor='none', color=color, label=f'{kind}, by the compiler')
  axes.set(xscale='log', xlabel='chips of v5p', ylabel='MFU, %', ylim=(0, None), title='Llama-3-70B')
  axes.set_xticks([x for x, _, _ in drawn['weak']], [f'{x:,}' for x, _, _ in drawn['weak']])
  axes.minorticks_off()
  axes.grid(alpha=.3)
  axes.legend()
  figure.savefig(file, dpi=130)


if __name__ == '__main__':
  main()
