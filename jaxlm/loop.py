"""The training loop: it dispatches step n, prepares batch n + 1, and only then reads what step n − 1 said."""
import hashlib
import json
import pathlib
import time
from typing import Callable, NamedTuple

import jax

from jaxlm import config as configs, evaluate, goodput, guard, hosts, metrics, replicas
from jaxlm.checkpoint import Checkpoints, run_meta
from jaxlm.data import mixture, pipeline as pipelines
from jaxlm.errors import Preempted, StorageError
from jaxlm.lease import Lease
from jaxlm.metrics import say
from jaxlm.schema import Config
from jaxlm.signals import Signals
from jaxlm.watchdog import Watchdog


class Begun(NamedTuple):
  """What a run goes on from."""
  checkpoints: Checkpoints
  step: int
  state: dict
  meta: dict  # of the checkpoint; empty if the run starts anew


class Loop:
  """Runs from what was begun to config.steps, or to a signal."""

  def __init__(self, config: Config, workdir: pathlib.Path, mesh, step_fn: Callable, pipeline: pipelines.Pipeline | mixture.Mixture,
               log: metrics.Log | metrics.NoLog, signals: Signals, clock: goodput.Clock, watchdog: Watchdog, lease: Lease | None,
               begin: Callable[[], Begun], begun: Begun):
    """lease: of the lead. begin: as it was begun, to go back to the newest good checkpoint."""
    self._config, self._workdir, self._mesh, self._step_fn, self._pipeline = config, workdir, mesh, step_fn, pipeline
    self._log, self._signals, self._clock, self._watchdog, self._lease, self._begin = log, signals, clock, watchdog, lease, begin
    self._guard = guard.Guard(config)
    self._goes_on(begun)
    self._pending = None  # (step, its sums, still on the device, when they were there, if that is known)
    self._due = False     # a save that waits for updates to be applied again

  def _goes_on(self, begun: Begun) -> None:
    self.checkpoints, self._saved, self._state = begun.checkpoints, begun.step, begun.state
    self._guard.goes_on(begun.step, begun.meta)
    self._data = begun.meta.get('data', '')  # of all batches until here: two runs with the same one have seen the same
    if begun.meta:  # the data goes on where it was, in examples, whatever the batch
      skipped = begun.meta['examples'] - self._guard.position(begun.step) * self._config.batch
      self._pipeline = self._pipeline.after(configs.from_json(json.dumps(begun.meta['config'])), begun.meta, skipped)

  def run(self) -> None:
    config, done, told = self._config, self._saved, False
    held_out = evaluate.held_out(config, self._pipeline.cache, self._mesh) if config.eval_every else None
    batch = self._batch(done)
    with jax.transfer_guard('disallow'):
      while done < config.steps:
        done += 1
        self._state, sums = self._step_fn(self._state, batch)
        made = time.monotonic() if sums['loss'].is_ready() else None  # CPUs run a step while it is dispatched
        self._mark('step')
        if done < config.steps:
          batch = self._batch(done)
        self._read()
        self._pending = (done, sums, made)
        if not told:
          jax.block_until_ready(sums)
          self._mark('step')
          say(str(self._clock))
          told = True
        self._clock.tick(done)
        self.checkpoints.check()
        if config.guard.replicas_every and done % config.guard.replicas_every == 0:
          replicas.check(self._state, done, self._saved)
          self._mark('replicas')
        if hosts.preempted(done):
          self._signals.received = 'SIGTERM'
        if self._signals.received or self._due or done == config.steps or done % config.save_every == 0:
          self._save(done)
        if self._signals.received:
          break
        if self._guard.gives_up(done):
          batch = sums = None
          done = self._go_back(done)
          batch = self._batch(done)
        elif held_out and done % config.eval_every == 0:
          self._read()
          with self._log.paused():
            self._log.write(done, dict(held_out.run(self._state['params'])))
          self._mark('eval')
      self.checkpoints.finish()
    self._mark('save')
    ends = 'finished' if done == config.steps else self._signals.received
    self._clock.write(done, **({'ends': ends} if ends in ('finished', 'SIGINT') else {}))
    self._saved = max(self.checkpoints.found, default=0)
    if self._signals.received and self._saved < config.steps:
      raise Preempted(f'{self._signals.received}: saved step {self._saved} of {config.steps} in {self._workdir}; '
                      'the same command goes on from there')
    if self._saved < done:  # checkpoint.when_full=skip
      raise StorageError(f'trained to step {done}, and there was no room to save it; the newest checkpoint is {self._saved}. Free some, and '
                         'run the same command again')
    say(f'trained to step {self._saved}; checkpoint saved in {self._workdir}')

  def _mark(self, kind: str) -> None:
    """The time since the last mark went there; and the loop goes on."""
    self._clock.mark(kind)
    self._watchdog.fed()

  def _batch(self, done: int):
    made = self._pipeline.batch(self._guard.position(done), self._mesh)
    self._mark('data')
    return made

  def _read(self) -> None:
    """Logs what the pending step said."""
    if self._pending is None:
      return
    step, sums, made = self._pending
    sums, self._pending = hosts.fetch(sums), None
    made = made or time.monotonic()
    self._data = hashlib.blake2b(self._data.encode() + sums.pop('ids').tobytes(), digest_size=8).hexdigest()
    self._mark('step')
    reason = self._guard.read(step, sums)
    if reason:
      self._log.skip(step, sums, reason)
    else:
      self._log.add(step, sums, self._data, made)

  def _save(self, step: int) -> None:
    """Saves, once no update is being skipped."""
    self._read()
    self._due = self._guard.streak > 0
    if self._due:
      return
    if self._lease:
      self._lease.check()
    meta = {**run_meta(self._config, self._pipeline.cache, self._examples(step)), **self._pipeline.meta(),
            'jumps': self._guard.jumps, 'data': self._data, 'guard': guard.to_meta(self._state.get('guard'))}
    state = {name: a for name, a in self._state.items() if name != 'guard'}
    with self._log.paused():
      if self.checkpoints.save(step, state, meta):
        self._saved = step
    self._mark('save')
    self._clock.write(step)

  def _examples(self, step: int) -> int:
    """Of the run's data, consumed by so many steps."""
    return self._pipeline.skipped + self._guard.position(step) * self._config.batch

  def _go_back(self, done: int) -> int:
    """To the newest good checkpoint, or to the start → its step. JaxlmError if it has been there too often (guard.py)."""
    self._clock.write(done)
    self._watchdog.starts()
    self._pending = self._state = None
    self.checkpoints.finish()
    self.checkpoints.close()
    with jax.transfer_guard('allow'):
      begun = self._begin()
    self._goes_on(begun)
    self._mark('restore')
    jump = self._guard.back_to(begun.step)
    say(f'goes back to step {begun.step}, and over the data of {jump} steps')
    self._log.back_to(begun.step, jump)
    self._clock.write(begun.step, begins=begun.step)
    self._due = False
    return begun.step
