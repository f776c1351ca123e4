"""How good a model is on a text: nats per token, perplexity, and bits per byte of the original bytes (scoring.py says how
each kind of model is asked)."""
import gzip
import lzma
import math
from collections.abc import Iterable, Iterator

import numpy as np

from jaxlm import hosts, scoring
from jaxlm.data import examples, pipeline, sources
from jaxlm.errors import UsageError
from jaxlm.models import ngram
from jaxlm.schema import Config, lead, of_task


class HeldOut:
  """The evaluator that training runs: mean loss on the first windows of the cached held-out split."""

  def __init__(self, config: Config, cache, mesh, nll=None):
    stream, task = cache.streams['heldout'], examples.Task(config, cache.tokenizer)
    count = min(config.eval_windows, examples.count(task, stream))
    if not count:
      raise UsageError(f'eval_every={config.eval_every}: nothing is held out (data.heldout={config.data.heldout})')
    self._nll = nll or scoring.make_nll(config)
    self._batches = []
    for start in range(0, count, config.batch):
      windows = np.arange(start, start + config.batch)
      self._batches.append(pipeline.place(
          lambda low, high: _only(examples.make(task, stream, np.minimum(windows[low:high], count - 1), windows[low:high]),
                                   windows[low:high] < count),
          config.batch, mesh))

  def run(self, params) -> Iterator[tuple[str, float]]:
    """Yields ('heldout_loss', nats per token)."""
    nll = sum(hosts.fetch(self._nll(params, b)[0]).sum(dtype=np.float64) for b in self._batches)
    tokens = sum(hosts.fetch(b['weights']).sum(dtype=np.float64) for b in self._batches)
    yield 'heldout_loss', nll / tokens


class HeldOutTasks:
  """HeldOut of each task of a mixture."""

  def __init__(self, config: Config, caches, mesh):
    nll = scoring.make_nll(lead(config))  # compiled once: all batches look alike
    self._tasks = []
    for task in config.tasks:
      try:
        self._tasks.append((task, HeldOut(of_task(config, task), caches.of[task.name], mesh, nll)))
      except UsageError as e:
        raise UsageError(f'task {task.name}: {e}') from e

  def run(self, params) -> Iterator[tuple[str, float]]:
    """Yields ('heldout_loss', the mean of the tasks' by weight), and ('heldout_loss/NAME', nats per token) of each."""
    losses = {task: loss for task, held_out in self._tasks for _, loss in held_out.run(params)}
    yield 'heldout_loss', sum(t.weight * loss for t, loss in losses.items()) / sum(t.weight for t in losses)
    yield from ((f'heldout_loss/{task.name}', loss) for task, loss in losses.items())


def held_out(config: Config, cache, mesh) -> HeldOut | HeldOutTasks:
  """The evaluator of a run, which may be a mixture."""
  return (HeldOutTasks if config.tasks else HeldOut)(config, cache, mesh)


def _only(batch: dict, rows_B: np.ndarray) -> dict:
  return {**batch, 'weights': batch['weights'] * rows_B[:, None].astype(np.float32)}


def evaluate(lm, documents: Iterable[tuple[str, str]], context: int, stride: int, batch: int, progress=None) -> dict:
  """Scores (name, text) documents with an LM (see lm.py) → the JSON of `jaxlm eval` (nats; null where undefined)."""
  return result(lm, scoring.score(lm, documents, context, stride, batch, progress), context, stride)


def result(lm, scored: list[scoring.Document], context: int, stride: int) -> dict:
  """The JSON of documents that were scored."""
  return {**total(scored), 'kind': lm.config.model.kind, 'step': lm.step, 'context': context, 'stride': stride}


def total(scored: list[scoring.Document]) -> dict:
  """Sums over documents, divided once."""
  tokens, size, nll = (sum(getattr(d, field) for d in scored) for field in ('tokens', 'bytes', 'nll'))
  per_token = nll / tokens if tokens else None
  return {'nll_per_token': per_token,
          'perplexity': math.exp(per_token) if per_token is not None and per_token < 700 else None,
          'bits_per_byte': nll / math.log(2) / size if size else None,
          'documents': len(scored), 'bytes': size, 'tokens': tokens}


def baselines(documents: list[tuple[str, str]], config: Config) -> dict[str, float]:
  """Bits per byte of the same documents by gzip -9 and xz -9 (of them all in a row), and by a byte 5-gram counted on
  the run's training documents."""
  texts = [text.encode() for _, text in documents]
  whole = b''.join(texts)
  model = ngram.of_bytes(5, (text.encode() for _, text in sources.documents(config.data.source, config.data, 'train')))
  return {'gzip_bits_per_byte': len(gzip.compress(whole, 9)) * 8 / len(whole),
          'xz_bits_per_byte': len(lzma.compress(whole, preset=9)) * 8 / len(whole),
          'fivegram_bits_per_byte': sum(model.bits(ngram.as_symbols(text)) for text in texts) / len(whole)}


def resolve(source: str, config: Config) -> tuple[str, str]:
  """--data=SOURCE → (source, split). 'heldout' and 'train' are the run's own documents; the run's own source means its
  held-out ones, so that no model is judged on what it was trained on; SOURCE/train and SOURCE/all say so outright."""
  if source in ('heldout', 'train'):
    if not config.data.source:
      raise UsageError(f'--data={source}: the config of the run has no data.source, as that of an import has none; say what to score, '
                       '--data=text:GLOB or another SOURCE')
    return config.data.source, source
  if source.startswith('stdlib/'):
    split = source.partition('/')[2]
    if split not in ('train', 'heldout', 'all'):
      raise UsageError(f'--data={source}: stdlib has the parts stdlib/heldout, stdlib/train and stdlib/all')
    return 'stdlib', split
  return source, 'heldout' if source in (config.data.source, 'stdlib') else 'all'


def source_documents(source: str, config: Config) -> tuple[str, list[tuple[str, str]]]:
  """(description, documents) of --data=SOURCE. UsageError if there is none."""
  name, split = resolve(source, config)
  found = list(sources.documents(name, config.data, split))
  if not found:
    raise UsageError(f'--data={source}: no document in it ({split} documents of {name})')
  return f'{split} documents of {name}', found
