"""What a run reports: sums and counts, divided once on the host → console, metrics.jsonl, TensorBoard events."""
import contextlib
import json
import os
import pathlib
import sys
import time

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxlm.schema import Config, ModelConfig, layer_kinds
from jaxlm.storage import Lines

SUMS = ('loss', 'nll', 'tokens', 'load', 'dropped', 'right', 'pairs', 'pairs_nll', 'pairs_right', 'task_nll', 'task_tokens')
# The others are the last step's.

console = Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
  """A line for a person, above the progress bar."""
  console.print(text, markup=False)


def flops_per_token(m: ModelConfig, params: int, length: int) -> float:
  """Model FLOPs of a decoder's training step, a token: 6 · (weights in matmuls that a token meets) + attention's.

  Forward is 2 a weight, backward twice that. A layer's scores and mix are 2 · (head dims of keys and of values) · H a
  token seen, forward; a token sees L/2 others on average, w · (1 − w/2L) through a window of w. An embedding that is
  only looked up is no matmul, an expert that is not chosen does nothing; recomputation is not counted.
  """
  kinds = layer_kinds(m)
  idle = sum(feed == 'moe' for _, feed in kinds) * 3 * m.D * m.moe.F * (m.moe.E - m.moe.top_k)
  looked_up = m.P * m.D + (0 if m.tied else m.V * m.D)
  w = min(m.window, length)
  seen = sum(w * (1 - w / 2 / length) if where == 'local' else length / 2 for where, _ in kinds)
  return 6. * (params - looked_up - idle) + 6. * m.H * (m.K + (m.mla.v or m.K)) * seen


class Log:
  """Takes the sums of every step; every `log_every` steps, and at the last, writes a line of what they say.

  metrics.jsonl has a line a logged step. After a resume, lines of steps that will be run again are dropped first, so
  that it reads as one unbroken run.
  """

  def __init__(self, workdir: pathlib.Path, config: Config, params: int, start: int):
    self._config = config
    self._flops = flops_per_token(config.model, params, config.length)
    self._path = workdir / 'metrics.jsonl'
    self._keep_until(start)
    self._file = Lines(self._path, say)
    self._events, self._workdir = None, workdir
    self._sums = {}
    self._since = self._made = time.monotonic()  # when the steps of the next line began, and when the last of them was done
    self._progress = self._task = None
    if console.is_terminal:
      self._progress = Progress(
          TextColumn('step'), MofNCompleteColumn(), BarColumn(), TextColumn('loss {task.fields[loss]}'),
          TextColumn('{task.fields[speed]} tokens/s'), TimeRemainingColumn(), TextColumn('left'), console=console)
      self._progress.start()
      self._task = self._progress.add_task('', total=config.steps, completed=start, loss='–', speed='–')

  def _keep_until(self, start: int) -> None:
    if self._path.exists():
      lines = [l for l in self._path.read_text(encoding='utf-8').splitlines() if _step_of(l) <= start]
      fresh = self._path.with_suffix('.tmp')
      fresh.write_text(''.join(l + '\n' for l in lines), encoding='utf-8')
      os.replace(fresh, self._path)

  def add(self, step: int, sums: dict, data: str, made: float) -> None:
    """`sums` of step (counted from 1), on the host: sums and counts are added up, norms are the last step's. data: a hash of all
    batches until here. made: when the step was done, by the monotonic clock."""
    self._data, self._made = data, made
    for name, value in sums.items():
      adds = name in SUMS
      self._sums[name] = (self._sums.get(name, 0.) if adds else 0.) + np.asarray(value, np.float64)
    self._sums['steps'] = self._sums.get('steps', 0) + 1
    if step % self._config.log_every == 0 or step == self._config.steps:
      self._flush(step)
    elif self._progress:
      self._progress.update(self._task, completed=step)

  def skip(self, step: int, sums: dict, reason: str) -> None:
    """A step whose update was skipped is a line of its own, and in no sum or mean; what of it is not finite is left out."""
    found = {'loss': sums['loss'] / max(sums['tokens'], 1), 'grad_norm': sums['grad_norm']}
    self.write(step, {'skipped': 1, **{f'skipped_{name}': float(value) for name, value in found.items() if np.isfinite(value)}})
    say(f'step {step}: {reason}; its update is skipped')
    if self._sums and (step % self._config.log_every == 0 or step == self._config.steps):
      self._flush(step)

  def back_to(self, step: int, jump: int) -> None:
    """The run goes back to `step`, and its data over `jump` batches: lines after it are dropped, as after a resume."""
    self._file.close()
    self._keep_until(step)
    self._file = Lines(self._path, say)
    if self._events:
      self._events.close()
    self._events, self._sums = None, {}
    self._since = self._made = time.monotonic()
    self.write(step + 1, {'jumped': jump})

  def _flush(self, step: int) -> None:
    sums, seconds = self._sums, self._made - self._since
    tokens, c = sums['tokens'], self._config
    speed = sums['steps'] * c.batch * c.length / seconds
    more = {'accuracy': float(sums['right'] / max(tokens, 1))} if 'right' in sums else {}
    if 'pairs' in sums:
      more = {f'pairs_{what}': float(sums[f'pairs_{key}'] / sums['pairs']) for what, key in (('loss', 'nll'), ('accuracy', 'right'))}
    if 'load' in sums:  # choices an expert, as multiples of its layer's mean
      share_NE = sums['load'] / sums['load'].mean(-1, keepdims=True)
      more |= {'expert_load_max': float(share_NE.max()), 'expert_load_min': float(share_NE.min()),
               'expert_dropped': float(sums['dropped'] / max(sums['load'].sum(), 1))}
    for k, task in enumerate(c.tasks):
      if count := int(sums['task_tokens'][k]):
        more[f'loss/{task.name}'] = float(sums['task_nll'][k] / count)
      more[f'tokens/{task.name}'] = count  # that counted, since the last line
    self.write(step, {
        'loss': float(sums['nll'] / max(tokens, 1)), 'objective': float(sums['loss'] / max(tokens, 1)),
        'tokens': step * c.batch * c.length, 'tokens_per_second': speed, 'step_seconds': seconds / sums['steps'],
        **({'model_flops_per_second': speed * self._flops} if c.model.kind == 'decoder' else {}), 'grad_norm': float(sums['grad_norm']),
        'param_norm': float(sums['param_norm']), 'learning_rate': float(sums['learning_rate']), 'data': self._data, **more})
    self._sums, self._since = {}, self._made

  def write(self, step: int, values: dict) -> None:
    """A line of metrics.jsonl, TensorBoard scalars, and the console."""
    self._file.write(json.dumps({'step': step, **values}))
    if self._events is None:
      from jaxlm.events import Events  # pylint: disable=g-import-not-at-top
      self._events = Events(self._workdir / 'tensorboard', step, say)
    self._events.add(step, {name: value for name, value in values.items() if name != 'data'})
    if 'loss' in values and self._progress:
      self._progress.update(self._task, completed=step, loss=f'{values["loss"]:.3f}',
                            speed=f'{values["tokens_per_second"]:,.0f}')
    if 'loss' in values:
      each = ''.join(f'  {name.removeprefix("loss/")} {value:.4f}' for name, value in values.items() if name.startswith('loss/'))
      left = (self._config.steps - step) * values['step_seconds']
      say(f'step {step:>6}/{self._config.steps}  loss {values["loss"]:.4f}{each}  '
          f'{values["tokens_per_second"]:,.0f} tokens/s  {left:,.0f} s left')
    if 'heldout_loss' in values:
      each = ''.join(f'  {name.removeprefix("heldout_loss/")} {value:.4f}' for name, value in values.items() if name.startswith('heldout_loss/'))
      say(f'step {step:>6}/{self._config.steps}  held-out loss {values["heldout_loss"]:.4f}{each}')

  @contextlib.contextmanager
  def paused(self):
    """The time within (a save, an evaluation) is not a step's."""
    began = time.monotonic()
    yield
    self._since += time.monotonic() - began

  def close(self) -> None:
    if self._progress:
      self._progress.stop()
    if self._events:
      self._events.close()
    self._file.close()


class NoLog:
  """A Log of a process that is not the one to write it."""

  def add(self, step: int, sums: dict, data: str, made: float) -> None:
    pass

  def skip(self, step: int, sums: dict, reason: str) -> None:
    pass

  def back_to(self, step: int, jump: int) -> None:
    pass

  def write(self, step: int, values: dict) -> None:
    pass

  def paused(self):
    return contextlib.nullcontext()

  def close(self) -> None:
    pass


def _step_of(line: str) -> int:
  """The step of a line of metrics.jsonl; a line cut short by a kill belongs to no step that counts."""
  try:
    return json.loads(line)['step']
  except ValueError:
    return sys.maxsize
