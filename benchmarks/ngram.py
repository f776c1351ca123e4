"""How long counting n-grams of 100 MB of text takes, and in how much memory; bits per byte of what was held out.

    python benchmarks/ngram.py [--order=5] [--megabytes=100] [--tmp=FOLDER] [--target_gb=4]

The text is on the machine: the standard library's sources, then text files of site-packages (.py first), each file once
however often it lies there. Over bytes, then over tokens of bpe:4096. The token cache is built beforehand, and its time said
apart; then a process counts and saves, and its largest resident memory (wait4's ru_maxrss: files that are mapped
included) is what counts. Exits 1 if it is above the target.
"""
import hashlib
import json
import pathlib
import sys
import sysconfig
import tempfile

from running import measured, parse, parser

TEXT = ('.py', '.pyi', '.txt', '.md', '.rst', '.h', '.hpp', '.c', '.cpp', '.cu', '.cuh', '.js', '.json', '.csv', '.xml', '.html')
VOCABULARIES = {'bytes': 257, 'bpe:4096': 4096}


def texts(wanted: int):
  """(name, text) of files, each content once, until they come to `wanted` bytes."""
  roots, seen, size = [sysconfig.get_path(name) for name in ('stdlib', 'purelib')], set(), 0
  for number, root in enumerate(map(pathlib.Path, roots)):
    found = [p for p in sorted(root.rglob('*')) if p.suffix in TEXT and (number or 'site-packages' not in p.parts)]
    for path in sorted(found, key=lambda p: TEXT.index(p.suffix)):  # stable: by name within a suffix
      raw = path.read_bytes() if path.is_file() and path.stat().st_size < 2 ** 22 else b''
      digest = hashlib.sha256(raw).digest()
      try:
        text = raw.decode()
      except UnicodeDecodeError:
        continue
      if text and digest not in seen:
        seen.add(digest)
        size += len(raw)
        yield f'{number}/{path.relative_to(root)}', text
        if size >= wanted:
          return
  sys.exit(f'this machine has only {size / 1e6:.0f} MB of text there; set --megabytes lower')


def main() -> None:
  p = parser(__doc__)
  p.add_argument('--order', type=int, default=5)
  p.add_argument('--megabytes', type=float, default=100)
  p.add_argument('--target_gb', type=float, default=4)
  p.add_argument('--tmp', default=None)
  args, met = parse(p, order=3, megabytes=1, target_gb=float('inf')), True
  with tempfile.TemporaryDirectory(dir=args.short or args.tmp) as tmp:
    tmp, size, files = pathlib.Path(tmp), 0, 0
    with (tmp / 'text.jsonl').open('w', encoding='utf-8') as f:
      for name, text in texts(int(args.megabytes * 1e6)):
        f.write(json.dumps({'name': name, 'text': text}) + '\n')
        size, files = size + len(text.encode()), files + 1
    print(f'{size / 1e6:.1f} MB of text in {files:,} files', flush=True)
    for tokenizer, V in list(VOCABULARIES.items())[:1 if args.short else None]:
      workdir = tmp / tokenizer.replace(':', '')
      words = [f'--config=configs/ngram.py:{args.order}', f'--workdir={workdir}', f'--config.data.source=jsonl:{tmp}/text.jsonl',
               f'--config.data.tokenizer={tokenizer}', f'--config.model.V={V}']
      cached = measured(args, 'data', 'build', *words).seconds
      seconds, peak, out = measured(args, 'train', *words)
      made = sum(p.stat().st_size for p in (workdir / 'checkpoints').rglob('*') if p.is_file())
      tokens = json.loads((workdir / 'data' / 'manifest.json').read_text(encoding='utf-8'))['splits']['train']['tokens']
      evaluated, eval_peak, _ = measured(args, 'eval', f'--workdir={workdir}', f'--json={workdir}/eval.json')
      result = json.loads((workdir / 'eval.json').read_text(encoding='utf-8'))
      met &= peak <= args.target_gb
      grams = ' + '.join(line.split(': ')[1].split()[0] for line in out.splitlines() if line.startswith('order '))
      print(f'{args.order}-grams over {tokenizer}: {tokens:,} tokens (cache {cached:.0f} s) counted and saved in {seconds:.0f} s, '
            f'peak {peak:.2f} GB; target {args.target_gb} GB: {"met" if peak <= args.target_gb else "MISSED"}\n'
            f'  {grams} grams, {made / 1e6:.0f} MB on disk; held out: {result["bytes"]:,} bytes at {result["bits_per_byte"]:.4f} '
            f'bits a byte in {evaluated:.0f} s, peak {eval_peak:.2f} GB', flush=True)
  sys.exit(not met)


if __name__ == '__main__':
  main()
