"""What examples are made of: what they are made with, the arrays of a batch, and what several objectives do to rows."""
import dataclasses
import functools
import hashlib

import numpy as np

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.schema import Config, ObjectiveConfig, selected


# Objectives of encoders that choose: labels of a row (tag: one a token).
CHOICES = {'classify': 1, 'tag': 0, 'span': 2}


@dataclasses.dataclass(frozen=True)
class Task:
  """What the examples of a run are made with."""
  config: Config
  tokenizer: Tokenizer
  packed: dict = dataclasses.field(default_factory=dict, compare=False)  # of each stream of records: its rows or labels

  @property
  def objective(self) -> ObjectiveConfig:
    return self.config.objective

  def rng(self, number: int) -> np.random.Generator:
    """Randomness of one example (by its number in the run) or window (static masks)."""
    digest = hashlib.blake2b(f'{self.config.seed}/{number}'.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, 'little')))


@functools.cache
def shapes(config: Config) -> dict[str, tuple[int, type]]:
  """name → (length, dtype) of the arrays [B, length] of a batch."""
  name, L, M = config.objective.name, config.length, config.objective.source
  out = {k: (L, np.int32) for k in ('tokens', 'targets', 'segments', 'positions')} | {'weights': (L, np.float32)}
  if M:
    out |= {k: (M, np.int32) for k in ('inputs', 'input_segments', 'input_positions')}
  if name in ('mask', 'pairs'):
    S = selected(config)
    out |= {'at': (S, np.int32), 'targets': (S, np.int32), 'weights': (S, np.float32)}
  if name == 'pairs':
    out |= {'types': (L, np.int32), 'labels': (1, np.int32)}
  if name in CHOICES:
    del out['targets']
    S = L if name == 'tag' else CHOICES[name]
    out |= {'labels': (S, np.int32), 'weights': (S, np.float32)}
  if name == 'span':
    out |= {'types': (L, np.int32)}
  return out


def blank(task: Task, rows: int) -> dict[str, np.ndarray]:
  return {name: np.zeros((rows, length), dtype) for name, (length, dtype) in shapes(task.config).items()}


def recount(segments_BL) -> np.ndarray:
  """Positions that start from 0 wherever the segment changes."""
  at_BL = np.broadcast_to(np.arange(segments_BL.shape[1]), segments_BL.shape)
  starts_BL = np.concatenate([np.ones_like(segments_BL[:, :1], bool), segments_BL[:, 1:] != segments_BL[:, :-1]], 1)
  return (at_BL - np.maximum.accumulate(np.where(starts_BL, at_BL, 0), 1)).astype(np.int32)
