"""Linear probes (Alain & Bengio 2016): how well a linear classifier reads a label off the hidden states of each layer.

A probe is scikit-learn's logistic regression (the extra `look`; L2 of C = 1) of standardised features, judged by stratified
cross-validation: each text is predicted once, by a probe that has not seen it. Beside it stands what always saying the most
frequent class comes to.
"""
import collections
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from rich import box
from rich.table import Table

from jaxlm.errors import UsageError, extra
from jaxlm.look import hidden
from jaxlm.metrics import console

try:
  from sklearn.dummy import DummyClassifier
  from sklearn.linear_model import LogisticRegression
  from sklearn.metrics import accuracy_score, f1_score
  from sklearn.model_selection import StratifiedKFold
  from sklearn.pipeline import make_pipeline
  from sklearn.preprocessing import StandardScaler
except ImportError as e:
  raise UsageError(f'look probe wants scikit-learn: {extra("look")} ({e})') from e


def read(path: str, text: str, label: str) -> tuple[list[str], list[str]]:
  """(texts, labels) of the fields of a file of JSON lines; a label is a string, a whole number or a bool. UsageError naming
  the line that has none."""
  if not pathlib.Path(path).is_file():
    raise UsageError(f'--data={path}: no such file')
  texts, labels = [], []
  for number, line in enumerate(pathlib.Path(path).read_bytes().splitlines(), 1):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
    except ValueError as e:
      raise UsageError(f'{path}:{number}: is not JSON ({e})') from e
    known = ', '.join(record) if isinstance(record, dict) else type(record).__name__
    for flag, field, types, out in (('text', text, (str,), texts), ('label', label, (str, int, bool), labels)):
      value = record.get(field) if isinstance(record, dict) else None
      if not isinstance(value, types) or value == '':
        raise UsageError(f'{path}:{number}: no {flag} in field {field!r} (there is {known}); set --{flag}=FIELD')
      out.append(str(value))
  return texts, labels


def validate(x_BD: np.ndarray, labels: Sequence[str], folds: int = 5, seed: int = 0, classifier=None) -> dict:
  """Cross-validation of a probe of features x_BD, one row a label → {'accuracy', 'macro_f1': means over folds; with _std:
  their standard deviation over folds (of a sample, n − 1)}. UsageError for labels that cannot be parted so."""
  y_B, counts = np.array(labels), collections.Counter(labels)
  if len(counts) < 2:
    raise UsageError(f'--label: all {len(y_B)} texts have {next(iter(counts), "none")!r}; a probe wants two classes or more')
  rarest, count = min(counts.items(), key=lambda pair: pair[1])
  if not 2 <= folds <= count:
    raise UsageError(f'--folds={folds}: wants 2 or more, and as many texts in each class: {rarest!r} has {count}')
  scores = []
  for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(x_BD, y_B):
    probe = classifier or make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    said = probe.fit(x_BD[train], y_B[train]).predict(x_BD[test])
    scores.append((accuracy_score(y_B[test], said), f1_score(y_B[test], said, average='macro', zero_division=0)))
  means, spread = np.mean(scores, 0), np.std(scores, 0, ddof=1)
  return {'accuracy': float(means[0]), 'accuracy_std': float(spread[0]), 'macro_f1': float(means[1]),
          'macro_f1_std': float(spread[1])}


def probe(lm, texts: Sequence[str], labels: Sequence[str], states: Sequence[int] | None = None, pool: str = 'mean',
          folds: int = 5, seed: int = 0, batch: int = 16, context: int | None = None) -> dict:
  """What `jaxlm look probe` writes: probes of states 0 (the embeddings) … N of hidden.pooled, of some or all, and the
  majority class under the same folds. Errors: see hidden.pooled, validate."""
  majority = validate(np.zeros((len(labels), 1)), labels, folds, seed, DummyClassifier(strategy='most_frequent'))
  x_NBD = hidden.pooled(lm, texts, pool, batch, context)
  chosen = range(len(x_NBD)) if states is None else states
  if bad := [n for n in chosen if not 0 <= n < len(x_NBD)]:
    raise UsageError(f'--layers={bad[0]}: wants all, or some of 0 (the embeddings) to {len(x_NBD) - 1} (after the last layer)')
  return {'texts': len(texts), 'classes': dict(collections.Counter(labels)), 'pool': pool, 'folds': folds, 'seed': seed,
          'step': lm.step, 'majority': majority, 'layers': {str(n): validate(x_NBD[n], labels, folds, seed) for n in chosen}}


def show(result: dict) -> None:
  """A small table."""
  table = Table(box=box.SIMPLE)
  for column in ('layers', 'accuracy', 'macro F1'):
    table.add_column(column, justify='left' if column == 'layers' else 'right')
  best = max(s['accuracy'] for s in result['layers'].values())
  for name, s in [('majority class', result['majority']), *result['layers'].items()]:
    name = '0 (embeddings)' if name == '0' else name
    table.add_row(name, *(f'{s[key]:.4f} ± {s[f"{key}_std"]:.4f}' for key in ('accuracy', 'macro_f1')),
                  style='bold' if s['accuracy'] == best else None)
  console.print(table)
