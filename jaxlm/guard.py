"""What is done about an update that is not finite, or spikes.

1. Within the jitted step, from scalars that are the same on every device: an update whose loss or gradient norm is not finite is not
   applied; nor, with guard.spike, one of which either is above mean + spike · std of the last guard.window good steps (OLMo-core's
   SkipStepOptimizer). The state stays as it was: the run is one whose data never held that batch.
2. On the host, from the same scalars: while updates are skipped nothing is saved. After guard.patience of them in a row, or if the
   run would end so, it goes back to the newest good checkpoint, of step S, and the data jumps over all that was seen since, up to and
   with step K: from step S on, batches come K − S later. Such jumps (S, K − S) travel in checkpoints, so that a run that goes on
   reads what the unbroken one would.
3. More than guard.rollbacks times to the same checkpoint is a JaxlmError.
"""
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import JaxlmError
from jaxlm.schema import Config, GuardConfig


def fresh(c: GuardConfig) -> dict:
  """The history before the first step: of the last `window` good steps, the newest at the end."""
  return {'losses': jnp.zeros(c.window), 'norms': jnp.zeros(c.window), 'seen': jnp.int32(0)}


def judge(c: GuardConfig, history: dict | None, loss, norm):
  """Scalars of a step → (is it finite, is it applied, the history with it). history: None without guard.spike."""
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  if history is None:
    return finite, finite, None
  seen = history['seen']
  known = jnp.arange(c.window) >= c.window - seen
  applied = finite
  for value, before in ((loss, history['losses']), (norm, history['norms'])):
    mean = jnp.sum(before) / jnp.maximum(seen, 1)
    std = jnp.sqrt(jnp.sum(jnp.where(known, (before - mean) ** 2, 0)) / jnp.maximum(seen, 1))
    applied &= (seen < max(2, c.window // 2)) | (value <= mean + c.spike * std)
  with_it = lambda before, value: jnp.concatenate([before[1:], value.astype(jnp.float32)[None]])
  return finite, applied, {'losses': with_it(history['losses'], loss), 'norms': with_it(history['norms'], norm),
                           'seen': jnp.minimum(seen + 1, c.window)}


def to_meta(history: dict | None) -> dict:
  """The history as JSON, exactly (float32 → its shortest decimal → float32)."""
  return {} if history is None else {name: np.asarray(a).tolist() for name, a in jax.device_get(history).items()}


def from_meta(c: GuardConfig, saved: dict, abstract: dict) -> dict:
  """The history of a checkpoint, on the shardings of `abstract`. Checkpoints of runs without guard.spike have none: it begins anew.
  If the window was another, the newest of it are kept."""
  of = {name: np.array(saved.get(name, []), np.float32)[-c.window:] for name in ('losses', 'norms')}
  padded = {name: np.pad(values, (c.window - len(values), 0)) for name, values in of.items()}
  seen = min(saved.get('seen', 0), len(of['losses']))
  return {name: jax.make_array_from_callback(np.shape(value), abstract[name].sharding, lambda index, value=value: value[index])
          for name, value in {**padded, 'seen': np.array(seen, np.int32)}.items()}


class Guard:
  """The host's part: what the sums of steps say, and where in the data a step is."""

  def __init__(self, config: Config):
    self._config = config
    self.jumps: list[tuple[int, int]] = []
    self._again: list[tuple[int, int]] = []  # of these, made from the checkpoint that the run went on from last
    self.streak = 0  # updates skipped in a row
    self._last = (0, '')  # step of the newest of them, and what it was

  def goes_on(self, step: int, meta: dict) -> None:
    """From a checkpoint with this meta, or with none from the start."""
    self._again = [jump for jump in self.jumps if jump[0] == step]
    self.jumps = [tuple(jump) for jump in meta.get('jumps', [])]

  def position(self, step: int) -> int:
    """Batches of the run's data before the one that follows `step` steps."""
    return step + sum(by for at, by in self.jumps if at <= step)

  def read(self, step: int, sums: dict) -> str:
    """Takes note of a step that was done → why its update was skipped, in words; '' if it was not."""
    if sums['applied']:
      self.streak = 0
      return ''
    loss, norm = float(sums['loss'] / max(sums['tokens'], 1)), float(sums['grad_norm'])
    self.streak += 1
    self._last = step, f'the loss is {loss:.4g} and the gradient norm {norm:.4g}'
    return self._last[1] + (', a spike' if sums['finite'] else '')

  def gives_up(self, step: int) -> bool:
    """Whether it is time to go back, after `step` steps."""
    return self.streak >= self._config.guard.patience or (self.streak > 0 and step == self._config.steps)

  def back_to(self, step: int) -> int:
    """The run, which goes on from the checkpoint of `step` again, jumps over the data since → the steps it jumps. JaxlmError if it
    has been there too often."""
    last, reason = self._last
    before = self._again
    if len(before) >= self._config.guard.rollbacks:
      raise JaxlmError(
          f'step {last}: {reason}; {self.streak} updates in a row were skipped'
          + (f', and so on other data after {len(before)} times back to step {step}' if before else '')
          + f'. The newest checkpoint is {step}. Lower --config.optimizer.lr, or look at the batch with `jaxlm data show '
          f'--step={last - 1 + sum(by for at, by in [*self.jumps, *before] if at < last)}`')
    self.jumps += [*before, (step, last - step)]
    self.streak = 0
    return last - step
