"""How much memory `jaxlm import` needs: its peak above the level before, beside 1.3 × the largest tensor in float32.

    python benchmarks/import_memory.py [--dtypes=bfloat16,float32] [--layers=16] [--tmp=FOLDER]

A random llama checkpoint (16 layers: 2.5 GB in bfloat16, 4.9 GB in float32) is written in shards, a few rows at a time, to
a temporary folder; its largest tensor is the embedding, 64,000 × 2,048, 524 MB in float32. A fresh process imports every
module that the import needs, notes its resident memory (VmRSS), has the kernel forget its peak (5 → /proc/self/clear_refs),
imports the checkpoint, and reads the peak (VmHWM). What is printed is VmHWM − VmRSS: it counts what jax, Orbax and
tensorstore allocate once when they are first used, and pages of files that are mapped. Exits 1 if it is above the target.
"""
import json
import pathlib
import struct
import sys
import tempfile
import threading
import time

import ml_dtypes
import numpy as np

from running import again, parse, parser

SHARD = 10 ** 9
BLOCK = 2 ** 22  # elements made at a time
BIG = dict(V=64_000, D=2_048, H=16, G=4, K=128, F=8_192)
SHORT = dict(V=512, D=32, H=4, G=2, K=8, F=64)


def tensors(s: dict, layers: int) -> dict[str, tuple[int, ...]]:
  """Names and shapes of a llama."""
  per_layer = {
      'input_layernorm': (s['D'],), 'post_attention_layernorm': (s['D'],), 'self_attn.q_proj': (s['H'] * s['K'], s['D']),
      'self_attn.k_proj': (s['G'] * s['K'], s['D']), 'self_attn.v_proj': (s['G'] * s['K'], s['D']),
      'self_attn.o_proj': (s['D'], s['H'] * s['K']), 'mlp.gate_proj': (s['F'], s['D']), 'mlp.up_proj': (s['F'], s['D']),
      'mlp.down_proj': (s['D'], s['F'])}
  return {'model.embed_tokens.weight': (s['V'], s['D']), 'model.norm.weight': (s['D'],), 'lm_head.weight': (s['V'], s['D']),
          **{f'model.layers.{n}.{name}.weight': shape for n in range(layers) for name, shape in per_layer.items()}}


def write_shard(file: pathlib.Path, shapes: dict, dtype: np.dtype, rng) -> None:
  """One safetensors file of random numbers, BLOCK at a time."""
  header, at = {'__metadata__': {'format': 'pt'}}, 0
  for name, shape in shapes.items():
    size = int(np.prod(shape)) * dtype.itemsize
    header[name] = {'dtype': {4: 'F32', 2: 'BF16'}[dtype.itemsize], 'shape': shape, 'data_offsets': [at, at + size]}
    at += size
  text = json.dumps(header).encode()
  noise = (0.02 * rng.standard_normal(BLOCK, np.float32)).astype(dtype)
  with file.open('wb') as f:
    f.write(struct.pack('<Q', len(text)) + text)
    for shape in shapes.values():
      left = int(np.prod(shape))
      while left:
        f.write(np.roll(noise, int(rng.integers(BLOCK)))[:left].tobytes())
        left -= min(left, BLOCK)


def write_checkpoint(folder: pathlib.Path, s: dict, layers: int, dtype: np.dtype) -> int:
  """A folder as save_pretrained makes it, and its bytes."""
  from jaxlm.data import tokenizer  # pylint: disable=g-import-not-at-top
  folder.mkdir()
  rng, shards, held = np.random.default_rng(0), [{}], 0
  for name, shape in tensors(s, layers).items():
    size = int(np.prod(shape)) * dtype.itemsize
    if held + size > SHARD and shards[-1]:
      shards.append({})
      held = 0
    shards[-1][name] = shape
    held += size
  names = [f'model-{i + 1:05}-of-{len(shards):05}.safetensors' for i in range(len(shards))]
  for name, shapes in zip(names, shards):
    write_shard(folder / name, shapes, dtype, rng)
  (folder / 'model.safetensors.index.json').write_text(json.dumps({
      'weight_map': {key: name for name, shapes in zip(names, shards) for key in shapes}}))
  (folder / 'config.json').write_text(json.dumps({
      'model_type': 'llama', 'hidden_size': s['D'], 'num_attention_heads': s['H'], 'num_key_value_heads': s['G'],
      'head_dim': s['K'], 'intermediate_size': s['F'], 'num_hidden_layers': layers, 'vocab_size': s['V'],
      'rms_norm_eps': 1e-5, 'tie_word_embeddings': False, 'eos_token_id': 0, 'rope_theta': 1e4,
      'max_position_embeddings': 2048}))
  (folder / 'tokenizer.json').write_text(tokenizer.make('bytes', iter(())).json, encoding='utf-8')
  return sum(p.stat().st_size for p in folder.glob('*.safetensors'))


def status(*keys: str) -> list[float]:
  """Fields of /proc/self/status in MB."""
  lines = dict(line.split(':', 1) for line in pathlib.Path('/proc/self/status').read_text().splitlines())
  return [int(lines[key].split()[0]) * 1024 / 1e6 for key in keys]


def child(folder: pathlib.Path, trace: bool) -> None:
  """Imports folder/hf and prints what it needed, as JSON."""
  from jaxlm.interop import importing  # pylint: disable=g-import-not-at-top
  import orbax.checkpoint  # pylint: disable=unused-import,g-import-not-at-top
  import tensorstore  # pylint: disable=unused-import,g-import-not-at-top
  pathlib.Path('/proc/self/clear_refs').write_text('5')
  start, = status('VmRSS')
  samples, done, began = [], threading.Event(), time.time()

  def sample():
    while not done.wait(0.05):
      samples.append((round(time.time() - began, 2), *status('VmRSS', 'RssAnon', 'RssFile')))
  if trace:
    threading.Thread(target=sample, daemon=True).start()
  importing.run(str(folder / 'hf'), folder / 'run', None, 1, [], lambda text: None)
  done.set()
  peak, = status('VmHWM')
  for row in [*samples[::max(1, len(samples) // 12)], *sorted(samples, key=lambda r: -r[1])[:1]]:
    print('at {} s: VmRSS {:.0f}, of it RssAnon {:.0f}, RssFile {:.0f} MB'.format(*row), file=sys.stderr)
  print(json.dumps({'start': start, 'peak': peak, 'seconds': time.time() - began}))


def main() -> None:
  p = parser(__doc__)
  p.add_argument('--dtypes', default='bfloat16,float32')
  p.add_argument('--layers', type=int, default=16)
  p.add_argument('--tmp', default=None)
  p.add_argument('--trace', action='store_true', help='say how the memory went, and when the peak was')
  p.add_argument('--child', type=pathlib.Path)
  args = parse(p, dtypes='bfloat16', layers=2)
  if args.child:
    child(args.child, args.trace)
    return
  sizes, met = SHORT if args.short else BIG, True
  for kind in args.dtypes.split(','):
    dtype = np.dtype({'bfloat16': ml_dtypes.bfloat16, 'float32': np.float32}[kind])
    with tempfile.TemporaryDirectory(dir=args.short or args.tmp) as tmp:
      tmp = pathlib.Path(tmp)
      size = write_checkpoint(tmp / 'hf', sizes, args.layers, dtype)
      out = again(args, __file__, f'--child={tmp}', *['--trace'] * args.trace)
      made = sum(p.stat().st_size for p in (tmp / 'run').rglob('*') if p.is_file())
    result = json.loads(out.splitlines()[-1])
    need, largest = result['peak'] - result['start'], sizes['V'] * sizes['D'] * 4 / 1e6
    met &= need <= 1.3 * largest
    print(f'{kind}: {size / 1e9:.2f} GB of safetensors → {made / 1e9:.2f} GB in {result["seconds"]:.0f} s; '
          f'peak {need:.0f} MB above the {result["start"]:.0f} MB before = {need / largest:.2f} × the largest tensor in float32 '
          f'({largest:.0f} MB); target 1.3 × = {1.3 * largest:.0f} MB: {"met" if need <= 1.3 * largest else "MISSED"}')
  sys.exit(not met and not args.short)


if __name__ == '__main__':
  main()
