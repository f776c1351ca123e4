"""Config: ml_collections files and command-line overrides → the dataclasses of schema.py, checked once.

A config file (`configs/*.py`) has `get_config()` that returns a ConfigDict stating only what differs from the
defaults. Nothing here imports jax: a bad config is refused before any device is touched.
"""
import ast
import dataclasses
import difflib
import importlib.util
import inspect
import json
import os
import pathlib
import re
import sys
import traceback
import typing

from ml_collections import ConfigDict

from jaxlm.errors import UsageError
from jaxlm.plan import cloud
from jaxlm.schema import FREE, RUN_DATA, TRAINING, Config, TaskConfig, flatten, means, task_keys
from jaxlm.validate import validate

_DEFAULTS = flatten(Config())
_TASK = flatten(task_keys(TaskConfig('')))  # the keys of a task, after tasks.NAME.


def _build(kind: type, values: dict, prefix: str = ''):
  """{'model.D': 512, …}, with every key → the dataclass."""
  nested = {f.name: f.type for f in dataclasses.fields(kind) if dataclasses.is_dataclass(f.type)}
  return kind(**{f.name: _build(nested[f.name], values, f'{prefix}{f.name}.') if f.name in nested
                 else values[prefix + f.name] for f in dataclasses.fields(kind) if prefix + f.name != 'tasks'})


def _tasks(values: dict) -> tuple[TaskConfig, ...]:
  """The tasks of a config, sorted by name: an order that no file changes."""
  stated: dict[str, dict] = {}
  for key in values:
    if key.startswith('tasks.'):
      _, name, rest = key.split('.', 2)
      stated.setdefault(name, {})[rest] = values[key]
  tasks = []
  for name, own in sorted(stated.items()):
    run = {k: values[k] for k in _TASK if k in values} | {'prefix': values['data.prefix']}
    own = {**_TASK, **run, **own}
    own['data.prefix'] = own['prefix']
    parts = {part: _build(kind, {**_DEFAULTS, **own}, f'{part}.') for part, kind in _SECTIONS.items()}
    tasks.append(TaskConfig(name, own['weight'], own['metrics'], **parts))
  return tuple(tasks)


_SECTIONS = {f.name: f.type for f in dataclasses.fields(TaskConfig) if dataclasses.is_dataclass(f.type)}


def _default(key: str):
  """The default of a key, which may be of a task; None if there is no such key."""
  if not key.startswith('tasks.'):
    return _DEFAULTS.get(key)
  return _TASK.get(key.split('.', 2)[-1]) if key.count('.') > 1 else None


def from_flat(values: dict) -> Config:
  """{'model.D': 512, …} over the defaults → a Config that is checked. Raises UsageError in one line."""
  merged = dict(_DEFAULTS)
  for key, value in values.items():
    if _default(key) is None:
      raise UsageError(f'config has no key {key!r} (value {value!r}){nearest(key)}')
    merged[key] = _convert(key, value, type(_default(key)))
  config = dataclasses.replace(_build(Config, merged), tasks=_tasks(merged))
  validate(config)
  return config


def nearest(key: str) -> str:
  """'; did you mean …?' with the known keys most like `key`, or all of its section."""
  keys, task = _DEFAULTS, ''
  if key.startswith('tasks.'):
    if key.count('.') == 1:
      return '; keys of tasks are tasks.NAME.weight, .prefix, .metrics, .objective.KEY and .data.KEY'
    _, name, key = key.split('.', 2)
    keys, task = _TASK, f'tasks.{name}.'
    if key in [f'data.{shared}' for shared in RUN_DATA]:
      return f'; all tasks share {key}'
  leaf = key.split('.')[-1]
  near = [k for k in keys if k.split('.')[-1].lower() == leaf.lower()]
  near = near or difflib.get_close_matches(key, keys, n=3, cutoff=0.75)
  if not near:
    leaves = difflib.get_close_matches(leaf, [k.split('.')[-1] for k in keys], n=2, cutoff=0.6)
    near = [k for k in keys if k.split('.')[-1] in leaves]
  if near:
    return f'; did you mean {" or ".join(task + k for k in near[:3])}?'
  section = key.rpartition('.')[0]
  known = [k for k in keys if section and k.startswith(section + '.')] or [k for k in keys if '.' not in k]
  return f'; there are {", ".join(task + k for k in known)}'


def _convert(key: str, value, kind: type):
  """`value` as `kind` where nothing is lost (an int is a float; a text is only itself), else UsageError."""
  if kind is float and type(value) is int and abs(value) <= 2 ** 53:
    return float(value)
  if type(value) is kind:
    return value
  raise UsageError(f'{key} wants {_KIND[kind]}, not {value!r} ({type(value).__name__})')


_KIND = {int: 'an integer, as 12', float: 'a number, as 0.1', bool: 'true or false', str: 'a text'}


def _parse(key: str, text: str):
  """An override's text as a value of the key's type; what cannot be one is left for _convert to refuse."""
  kind = type(_default(key))
  if kind is str:
    return text
  if kind is bool and text.lower() in ('true', 'false', '1', '0'):
    return text.lower() in ('true', '1')
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def shipped() -> pathlib.Path:
  """The folder of the configs that come with this code: in an installed package within it, in a checkout beside it."""
  package = pathlib.Path(__file__).absolute().parent
  return next(folder for folder in (package / 'configs', package.parent / 'configs') if folder.is_dir())


def load(path: str, overrides: typing.Sequence[tuple[str, str]] = ()) -> Config:
  """The Config of `path` ('configs/x.py', 'configs/x.py:argument', or a run's config.json), with overrides. 'configs/x.py@TOPOLOGY' is
  as configs/pods.json recommends for that pod, by our name or a cloud's (v5p:4x4x8 or v5p-256).

  A config file is Python code and runs as such: treat it as you treat a script.
  """
  asked = re.fullmatch(r'(.*\.py(?::[^@/]*)?)@([^@/]*)', path)
  path, topology = asked.groups() if asked else (path, '')
  if path.endswith('.json'):
    return _overridden(_read_json(path), overrides)
  return _overridden(_read_file(path) | (_recommended(path, topology) if topology else {}), overrides)


def _read_file(path: str) -> dict:
  """The keys that 'FILE.py' or 'FILE.py:ARGUMENT' states. UsageError, in one line, whatever is wrong with it."""
  file, _ = _split(path)
  if not pathlib.Path(file).is_file():
    near = difflib.get_close_matches(pathlib.Path(file).name, [p.name for p in shipped().glob('*.py')], n=2)
    near = [os.path.relpath(shipped() / name) for name in near]
    raise UsageError(f'--config={path}: no such file{"; did you mean " + " or ".join(near) + "?" if near else ""}')
  spec = importlib.util.spec_from_file_location('jaxlm_config_file', file)
  module = importlib.util.module_from_spec(spec)
  folder, before = str(pathlib.Path(file).absolute().parent), set(sys.modules)
  sys.path.append(folder)  # the file may import what is beside it; last, or a config that is named as a module of Python's would hide it
  try:
    return _stated(path, spec, module)
  finally:
    sys.path.remove(folder)
    for name in set(sys.modules) - before:  # beside a file of another folder, the same name is another module
      if os.path.dirname(getattr(sys.modules[name], '__file__', None) or '') == folder:
        del sys.modules[name]


def _stated(path: str, spec, module) -> dict:
  """The keys that get_config() of a config file returns."""
  file, argument = _split(path)
  _run(path, spec.loader.exec_module, module)
  get_config = getattr(module, 'get_config', None)
  if not callable(get_config):
    raise UsageError(f'--config={path}: the file has no get_config()')
  arguments = [argument] if argument else []
  try:
    inspect.signature(get_config).bind(*arguments)
  except TypeError as e:
    mend = f'takes no argument; leave :{argument} out' if argument else f'wants an argument, {file}:ARGUMENT'
    raise UsageError(f'--config={path}: its get_config() {mend}') from e
  config = _run(path, get_config, *arguments)
  if not isinstance(config, (dict, ConfigDict)):
    raise UsageError(f'--config={path}: its get_config() returns a {type(config).__name__}; it wants a ConfigDict')
  try:
    return flatten(config)
  except TypeError as e:
    raise UsageError(f'--config={path}: its get_config() returns keys that are no texts ({e})') from e


def _split(path: str) -> tuple[str, str]:
  """'FILE.py:ARGUMENT' → (FILE.py, ARGUMENT), or '' where there is none."""
  found = re.fullmatch(r'(.*?\.py)(?::(.*))?', path)
  return (found[1], found[2] or '') if found else (path, '')


def _run(path: str, function, *arguments):
  """function(*arguments), which is of a config file: what it raises is a UsageError that says what, and in which line."""
  try:
    return function(*arguments)
  except Exception as e:  # pylint: disable=broad-except  # the file is the user's own code
    file, argument = _split(path)
    if isinstance(e, KeyError) and e.args == (argument,):
      raise UsageError(f'--config={path}: the file knows no {argument!r}; its first lines say what it knows') from e
    own = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(pathlib.Path(file).absolute())]
    where = f'line {own[-1]} of the file' if own else 'the file'  # a SyntaxError says it itself
    raise UsageError(f'--config={path}: {where} raises {type(e).__name__}: {(str(e).splitlines() or [""])[0]}') from e


def _recommended(path: str, topology: str) -> dict:
  """The keys that a pod wants of a config, which `make recommend` wrote beside it."""
  file, argument = _split(path)
  beside = pathlib.Path(file).parent / 'pods.json'
  known = json.loads(beside.read_text(encoding='utf-8')) if beside.is_file() else {}
  pods = known.get(pathlib.Path(file).name + (f':{argument}' if argument else ''), {})
  pod = cloud.ours(topology, f'--config={path}@{topology}')
  found = pods.get(pod, f'nothing is recommended for it; there is {", ".join(pods) or "nothing for this config"}; see jaxlm plan')
  if isinstance(found, str):
    raise UsageError(f'--config={path}@{topology}: {found}')
  return found


def split_overrides(argv: typing.Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
  """A command's words → (those that are not of the config, (key, text) of each --config.KEY=VALUE or --config.KEY VALUE)."""
  rest, overrides, words = [], [], iter(argv)
  for word in words:
    if word.startswith('--config.'):
      key, equals, value = word.removeprefix('--config.').partition('=')
      overrides.append((key, value if equals else next(words, '')))
    else:
      rest.append(word)
  return rest, overrides


def _overridden(values: dict, overrides: typing.Sequence[tuple[str, str]]) -> Config:
  """from_flat with overrides. They make no new task where there are some: it would be one that is misspelt."""
  names = list(dict.fromkeys(k.split('.')[1] for k in values if k.startswith('tasks.')))
  for key, _ in overrides if names else ():
    name = key.split('.')[1] if key.startswith('tasks.') else names[0]
    if name not in names:
      near = difflib.get_close_matches(name, names, n=1)
      mend = f'did you mean {key.replace(name, near[0], 1)}?' if near else f'there are {", ".join(names)}'
      raise UsageError(f'{key}: the config has no task {name!r}; {mend}')
  return from_flat({**values, **parsed(overrides)})


def parsed(overrides: typing.Sequence[tuple[str, str]]) -> dict:
  """('optimizer.lr', '3e-4') pairs → {'optimizer.lr': 3e-4}."""
  return {key: _parse(key, text) for key, text in overrides}


def of_run(workdir: pathlib.Path) -> str:
  """The path of a run's config: its config.json, or where only checkpoints are left, what the newest says of itself; '' if there is none."""
  steps = sorted((int(path.parent.name), path) for path in (workdir / 'checkpoints').glob('*/run.json') if path.parent.name.isdecimal())
  found = [workdir / 'config.json', *(path for _, path in steps[-1:])]
  return next((str(path) for path in found if path.is_file()), '')


def _read_json(path: str) -> dict:
  try:
    values = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
    return flatten(values['config'] if pathlib.Path(path).name == 'run.json' else values)  # run.json: of a checkpoint
  except (OSError, ValueError, AttributeError, KeyError, RecursionError) as e:
    raise UsageError(f'--config={path}: is no config.json of a run ({e})') from e


def to_json(config: Config) -> str:
  """As a config file would have it: of a task's objective and data, what differs from the run's."""
  run = flatten(config)
  tasks = {}
  for task in config.tasks:
    keys = task_keys(task)
    for section in _SECTIONS:
      keys[section] = {k: v for k, v in keys[section].items() if v != run[f'{section}.{k}']}
    tasks[task.name] = keys
  return json.dumps({**dataclasses.asdict(config), 'tasks': tasks}, indent=1, ensure_ascii=False)


def from_json(text: str) -> Config:
  return from_flat(flatten(json.loads(text)))


def summary(config: Config) -> str:
  """What differs from the defaults, a line a section."""
  flat, rows = flatten(config), {}
  run = {**flat, 'prefix': flat['data.prefix'], 'metrics': ''}
  expected = lambda k: run.get(k.split('.', 2)[-1]) if k.startswith('tasks.') else _DEFAULTS[k]  # of a task: the run's own
  for key, value in flat.items():
    if value == expected(key):
      continue
    section, _, leaf = key.rpartition('.')
    shown = value.replace('\n', '\\n') if isinstance(value, str) else value
    rows.setdefault(section or 'run', []).append(f'{leaf}={shown}')
  return '\n'.join(f'  {section:<10} {" ".join(parts)}' for section, parts in rows.items())


def check_fields(names: typing.Sequence[str], config: Config) -> None:
  """UsageError for a name of --allow_change that is no field of the config, nor `data` nor `tasks`."""
  for name in names:
    if name not in ('data', 'tasks') and name not in flatten(config):
      raise UsageError(f'--allow_change={name}: the config has no such field{nearest(name)}')


def refuse_other_model(saved: Config, config: Config, allow: tuple[str, ...] = ()) -> None:
  """refuse_change for imported parameters: the run around them, and how the model trains, is new."""
  old, new = flatten(saved), flatten(config)
  kept = {k: old[k] for k in old if k.startswith('model.') and not TRAINING.match(k)}
  refuse_change(from_flat({**new, **kept}), config, allow)


def refuse_change(saved: Config, config: Config, allow: tuple[str, ...] = ()) -> None:
  """UsageError naming the first field in which a checkpoint's config differs, unless the field is free, or one of `allow`."""
  names = [', '.join(t.name for t in c.tasks) or 'none' for c in (saved, config)]
  if names[0] != names[1] and 'tasks' not in allow:
    raise UsageError(f'the checkpoint is of another run: its tasks were {names[0]} and are now {names[1]}; set them so to go '
                     'on, another --workdir to start anew, or --allow_change=tasks to go on with these')
  old, new = flatten(saved), flatten(config)
  for key in (key for key in old if key in new):  # where keys differ, tasks do
    if old[key] != new[key] and not FREE.match(key) and key not in allow:
      _refuse(key, old[key], new[key], f'--config.{key}={old[key]}')
  old, new = means(saved), means(config)
  for key in old:
    if key in new and old[key] != new[key] and key not in allow:
      unused = key == 'model.pipeline.pieces' and config.mesh.stage == 1
      mend = f'--config.mesh.stage={saved.mesh.stage}' if unused else f'--config.{key}={old[key]}'
      _refuse(key, old[key], new[key], mend, ', and losses of this run depend on how a batch is cut')


def _refuse(key: str, old, new, mend: str, why: str = ''):
  raise UsageError(f'the checkpoint is of another run: {key} was {old!r} and is now {new!r}{why}; set {mend} to go on, another --workdir '
                   f'to start anew, or --allow_change={key} to go on with it changed')
