"""`make classify`: an encoder learns which mails are spam, beside TF-IDF and logistic regression on the same mails. Writes
docs/classification.md.

    python benchmarks/classify.py [--workdir=runs/classify] [--steps=600]
"""
import json

import numpy as np
from running import TINY_RUN, fetched, jaxlm, parse, parser

from jaxlm import config as configs
from jaxlm.data import sources

SHORT = ('--config.data.tokenizer=bpe:300', *TINY_RUN)


def baseline(config) -> np.ndarray:
  """Which held-out texts TF-IDF (words and pairs of them) and logistic regression get right."""
  from sklearn.feature_extraction.text import TfidfVectorizer  # pylint: disable=g-import-not-at-top
  from sklearn.linear_model import LogisticRegression
  from sklearn.pipeline import make_pipeline
  split = lambda part: zip(*((text, label) for _, text, label in sources.records(config.data.source, config.data, part)))
  model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2), LogisticRegression(C=10, max_iter=1000))
  model.fit(*split('train'))
  texts, labels = split('heldout')
  return model.predict(texts) == np.array(labels)


def main() -> None:
  p = parser(__doc__, workdir='runs/classify', out='docs')
  p.add_argument('--steps', type=int, default=600)
  flags = parse(p, steps=2)
  workdir = flags.workdir
  jaxlm(flags, 'train', '--config=configs/finetune/classification.py', f'--workdir={workdir / "encoder"}',
        f'--config.data.source={fetched(flags, "spam", workdir)}', f'--config.steps={flags.steps}',
        *(SHORT if flags.short else ()))
  jaxlm(flags, 'eval', f'--workdir={workdir / "encoder"}', '--metrics=exact,f1', f'--json={workdir / "eval.json"}',
        f'--answers={workdir / "answers.jsonl"}')
  answers = (workdir / 'answers.jsonl').read_text(encoding='utf-8').splitlines()
  ours = np.array([a['said'] == a['right'] for a in map(json.loads, answers)])
  theirs = baseline(configs.load(str(workdir / 'encoder' / 'config.json')))
  rng = np.random.default_rng(0)
  interval = lambda right: np.quantile(right[rng.integers(0, len(right), (10_000, len(right)))].mean(1), (0.025, 0.975))
  row = lambda name, right: f'| {name} | {right.mean():.4f} | {interval(right)[0]:.4f} – {interval(right)[1]:.4f} |'
  text = ['# Spam or ham', '', f'Made by `make classify`: the mails of `jaxlm data fetch spam`, {len(ours)} of them held out.', '',
          '| model | accuracy | 95% interval |', '|---|---|---|', row('encoder (jaxlm)', ours),
          row('TF-IDF and logistic regression', theirs)]
  (flags.out / 'classification.md').write_text('\n'.join(text) + '\n', encoding='utf-8')
  print('\n'.join(text))


if __name__ == '__main__':
  main()
