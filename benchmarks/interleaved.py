"""Two programs timed on the same cores in turn. Each is a process that stays; a round is one step of each, in alternating
order, while the other sleeps. The figure is the ratio of the median times."""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np


def timed(step: Callable) -> tuple[float, object]:
  """(seconds, result) of a step."""
  start = time.perf_counter()
  result = step()
  return time.perf_counter() - start, result


def serve(step: Callable) -> None:
  """In a worker: does one step a line on stdin, and answers with its seconds and what it returned."""
  print('ready', flush=True)
  for _ in sys.stdin:
    print(json.dumps(timed(step)), flush=True)


class Worker:
  """`SCRIPT --worker=NAME …`, which serves a step."""

  def __init__(self, name: str, words: list[str], env: dict[str, str]):
    self._name, self._errors = name, tempfile.TemporaryFile('w+')
    self._process = subprocess.Popen([sys.executable, *words], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                     stderr=self._errors, env={**os.environ, **env})
    while self._line() != 'ready':
      pass

  def _line(self) -> str:
    line = self._process.stdout.readline()
    if not line:
      self._errors.seek(0)
      raise RuntimeError(f'the {self._name} worker ended with {self._process.wait()}\n{self._errors.read()[-2000:]}')
    return line.strip()

  def step(self) -> tuple[float, object]:
    print('step', file=self._process.stdin, flush=True)
    return json.loads(self._line())

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()
    self._errors.close()


def race(flags: argparse.Namespace, script: str, workers: dict[str, Callable], rounds: int, env: dict[str, dict] | None = None,
         **own) -> dict[str, list]:
  """{name: flags → its step, a function} → {name: [(seconds, result) a round]}.

  script: `SCRIPT --worker=NAME --KEY=VALUE …` serves the step of a worker, the keys and values being those of `own`. env: what each worker
  has in its environment besides, by name. In short mode the steps are made and done in this process.
  """
  if flags.short:
    steps = {name: make(argparse.Namespace(**{**vars(flags), **own})) for name, make in workers.items()}
    return {name: [timed(step) for _ in range(rounds)] for name, step in steps.items()}
  words = [script, *(f'--{key}={value}' for key, value in own.items())]
  peers = {}
  try:
    for name in workers:
      peers[name] = Worker(name, [*words, f'--worker={name}'], (env or {}).get(name, {}))
    out = {name: [] for name in peers}
    for n in range(rounds):
      for name in sorted(peers, reverse=n % 2 == 1):
        out[name].append(peers[name].step())
    return out
  finally:
    for peer in peers.values():
      peer.close()


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
