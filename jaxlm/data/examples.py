"""How a window of the token stream becomes an example, objective by objective. All of it is a pure function of (config,
tokenizer, stream, window, example number): masks are drawn anew for each example of the run, and the same after a resume.

A batch is a dict of arrays [B, …], `shapes` says which: tokens, segments, positions (what the model, or its decoder,
reads), inputs, input_segments, input_positions (what an encoder beside it reads), targets and weights (what is to be said),
at (the places of the targets, where they are not all), types and labels (of pairs). Segment and weight 0 are padding.
"""
import numpy as np

from jaxlm.data import asked, windows
from jaxlm.data.packing import Stream
from jaxlm.data.rows import Task, shapes  # noqa: F401  pylint: disable=unused-import  # all of it is asked for here
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UsageError
from jaxlm.schema import Config, span_lengths

EXAMPLES = {'causal': windows.causal, 'next': windows.following, 'prefix': windows.prefix, 'spans': windows.spans,
            'mask': windows.mask, 'pairs': windows.pairs, 'answer': asked.answer, 'classify': asked.classify, 'tag': asked.tag,
            'span': asked.span}


def make(task: Task, stream: Stream, windows_B: np.ndarray, numbers_B: np.ndarray) -> dict[str, np.ndarray]:
  """The examples of some windows of a stream; numbers: of the examples in the run, which their randomness follows."""
  return EXAMPLES[task.objective.name](task, stream, windows_B, numbers_B)


def count(task: Task, stream: Stream) -> int:
  """Windows, or rows, that a stream has."""
  return asked.count(task, stream) if task.objective.name in asked.RECORDS else stream.windows(stride(task.config))


def stride(config: Config) -> int:
  """Tokens of the stream from one window to the next."""
  return span_lengths(config.objective)[0] if config.objective.name == 'spans' else config.length


def check(config: Config, tokenizer: Tokenizer) -> None:
  """UsageError if the model's vocabulary has no row for a token that the objective puts in."""
  name = config.objective.name
  extra = [tokenizer.mask] if name in ('mask', 'pairs') else tokenizer.sentinels if name == 'spans' else []
  size = max([tokenizer.vocab_size - 1, *extra]) + 1
  for key in ('V', 'vocab'):
    if 0 < getattr(config.model, key) < size:
      raise UsageError(f'model.{key}={getattr(config.model, key)}: the tokenizer has {tokenizer.vocab_size} tokens'
                       + (f', and objective.name={name} puts in others' if size > tokenizer.vocab_size else '')
                       + f'; set at least {size}')
