"""Training: what is made ready before the first step, and what a run goes on from. The loop itself is loop.py.

In this order: 1. The workdir is written to, and leased. 2. The step is traced, so that a config that cannot be is an error before
anything is read. 3. While XLA compiles it, the data is made ready, and 4. the newest good checkpoint is restored, or a fresh state
made. 5. Then no device waits for a host again, but to log, save and evaluate.
"""
import concurrent.futures
import contextlib
import functools
import os
import pathlib
from typing import NamedTuple

import jax

from jaxlm import config as configs, count, elastic, goodput, guard, hosts, layout, metrics, report, start, xla
from jaxlm.checkpoint import Checkpoints
from jaxlm.data import mixture, pipeline as pipelines, sources
from jaxlm.errors import StorageError, UsageError
from jaxlm.lease import Lease
from jaxlm.loop import Begun, Loop
from jaxlm.metrics import say
from jaxlm.models import pipeline as pipelined
from jaxlm.optimizer import decay_begins, make_optimizer
from jaxlm.resume import resume
from jaxlm.schema import Config
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
    probe = workdir / f'.probe-{hosts.process()}'  # each process writes its own part of a checkpoint
    probe.write_bytes(b'0')
    hosts.share(workdir / '.probe-0')
    probe.unlink()
  except OSError as e:
    raise StorageError(f'--workdir={workdir}: cannot be written ({e.strerror}); choose another') from e


class Branch(NamedTuple):
  """Where a run that has no checkpoint yet branches off."""
  workdir: pathlib.Path  # of another run
  step: int | None       # None: its newest good one


def train(config: Config, workdir: pathlib.Path, allow: tuple[str, ...] = (), branch: Branch | None = None) -> None:
  """Trains to config.steps; counts, if model.kind=ngram. allow: fields of the config in which a checkpoint may differ. branch: what a
  workdir with no checkpoints goes on from, state, data and all. Raises Preempted (saved), UsageError, CheckpointError, StorageError."""
  clock = goodput.Clock()
  sources.check_stated(config)
  with Signals(hosts.signals()) as signals, contextlib.ExitStack() as held:
    _prepare_workdir(workdir)
    if config.model.kind == 'ngram' and not hosts.alone():
      raise UsageError('model.kind=ngram: is counted by one process; start one, without --coordinator')
    lease = hosts.lead_first('lease', lambda: held.enter_context(Lease(workdir, say)) if hosts.lead() else None)
    if config.model.kind == 'ngram':
      count.run(config, workdir)
      return
    config = start.tokenizer_of(config, workdir)
    hosts.same('config', configs.to_json(config))
    say(f'{workdir}: {config.steps} steps of {config.batch} × {config.length} tokens\n{configs.summary(config)}')
    mesh = layout.run_mesh(config)
    elastic.fits(lambda processes: layout.fits(config, processes * jax.local_device_count()))
    with jax.set_mesh(mesh):
      _train(config, workdir, allow, branch, mesh, clock, signals, lease)


def _train(config: Config, workdir: pathlib.Path, allow, branch, mesh, clock, signals: Signals, lease: Lease | None) -> None:
  use_compile_cache(pathlib.Path(config.compile_cache) if config.compile_cache else workdir / 'compile_cache')
  tx, schedule = make_optimizer(config.optimizer, config.steps)
  abstract = abstract_state(config, tx)
  lowered = jax.jit(make_step(config, tx, schedule), donate_argnums=0).lower(
      layout.named(abstract, mesh), abstract_batch(config, mesh))
  options = xla.options(config.compiler_options, mesh)
  clock.mark('trace')
  with concurrent.futures.ThreadPoolExecutor(1) as pool:  # XLA compiles while the data and the state get ready
    compiling = pool.submit(lowered.compile, options)
    cache = hosts.lead_first('data cache', lambda: mixture.prepare(config, workdir, say))
    hosts.same('data cache', cache.hash)
    pipeline = mixture.make(config, cache)
    clock.mark('data')
    with Watchdog(config.watchdog, workdir, hosts.process()) as watchdog:
      begin = functools.partial(_begin, config, workdir, allow, branch, tx, abstract, mesh, cache)
      begun = begin()
      if hosts.lead():
        (workdir / 'config.json').write_text(configs.to_json(config), encoding='utf-8')
      clock.mark('restore' if begun.meta else 'init')
      step_fn = compiling.result()
      hosts.meet('the first step')
      clock.mark('compile')
      params = sum(a.size for a in jax.tree.leaves(begun.state['params']))
      sizes = ' × '.join(f'{axis} {n}' for axis, n in mesh.shape.items() if n > 1) or 'one device'
      say(f'{params / 1e6:.1f}M parameters on {sizes}{idle(config, mesh.shape["stage"])}; {pipeline.epochs()}; '
          + (f'goes on from step {begun.step}' if begun.meta else 'starts at step 0'))
      if repeats := pipeline.repeats():
        say(f'warning: {repeats}')
      if begun.step >= config.steps:
        say(f'already at step {begun.step}; raise --config.steps to train on')
        return
      log = metrics.Log(workdir, config, params, begun.step) if hosts.lead() else metrics.NoLog()
      if lease:
        clock.keep(workdir, begun.step)
      signals.in_loop = True
      loop = Loop(config, workdir, mesh, step_fn, pipeline, log, signals, clock, watchdog, lease, begin, begun)
      del begun  # the loop donates its state
      try:
        loop.run()
      finally:
        log.close()
        clock.close()
        loop.checkpoints.close()
  if lease:
    report.print_goodput(goodput.summary(goodput.read(workdir / 'goodput.jsonl')))


def _begin(config: Config, workdir: pathlib.Path, allow, branch, tx, abstract, mesh, cache) -> Begun:
  """What the run goes on from: the newest good checkpoint, its own or that it branches off, or a fresh state."""
  checkpoints = Checkpoints(workdir, config.checkpoint, say=say, until=decay_begins(config.optimizer, config.steps))
  saved = {name: a for name, a in abstract.items() if name != 'guard'}
  found = lambda where: resume(where, config, cache, saved, mesh, jax.jit(lambda params: fresh_opt(config, tx, params)), allow)
  restored = found(checkpoints)
  if branch and not restored:
    with contextlib.closing(start.opened(branch.workdir, branch.step, '--from', '--from_step')) as theirs:
      restored = found(theirs)
    say(f'branches off {branch.workdir} at step {restored[0]}')
  hosts.same('newest good checkpoint', str(restored and restored[0]))
  if not restored:
    state = _fresh_state(config, tx)
    if config.start.checkpoint:
      state['params'] = start.parameters(config, state['params'], cache.tokenizer, mesh, say)
    return Begun(checkpoints, 0, state, {})
  step, state, meta = restored
  if 'guard' in abstract:
    state['guard'] = guard.from_meta(config.guard, meta.get('guard', {}), layout.named(abstract['guard'], mesh))
  return Begun(checkpoints, step, state, meta)


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
