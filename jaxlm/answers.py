"""How good answers are: a model that was trained to answer (objective answer) is asked the questions it never saw, and what
it says is scored by the libraries that the field trusts; one that was trained to classify says the likeliest class. `jaxlm
eval` of such a run.

    loss         nats per token of the right answers, as text: what training minimises
    exact        share of answers that are the right one
    bleu, chrf   sacreBLEU's corpus scores (Post 2018), with their signatures
    rouge        F1 of rouge1, rouge2 and rougeL (Lin 2004), means over answers, by rouge-score
    f1           macro-averaged F1 of answers as labels, by scikit-learn
"""
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxlm import evaluate, report, scoring
from jaxlm.data import examples, packing, pipeline, sources
from jaxlm.errors import UsageError


def _exact(said: Sequence[str], right: Sequence[str]) -> dict:
  return {'exact': sum(a.strip() == b.strip() for a, b in zip(said, right)) / len(right)}


def _sacrebleu(name: str) -> Callable:
  def score(said, right):
    import sacrebleu  # pylint: disable=g-import-not-at-top
    metric = {'bleu': sacrebleu.BLEU, 'chrf': sacrebleu.CHRF}[name]()
    return {name: metric.corpus_score(list(said), [list(right)]).score, f'{name}_signature': str(metric.get_signature())}
  return score


def _rouge(said: Sequence[str], right: Sequence[str]) -> dict:
  from rouge_score import rouge_scorer  # pylint: disable=g-import-not-at-top
  scorer = rouge_scorer.RougeScorer(['rouge1', 'rouge2', 'rougeL'], use_stemmer=True)
  scores = [scorer.score(b, a) for a, b in zip(said, right)]
  return {kind: sum(s[kind].fmeasure for s in scores) / len(scores) for kind in scores[0]}


def _f1(said: Sequence[str], right: Sequence[str]) -> dict:
  from sklearn.metrics import f1_score  # pylint: disable=g-import-not-at-top
  strip = lambda texts: [t.strip() for t in texts]
  return {'f1': float(f1_score(strip(right), strip(said), average='macro', zero_division=0, labels=sorted(set(strip(right)))))}


def _generated(lm, questions: Sequence[str], batch: int, new: int, num_beams: int) -> list[str]:
  """What the model says to each, the short ones first, so that few rows are padded."""
  said, order = [''] * len(questions), sorted(range(len(questions)), key=lambda i: len(questions[i]))
  with report.progress('answering', len(questions)) as tick:
    for start in range(0, len(questions), batch):
      rows = order[start:start + batch]
      for i, text in zip(rows, lm.generate([questions[i] for i in rows], new, temperature=0, num_beams=num_beams)):
        said[i] = text
      tick(len(rows))
  return said


METRICS = {'exact': _exact, 'bleu': _sacrebleu('bleu'), 'chrf': _sacrebleu('chrf'), 'rouge': _rouge, 'f1': _f1}


def loss(lm, pairs: Sequence[tuple[str, str, str]], batch: int) -> dict:
  """{'nll_per_token', 'tokens'} of the right answers."""
  tokenizer, texts = lm.tokenizer, [t for _, *both in pairs for t in both]
  ids = tokenizer.encode_batch(texts)
  documents = [[tokenizer.boundary, *q, tokenizer.boundary, *a, tokenizer.boundary] for q, a in zip(ids[::2], ids[1::2])]
  starts = np.cumsum([0] + [len(d) for d in documents])
  answers = starts[:-1] + np.array([len(q) + 2 for q in ids[::2]])
  stream = packing.Stream((np.concatenate(documents),), np.array([0, starts[-1]]), starts, answers)
  task, scorer = examples.Task(lm.config, tokenizer), scoring.make_nll(lm.config)
  batch = -(-batch // lm.rows_multiple) * lm.rows_multiple
  count, nll, tokens = examples.count(task, stream), 0., 0.
  with jax.set_mesh(lm.mesh):
    for start in range(0, count, batch):
      windows = np.arange(start, start + batch)
      arrays = examples.make(task, stream, np.minimum(windows, count - 1), windows)
      arrays['weights'] *= (windows < count)[:, None]
      placed = pipeline.place(lambda low, high, a=arrays: {k: v[low:high] for k, v in a.items()}, batch, lm.mesh)
      nll += jax.device_get(scorer(lm.params, placed)[0]).sum(dtype=np.float64)
      tokens += arrays['weights'].sum()
  return {'nll_per_token': nll / tokens, 'perplexity': math.exp(min(700., nll / tokens)), 'tokens': int(tokens)}


def evaluate_answers(lm, source: str, metrics: Sequence[str], batch: int = 16, limit: int | None = None,
                     max_length: int | None = None, num_beams: int = 1) -> tuple[dict, list[dict]]:
  """(the JSON of `jaxlm eval`, {name, question, said, right} of each) for --data=SOURCE: the first `limit` of its questions.

  UsageError for a metric that is not known or whose library is missing.
  """
  unknown = [m for m in metrics if m not in METRICS]
  if unknown:
    raise UsageError(f'--metrics={unknown[0]}: wants some of {", ".join(METRICS)}')
  name, split = evaluate.resolve(source, lm.config)
  pairs = list(sources.answers(name, lm.config.data, split))[:limit]
  if not pairs:
    raise UsageError(f'--data={source}: no question in it ({split} questions of {name})')
  questions = [question for _, question, _ in pairs]
  if lm.config.objective.name == 'classify':
    classes = lm.config.data.classes.split('|')
    said = [classes[c] for c in lm.scores(questions).argmax(-1)]
  else:
    said = _generated(lm, questions, batch, max_length or lm.config.length - 1, num_beams)
  right = [answer for _, _, answer in pairs]
  result = {**loss(lm, pairs, batch), 'questions': len(pairs), 'step': lm.step}
  for metric in metrics:
    try:
      result |= METRICS[metric](said, right)
    except ImportError as e:
      raise UsageError(f'--metrics={metric}: pip install "jaxlm[metrics]" ({e})') from e
  return result, [{'name': n, 'question': q, 'said': s, 'right': a} for (n, q, a), s in zip(pairs, said)]
