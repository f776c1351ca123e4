"""One declarative mapping between a family's tensors and ours; each direction is derived from the same rows.

A row says which of our arrays a foreign tensor holds, and in which layout:

    Row('model.layers.{n}.self_attn.q_proj.weight', {'layers/attention/q/w': 'DHK>(HK)D'})

Left of > are our letters (without the leading layer and expert), right theirs; brackets are axes they merge, () one of
size 1. Several of ours in one of theirs are concatenated along `join`, a letter of the first. A letter with ~ has its rotary
pairs side by side in theirs, in halves in ours. {n} is the layer, of the stack that the row's arrays are of (the encoder's
are encoder/layers/…), and {e} the expert: our arrays are stacked over both.
"""
import dataclasses
import math
import re
from collections.abc import Callable, Iterator

import numpy as np

from jaxlm.schema import ModelConfig, layer_kinds

STACK = re.compile(r'(encoder/)?layers/')  # of paths whose arrays are stacked over layers


@dataclasses.dataclass(frozen=True)
class Row:
  theirs: str
  ours: dict[str, str]
  join: str = ''
  when: str = ''    # only if this array of ours is there …
  unless: str = ''  # … and this one is not
  head: str = ''    # only of models whose model.head is one of these words; '': of all

  def there(self, shapes) -> bool:
    return all(p in shapes for p in self.ours) and (not self.when or self.when in shapes) and self.unless not in shapes


@dataclasses.dataclass(frozen=True)
class Family:
  """A family of models as Hugging Face names and stores them."""
  architecture: str          # the class that config.json names, unless one of the pieces says which
  rows: tuple[Row, ...]
  pieces: tuple              # of config.json (pieces.py)
  ignored: str = r'rotary_emb\.inv_freq$|lm_head\.weight$'  # names that may be there and say nothing new
  prefix: str = ''           # of most names, which a model without a head (model.head=none) is stored without
  renamed: tuple[tuple[str, str], ...] = ()  # (pattern, replacement) of names in older files
  settle: Callable = lambda config, names: config  # config.json and what only the names of the tensors say

  def rows_of(self, m: ModelConfig) -> tuple[Row, ...]:
    """The rows of a model with this head."""
    return tuple(row for row in self.rows if not row.head or m.head in row.head.split())

  def named(self, names: set[str]) -> dict[str, str]:
    """{a name in a file: the name in our rows}."""
    bare = self.prefix and not any(name.startswith(self.prefix) for name in names)
    out = {}
    for name in names:
      new = (self.prefix if bare else '') + name
      for pattern, replacement in self.renamed:
        new = re.sub(pattern, replacement, new)
      out[name] = new
    return out

  def stored(self, m: ModelConfig, name: str) -> str:
    """The name in a file of a name in our rows."""
    return name.removeprefix(self.prefix) if m.head == 'none' else name


@dataclasses.dataclass(frozen=True)
class Part:
  """One of our arrays in a unit: where it goes, and what it looks like there."""
  path: str
  index: tuple[int, ...]
  shape: tuple[int, ...]
  letters: str    # ours
  unmerged: str   # theirs, without brackets
  halves: str     # the letter whose pairs are interleaved in theirs, or ''


@dataclasses.dataclass(frozen=True)
class Unit:
  """A foreign tensor and the parts of ours that it holds."""
  theirs: str
  parts: tuple[Part, ...]
  groups: tuple[int, ...]  # how many unmerged axes each of their axes has
  axis: int                # along which unmerged axis the parts are concatenated
  rotary: int              # dims of a ~ axis that are: its last ones if at_end, else its first
  at_end: bool

  @property
  def shape(self) -> tuple[int, ...]:
    return self._merge(self._joined())

  @property
  def is_copy(self) -> bool:
    """Their tensor is one of our arrays as it is."""
    return len(self.parts) == 1 and self.parts[0].letters == self.parts[0].unmerged and len(self.groups) == len(
        self.parts[0].letters) and not self.parts[0].halves

  def _joined(self) -> tuple[int, ...]:
    sizes = [tuple(dict(zip(p.letters, p.shape))[d] for d in p.unmerged) for p in self.parts]
    return tuple(sum(s[a] for s in sizes) if a == self.axis else size for a, size in enumerate(sizes[0]))

  def _merge(self, sizes) -> tuple[int, ...]:
    sizes = iter(sizes)
    return tuple(math.prod(next(sizes) for _ in range(g)) for g in self.groups)

  def to_ours(self, tensor: np.ndarray) -> list[np.ndarray]:
    """Their tensor → the arrays of self.parts."""
    whole = tensor.reshape(self._joined())
    sizes = [dict(zip(p.letters, p.shape))[p.unmerged[self.axis]] for p in self.parts]
    pieces = np.split(whole, np.cumsum(sizes)[:-1], self.axis)
    return [np.transpose(self._pairs(piece, p, inverse=False), [p.unmerged.index(d) for d in p.letters])
            for piece, p in zip(pieces, self.parts)]

  def to_theirs(self, arrays: list[np.ndarray]) -> np.ndarray:
    """The inverse of to_ours."""
    pieces = [self._pairs(np.transpose(a, [p.letters.index(d) for d in p.unmerged]), p, inverse=True)
              for a, p in zip(arrays, self.parts)]
    return np.concatenate(pieces, self.axis).reshape(self.shape)

  def _pairs(self, a: np.ndarray, p: Part, inverse: bool) -> np.ndarray:
    if not p.halves:
      return a
    axis = p.unmerged.index(p.halves)
    size = a.shape[axis]
    low = size - self.rotary if self.at_end else 0
    pairs = low + np.arange(self.rotary).reshape(-1, 2).T.reshape(-1)  # 0 2 4 … 1 3 5 …
    order = np.concatenate([np.arange(low), pairs, np.arange(low + self.rotary, size)])
    return np.take(a, np.argsort(order) if inverse else order, axis)


def units(rows: tuple[Row, ...], cfg: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> Iterator[Unit]:
  """Every tensor of a checkpoint of `cfg`. `shapes`: of our arrays by path; a row whose arrays are not there is not
  there in the checkpoint either (a bias, an untied output matrix)."""
  stacks = {'': cfg, 'encoder/': dataclasses.replace(cfg, N=cfg.encoder_N)}
  rotary = cfg.mla.rope if cfg.mla.kv else int(cfg.K * cfg.rope.share)
  for row in rows:
    if not row.there(shapes):
      continue
    stack, feed = re.match(r'(encoder/|)(?:layers/(mlp|moe)/)?', next(iter(row.ours))).groups()
    layers = [n for n, (_, kind) in enumerate(layer_kinds(stacks[stack])) if feed in (None, kind)]
    for position, n in enumerate(layers if '{n}' in row.theirs else [0]):
      for e in range(cfg.moe.E if '{e}' in row.theirs else 1):
        index = (position,) * ('{n}' in row.theirs) + (e,) * ('{e}' in row.theirs)
        yield _unit(row, row.theirs.format(n=n, e=e), index, shapes, rotary, bool(cfg.mla.kv))


def _unit(row: Row, theirs: str, index, shapes, rotary: int, at_end: bool) -> Unit:
  parts, groups = [], None
  for path, spec in row.ours.items():
    letters, _, layout = spec.partition('>')
    halves = layout[layout.index('~') - 1] if '~' in layout else ''
    axes = re.findall(r'\((\w*)\)|(\w)', layout.replace('~', ''))
    groups = groups or tuple(len(a or b) for a, b in axes)
    parts.append(Part(path, index, shapes[path][len(index):], letters, ''.join(a or b for a, b in axes), halves))
  axis = parts[0].unmerged.index(row.join) if row.join else 0
  return Unit(theirs, tuple(parts), groups, axis, rotary, at_end)


def factors(unit: Unit, inputs: int, ranks: list[int]) -> tuple[Unit, Unit]:
  """The tensors [R, in] and [out, R] whose product is a change of low rank of this one, from pairs [in…, r] and [R, out…] of
  its parts: the parts' ranks (0: no pair) add up to R, and the B of each is 0 outside its own. ValueError if this tensor is no
  matrix from the `inputs` first axes of its parts to their others."""
  R, sides = sum(ranks), []
  for p in unit.parts:
    halves = p.unmerged[:unit.groups[0]], p.unmerged[unit.groups[0]:]
    ins, outs = (next((h for h in halves if set(h) == set(own)), '') for own in (p.letters[:inputs], p.letters[inputs:]))
    if len(unit.groups) != 2 or not ins or not outs or (len(unit.parts) > 1 and p.unmerged[unit.axis] not in outs):
      raise ValueError(f'{unit.theirs} is no matrix from {p.letters[:inputs]} to {p.letters[inputs:]}')
    sides.append((ins, outs))
  pick = lambda p, letters: p.halves if p.halves in letters else ''
  a = tuple(Part(f'{p.path}/a', p.index, (*p.shape[:inputs], r), p.letters[:inputs] + '_', '_' + ins, pick(p, ins))
            for p, r, (ins, _) in zip(unit.parts, ranks, sides) if r)
  b = tuple(Part(f'{p.path}/b', p.index, (R, *p.shape[inputs:]), '_' + p.letters[inputs:], outs + '_', pick(p, outs))
            for p, (_, outs) in zip(unit.parts, sides))
  module, (ins, outs) = unit.theirs.removesuffix('.weight'), sides[0]
  joined = outs.index(unit.parts[0].unmerged[unit.axis]) if len(unit.parts) > 1 else 0
  return (dataclasses.replace(unit, theirs=f'{module}.lora_A.weight', parts=a, groups=(1, len(ins)), axis=0),
          dataclasses.replace(unit, theirs=f'{module}.lora_B.weight', parts=b, groups=(len(outs), 1), axis=joined))


def uncovered(rows: tuple[Row, ...], shapes: dict) -> list[str]:
  """Paths of ours that no row holds: what a checkpoint of this family has no place for."""
  held = {path for row in rows if row.there(shapes) for path in row.ours}
  return sorted(set(shapes) - held)
