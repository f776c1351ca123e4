"""The command line: commands → one function each.

    jaxlm train     --config=FILE[:ARG] --workdir=DIR [--config.KEY=VALUE …]
    jaxlm eval      --workdir=DIR [--data=SOURCE --step=N --context=C --stride=S --batch=B --mesh=D,F,T --json=FILE]
    jaxlm generate  --workdir=DIR --prompt=TEXT [--max_length=100 --temperature=0.7 --seed=0 --json=FILE]
    jaxlm data      build | show | stats   --config=FILE --workdir=DIR [--step=N]
    jaxlm doctor

`jaxlm COMMAND --help` lists a command's flags. Exit codes are in errors.py.
"""
import json
import pathlib
import sys

from absl import flags, logging

from jaxlm import config as configs
from jaxlm.errors import JaxlmError, UsageError
from jaxlm.memory import restart_with_kept_memory
from jaxlm.signals import Signals


def _flag_values(command: str) -> flags.FlagValues:
  """The flags of a command, as a FlagValues of its own."""
  f = flags.FlagValues()
  if command != 'doctor':
    flags.DEFINE_string('workdir', None, 'the folder of the run', flag_values=f)
  if command in ('train', 'data'):
    flags.DEFINE_string('config', None, 'configs/FILE.py[:ARGUMENT]; --config.KEY=VALUE overrides', flag_values=f)
  if command in ('eval', 'generate', 'data'):
    flags.DEFINE_integer('step', None, 'the step (default: the newest checkpoint; data show: 0)', flag_values=f)
  if command in ('eval', 'generate'):
    flags.DEFINE_string('mesh', None, 'devices DATA,FSDP,TENSOR (default: the run\'s)', flag_values=f)
    flags.DEFINE_string('json', None, 'write the result to this file too', flag_values=f)
  if command == 'eval':
    flags.DEFINE_string('data', 'heldout', 'heldout, train, or a SOURCE as in data/sources.py', flag_values=f)
    flags.DEFINE_integer('context', None, 'tokens a window (default: the run\'s length)', flag_values=f)
    flags.DEFINE_integer('stride', None, 'tokens a window scores after the first (default: half of context)',
                         flag_values=f)
    flags.DEFINE_integer('batch', 16, 'rows at a time; changes speed only', flag_values=f)
    flags.DEFINE_bool('baselines', False, 'gzip -9, xz -9 and a byte 5-gram on the same bytes', flag_values=f)
  if command == 'generate':
    flags.DEFINE_multi_string('prompt', None, 'a text to go on from; may be given again', flag_values=f)
    flags.DEFINE_integer('max_length', 100, 'new tokens at most', flag_values=f)
    flags.DEFINE_float('temperature', 0.7, '0 is greedy', flag_values=f)
    flags.DEFINE_integer('seed', 0, 'of the sampling', flag_values=f)
  return f


def _parse(command: str, argv: list[str]):
  """(flags, config overrides, positional words). UsageError for what is not a flag of the command."""
  f, rest, overrides = _flag_values(command), [], []
  words = iter(argv)
  for word in words:
    if word.startswith('--config.'):
      key, equals, value = word.removeprefix('--config.').partition('=')
      overrides.append((key, value if equals else next(words, '')))
    else:
      rest.append(word)
  if '--help' in rest or '-h' in rest:
    print(__doc__ + '\n' + f.get_help())
    sys.exit(0)
  try:
    positional = f(['jaxlm', *rest])[1:]
  except flags.Error as e:
    raise UsageError(f'{command}: {str(e).splitlines()[0]}') from e
  if overrides and command not in ('train', 'data'):
    raise UsageError(f'{command}: --config.{overrides[0][0]} belongs to train; {command} uses the config of the run')
  for name in ('workdir', 'config', 'prompt'):
    if name in f and not f[name].value:
      raise UsageError(f'{command}: wants --{name}=…')
  return f, overrides, positional


def _train(f, overrides):
  config = configs.load(f.config, overrides)
  restart_with_kept_memory(configs.approximate_params(config.model))
  with Signals():  # so that a signal while jax is imported is no traceback either
    from jaxlm import train  # pylint: disable=g-import-not-at-top  # jax is imported once the config is good
    train.train(config, pathlib.Path(f.workdir))


def _load(f):
  mesh = None
  if f.mesh:
    parts = f.mesh.split(',')
    if len(parts) != 3 or not all(p.lstrip('-').isdigit() for p in parts):
      raise UsageError(f'--mesh={f.mesh}: wants three counts DATA,FSDP,TENSOR, as 1,-1,1')
    mesh = configs.MeshConfig(*map(int, parts))
  if not pathlib.Path(f.workdir).is_dir():
    raise UsageError(f'--workdir={f.workdir}: no such folder')
  restart_with_kept_memory()
  from jaxlm import lm  # pylint: disable=g-import-not-at-top
  return lm.load(f.workdir, f.step, mesh)


def _write_json(path: str, result: dict) -> None:
  pathlib.Path(path).write_text(json.dumps(result, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def _eval(f, overrides):
  lm = _load(f)
  from jaxlm import evaluate, report  # pylint: disable=g-import-not-at-top
  described, documents = evaluate.source_documents(f.data, lm.config)
  context = f.context if f.context is not None else lm.config.length
  stride = f.stride if f.stride is not None else max(1, context // 2)
  with report.progress('scoring', sum(len(text.encode()) for _, text in documents)) as tick:
    result = evaluate.evaluate(lm, documents, context, stride, f.batch, tick)
  if f.baselines:
    result.update(evaluate.baselines(documents, lm.config))
  report.print_eval(described, result)
  if f.json:
    _write_json(f.json, {**result, 'data': f.data})


def _generate(f, overrides):
  lm = _load(f)
  from jaxlm import report  # pylint: disable=g-import-not-at-top
  texts = lm.generate(f.prompt, f.max_length, f.temperature, f.seed)
  for prompt, text in zip(f.prompt, texts):
    report.print_sample(prompt, text)
  if f.json:
    _write_json(f.json, {'prompts': f.prompt, 'texts': texts, 'step': lm.step, 'seed': f.seed,
                         'temperature': f.temperature})


def _data(f, overrides, what):
  config = configs.load(f.config, overrides)
  from jaxlm.data import inspect  # pylint: disable=g-import-not-at-top
  inspect.COMMANDS[what](config, pathlib.Path(f.workdir), f.step or 0)


def _doctor(f, overrides):
  from jaxlm import report  # pylint: disable=g-import-not-at-top
  report.doctor()


COMMANDS = {'train': _train, 'eval': _eval, 'generate': _generate, 'data': _data, 'doctor': _doctor}
DATA_WORDS = ('build', 'show', 'stats')


def run(argv: list[str]) -> None:
  """Runs `argv`, without the program's name. Raises JaxlmError."""
  command, rest = (argv[0], argv[1:]) if argv else ('', [])
  if command in ('--help', '-h', 'help'):
    print(__doc__)
    return
  if command not in COMMANDS:
    raise UsageError(f'{command or "no command"!r}: wants one of {", ".join(COMMANDS)}; see jaxlm --help')
  f, overrides, words = _parse(command, rest)
  if command == 'data':
    if len(words) != 1 or words[0] not in DATA_WORDS:
      raise UsageError(f'data {" ".join(words)}: wants one of {", ".join(DATA_WORDS)}')
  elif words:
    raise UsageError(f'{command}: {words[0]!r} is no flag; flags are --name=value')
  COMMANDS[command](f, overrides, *words)


def main() -> None:
  """Runs the command line and exits with the code of errors.py."""
  logging.set_verbosity(logging.FATAL)  # what Orbax logs of an error is in the exception too
  try:
    run(sys.argv[1:])
  except JaxlmError as e:
    print(f'jaxlm: {e}', file=sys.stderr)
    sys.exit(e.code)
  except KeyboardInterrupt:
    print('jaxlm: interrupted', file=sys.stderr)
    sys.exit(130)
