"""`make ladder`: the textbook's line of language models on one ruler.

Every model of configs/ladder.py, and n-grams, on the same training text, the same tokens (n-grams count all of the text),
scored on the same held-out bytes; with bootstrap intervals over documents and a paired permutation test between neighbours.
Speeds are measured apart, in rounds that take the models in turn, so that what else the machine does falls on all of them.
Writes docs/ladder.md and docs/ladder.png. A model that has been scored in --workdir is not run again.

    python benchmarks/ladder.py [--workdir=runs/ladder] [--corpora=stdlib,shakespeare] [--models=lstm,…] [--steps=350]
"""
import argparse
import json
import math
import pathlib
import time

import numpy as np
from running import TINY_RUN, fetched, jaxlm, parse, parser

CONFIGS = {'3-gram': 'ngram.py:3', '5-gram': 'ngram.py:5', 'LSTM': 'ladder.py:lstm', 'GRU seq2seq': 'ladder.py:gru_seq2seq',
           'Transformer (2017)': 'ladder.py:transformer', 'BERT (pseudo)': 'ladder.py:bert', 'T5': 'ladder.py:t5',
           'GPT-2': 'ladder.py:gpt2', 'Llama': 'ladder.py:llama', 'MoE': 'ladder.py:moe'}
EVAL = {'BERT (pseudo)': ['--context=64', '--batch=64'], 'GRU seq2seq': ['--stride=256'], 'T5': ['--stride=256'],
        'Transformer (2017)': ['--stride=256'], 'LSTM': ['--batch=32']}
ROUNDS, ROUND = 3, 16  # of speed: how many, and steps a model in each
SAMPLES = 10_000  # of the bootstrap and of the permutation test


def train(flags: argparse.Namespace, name: str, corpus: str, folder: pathlib.Path, stated: list[str]) -> None:
  workdir = flags.workdir
  source = corpus if corpus == 'stdlib' else fetched(flags, corpus, workdir / 'data')
  short = TINY_RUN if flags.short and not name.endswith('gram') else ()
  jaxlm(flags, 'train', f'--config=configs/{CONFIGS[name]}', f'--workdir={folder}', '--config.data.tokenizer=bpe:4096',
        f'--config.data.source={source}', f'--config.data.cache={workdir / corpus / "tokens"}',
        f'--config.data.heldout={flags.heldout}', *short, *stated)


def run(flags: argparse.Namespace, name: str, corpus: str) -> dict:
  """Trains and scores a model → its result, with what each document came to."""
  folder = flags.workdir / corpus / name.replace(' ', '_')
  if not (folder / 'eval.json').exists():
    train(flags, name, corpus, folder, ['--config.model.V=4096'] if name.endswith('gram') else [f'--config.steps={flags.steps}'])
    jaxlm(flags, 'eval', f'--workdir={folder}', f'--by_document={folder / "documents.jsonl"}', f'--json={folder / "eval.json"}',
          *EVAL.get(name, []))
  documents = [json.loads(line) for line in (folder / 'documents.jsonl').read_text().splitlines()]
  return {'name': name, 'nats': np.array([d['nll'] for d in documents]), 'bytes': np.array([d['bytes'] for d in documents]),
          'names': [d['name'] for d in documents]}


def speeds(flags: argparse.Namespace, names: list[str], corpus: str) -> dict[str, float]:
  """Training tokens a second of each model that is trained: medians of ROUNDS rounds of its later steps."""
  file, (rounds, steps) = flags.workdir / 'speed.json', (1, 2) if flags.short else (ROUNDS, ROUND)
  if not file.exists():
    found = {name: [] for name in names if not name.endswith('gram')}
    for n in range(rounds):
      for name, values in found.items():
        folder = flags.workdir / 'speed' / name.replace(' ', '_')
        train(flags, name, corpus, folder / str(n), [f'--config.steps={steps}', f'--config.log_every={steps // 2}',
                                                     f'--config.compile_cache={folder / "compile_cache"}'])
        lines = [json.loads(line) for line in (folder / str(n) / 'metrics.jsonl').read_text().splitlines()]
        values.append(lines[-1]['tokens_per_second'])
    file.write_text(json.dumps(found))
  return {name: float(np.median(values)) for name, values in json.loads(file.read_text()).items()}


def bits_per_byte(nats, size):
  """Over the last axis, documents."""
  return nats.sum(-1) / math.log(2) / size.sum(-1)


def interval(result: dict) -> tuple[float, float]:
  """95% of what other documents would have given: documents are drawn with replacement (Efron 1979)."""
  drawn = np.random.default_rng(0).integers(0, len(result['nats']), (SAMPLES, len(result['nats'])))
  return tuple(np.quantile(bits_per_byte(result['nats'][drawn], result['bytes'][drawn]), (0.025, 0.975)))


def p_value(a: dict, b: dict) -> float:
  """Two-sided: how often a difference at least this large arises if, document by document, the two models' names are
  exchanged at random (Fisher's paired permutation test)."""
  assert a['names'] == b['names']
  gap = a['nats'] - b['nats']
  signs = np.random.default_rng(0).choice([-1., 1.], (SAMPLES, len(gap)))
  return float((1 + (np.abs(signs @ gap) >= abs(gap.sum())).sum()) / (1 + SAMPLES))


def table(corpus: str, results: list[dict], speed: dict[str, float]) -> list[str]:
  size = sum(results[0]['bytes'])
  out = [f'## {corpus}: {len(results[0]["bytes"])} documents, {size:,} bytes held out', '',
         '| model | bits per byte | 95% interval | p, against the row above | training tokens/s |',
         '|---|---|---|---|---|']
  for n, r in enumerate(results):
    low, high = interval(r)
    p = f'{p_value(results[n - 1], r):.4f}' if n else '–'
    rate = f'{speed[r["name"]]:,.0f}' if r['name'] in speed else '–'
    out.append(f'| {r["name"]} | {bits_per_byte(r["nats"], r["bytes"]):.4f} | {low:.4f} – {high:.4f} | {p} | {rate} |')
  return [*out, '']


def plot(everything: dict[str, list[dict]], file: pathlib.Path) -> None:
  import matplotlib  # pylint: disable=g-import-not-at-top
  matplotlib.use('Agg')
  from matplotlib import pyplot as plt
  figure, axes = plt.subplots(1, len(everything), figsize=(6 * len(everything), 4.5), squeeze=False, constrained_layout=True)
  for axis, (corpus, results) in zip(axes[0], everything.items()):
    values = np.array([bits_per_byte(r['nats'], r['bytes']) for r in results])
    around = np.abs(np.array([interval(r) for r in results]).T - values)
    axis.errorbar(values, range(len(results)), xerr=around, fmt='o', capsize=3)
    axis.set_yticks(range(len(results)), [r['name'] for r in results])
    axis.set_xlabel('bits per byte (less is better)')
    axis.set_title(corpus)
    axis.grid(alpha=0.3)
  figure.savefig(file, dpi=120)


def main() -> None:
  p = parser(__doc__, workdir='runs/ladder', out='docs')
  p.add_argument('--corpora', default='stdlib,shakespeare')
  p.add_argument('--models', default=','.join(CONFIGS))
  p.add_argument('--steps', type=int, default=350)
  p.add_argument('--heldout', type=float, default=.02, help='the share of documents that models are scored on')
  flags = parse(p, corpora='shakespeare', models='3-gram,LSTM', steps=2, heldout=.1)
  began, everything = time.time(), {}
  corpora, names = flags.corpora.split(','), flags.models.split(',')
  speed = speeds(flags, names, corpora[0])
  for corpus in corpora:
    results = [run(flags, name, corpus) for name in names]
    everything[corpus] = sorted(results, key=lambda r: -bits_per_byte(r['nats'], r['bytes']))
  flags.out.mkdir(parents=True, exist_ok=True)
  plot(everything, flags.out / 'ladder.png')
  text = ['# Every model on one ruler\n\nMade by `make ladder`: models of about 1.7M parameters (configs/ladder.py), '
          f'{flags.steps} steps of 4,096 tokens each; n-grams count all of the text. BERT\'s number is a '
          'pseudo-perplexity: each token given all others of its window. It is no probability of the text, and does not compare with '
          'the others; in so few steps it has learned little more than which tokens are frequent.\n\n![ladder](ladder.png)\n']
  for corpus, results in everything.items():
    text += table(corpus, results, speed)
  (flags.out / 'ladder.md').write_text('\n'.join(text), encoding='utf-8')
  print('\n'.join(text), f'\n{time.time() - began:,.0f} s')


if __name__ == '__main__':
  main()
