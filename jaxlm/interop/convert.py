"""Between a foreign checkpoint and ours: the config, then tensor after tensor, through the rows of the family."""
import dataclasses
import re
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from jaxlm import layout
from jaxlm.errors import UsageError
from jaxlm.interop.families import FAMILIES, Family
from jaxlm.interop.mapping import uncovered, units
from jaxlm.models import kinds
from jaxlm.optimizer import path_of
from jaxlm.schema import FREE, TRAINING, ModelConfig, flatten


VOCABULARY = ('embed', 'unembed', 'unembed_bias')  # arrays with a row a token


def to_model(family: Family, hf: dict) -> dict:
  """config.json → {'D': 256, 'rope.base': …}, our model keys. UsageError for what no field of ours says."""
  out = {}
  for read, _ in family.pieces:
    try:
      out |= read(hf)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as e:
      raise UsageError(f'config.json: a key is missing or malformed ({type(e).__name__}: {e})') from e
  return out


def to_config_json(model_type: str, m: ModelConfig) -> dict:
  """Our model as a config.json of the family. UsageError naming the first field that the family cannot hold."""
  out, lost = _written(model_type, m)
  if lost:
    raise UsageError(f'{model_type} has no place for {lost[0]}')
  return out


def family_of(m: ModelConfig) -> str:
  """The first family that holds this model. UsageError with what keeps it out of the nearest if none does."""
  lost = {model_type: _written(model_type, m)[1] for model_type in FAMILIES}
  nearest = min(lost, key=lambda model_type: len(lost[model_type]))
  if lost[nearest]:
    raise UsageError(f'no family holds this model; the nearest, {nearest}, has no place for {" and ".join(lost[nearest])}')
  return nearest


def holding(m: ModelConfig) -> list[str]:
  """The families that hold this model, one at least. UsageError as family_of."""
  return [model_type for model_type in FAMILIES if not _written(model_type, m)[1]] or [family_of(m)]


def _written(model_type: str, m: ModelConfig) -> tuple[dict, list[str]]:
  """(config.json, what of the model is not in it)."""
  family, out = FAMILIES[model_type], {}
  for _, write in family.pieces:
    out |= write(m)
  back, mine = flatten(dataclasses.replace(ModelConfig(), V=m.V)), flatten(m)
  written = {'architectures': [family.architecture], 'model_type': model_type, **out}
  back |= to_model(family, written)
  lost = [f'model.{key}={value!r}' for key, value in mine.items()
          if key not in ('V', 'vocab') and not any(r.match(f'model.{key}') for r in (FREE, TRAINING))
          and not _same(back[key], value)]
  if not lost:
    lost = [f'the weights {path}' for path in uncovered(family.rows_of(m), shapes(m))[:1]]
  return written, lost


def _same(a, b) -> bool:
  return abs(a - b) <= 1e-9 * abs(b) if isinstance(a, float) and isinstance(b, float) else a == b


def shapes(m: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Our arrays by path, without the rows that only pad the vocabulary."""
  mesh = AbstractMesh((1,) * len(layout.AXES), layout.AXES, axis_types=(AxisType.Explicit,) * len(layout.AXES))
  with jax.sharding.use_abstract_mesh(mesh):
    leaves = jax.tree_util.tree_leaves_with_path(kinds.abstract_params(m))
  cut = lambda path, shape: (m.vocab or m.V, *shape[1:]) if path in VOCABULARY else shape
  return {path_of(p): cut(path_of(p), a.shape) for p, a in leaves}


def read(source, m: ModelConfig) -> Iterator[tuple[str, tuple, np.ndarray]]:
  """(path, index into it, float32 array) until all of our arrays are there, a foreign tensor at a time, and less where
  its layout is ours.

  source: path, names(), shape(name), blocks(name), family. UsageError for a tensor that is missing, of another shape, or
  unknown; nothing is read before all of them are known to be there.
  """
  ours, rows_of_it = shapes(m), source.family.rows_of(m)
  missing = uncovered(rows_of_it, ours)
  if missing:
    raise UsageError(f'{source.path}: this family has no tensor for {missing[0]}')
  everything = []
  for unit in units(rows_of_it, m, ours):  # a config can ask for more tensors than there is memory to list
    if (shape := source.shape(unit.theirs)) != unit.shape:
      raise UsageError(f'{source.path}: {unit.theirs} is {list(shape)}, where its config wants {list(unit.shape)}')
    everything.append(unit)
  unknown = sorted(source.names() - {u.theirs for u in everything})
  unknown = [name for name in unknown if not re.search(source.family.ignored, name)]
  if unknown:
    raise UsageError(f'{source.path}: holds {unknown[0]}, which this family has no use for by its config')
  for unit in everything:
    if unit.is_copy:
      for rows, block in source.blocks(unit.theirs):
        yield unit.parts[0].path, (*unit.parts[0].index, rows), block
    else:
      whole = np.empty(unit.shape, np.float32)
      for rows, block in source.blocks(unit.theirs):
        whole[rows] = block
      for part, array in zip(unit.parts, unit.to_ours(whole)):
        yield part.path, part.index, array


def write(model_type: str, m: ModelConfig, get) -> Iterator[tuple[str, np.ndarray]]:
  """(name, tensor) of a checkpoint of the family; get(path, index) → our float32 array there."""
  family = FAMILIES[model_type]
  for unit in units(family.rows_of(m), m, shapes(m)):
    pieces = []
    for part in unit.parts:
      array = get(part.path, part.index)
      pieces.append(array[:m.vocab or m.V] if part.path in VOCABULARY else array)
    yield family.stored(m, unit.theirs), unit.to_theirs(pieces)
