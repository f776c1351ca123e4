"""`make translate`: a small Transformer and a GRU with attention learn German to English on the same pairs, and answer the
held-out ones: sacreBLEU and chrF, greedy and with 4 beams. Writes docs/translation.md.

    python benchmarks/translate.py [--workdir=runs/translate] [--steps=1200]
"""
import json

from running import TINY_RUN, fetched, jaxlm, parse, parser

from jaxlm import config as configs
from jaxlm.data import packing, pipeline

MODELS = {'gru': 'GRU', 'transformer': 'Transformer'}
SHORT = ('--config.data.tokenizer=bpe:300', '--config.data.heldout=0.1', '--config.objective.source=32', *TINY_RUN)


def main() -> None:
  p = parser(__doc__, workdir='runs/translate', out='docs')
  p.add_argument('--steps', type=int, default=1200)
  p.add_argument('--limit', type=int, default=400)
  flags = parse(p, steps=2, limit=4)
  workdir, models = flags.workdir, ['gru'] if flags.short else list(MODELS)
  rows, samples = [], []
  for model in models:
    jaxlm(flags, 'train', f'--config=configs/finetune/translation.py:{model}', f'--workdir={workdir / model}',
          f'--config.data.source={fetched(flags, "german", workdir)}', f'--config.data.cache={workdir / "tokens"}',
          f'--config.steps={flags.steps}', *(SHORT if flags.short else ()))
    config = configs.load(str(workdir / model / 'config.json'))
    epochs = flags.steps * config.batch / pipeline.make(config, packing.open_cache(config.data, workdir / 'tokens')).windows
    for beams in (1,) if flags.short else (1, 4):
      found, answers = workdir / f'{model}-{beams}.json', workdir / f'{model}-{beams}.jsonl'
      jaxlm(flags, 'eval', f'--workdir={workdir / model}', '--metrics=bleu,chrf,exact', f'--num_beams={beams}', f'--limit={flags.limit}',
            '--batch=32', f'--json={found}', f'--answers={answers}')
      result = json.loads(found.read_text())
      rows.append(f'| {model} | {beams} | {result["bleu"]:.1f} | {result["chrf"]:.1f} | {result["exact"]:.3f} '
                  f'| {result["nll_per_token"]:.3f} | {epochs:.1f} |')
    samples.append([json.loads(line) for line in answers.read_text(encoding='utf-8').splitlines()][:200:25])
  text = ['# German to English', '', f'Made by `make translate`: {flags.steps} steps each on the pairs of `jaxlm data fetch '
          f'german`, scored on {result["questions"]} held-out ones ({result["bleu_signature"]}).', '',
          '| model | beams | BLEU | chrF | exact | nats a token | epochs |', '|---|---|---|---|---|---|---|', *rows, '',
          f'| German | {" | ".join(map(MODELS.get, models))} | right |', '|---|---|' + '---|' * len(models),
          *(f'| {each[0]["question"]} | {" | ".join(a["said"] for a in each)} | {each[0]["right"]} |'.replace('\n', ' ')
            for each in zip(*samples))]
  (flags.out / 'translation.md').write_text('\n'.join(text) + '\n', encoding='utf-8')
  print('\n'.join(text))


if __name__ == '__main__':
  main()
