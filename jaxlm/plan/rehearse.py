"""Everything of a run on a pod that can be tried before the pod is there: launch/rehearse.sh is this module.

    config    is read and checked
    mesh      has as many devices as the pod has chips; the step of the whole model is traced on it, at its real sizes
    data      is read, if it is on this machine; the tokenizer's tokens fit the vocabulary
    train     `jaxlm train` in a process of its own, on CPU devices: the run that shrink.py made is born on its mesh, and saved
    restore   a new process goes on from the first step that was saved: its steps are those of the unbroken run, bit for bit

Each is a line. The first that fails ends the rehearsal, with its exit code.
"""
import contextlib
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

from absl import flags

from jaxlm import config as configs
from jaxlm.data import examples, tokenizer as tokenizers
from jaxlm.errors import JaxlmError, StorageError, UsageError
from jaxlm.metrics import say
from jaxlm.plan import sample, shrink
from jaxlm.plan.cost import approximate_params
from jaxlm.plan.topology import parse
from jaxlm.schema import Config, of_task
from jaxlm.validate import check_mesh, filled

GIB = 2 ** 30
TIMES = ('step_seconds', 'tokens_per_second', 'model_flops_per_second')  # of metrics.jsonl: all else is the same in the same run


class Failed(JaxlmError):
  """A process of the rehearsal ended with this code."""

  def __init__(self, text: str, code: int):
    super().__init__(text)
    self.code = code


def rehearse(path: str, overrides, topology: str, folder: pathlib.Path, devices: int = 0) -> None:
  """All phases of the run `path` with overrides on a pod of this topology; what is written goes to `folder`, which must be empty.
  devices: on this machine, at most; 0: see shrink.fewer. Raises the JaxlmError of the phase that failed."""
  chips = parse(topology).devices
  with _phase('config') as tell:
    config = configs.load(path, overrides)
    if config.model.kind == 'ngram':
      raise UsageError('model.kind=ngram: is counted on one host, no mesh is there to rehearse; run jaxlm train')
    tell(f'{path}: about {_short(approximate_params(config.model))} parameters, {config.batch} × {config.length} tokens a step')
  with _phase('mesh') as tell:
    sizes = filled(config.mesh, chips)
    check_mesh(config, sizes)
    mesh = shrink.fewer(sizes, devices)
    tell(f'{topology} is {_axes(sizes)}: state {_trace(config, sizes) / GIB:.2f} GiB a chip')
  with _phase('data') as tell:
    unread = _check_tokens(config)
    small, made_up = sample.take(shrink.shrunk(config, mesh), config, folder)
    tell('; '.join([*made_up, *unread]) or f'at most {sample.RECORDS} records of it')
    (folder / 'config.json').write_text(configs.to_json(small), encoding='utf-8')
  whole, resumed = folder / 'unbroken', folder / 'resumed'
  with _phase('train') as tell:
    _train(folder, whole, math.prod(mesh.values()), 'train')
    lines = _metrics(whole)
    losses = [line['loss'] for line in lines if 'loss' in line]
    if not losses[0]:
      raise JaxlmError(f'train: the loss is 0: nothing in the records counts as a target; see {folder} and data.form, data.template, '
                       'data.target')
    tell(f'D={small.model.D}, N={small.model.N}, {small.batch} × {small.length} tokens on {_axes(mesh)}: {len(losses)} steps, '
         f'loss {losses[0]:.4f} to {losses[-1]:.4f}, saved')
  with _phase('restore') as tell:
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns('compile_cache'))
    for step in range(2, small.steps + 1):  # as if the run had ended after its first step
      shutil.rmtree(resumed / 'checkpoints' / str(step))
    _train(folder, resumed, math.prod(mesh.values()), 'restore')
    tell(compare(lines, _metrics(resumed)))


@contextlib.contextmanager
def _phase(name: str):
  """Says how it ended, after how long, and what `tell` was given."""
  start, said, ended = time.monotonic(), [], 'failed'
  try:
    yield said.append
    ended = 'OK'
  finally:
    say(f'{name:<8} {ended:<6} {time.monotonic() - start:6.1f} s  {" ".join(said)}'.rstrip())


def _short(count: float) -> str:
  unit, name = next((u, n) for u, n in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k'), (1, '')) if count >= u or u == 1)
  return f'{count / unit:.3g}{name}'


def _axes(sizes: dict[str, int]) -> str:
  chips = math.prod(sizes.values())
  used = [f'{axis} {size}' for axis, size in sizes.items() if size > 1]
  return ' × '.join(used) + (f' = {chips}' if len(used) > 1 else '') if used else 'one device'


def _trace(config: Config, sizes: dict[str, int]) -> int:
  """Traces the step on a mesh of these sizes, of which there need be no device → bytes of the state on one of them."""
  import jax  # pylint: disable=g-import-not-at-top  # once the config is good
  from jaxlm import layout
  from jaxlm.optimizer import make_optimizer
  from jaxlm.step import abstract_state, make_step
  from jaxlm.train import abstract_batch
  types = (jax.sharding.AxisType.Explicit,) * len(layout.AXES)
  mesh = jax.sharding.AbstractMesh(tuple(sizes[axis] for axis in layout.AXES), layout.AXES, axis_types=types)
  with jax.sharding.use_abstract_mesh(mesh):
    tx, schedule = make_optimizer(config.optimizer, config.steps)
    state = layout.named(abstract_state(config, tx), mesh)
    jax.eval_shape(make_step(config, tx, schedule), state, abstract_batch(config, mesh))
  return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(state))


def _check_tokens(config: Config) -> list[str]:
  """What cannot be checked here, in words. UsageError if the vocabulary has no row for a token of the whole run's tokenizer."""
  spec, said = config.data.tokenizer, []
  if config.start.checkpoint:
    said.append(f'start.checkpoint={config.start.checkpoint} is not read, parameters are fresh')
  if needed := shrink.most_tokens(config):
    for key in ('V', 'vocab'):
      if 0 < getattr(config.model, key) < needed:
        raise UsageError(f'model.{key}={getattr(config.model, key)}: data.tokenizer={spec} comes to {needed} tokens, with those that '
                         f'the objective puts in; set at least {needed}')
  elif pathlib.Path(spec).is_file():
    tokenizer = tokenizers.make(spec, iter(()))
    for run in [of_task(config, task) for task in config.tasks] or [config]:
      examples.check(run, tokenizer)
    for key in ('stop', 'never', 'start'):
      tokenizer.ids_of(getattr(config.data, key).split(), f'data.{key}')
  else:
    said.append(f'data.tokenizer={spec} is not read, bytes stand in')
  return said


def _train(folder: pathlib.Path, workdir: pathlib.Path, devices: int, name: str) -> None:
  """`jaxlm train` on so many CPU devices, as a person would launch it. Failed with its exit code, and why it says it ended."""
  words = [sys.executable, '-m', 'jaxlm', 'train', f'--config={folder / "config.json"}', f'--workdir={workdir}',
           f'--config.compile_cache={folder / "compile_cache"}']
  on_cpu = {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices)}
  log = folder / f'{name}.log'
  with open(log, 'w', encoding='utf-8') as out:
    print(*(f'{key}={value}' for key, value in on_cpu.items()), *words, file=out, flush=True)
    code = subprocess.run(words, env={**os.environ, **on_cpu}, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
  if code:
    lines = log.read_text(encoding='utf-8', errors='replace').splitlines()
    reason = next((line for line in lines if re.match(r'jaxlm: |F\d{4} ', line)), lines[-1]).removeprefix('jaxlm: ')
    raise Failed(f'{name}: {reason} (exit code {code}; {log} has all of it)', code if code > 0 else 128 - code)


def _metrics(workdir: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]


def compare(unbroken: list[dict], resumed: list[dict]) -> str:
  """Lines of metrics.jsonl of a run, and of the same run that went on from its first step. JaxlmError if it did not, or what came
  after is not the same; else what was the same, in words."""
  if resumed[:1] != unbroken[:1]:  # that line has times too, which no second run of the step would have
    raise JaxlmError('restore: the new process did not go on from step 1, it began anew')
  of = lambda lines: {(line['step'], key): repr(value) for line in lines for key, value in line.items() if key not in TIMES}
  first, second = of(unbroken), of(resumed)
  differ = [at for at in {**first, **second} if first.get(at) != second.get(at)]
  if differ:
    step, key = differ[0]
    raise JaxlmError(f'restore: {key} of step {step} was {first.get(differ[0])}, and is {second.get(differ[0])} in a new process that '
                     'went on from step 1')
  return f'a new process went on from step 1: steps 2 to {resumed[-1]["step"]} as in the unbroken run, bit for bit'


def _folder(workdir: str | None) -> pathlib.Path:
  """A new folder, which no run is in. StorageError if it cannot be made."""
  try:
    if workdir:
      pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
    return pathlib.Path(tempfile.mkdtemp(prefix='rehearsal-', dir=workdir)).absolute()
  except OSError as e:
    raise StorageError(f'--workdir={workdir}: cannot be written ({e.strerror}); choose another') from e


def run(argv: list[str]) -> None:
  """Rehearses what `argv` asks for. Raises JaxlmError."""
  f = flags.FlagValues()
  flags.DEFINE_string('topology', None, 'the pod, KIND:AxB, as v5e:4x4 or h100:2x8: the product is its chips', flag_values=f)
  flags.DEFINE_string('config', None, 'configs/FILE.py[:ARGUMENT]; --config.KEY=VALUE overrides', flag_values=f)
  flags.DEFINE_string('workdir', None, 'a folder to keep what is written in (default: a temporary one, kept if a phase fails)',
                      flag_values=f)
  flags.DEFINE_integer('devices', 0, f'CPU devices at most (default: {shrink.DEVICES}, or what the axes need)', flag_values=f)
  rest, overrides = configs.split_overrides(argv)
  if '--help' in rest or '-h' in rest:
    print(__doc__ + '\n' + f.get_help())
    return
  try:
    words = f(['rehearse', *rest])[1:]
  except flags.Error as e:
    raise UsageError(str(e).splitlines()[0]) from e
  for name in ('topology', 'config'):
    if not f[name].value:
      raise UsageError(f'wants --{name}=…')
  if words:
    raise UsageError(f'{words[0]!r} is no flag; flags are --name=value')
  os.environ['JAX_PLATFORMS'] = 'cpu'
  start, folder = time.monotonic(), _folder(f.workdir)
  try:
    rehearse(f.config, overrides, f.topology, folder, f.devices)
  except (UsageError, KeyboardInterrupt):
    shutil.rmtree(folder)  # there is nothing in it to look at
    raise
  except JaxlmError:
    say(f'what was written is in {folder}')
    raise
  say(f'rehearsed in {time.monotonic() - start:.0f} s{f": {folder}" if f.workdir else ""}')
  if not f.workdir:
    shutil.rmtree(folder)


def main() -> None:
  """Runs the command line and exits with the code of errors.py."""
  try:
    run(sys.argv[1:])
  except JaxlmError as e:
    print(f'rehearse: {e}', file=sys.stderr)
    sys.exit(e.code)
  except KeyboardInterrupt:
    print('rehearse: interrupted', file=sys.stderr)
    sys.exit(130)


if __name__ == '__main__':
  main()
