"""How good answers are: a model that was trained to answer is asked what it never saw, and what it says is scored by the
libraries that the field trusts. `jaxlm eval` of such a run. Objective answer generates text (of chats, what the assistant says
last), classify names the likeliest class, tag a tag for each word, span a part of a text.

    loss         nats per token (or choice) of what is right: what training minimises
    exact        share of answers that are the right one
    bleu, chrf   sacreBLEU's corpus scores (Post 2018), with their signatures
    rouge        F1 of rouge1, rouge2 and rougeL (Lin 2004), means over answers, by rouge-score
    f1           macro-averaged F1 of answers as labels, by scikit-learn
    accuracy     tag: share of words whose tag is right
    seqeval      tag: precision, recall and F1 of whole chunks (IOB tags), by seqeval (Ramshaw & Marcus 1995)
    squad        span: exact match and F1 of words, the best of the right answers (Rajpurkar et al. 2016, §6.1)
"""
import collections
import itertools
import math
import re
import string
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxlm import evaluate, report, schema, scoring
from jaxlm.data import examples, forms, packing, pipeline, sources
from jaxlm.errors import UsageError, extra


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


def _generated(lm, questions: Sequence, batch: int, new: int, num_beams: int) -> list[str]:
  """What the model says to each, the short ones first, so that few rows are padded."""
  said, order = [''] * len(questions), sorted(range(len(questions)), key=lambda i: len(str(questions[i])))
  with report.progress('answering', len(questions)) as tick:
    for start in range(0, len(questions), batch):
      rows = order[start:start + batch]
      for i, text in zip(rows, lm.generate([questions[i] for i in rows], new, temperature=0, num_beams=num_beams)):
        said[i] = text
      tick(len(rows))
  return said


def _accuracy(said: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> dict:
  pairs = [pair for both in zip(said, right) for pair in zip(*both, strict=True)]
  return {'accuracy': sum(a == b for a, b in pairs) / len(pairs)}


def _seqeval(said: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> dict:
  from seqeval import metrics  # pylint: disable=g-import-not-at-top
  lists = lambda rows: [list(row) for row in rows]
  values = {name: getattr(metrics, f'{name}_score')(lists(right), lists(said)) for name in ('precision', 'recall', 'f1')}
  return {f'seqeval_{name}': float(value) for name, value in values.items()}


def _plain(text: str) -> list[str]:
  """Words as SQuAD compares them: small letters, no punctuation, no articles."""
  text = ''.join(c for c in text.lower() if c not in string.punctuation)
  return re.sub(r'\b(a|an|the)\b', ' ', text).split()


def _word_f1(said: list[str], right: list[str]) -> float:
  if not said or not right:
    return float(said == right)
  common = sum((collections.Counter(said) & collections.Counter(right)).values())
  return 2 * common / (len(said) + len(right))


def _squad(said: Sequence[str], right: Sequence[Sequence[str]]) -> dict:
  best = lambda score: sum(max(score(_plain(s), _plain(r)) for r in rs or ['']) for s, rs in zip(said, right)) / len(said)
  return {'squad_exact': best(lambda a, b: float(a == b)), 'squad_f1': best(_word_f1)}


METRICS = {'exact': _exact, 'bleu': _sacrebleu('bleu'), 'chrf': _sacrebleu('chrf'), 'rouge': _rouge, 'f1': _f1,
           'accuracy': _accuracy, 'seqeval': _seqeval, 'squad': _squad}


def _ask(lm, records: Sequence[tuple], batch: int, max_length: int | None, num_beams: int) -> tuple[list, list, list]:
  """(questions, what the model says, what is right) of records, which are fields as data.form has them."""
  objective, first = lm.config.objective.name, [r[0] for r in records]
  if objective == 'tag':
    return [' '.join(words) for words in first], lm.tag(first), [list(r[1]) for r in records]
  if objective == 'span':
    return [f'{r[0]} | {r[1]}' for r in records], lm.answer(first, [r[1] for r in records]), [[a for a, _ in r[2]] for r in records]
  if objective == 'classify':
    classes = lm.config.data.classes.split('|')
    return first, [classes[c] for c in lm.scores(first).argmax(-1)], [r[1] for r in records]
  questions, right = first, [r[-1] for r in records]
  if lm.config.data.form == 'chat':
    ends = [max(n for n, (role, _) in enumerate(messages) if role == forms.ASSISTANT) for messages in first]
    questions = [[{'role': role, 'content': said} for role, said in m[:end]] for m, end in zip(first, ends)]
    right = [m[end][1] for m, end in zip(first, ends)]
  return questions, _generated(lm, questions, batch, max_length or lm.config.length - 1, num_beams), right


def loss(lm, records: Sequence[tuple], batch: int) -> dict:
  """{'nll_per_token', 'perplexity', 'tokens'} of what is right in records."""
  stream = packing.in_memory(lm.config.data, lm.tokenizer, records)
  task, scorer = examples.Task(lm.config, lm.tokenizer), scoring.make_nll(lm.config)
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


def evaluate_answers(lm, source: str, metrics: Sequence[str] = (), batch: int = 16, limit: int | None = None,
                     max_length: int | None = None, num_beams: int = 1) -> tuple[dict, list[dict]]:
  """(the JSON of `jaxlm eval`, {name, question, said, right} of each) for --data=SOURCE: the first `limit` of its questions.

  UsageError for a metric that is not known or whose library is missing.
  """
  allowed = schema.METRICS[lm.config.objective.name]
  unknown = [m for m in metrics if m not in allowed]
  if unknown:
    raise UsageError(f'--metrics={unknown[0]}: objective.name={lm.config.objective.name} wants some of {", ".join(allowed)}')
  name, split = evaluate.resolve(source, lm.config)
  records = sources.records(name, lm.config.data, split)
  if lm.config.data.form == 'chat':  # which asks for what an assistant says
    records = (r for r in records if any(role == forms.ASSISTANT for role, _ in r[1]))
  named = list(itertools.islice(records, limit))
  if not named:
    raise UsageError(f'--data={source}: no question in it ({split} questions of {name})')
  names, records = [n for n, *_ in named], [fields for _, *fields in named]
  questions, said, right = _ask(lm, records, batch, max_length, num_beams)
  result = {**loss(lm, records, batch), 'questions': len(records), 'step': lm.step}
  for metric in metrics or allowed[:1]:
    try:
      result |= METRICS[metric](said, right)
    except ImportError as e:
      raise UsageError(f'--metrics={metric}: {extra("metrics")} ({e})') from e
  return result, [{'name': n, 'question': q, 'said': s, 'right': a} for n, q, s, a in zip(names, questions, said, right)]
