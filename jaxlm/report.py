"""What commands show a person: tables, samples, a bar for long work, the machine."""
import contextlib
import importlib.metadata
import platform
import time

from rich import box
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jaxlm.metrics import console, say


@contextlib.contextmanager
def progress(what: str, total: int):
  """Yields tick(amount): a bar on a terminal, elsewhere a line now and then."""
  if not console.is_terminal:
    yield _Lines(what, total).tick
    return
  with Progress(TextColumn(what), BarColumn(), TimeRemainingColumn(), console=console) as bar:
    task = bar.add_task('', total=total)
    yield lambda amount: bar.advance(task, amount)


class _Lines:
  """Progress where no bar can be drawn: a line when EVERY seconds have passed since the last."""
  EVERY = 10.

  def __init__(self, what: str, total: int):
    self._what, self._total, self._done, self._began = what, total, 0, time.monotonic()
    self._said = self._began

  def tick(self, amount: int) -> None:
    self._done += amount
    now = time.monotonic()
    if now - self._said >= self.EVERY and self._done < self._total:
      self._said = now
      left = (now - self._began) * (self._total / self._done - 1)
      say(f'{self._what} {self._done / self._total:.0%}, {left:,.0f} s left')


def print_eval(described: str, result: dict) -> None:
  """The evaluation, beside the baselines if there are any."""
  say(f'{described}: {result["documents"]:,} documents, {result["bytes"]:,} bytes, {result["tokens"]:,} tokens; '
      f'step {result["step"]}, context {result["context"]}, stride {result["stride"]}')
  table = Table(box=box.SIMPLE)
  for column in ('', 'bits/byte', 'nats/token', 'perplexity'):
    table.add_column(column, justify='left' if not column else 'right')
  show = lambda value: '–' if value is None else f'{value:.4f}'
  ours = result['bits_per_byte']
  rows = [('this model', ours, show(result['nll_per_token']), show(result['perplexity']))]
  for key, name in (('gzip', 'gzip -9'), ('xz', 'xz -9'), ('fivegram', 'byte 5-gram')):
    if (value := result.get(f'{key}_bits_per_byte')) is not None:
      rows.append((name, value, '', ''))
  for name, bits, nats, perplexity in sorted(rows, key=lambda r: (r[1] is None, r[1])):
    table.add_row(name, show(bits), nats, perplexity, style='bold' if name == 'this model' else None)
  console.print(table)


def print_goodput(seconds: dict[str, float]) -> None:
  """Where a run's time went, over all its starts (goodput.py)."""
  table, whole = Table(box=box.SIMPLE), sum(seconds.values())
  table.add_column('time went to')
  table.add_column('seconds', justify='right')
  table.add_column('share', justify='right')
  for kind, value in sorted(seconds.items(), key=lambda item: -item[1]):
    table.add_row(kind, f'{value:,.1f}', f'{value / max(whole, 1e-9):.1%}', style='bold' if kind == 'step' else None)
  console.print(table)


def print_tasks(result: dict) -> None:
  """The harness's metrics, a line each."""
  say(f'step {result["step"]}, context {result["context"]}')
  table = Table(box=box.SIMPLE)
  for column in ('task', 'documents', 'examples', 'metric', 'value'):
    table.add_column(column, justify='right' if column in ('documents', 'examples', 'value') else 'left')
  for task, metrics in result['results'].items():
    start = (task, *(str(result[key].get(task, '')) for key in ('documents', 'fewshot')))
    for metric, value in metrics.items():
      table.add_row(*start, metric, '–' if value is None else f'{value:.4f}')
      start = ('', '', '')
  console.print(table)


def print_answers(result: dict, each: list[dict], shown: int = 3) -> None:
  """The metrics of answers, and the first few of them."""
  for answer in each[:shown]:
    say(f'{answer["question"]}\n  said:  {answer["said"]}\n  right: {answer["right"]}')
  table = Table(box=box.SIMPLE)
  table.add_column('metric')
  table.add_column('value', justify='right')
  for name, value in result.items():
    table.add_row(name, f'{value:.4f}' if isinstance(value, float) else str(value))
  console.print(table)


def print_sample(prompt: str, text: str) -> None:
  console.print(f'[bold]{_escape(prompt)}[/bold]{_escape(text)}', markup=True)


@contextlib.contextmanager
def streaming(prompt: str):
  """Yields show(text so far), which prints what is new in it; a character that is not whole yet waits."""
  shown = 0
  console.print(f'[bold]{_escape(prompt)}[/bold]', markup=True, end='')

  def show(text: str) -> None:
    nonlocal shown
    whole = text.rstrip('\ufffd')
    console.print(whole[shown:], markup=False, end='')
    shown = max(shown, len(whole))
  yield show
  console.print()


def _escape(text: str) -> str:
  return text.replace('[', r'\[')


def doctor() -> None:
  """Versions that must fit together, and the devices that jax sees."""
  import jax  # pylint: disable=g-import-not-at-top
  say(f'python {platform.python_version()} on {platform.platform()}')
  for name in ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tokenizers', 'tensorflow-datasets',
               'libtpu', 'jax-cuda12-plugin'):
    try:
      version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      version = 'not installed'
    say(f'{name:<22}{version}')
  say(f'{jax.device_count()} devices, {jax.process_count()} processes: {jax.devices()[0].device_kind}')
