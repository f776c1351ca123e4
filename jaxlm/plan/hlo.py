"""What a scheduled program of the TPU or GPU compiler says of itself: cycles, collectives, kernels, each as often as it runs.

The text is that of `compiled.as_text()`. The compiler estimates cycles for its fusions and copies (TPU only), not for kernels
written by hand nor for collectives; it counts the body of a loop once, so trip counts are read from the loops' conditions.

An asynchronous collective takes one of three forms. XLA's own is a pair such as all-gather-start and all-gather-done. TPU v5e
continues a collective inside the matrix products that it runs beside ("continuation fusion"): fusions named async-collective-start
and -done. Later TPUs hand it to their SparseCores: a custom call on the thread "sparsecore", named after the collective.
"""
import dataclasses
import math
import re

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all', 'collective-permute')
_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'f8e4m3fn': 1, 'f8e5m2': 1, 's16': 2, 'u16': 2, 'f16': 2, 'bf16': 2, 's32': 4, 'u32': 4, 'f32': 4,
          's64': 8, 'u64': 8, 'f64': 8}
_START, _DONE = 'async-collective-start', 'async-collective-done'  # of continuation fusions, by name
_SPARSE = re.compile(rf'(?P<kind>{"|".join(COLLECTIVES)})[.\w-]*\.call-')  # of SparseCore calls, by name
_LINE = re.compile(r'\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[a-z][\w-]*)\(')
_HEAD = re.compile(r'(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$')


@dataclasses.dataclass(frozen=True)
class Op:
  """An instruction: how often it runs in a step, and what the compiler says of one time."""
  name: str
  kind: str      # the operation; of an asynchronous one without -start
  times: int
  cycles: int    # estimated by the compiler; 0 where it says nothing
  bytes: int     # of its result; of a reduce-scatter in a fusion, of the whole that goes in
  is_async: bool
  where: str     # op_name of the jaxpr, '' if unknown
  waits_for: str = ''  # of kind 'done': the name of the asynchronous operation that must have ended here


def read(text: str) -> list[Op]:
  """All operations that the entry runs, in the order of the schedule, through loops, calls and branches (of which all are counted).
  ValueError if a loop's count cannot be found."""
  bodies = _computations(text)
  entry = next(m['name'] for m in re.finditer(r'^ENTRY %?(?P<name>[\w.-]+)', text, re.M))
  out: list[Op] = []
  _walk(bodies, entry, 1, out)
  return out


def seconds(ops: list[Op], hertz: float) -> float:
  """Of the compiler's estimate at this clock rate."""
  return sum(op.times * op.cycles for op in ops) / hertz


def collectives(ops: list[Op]) -> list[Op]:
  return [op for op in ops if op.kind in COLLECTIVES]


def kernels(ops: list[Op]) -> list[Op]:
  """Calls of kernels that were written by hand (Pallas, cuDNN), whose time the compiler does not estimate."""
  return [op for op in ops if op.kind == 'custom-call' and not op.cycles]


def _computations(text: str) -> dict[str, list[str]]:
  """name → its lines. Kernels write metadata of several lines: a computation ends at a line that is exactly }, or
  names the thread that runs it after that."""
  found, current = {}, None
  for line in text.splitlines():
    if current is None:
      head = _HEAD.match(line)
      if head:
        current = found.setdefault(head['name'], [])
    elif line == '}' or line.startswith('}, execution_thread='):
      current = None
    else:
      current.append(line)
  return found


def _walk(bodies, name: str, times: int, out: list[Op]) -> None:
  for line in bodies[name]:
    m = _LINE.match(line)
    if not m:
      continue
    kind = m['op']
    called = lambda key, line=line: re.findall(rf'\b{key}=%?([\w.-]+)', line)
    if kind == 'while':
      _walk(bodies, called('body')[0], times * _trips(bodies, called('condition')[0], bodies[name], line), out)
    elif kind == 'conditional':
      for inner in re.findall(r'%([\w.-]+)', re.search(r'branch_computations=\{(.*?)\}', line)[1]):
        _walk(bodies, inner, times, out)
    elif kind in ('call', 'async-start'):
      begun = len(out)
      for inner in called('to_apply') + called('calls'):
        _walk(bodies, inner, times, out)
      if kind == 'async-start':
        out[begun:] = [dataclasses.replace(op, name=m['name'], is_async=True) for op in out[begun:] if op.kind in COLLECTIVES]
    elif kind not in ('parameter', 'get-tuple-element', 'tuple', 'bitcast', 'constant'):
      out += _ops(bodies, m['name'], kind, m['shape'], line, times, called('calls'))


def _ops(bodies, name: str, kind: str, shape: str, line: str, times: int, called: list[str]) -> list[Op]:
  """What an instruction counts as: itself, and the collectives in it if it is a fusion."""
  cycles = re.search(r'"estimated_cycles":"(\d{1,18})"', line)  # 2⁶³ − 1: it does not know
  cycles = int(cycles[1]) if cycles else 0
  where = re.search(r'op_name="([^"]*)"', line)
  where = where[1] if where else ''
  sparse = _SPARSE.match(name)
  if sparse and kind in ('call-start', 'custom-call-update'):  # libtpu 0.0.42, 0.0.52: its operands are there
    return [Op(name, sparse['kind'], times, 0, _largest(shape), True, where)]
  if kind.endswith('-done'):
    return [Op(name, 'done', times, cycles, 0, False, where, re.search(r'-done\([^%]*%?([\w.-]+)', line)[1])]
  if kind == 'fusion' and name.startswith(_DONE):
    return [Op(name, 'done', times, cycles, 0, False, where, name.replace(_DONE, _START))]
  plain = kind.removesuffix('-start')
  itself = Op(name, plain, times, cycles, _size(shape, plain != kind), plain != kind, where)
  inner = _fused(bodies, called) if kind == 'fusion' else []
  return [Op(name, inside, times, 0, size, name.startswith(_START), where) for inside, size in inner] + [itself]


def _fused(bodies, names: list[str]) -> list[tuple[str, int]]:
  """Kind and bytes of the collectives in a fusion. A reduce-scatter is one in the TPU compiler's words: a sum, and a piece of it. Of a
  gather that is continued in matrix products only the start counts."""
  if any(name.startswith('async_collective_fusion') for name in names):
    return []
  found = [(name, m) for name in names for m in map(_LINE.match, bodies.get(name, ())) if m and m['op'] in COLLECTIVES]
  scatters = lambda name, m: m['op'] == 'all-reduce' and 'scatter' in name
  return [('reduce-scatter' if scatters(name, m) else m['op'], _size(m['shape'], False)) for name, m in found]


def _trips(bodies, condition: str, around: list[str], line: str) -> int:
  """Of the loop in a line of `around`. Its counter goes up by 1 to a limit: from 0, or from 1 where the first turn was peeled off."""
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
  if known:
    return int(known[1])
  limits = re.findall(r'= [su]32\[\]\S* constant\((\d+)\)', '\n'.join(bodies[condition]))
  if len(limits) != 1:
    raise ValueError(f'the loop with condition {condition} does not say how often it runs')
  counter = re.search(r'get-tuple-element\([^)]*\), index=(\d+)', '\n'.join(bodies[condition]))
  made = {m[1]: (m[2], re.findall(r'%?([\w.-]+)', re.sub(r'/\*.*?\*/', '', m[3])))
          for m in (re.match(r'\s+(?:ROOT )?%?([\w.-]+) = .*? ([a-z][\w-]*)\((.*?)\)', line) for line in around) if m}
  kind, inputs = made[re.search(r' while\(%?([\w.-]+)\)', line)[1]]
  if kind == 'tuple' and counter:
    kind, inputs = made[inputs[int(counter[1])]]
    while kind in ('copy', 'copy-start', 'copy-done', 'bitcast'):
      kind, inputs = made[inputs[0]]
  if kind != 'constant':
    raise ValueError(f'the loop with condition {condition} does not say where it starts')
  return int(limits[0]) - int(inputs[0])


def _size(shape: str, started: bool) -> int:
  """Bytes; of a started operation, whose shape is (operands, results, …), those of the largest array."""
  arrays = _arrays(shape)
  return (max if started else sum)(arrays) if arrays else 0


def _largest(shape: str) -> int:
  """Bytes of the operands or of the results of a SparseCore call, ((operands), results, …), whichever are more."""
  operands, results, *_ = shape.removeprefix('((').split('), ')
  return max(sum(_arrays(operands)), sum(_arrays(results if results.startswith('(') else results.split(', (')[0])))


def _arrays(shape: str) -> list[int]:
  """Bytes of each array that a shape names."""
  return [math.prod(map(int, filter(None, dims.split(',')))) * _BYTES.get(kind, 0)
          for kind, dims in re.findall(r'(\w+)\[([\d,]*)\]', shape)]
