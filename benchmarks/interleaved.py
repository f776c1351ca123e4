"""Two programs timed on the same cores in turn. Each is a process that stays; a round is one step of each, in alternating
order, while the other sleeps. The figure is the ratio of the median times."""
import json
import subprocess
import sys
import time

import numpy as np


def serve(step) -> None:
  """In a worker: does one step a line on stdin, and answers with its seconds and what it returned."""
  print('ready', flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    result = step()
    print(json.dumps([time.perf_counter() - start, result]), flush=True)


def race(workers: dict[str, tuple[list[str], dict]], rounds: int) -> dict[str, list]:
  """{name: (arguments after the interpreter, environment)} → {name: [(seconds, result) a round]}."""
  peers = {}
  for name, (arguments, env) in workers.items():
    peers[name] = subprocess.Popen([sys.executable, *arguments], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, env=env)
    while (line := peers[name].stdout.readline().strip()) != 'ready':
      if not line and peers[name].poll() is not None:
        raise RuntimeError(f'the {name} worker ended with {peers[name].returncode}')
  out = {name: [] for name in peers}
  for n in range(rounds):
    for name in sorted(peers, reverse=n % 2 == 1):
      print('step', file=peers[name].stdin, flush=True)
      out[name].append(json.loads(peers[name].stdout.readline()))
  for peer in peers.values():
    peer.stdin.close()
    peer.wait()
  return out


def report(label: str, results: dict[str, list], tokens: int) -> float:
  """Prints the times of 'jaxlm' and 'torch', `tokens` a step, and their ratio, which it returns."""
  seconds = {name: [s for s, _ in rounds] for name, rounds in results.items()}
  median = {name: float(np.median(s)) for name, s in seconds.items()}
  ratio = median['torch'] / median['jaxlm']
  paired = np.quantile(np.array(seconds['torch']) / np.array(seconds['jaxlm']), [0.25, 0.5, 0.75])
  print(' '.join(f'{a:.2f}/{b:.2f}' for a, b in zip(seconds['jaxlm'], seconds['torch'])))
  for name, value in median.items():
    print(f'{label} {name:>6}: median {value:.3f} s, {tokens / value:,.1f} tokens/s, best {min(seconds[name]):.3f} s')
  print(f'{label} ratio of medians torch / jaxlm {ratio:.2f}; paired by round {paired[1]:.2f} '
        f'[{paired[0]:.2f}, {paired[2]:.2f}]; {len(seconds["torch"])} rounds', flush=True)
  return ratio
