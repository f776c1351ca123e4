"""The training loop: starts or goes on from the newest good checkpoint, and stops cleanly when told to."""
import concurrent.futures
import dataclasses
import os
import pathlib
from typing import Callable

import jax

from jaxlm import config as configs, count, evaluate, hosts, layout, metrics, start, xla
from jaxlm.checkpoint import Checkpoints, resume, run_meta
from jaxlm.schema import Config
from jaxlm.data import mixture, pipeline as pipelines
from jaxlm.errors import JaxlmError, Preempted, StorageError, UsageError
from jaxlm.metrics import say
from jaxlm.models import pipeline as pipelined
from jaxlm.optimizer import make_optimizer
from jaxlm.signals import Signals
from jaxlm.step import abstract_state, fresh_opt, init_state, make_step


def use_compile_cache(folder: pathlib.Path) -> None:
  """Keeps compiled programs in `folder` (mode 0700: what is in it is run), unless the environment names another."""
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def _prepare_workdir(workdir: pathlib.Path) -> None:
  """Fails before anything is computed if the workdir cannot be written."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / f'.probe-{hosts.process()}'  # each process writes its own part of a checkpoint
    probe.write_bytes(b'0')
    hosts.share(workdir / '.probe-0')
    probe.unlink()
  except OSError as e:
    raise StorageError(f'--workdir={workdir}: cannot be written ({e.strerror}); choose another') from e


def train(config: Config, workdir: pathlib.Path) -> None:
  """Trains to config.steps; counts, if model.kind=ngram. Raises Preempted (saved), UsageError, CheckpointError, StorageError."""
  timer = metrics.Timer()
  with Signals(hosts.signals()) as signals:
    _prepare_workdir(workdir)
    if config.model.kind == 'ngram':
      if not hosts.alone():
        raise UsageError('model.kind=ngram: is counted by one process; start one, without --coordinator')
      count.run(config, workdir)
      return
    config = start.tokenizer_of(config, workdir)
    hosts.same('config', configs.to_json(config))
    say(f'{workdir}: {config.steps} steps of {config.batch} × {config.length} tokens\n{configs.summary(config)}')
    mesh = layout.run_mesh(config)
    with jax.set_mesh(mesh):
      _train(config, workdir, mesh, timer, signals)


def _train(config: Config, workdir: pathlib.Path, mesh, timer, signals: Signals) -> None:
  use_compile_cache(pathlib.Path(config.compile_cache) if config.compile_cache else workdir / 'compile_cache')
  tx, schedule = make_optimizer(config.optimizer, config.steps)
  abstract = abstract_state(config, tx)
  lowered = jax.jit(make_step(config, tx, schedule), donate_argnums=0).lower(
      layout.named(abstract, mesh), abstract_batch(config, mesh))
  timer.mark('trace')
  with concurrent.futures.ThreadPoolExecutor(1) as pool:  # XLA compiles while the data and the state get ready
    compiling = pool.submit(lowered.compile, xla.OPTIONS[jax.default_backend()])
    cache = hosts.lead_first('data cache', lambda: mixture.prepare(config, workdir, say))
    hosts.same('data cache', cache.hash)
    pipeline = mixture.make(config, cache)
    timer.mark('data')
    checkpoints = Checkpoints(workdir, config.checkpoint)
    restored = resume(checkpoints, config, cache, abstract, mesh, jax.jit(lambda params: fresh_opt(config, tx, params)), say)
    first, state = restored or (0, _fresh_state(config, tx))
    hosts.same('newest good checkpoint', str(first))
    if hosts.lead():
      (workdir / 'config.json').write_text(configs.to_json(config), encoding='utf-8')
    if not restored and config.start.checkpoint:
      state['params'] = start.parameters(config, state['params'], cache.tokenizer, mesh, say)
    timer.mark('restore' if restored else 'init')
    step_fn = compiling.result()
  hosts.meet('the first step')
  timer.mark('compile')
  params = sum(a.size for a in jax.tree.leaves(state['params']))
  sizes = ' × '.join(f'{axis} {n}' for axis, n in mesh.shape.items() if n > 1) or 'one device'
  say(f'{params / 1e6:.1f}M parameters on {sizes}{idle(config, mesh.shape["stage"])}; {pipeline.epochs()}; '
      + (f'goes on from step {first}' if restored else 'starts at step 0'))
  if first >= config.steps:
    say(f'already at step {first}; raise --config.steps to train on')
    return
  log = metrics.Log(workdir, config, params, first) if hosts.lead() else metrics.NoLog()
  signals.in_loop = True
  try:
    _Loop(config, workdir, mesh, step_fn, pipeline, checkpoints, log, signals, first, state).run(timer)
  finally:
    log.close()
    checkpoints.close()


def idle(config: Config, stages: int) -> str:
  """What is lost to a pipeline's bubble, in words; '' without one."""
  how = config.model.pipeline
  share = pipelined.bubble(how, stages, how.pieces or stages)
  return f', of which stages are idle {share:.0%} of the time' if stages > 1 else ''


def abstract_batch(config: Config, mesh):
  """Shapes, dtypes and shardings of a training batch."""
  return {name: jax.ShapeDtypeStruct((config.batch, length), dtype, sharding=pipelines.sharding(length, mesh))
          for name, (length, dtype) in mixture.shapes(config).items()}


def _fresh_state(config: Config, tx):
  """Fresh state, born sharded. Runs once, so on CPU it is compiled with little optimization (1.6 s for 2.9)."""
  options = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
  init = jax.jit(lambda key: init_state(config, tx, key))
  return init.lower(jax.random.key(config.seed)).compile(compiler_options=options)(jax.random.key(config.seed))


@dataclasses.dataclass
class _Loop:
  """Dispatches step n, prepares batch n + 1, and only then reads what step n − 1 said."""
  config: Config
  workdir: pathlib.Path
  mesh: jax.sharding.Mesh
  step_fn: Callable
  pipeline: pipelines.Pipeline | mixture.Mixture
  checkpoints: Checkpoints
  log: metrics.Log
  signals: Signals
  saved: int                  # the newest step that is saved
  state: dict
  pending: tuple | None = None  # (step, its sums), still on the device

  def run(self, timer: metrics.Timer) -> None:
    config, start = self.config, self.saved
    held_out = evaluate.held_out(config, self.pipeline.cache, self.mesh) if config.eval_every else None
    batch = self.pipeline.batch(start, self.mesh)
    with jax.transfer_guard('disallow'):
      for done in range(start + 1, config.steps + 1):
        self.state, sums = self.step_fn(self.state, batch)
        if done < config.steps:
          batch = self.pipeline.batch(done, self.mesh)
        self.read()
        self.pending = (done, sums)
        if done == start + 1:
          jax.block_until_ready(sums)
          timer.mark('step')
          say(str(timer))
        if hosts.preempted(done):
          self.signals.received = 'SIGTERM'
        if self.signals.received or done == config.steps or done % config.save_every == 0:
          self.save(done)
        if self.signals.received:
          break
        if held_out and done % config.eval_every == 0:
          self.read()
          with self.log.paused():
            self.log.write(done, dict(held_out.run(self.state['params'])))
      self.checkpoints.finish()
    if self.signals.received and self.saved < config.steps:
      raise Preempted(f'{self.signals.received}: saved step {self.saved} of {config.steps} in {self.workdir}; '
                      'the same command goes on from there')
    say(f'trained to step {self.saved}; checkpoint saved in {self.workdir}')

  def read(self) -> None:
    """Logs what the pending step said. JaxlmError if it was not finite."""
    if self.pending is None:
      return
    step, sums = self.pending[0], hosts.fetch(self.pending[1])
    self.pending = None
    if not sums['finite']:
      raise JaxlmError(f'step {step}: the loss is {sums["loss"] / max(sums["tokens"], 1)} and the gradient norm '
                       f'{sums["grad_norm"]}; the update was not applied, and the newest checkpoint is {self.saved}. '
                       'Lower --config.optimizer.lr, or look at the batch with `jaxlm data show`')
    self.log.add(step, sums)

  def save(self, step: int) -> None:
    self.read()  # never save past a step that was not finite
    with self.log.paused():
      self.checkpoints.save(step, self.state, run_meta(self.config, self.pipeline.cache, step))
    self.saved = step
