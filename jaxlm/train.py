"""The training loop: starts or goes on from the newest good checkpoint, and stops cleanly when told to."""
import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import pathlib
from typing import Callable

import jax

from jaxlm import config as configs, count, evaluate, goodput, guard, layout, metrics, replicas, report, start, xla
from jaxlm.checkpoint import Checkpoints, resume, run_meta
from jaxlm.schema import Config
from jaxlm.data import mixture, pipeline as pipelines
from jaxlm.errors import Preempted, StorageError
from jaxlm.lease import Lease
from jaxlm.metrics import say
from jaxlm.models import pipeline as pipelined
from jaxlm.optimizer import make_optimizer
from jaxlm.signals import Signals
from jaxlm.step import abstract_state, fresh_opt, init_state, make_step
from jaxlm.watchdog import Watchdog


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
    probe = workdir / '.probe'
    probe.write_bytes(b'0')
    probe.unlink()
  except OSError as e:
    raise StorageError(f'--workdir={workdir}: cannot be written ({e.strerror}); choose another') from e


def train(config: Config, workdir: pathlib.Path) -> None:
  """Trains to config.steps; counts, if model.kind=ngram. Raises Preempted (saved), UsageError, CheckpointError, StorageError."""
  clock = goodput.Clock()
  with Signals() as signals, contextlib.ExitStack() as held:
    _prepare_workdir(workdir)
    lease = held.enter_context(Lease(workdir, say)) if config.model.kind == 'ngram' or jax.process_index() == 0 else None
    if config.model.kind == 'ngram':
      count.run(config, workdir)
      return
    config = start.tokenizer_of(config, workdir)
    say(f'{workdir}: {config.steps} steps of {config.batch} × {config.length} tokens\n{configs.summary(config)}')
    mesh = layout.run_mesh(config)
    with jax.set_mesh(mesh):
      _train(config, workdir, mesh, clock, signals, lease)


def _train(config: Config, workdir: pathlib.Path, mesh, clock, signals: Signals, lease: Lease | None) -> None:
  use_compile_cache(pathlib.Path(config.compile_cache) if config.compile_cache else workdir / 'compile_cache')
  tx, schedule = make_optimizer(config.optimizer, config.steps)
  abstract = abstract_state(config, tx)
  lowered = jax.jit(make_step(config, tx, schedule), donate_argnums=0).lower(
      layout.named(abstract, mesh), abstract_batch(config, mesh))
  clock.mark('trace')
  with concurrent.futures.ThreadPoolExecutor(1) as pool:  # XLA compiles while the data and the state get ready
    compiling = pool.submit(lowered.compile, xla.OPTIONS[jax.default_backend()])
    cache = mixture.prepare(config, workdir, say)
    pipeline = mixture.make(config, cache)
    clock.mark('data')
    with Watchdog(config.watchdog, workdir, jax.process_index()) as watchdog:
      begin = functools.partial(_begin, config, workdir, tx, abstract, mesh, cache)
      checkpoints, first, state, jumps = begin()
      (workdir / 'config.json').write_text(configs.to_json(config), encoding='utf-8')
      clock.mark('restore' if checkpoints.found else 'init')
      step_fn = compiling.result()
      clock.mark('compile')
      params = sum(a.size for a in jax.tree.leaves(state['params']))
      sizes = ' × '.join(f'{axis} {n}' for axis, n in mesh.shape.items() if n > 1) or 'one device'
      say(f'{params / 1e6:.1f}M parameters on {sizes}{idle(config, mesh.shape["stage"])}; {pipeline.epochs()}; '
          + (f'goes on from step {first}' if checkpoints.found else 'starts at step 0'))
      if first >= config.steps:
        say(f'already at step {first}; raise --config.steps to train on')
        return
      log = metrics.Log(workdir, config, params, first)
      if lease:
        clock.keep(workdir, first)
      signals.in_loop = True
      loop = _Loop(config, workdir, mesh, step_fn, pipeline, checkpoints, log, signals, begin, guard.Guard(config, jumps), clock, watchdog,
                   lease, first, state)
      del state  # the loop donates it
      try:
        loop.run()
      finally:
        log.close()
        clock.close()
        loop.checkpoints.close()
  if lease:
    report.print_goodput(goodput.summary(goodput.read(workdir / 'goodput.jsonl')))


def _begin(config: Config, workdir: pathlib.Path, tx, abstract, mesh, cache):
  """What the run goes on from: the newest good checkpoint, or a fresh state → (checkpoints, step, state, jumps in the data)."""
  checkpoints = Checkpoints(workdir, config.checkpoint)
  saved = {name: a for name, a in abstract.items() if name != 'guard'}
  restored = resume(checkpoints, config, cache, saved, mesh, jax.jit(lambda params: fresh_opt(config, tx, params)), say)
  if not restored:
    state = _fresh_state(config, tx)
    if config.start.checkpoint:
      state['params'] = start.parameters(config, state['params'], cache.tokenizer, mesh, say)
    return checkpoints, 0, state, []
  step, state = restored
  meta = checkpoints.read_meta(step)
  if 'guard' in abstract:
    state['guard'] = guard.from_meta(config.guard, meta.get('guard', {}), layout.named(abstract['guard'], mesh))
  return checkpoints, step, state, meta.get('jumps', [])


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
  begin: Callable             # → as _begin
  guard: guard.Guard
  clock: goodput.Clock
  watchdog: Watchdog
  lease: Lease | None         # of the first process
  saved: int                  # the newest step that is saved
  state: dict | None
  pending: tuple | None = None  # (step, its sums), still on the device
  due: bool = False           # a save that waits for updates to be applied again

  def run(self) -> None:
    config, done, told = self.config, self.saved, False
    held_out = evaluate.held_out(config, self.pipeline.cache, self.mesh) if config.eval_every else None
    batch = self.batch(done)
    with jax.transfer_guard('disallow'):
      while done < config.steps:
        done += 1
        self.state, sums = self.step_fn(self.state, batch)
        self.mark('step')
        if done < config.steps:
          batch = self.batch(done)
        self.read()
        self.pending = (done, sums)
        if not told:
          jax.block_until_ready(sums)
          self.mark('step')
          say(str(self.clock))
          told = True
        self.clock.tick(done)
        if config.guard.replicas_every and done % config.guard.replicas_every == 0:
          replicas.check(self.state, done, self.saved)
          self.mark('replicas')
        if self.signals.received or self.due or done == config.steps or done % config.save_every == 0:
          self.save(done)
        if self.signals.received:
          break
        if self.guard.gives_up(done):
          batch = sums = None
          done = self.go_back(done)
          batch = self.batch(done)
        elif held_out and done % config.eval_every == 0:
          self.read()
          with self.log.paused():
            self.log.write(done, dict(held_out.run(self.state['params'])))
          self.mark('eval')
      self.checkpoints.finish()
      self.mark('save')
      self.clock.write(done)
    if self.signals.received and self.saved < config.steps:
      raise Preempted(f'{self.signals.received}: saved step {self.saved} of {config.steps} in {self.workdir}; '
                      'the same command goes on from there')
    say(f'trained to step {self.saved}; checkpoint saved in {self.workdir}')

  def mark(self, kind: str) -> None:
    """The time since the last mark went there; and the loop goes on."""
    self.clock.mark(kind)
    self.watchdog.fed()

  def batch(self, done: int):
    made = self.pipeline.batch(self.guard.position(done), self.mesh)
    self.mark('data')
    return made

  def read(self) -> None:
    """Logs what the pending step said."""
    if self.pending is None:
      return
    step, sums = self.pending[0], jax.device_get(self.pending[1])
    self.pending = None
    self.mark('step')
    reason = self.guard.read(step, sums)
    if reason:
      self.log.skip(step, sums, reason)
    else:
      self.log.add(step, sums)

  def save(self, step: int) -> None:
    """Saves, once no update is being skipped."""
    self.read()
    self.due = self.guard.streak > 0
    if self.due:
      return
    if self.lease:
      self.lease.check()
    with self.log.paused():
      more = {'examples': self.guard.position(step) * self.config.batch, 'jumps': self.guard.jumps,
              'guard': guard.to_meta(self.state.get('guard'))}
      state = {name: a for name, a in self.state.items() if name != 'guard'}
      self.checkpoints.save(step, state, {**run_meta(self.config, self.pipeline.cache, step), **more})
    self.saved = step
    self.mark('save')
    self.clock.write(step)

  def go_back(self, done: int) -> int:
    """To the newest good checkpoint, or to the start → its step. JaxlmError if it has been there too often (guard.py)."""
    self.clock.write(done)
    self.watchdog.starts()
    self.pending = self.state = None
    self.checkpoints.finish()
    self.checkpoints.close()
    with jax.transfer_guard('allow'):
      self.checkpoints, self.saved, self.state, jumps = self.begin()
    self.mark('restore')
    jump = self.guard.back_to(self.saved, jumps)
    say(f'goes back to step {self.saved}, and over the data of {jump} steps')
    self.log.back_to(self.saved, jump)
    self.clock.write(self.saved, begins=self.saved)
    self.due = False
    return self.saved
