"""EleutherAI's lm-evaluation-harness on a trained model, in process and on its mesh: `jaxlm eval --tasks=…`.

What is asked of the model equals what the harness's own `hf` model answers for the same weights, to rounding: how a
context and its continuation are encoded, what is cut where they are longer than the context, the windows of a long text.
"""
import collections
import difflib
import functools
import itertools
import json
import math
import numbers
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from jaxlm import generate, layout, loss, report, scoring
from jaxlm.data import pipeline
from jaxlm.errors import UsageError, extra
from jaxlm.models import kinds, output
from jaxlm.sampling import Sampling
from jaxlm.schema import ModelConfig

try:
  import lm_eval
  from lm_eval import tasks as harness_tasks, utils
  from lm_eval.api.model import TemplateLM
  from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
except ImportError as e:
  raise UsageError(f'--tasks wants the evaluation harness: {extra("harness")} ({e})') from e

PIECE = 64        # tokens whose logits are there at a time; rows are PIECE · 2^k long, so that few programs are compiled
NEW = 256         # tokens that a task which does not say may generate
SAMPLING = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')


@functools.partial(jax.jit, static_argnums=0)
def _scores(cfg: ModelConfig, params, batch):
  """float32 [B, L, 2]: −log p of each target, and 1 where it is the likeliest token; 0 in pieces where none has weight."""
  hidden = kinds.forward(cfg, params, batch)
  unembed = output.gathered(hidden)

  def score(x, targets):
    logits_BLV = output.finish(cfg, output.unembed(unembed, x))
    nll_BL, _ = loss.token_nll(logits_BLV, targets)
    return jnp.stack([nll_BL, jnp.argmax(logits_BLV, -1) == targets], -1)

  def body(carry, piece):
    x, targets, weights = piece
    skip = lambda x, targets: jnp.zeros((*targets.shape, 2), out_sharding=layout.spec('BL') + (None,))
    return carry, jax.lax.cond(jnp.any(weights > 0), score, skip, x, targets)  # for contexts' sake: 1.4 × as fast on CPU
  arrays = (hidden.x_BLD, batch['targets'], batch['weights'])
  return loss.pieces(hidden.x_BLD.shape[1] // PIECE, False, body, None, arrays)[1]


class Harness(TemplateLM):
  """A jaxlm LM as the harness sees models. context: tokens at most that the model sees, the run's length if None."""

  def __init__(self, lm, context: int | None = None, batch: int = 16):
    super().__init__()
    if lm.config.model.kind not in ('decoder', 'rnn'):
      raise UsageError(f'--tasks: model.kind={lm.config.model.kind} does not go on with texts; decoder and rnn do')
    self.lm, self.max_length = lm, lm.config.length if context is None else context
    reach = lm.config.model.P or self.max_length  # learned positions end
    if not 1 <= self.max_length <= reach:
      raise UsageError(f'--context={context}: wants {f"1 up to {reach}" if lm.config.model.P else "at least 1"}')
    self._batch = -(-max(1, batch) // lm.rows_multiple) * lm.rows_multiple
    # Unlike in training, a special token that a text spells out is that token: prompts of tasks mean it so.
    self._tokenizer = tokenizers.Tokenizer.from_str(lm.tokenizer.json)
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._opening = self.tok_decode([self.prefix_token_id])
    self._ends = [self.tok_decode([i]) for i in sorted(lm.stop_ids)]

  @property
  def eot_token_id(self) -> int:
    return self.lm.tokenizer.boundary

  @property
  def prefix_token_id(self) -> int:
    return self.lm.tokenizer.opening

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
    """Ids with what the tokenizer's template adds, unless the text has it already."""
    if add_special_tokens is None:
      add_special_tokens = not string.startswith(self._opening)
    return self._tokenizer.encode(string, add_special_tokens=add_special_tokens).ids

  def tok_decode(self, ids, skip_special_tokens: bool = False) -> str:
    return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

  def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
    """(log p of the continuation, whether it is the greedy one) of each request's (context, continuation)."""
    return super().loglikelihood(requests, disable_tqdm=True)

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = True) -> list[float]:
    """log p of each request's text, in windows of the context that score each token once."""
    windows, owners = [], []
    for i, request in enumerate(requests):
      ids = self.tok_encode(request.args[0])
      for pair in utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
        windows.append((None, *utils.make_disjoint_window(pair)))
        owners.append(i)
    totals = [0.] * len(requests)
    for i, (logp, _) in zip(owners, self._loglikelihood_tokens(windows)):
      totals[i] += logp
    return totals

  def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
    windows = []
    for _, context, target in requests:
      if len(target) > self.max_length:
        raise UsageError(f'a continuation has {len(target)} tokens, the context {self.max_length}: set --context higher')
      ids = [*(context or [self.prefix_token_id]), *target][-self.max_length - 1:]
      windows.append(scoring.Window(np.array(ids, np.int32), len(ids) - 1 - len(target)))
    length = lambda i: PIECE << (max(0, len(windows[i].ids) - 2) // PIECE).bit_length()
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i].ids))
    out: list = [None] * len(windows)
    with report.progress('scoring', len(windows)) as tick, jax.set_mesh(self.lm.mesh):
      for L, bucket in itertools.groupby(order, length):
        for rows in self._batches(list(bucket)):
          for i, answer in zip(rows, self._score([windows[i] for i in rows], L)):
            out[i] = answer
          tick(len(rows))
    return out

  def _batches(self, order: list[int]):
    return (order[at:at + self._batch] for at in range(0, len(order), self._batch))

  def _score(self, windows, L: int):
    multiple = self.lm.rows_multiple
    size = min(self._batch, multiple << (-(-len(windows) // multiple) - 1).bit_length())  # few sizes too
    arrays = scoring.to_batch([[w] for w in windows], size, L)
    placed = pipeline.place(lambda low, high: {k: a[low:high] for k, a in arrays.items()}, size, self.lm.mesh)
    scores_BL2 = jax.device_get(_scores(self.lm.config.model, self.lm.params, placed))
    for row_L2, weights_L in zip(scores_BL2[:len(windows)], arrays['weights'] > 0):
      nll, greedy = row_L2[weights_L].T
      yield -float(nll.sum(dtype=np.float64)), bool(greedy.all())

  def generate_until(self, requests, disable_tqdm: bool = True) -> list[str]:
    """What follows each request's context, up to the first of its stop strings; greedy unless the request says."""
    groups = collections.defaultdict(list)
    for i, request in enumerate(requests):
      groups[json.dumps(request.args[1], sort_keys=True)].append(i)
    out = [''] * len(requests)
    with report.progress('generating', len(requests)) as tick:
      for key, members in groups.items():
        until, new, sampling = self._settings(json.loads(key))
        ids = {i: (self.tok_encode(requests[i].args[0]) or [self.prefix_token_id])[new - self.max_length:] for i in members}
        for k, rows in enumerate(self._batches(sorted(members, key=lambda i: -len(ids[i])))):
          for i, text in zip(rows, self._continue([ids[i] for i in rows], until, new, sampling, k * self._batch)):
            out[i] = text
          tick(len(rows))
    return out

  def _settings(self, kwargs: dict) -> tuple[list[str], int, Sampling]:
    """(stop strings, new tokens at most, sampling) of a task's generation_kwargs."""
    kwargs = normalize_gen_kwargs(kwargs, NEW)
    until, new = [x for x in kwargs.pop('until') or [] if x], kwargs.pop('max_gen_toks')
    sampling = {k: kwargs.pop(k) for k in SAMPLING if k in kwargs}
    if not kwargs.pop('do_sample'):
      sampling['temperature'] = 0
    if kwargs:
      raise UsageError(f'generation_kwargs: {", ".join(sorted(kwargs))} of a task is not known; known are until, '
                       f'max_gen_toks, do_sample, {", ".join(SAMPLING)}')
    if not 0 < new < self.max_length:
      raise UsageError(f'max_gen_toks={new} of a task leaves no prompt in the context, {self.max_length}: set --context')
    return [*until, *self._ends], new, Sampling(**{'temperature': 0, **sampling})

  def _continue(self, prompts, until: list[str], new: int, sampling: Sampling, seed: int) -> list[str]:
    rows = generate.sample(self.lm, prompts, new, sampling, seed, generate.stopper(self.lm.stop_ids, self.tok_decode, until))
    return [postprocess_generated_text(self.tok_decode(row, skip_special_tokens=True), until, None) for row in rows]


def _manager(names: list[str], task_path: str | None):
  """The harness's index of tasks: of the folder alone if it has them all, for its own thousands take seconds to read."""
  if task_path and not pathlib.Path(task_path).is_dir():
    raise UsageError(f'--task_path={task_path}: no such folder')
  manager = harness_tasks.TaskManager(include_path=task_path, include_defaults=False) if task_path else None
  if manager is None or not set(names) <= set(manager.all_subtasks):
    manager = harness_tasks.TaskManager(include_path=task_path)
  for name in names:
    if name not in manager.all_tasks:
      near = difflib.get_close_matches(name, manager.all_tasks, n=1)
      raise UsageError(f'--tasks={name}: no such task{"; did you mean " + near[0] + "?" if near else ""}')
  return manager


def run(lm, tasks: list[str], task_path: str | None = None, num_fewshot: int | None = None, limit: int | None = None,
        context: int | None = None, batch: int = 16) -> dict:
  """The harness's results of an LM (see lm.py) on tasks by name: the JSON of `jaxlm eval --tasks` (null: undefined)."""
  model = Harness(lm, context, batch)
  try:
    found = lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=_manager(tasks, task_path), limit=limit,
                                    num_fewshot=num_fewshot, bootstrap_iters=0, log_samples=False)
  except OSError as e:  # also of a dataset that cannot be had
    raise UsageError(f'--tasks={",".join(tasks)}: {(str(e) or repr(e)).splitlines()[0]}') from e
  metrics = lambda row: {key.removesuffix(',none'): float(value) if math.isfinite(value) else None
                         for key, value in row.items() if ',' in key and isinstance(value, numbers.Real)}
  return {'results': {task: metrics(row) for task, row in found['results'].items()},
          'documents': {task: n['effective'] for task, n in found['n-samples'].items()},
          'fewshot': found['n-shot'], 'versions': found['versions'], 'step': lm.step, 'context': model.max_length}
