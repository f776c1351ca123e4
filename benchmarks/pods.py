"""`make pods`: known models compiled for pods that are not here, by the pods' own compilers: does the step fit, and how fast is it?

Each is compiled in a process of its own, one after the other. Writes docs/pods.md. What has been compiled is kept in --workdir and
not compiled again.

    python benchmarks/pods.py [--workdir=runs/pods] [--only=TEXT]
"""
import dataclasses
import json
import resource

import jax
from running import TINY_POD, TINY_STEP, kept, parse as flags_of, parser

from jaxlm import config as configs
from jaxlm.plan import command, compile as compiling, costed, hlo, search
from jaxlm.plan.topology import parse
from jaxlm.validate import filled

PIECES = {'loss.over': 'vocabulary'}
RUNS = {  # name: config, topology, slices, what differs
    '8B, v5p:4x4x8, full remat': ('llama3.py:8b', 'v5p:4x4x8', 1, {**PIECES, 'batch': 128, 'mesh.fsdp': 128}),
    '8B, v5p:4x4x8, full remat, data 4 × fsdp 32': ('llama3.py:8b', 'v5p:4x4x8', 1, {
        **PIECES, 'batch': 128, 'mesh.data': 4, 'mesh.fsdp': 32}),
    '8B, v5p:4x4x8, minimal remat, data 4 × fsdp 32': ('llama3.py:8b', 'v5p:4x4x8', 1, {
        **PIECES, 'batch': 128, 'mesh.data': 4, 'mesh.fsdp': 32, 'model.remat': 'minimal'}),
    '8B, v5e:16x16': ('llama3.py:8b', 'v5e:16x16', 1, {**PIECES, 'batch': 256, 'mesh.fsdp': 32, 'mesh.data': 8}),
    '8B, v5e:16x16, int8 projections': ('llama3.py:8b', 'v5e:16x16', 1, {
        **PIECES, 'batch': 256, 'mesh.fsdp': 32, 'mesh.data': 8, 'model.matmul': 'int8'}),
    '70B, v5p:16x16x16, full remat': ('llama3.py:70b', 'v5p:16x16x16', 1, {
        **PIECES, 'batch': 1024, 'mesh.data': 16, 'mesh.fsdp': 64, 'mesh.tensor': 4}),
    '70B, v5p:16x16x16, minimal remat': ('llama3.py:70b', 'v5p:16x16x16', 1, {
        **PIECES, 'batch': 1024, 'mesh.data': 16, 'mesh.fsdp': 64, 'mesh.tensor': 4, 'model.remat': 'minimal'}),
    '405B, 2 × v6e:16x16, layer inputs offloaded': ('llama3.py:405b', 'v6e:16x16', 2, {
        **PIECES, 'batch': 64, 'mesh.data': 2, 'mesh.fsdp': 32, 'mesh.tensor': 8, 'model.offload': 'block_in'}),
    'Mixtral-8x7B, v5p:4x4x8, minimal remat, data 4 × fsdp 32': ('mixtral.py:8x7b', 'v5p:4x4x8', 1, {
        **PIECES, 'batch': 256, 'mesh.data': 4, 'mesh.fsdp': 32, 'model.remat': 'minimal', 'loss.chunks': 8}),
    'Mixtral-8x7B, v5p:4x4x8, minimal remat, data 4 × fsdp 32, int8 projections and experts': ('mixtral.py:8x7b', 'v5p:4x4x8', 1, {
        **PIECES, 'batch': 256, 'mesh.data': 4, 'mesh.fsdp': 32, 'model.remat': 'minimal', 'loss.chunks': 8, 'model.matmul': 'int8'}),
    'Mixtral-8x7B, v6e:16x16, data 4 × fsdp 64': ('mixtral.py:8x7b', 'v6e:16x16', 1, {
        **PIECES, 'batch': 1024, 'mesh.data': 4, 'mesh.fsdp': 64, 'loss.chunks': 8}),
    'Mixtral-8x7B, v6e:16x16, fsdp 32 × expert 8, room for 2 × the mean': ('mixtral.py:8x7b', 'v6e:16x16', 1, {
        **PIECES, 'batch': 1024, 'mesh.fsdp': 32, 'mesh.expert': 8, 'loss.chunks': 8, 'model.moe.room': 2}),
    'Qwen3-235B-A22B, v5p:8x8x16, fsdp 32 × expert 32, room for 1.5 × the mean': ('qwen3.py:235b-a22b', 'v5p:8x8x16', 1, {
        **PIECES, 'batch': 2048, 'mesh.fsdp': 32, 'mesh.expert': 32, 'loss.chunks': 16, 'model.moe.room': 1.5}),
    'DeepSeek-V3 671B, v5p:8x16x16, data 4 × fsdp 8 × expert 64, room for 1.5 × the mean': ('deepseek_v3.py', 'v5p:8x16x16', 1, {
        **PIECES, 'batch': 4096, 'mesh.data': 4, 'mesh.fsdp': 8, 'mesh.expert': 64, 'loss.chunks': 16, 'model.moe.room': 1.5}),
    '8B, rows of 1,048,576, v5p:8x8x8': ('llama3.py:8b', 'v5p:8x8x8', 1, {
        **PIECES, 'batch': 8, 'length': 2 ** 20, 'mesh.fsdp': 8, 'mesh.context': 64}),
    '8B, h100:16x8': ('llama3.py:8b', 'h100:16x8', 1, {**PIECES, 'batch': 128, 'mesh.fsdp': 128}),
    '70B, h100:128x8': ('llama3.py:70b', 'h100:128x8', 1, {
        **PIECES, 'batch': 512, 'mesh.data': 4, 'mesh.fsdp': 32, 'mesh.tensor': 8}),
}
SHORT = {'tiny': ('llama3.py:8b', TINY_POD, 1, TINY_STEP)}
HEAD = """# Steps compiled for pods that are not here

Made by `make pods` (benchmarks/pods.py): the real TPU and GPU compilers, on a CPU. Rows have the length of their
config (8,192 tokens; Mixtral 4,096) unless said otherwise.

Peak HBM is the compiler's, of one device, beside what the chip has, and as `jaxlm plan` predicts it with no compiler. A step's
seconds are the TPU compiler's estimate for its fusions at the chip's clock; kernels of attention and of experts, which it does not
estimate, at the shares of the chip's peak that published runs reach (jaxlm/plan/roofline.py, costed.py); and collectives that nothing runs beside, at the rate of
the links. Hidden is the share of the bytes of collectives that go on beside other work, by the compiled schedule. XLA's GPU compiler
estimates nothing: there the step is the planner's, and what is asynchronous counts as hidden. MFU is model FLOPs over the step (causal,
nothing recomputed is counted: jaxlm/plan/cost.py).

| step | chips | peak, GiB | of | predicted | off by | fusions, s | kernels, s | waits, s | hidden | step predicted, s | MFU | jax | compiled in, s | host memory, GiB |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def planned(name: str) -> search.Plan:
  file, topology, slices, changes = {**RUNS, **SHORT}[name]
  config, pod = configs.load(f'configs/{file}', [(key, str(value)) for key, value in changes.items()]), parse(topology, slices)
  return search.plan(config, filled(config.mesh, pod.devices), pod)


def compiled(name: str) -> dict:
  """What the compiler makes of one of RUNS, in this process, its program too."""
  p, (_, topology, slices, _) = planned(name), {**RUNS, **SHORT}[name]
  found = dataclasses.asdict(dataclasses.replace(compiling.step(p.config, topology, slices), ops=[]))
  return {**found, 'jax': jax.__version__, 'host': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20}


def row(name: str, r: dict) -> str:
  """What was compiled, beside what the planner says."""
  p, host, version = planned(name), r.pop('host'), r.pop('jax')
  c = compiling.Compiled(**{**r, 'ops': hlo.read(r['text'])})
  own, made = command.entry(p, c)['compiled'], costed.seconds(p.job, c)
  sent = costed.sent(p.job, c)
  hidden = sum(s.bytes * s.hidden for s in sent) / max(sum(s.bytes for s in sent), 1)
  times = [f'{made[part]:.3f}' for part in ('fusions', 'kernels', 'waits')] if made else ['–'] * 3
  return '| ' + ' | '.join([
      name, f'{p.job.pod.chips:,}', f'{c.peak:.2f}', f'{p.limit:g}', f'{p.hbm.peak:.2f}', f'{own["error_of_peak"]:+.0%}', *times,
      f'{hidden:.0%}', f'{p.step.seconds:.3f}', f'{own["mfu"] or p.mfu:.1%}', version, f'{c.seconds:.0f}', f'{host:.1f}']) + ' |'


def main() -> None:
  p = parser(__doc__, workdir='runs/pods', out='docs')
  p.add_argument('--only', default='', help='those whose name has this')
  p.add_argument('--one', help='compile this one and print what was found')
  flags = flags_of(p)
  if flags.one:
    print(json.dumps(compiled(flags.one)))
    return
  flags.workdir.mkdir(parents=True, exist_ok=True)
  rows = []
  for name in SHORT if flags.short else RUNS:
    file = flags.workdir / f'{name}.json'
    if file.exists() or flags.only in name:
      r = kept(flags, file, __file__, f'--one={name}')
      rows.append(row(name, r))
      print(rows[-1], flush=True)
  (flags.out / 'pods.md').write_text(HEAD + '\n'.join(rows) + '\n', encoding='utf-8')


if __name__ == '__main__':
  main()
