"""`make faults`: the fault matrix. Runs every test of a fault, the slow ones too, and writes what they saw to docs/faults.md.

    python benchmarks/faults.py [--only=WORDS for pytest's -k | --written]
"""
import json
import os
import subprocess
import sys

from running import ROOT, parse, parser

TESTS = ['tests/faults', *(f'tests/test_{name}.py' for name in (
    'seal', 'storage', 'guard', 'replicas', 'watchdog', 'lease', 'launch', 'secrets', 'data', 'hosts', 'watch_hosts', 'goodput'))]
SHORT = ('tests/test_lease.py', 'a_clock_that_is_set')  # a file, and words of -k
HEAD = """# The fault matrix

Made by `make faults` (benchmarks/faults.py): each line is a test in which something really happened to a run, on CPU devices; of several
processes over gloo. Lost: steps that were run again, at most. Seconds on two cores: until the fault was seen, the run to there included
where a process dies, and until the run that follows had ended or trained again. The small model saves every 10 steps unless it says
otherwise. Saves are asynchronous: who is killed while one is under way loses an interval and the steps since that save began, and the
small model does a hundred steps in less than a second.

| fault | what happened | trials | lost steps | detected in, s | recovered in, s | result |
|---|---|---|---|---|---|---|
"""


def row(line: dict) -> str:
  shown = lambda value: '–' if value is None else f'{value:.1f}' if isinstance(value, float) else str(value)
  return '| ' + ' | '.join(shown(line[key]) for key in ('fault', 'case', 'trials', 'lost', 'detect', 'recover', 'result')) + ' |'


def main() -> None:
  p = parser(__doc__, workdir='runs/faults', out='docs')
  p.add_argument('--only', help='tests whose names have this')
  p.add_argument('--written', action='store_true', help='run nothing: the table of the lines that are in runs/faults/lines.jsonl')
  flags = parse(p)
  flags.workdir.mkdir(parents=True, exist_ok=True)
  file = flags.workdir / 'lines.jsonl'
  code = 0
  if not flags.written:
    file.unlink(missing_ok=True)
    tests, only = ([SHORT[0]], SHORT[1]) if flags.short else (TESTS, flags.only)
    words = [sys.executable, '-m', 'pytest', '-p', 'no:xdist', *tests, *(['-k', only] if only else [])]
    code = subprocess.run(words, cwd=ROOT, env={**os.environ, 'JAXLM_FAULTS': str(file)}, check=False).returncode
  lines = [json.loads(line) for line in file.read_text(encoding='utf-8').splitlines()]
  number = lambda line: (int(line['fault'][1:]) if line['fault'][1:].isdigit() else 99, line['case'])
  if not flags.only:
    text = HEAD + '\n'.join(row(line) for line in sorted(lines, key=number)) + '\n'
    (flags.out / 'faults.md').write_text(text, encoding='utf-8')
  print('\n'.join(row(line) for line in sorted(lines, key=number)))
  sys.exit(code)


if __name__ == '__main__':
  main()
