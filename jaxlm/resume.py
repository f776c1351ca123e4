"""What a run goes on from, and what others read of it: the newest good checkpoint, held against the config, the data and the model."""
import json
import pathlib

import jax
import jax.numpy as jnp

from jaxlm import config as configs, layout
from jaxlm.checkpoint import Checkpoints
from jaxlm.errors import UsageError
from jaxlm.optimizer import risen
from jaxlm.schema import Config


def resume(checkpoints: Checkpoints, config: Config, cache, abstract, mesh, fresh_opt, allow: tuple[str, ...] = ()):
  """(step, state, meta) of the newest good checkpoint of this run, or None to start anew.

  An imported checkpoint has parameters only: the optimizer's state is fresh_opt(params), and the model alone must be the
  same. abstract may be None (see read_state). UsageError naming the first field in which the checkpoint is of another run, unless
  it is one of `allow`, or if its data is other data.
  """
  def read(step):
    meta = checkpoints.read_meta(step)
    saved = configs.from_json(json.dumps(meta['config']))
    if 'imported' in meta:
      configs.refuse_other_model(saved, config, allow)
      params = checkpoints.read_state(step, {'params': layout.named(abstract['params'], mesh)})['params']
      return {'params': params, 'opt': fresh_opt(params), 'step': jnp.int32(0)}, meta
    configs.refuse_change(saved, config, allow)
    if (rates := risen(saved, config, step)) and 'steps' not in allow:
      raise UsageError(f'steps was {saved.steps} and is now {config.steps}: the learning rate of checkpoint {step}, {rates[0]:.3g} by '
                       f'optimizer.schedule={config.optimizer.schedule}, would rise to {rates[1]:.3g}; set --config.steps={saved.steps}, pass '
                       '--allow_change=steps to go on so, or branch off before it came down: another --workdir with '
                       f'--from={checkpoints.workdir} --from_step=N')
    if meta['data_hash'] != cache.hash and 'data' not in allow:
      raise UsageError(f'checkpoint {step} was trained on other tokens than the data cache holds '
                       f'(hash {meta["data_hash"][:12]}, now {cache.hash[:12]}); bring its cache back, use another --workdir, or '
                       'pass --allow_change=data')
    return checkpoints.read_state(step, None if abstract is None else layout.named(abstract, mesh)), meta
  found = checkpoints.newest(read)
  return found and (found[0], *found[1])


def load(workdir: pathlib.Path, abstract_params, step: int | None = None, say=print):
  """(step, config, tokenizer json, params on the current mesh) of a finished or running job.

  abstract_params(config) → abstract params under the mesh (None: see read_state), and the mesh. Raises UsageError if there
  is no checkpoint or not this step; CheckpointError if none is good.
  """
  checkpoints = Checkpoints(workdir, read_only=True, say=say)
  if not checkpoints.found:
    raise UsageError(f'--workdir={workdir}: has no checkpoints; train there first')
  if step is not None:
    if step not in checkpoints.found:
      raise UsageError(f'--step={step}: the checkpoints of {workdir} are {checkpoints.found}')
    checkpoints.found = [step]

  def read(step):
    meta = checkpoints.read_meta(step)
    config = configs.from_json(json.dumps(meta['config']))
    abstract, mesh = abstract_params(config)
    wanted = None if abstract is None else {'params': layout.named(abstract, mesh)}
    params = checkpoints.read_state(step, wanted)['params']
    return config, meta['tokenizer'], params
  step, (config, tokenizer, params) = checkpoints.newest(read)
  checkpoints.close()
  return step, config, tokenizer, jax.block_until_ready(params)
