"""`make translate`: a small Transformer and a GRU with attention learn German to English on the same pairs, and answer the
held-out ones: sacreBLEU and chrF, greedy and with 4 beams. Writes docs/translation.md.

    python benchmarks/translate.py [--workdir=runs/translate] [--steps=1200]
"""
import argparse
import json
import pathlib

from running import ROOT, fetched, jaxlm

from jaxlm import config as configs
from jaxlm.data import packing, pipeline


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', type=pathlib.Path, default=ROOT / 'runs' / 'translate')
  parser.add_argument('--steps', type=int, default=1200)
  parser.add_argument('--limit', type=int, default=400)
  parser.add_argument('--out', type=pathlib.Path, default=ROOT / 'docs' / 'translation.md')
  flags = parser.parse_args()
  workdir = flags.workdir.absolute()
  rows, samples = [], []
  for model in ('gru', 'transformer'):
    jaxlm('train', f'--config=configs/finetune/translation.py:{model}', f'--workdir={workdir / model}',
          f'--config.data.source={fetched("german", workdir)}', f'--config.data.cache={workdir / "tokens"}',
          f'--config.steps={flags.steps}')
    config = configs.load(str(workdir / model / 'config.json'))
    epochs = flags.steps * config.batch / pipeline.make(config, packing.open_cache(config.data, workdir / 'tokens')).windows
    for beams in (1, 4):
      found, answers = workdir / f'{model}-{beams}.json', workdir / f'{model}-{beams}.jsonl'
      jaxlm('eval', f'--workdir={workdir / model}', '--metrics=bleu,chrf,exact', f'--num_beams={beams}', f'--limit={flags.limit}',
            '--batch=32', f'--json={found}', f'--answers={answers}')
      result = json.loads(found.read_text())
      rows.append(f'| {model} | {beams} | {result["bleu"]:.1f} | {result["chrf"]:.1f} | {result["exact"]:.3f} '
                  f'| {result["nll_per_token"]:.3f} | {epochs:.1f} |')
    samples.append([json.loads(line) for line in answers.read_text(encoding='utf-8').splitlines()][:200:25])
  text = ['# German to English', '', f'Made by `make translate`: {flags.steps} steps each on the pairs of `jaxlm data fetch '
          f'german`, scored on {result["questions"]} held-out ones ({result["bleu_signature"]}).', '',
          '| model | beams | BLEU | chrF | exact | nats a token | epochs |', '|---|---|---|---|---|---|---|', *rows, '',
          '| German | GRU | Transformer | right |', '|---|---|---|---|',
          *(f'| {g["question"]} | {g["said"]} | {t["said"]} | {g["right"]} |'.replace('\n', ' ') for g, t in zip(*samples))]
  flags.out.write_text('\n'.join(text) + '\n', encoding='utf-8')
  print('\n'.join(text))


if __name__ == '__main__':
  main()
