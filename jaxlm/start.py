"""A run that starts from the parameters of another: fine-tuning, or a larger vocabulary, or another head.

What has the same path and shape in both is loaded; a table (embed, unembed, positions) that has more rows here keeps its first
ones; everything is reported: what was loaded, what is fresh, what was left.
"""
import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp

from jaxlm import checkpoint, config as configs, hosts, layout
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UsageError
from jaxlm.models import kinds, lora
from jaxlm.schema import Config

TABLES = ('embed', 'unembed', 'unembed_bias', 'positions')


def tokenizer_of(config: Config, workdir: pathlib.Path) -> Config:
  """The config with data.tokenizer=start made the tokenizer of start.checkpoint, written into the workdir. UsageError if
  there is no such checkpoint."""
  if not config.start.checkpoint:
    if config.data.tokenizer == 'start':
      raise UsageError('data.tokenizer=start: wants start.checkpoint, whose tokenizer it is')
    return config
  checkpoints, step = _open(config)
  file = workdir / 'tokenizer.json'
  if config.data.tokenizer == 'start':
    text = checkpoints.read_meta(step)['tokenizer']  # which all processes do together
    if hosts.lead():
      file.write_text(text, encoding='utf-8')
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(file)))
  checkpoints.close()
  return config


def _open(config: Config) -> tuple[checkpoint.Checkpoints, int]:
  checkpoints = opened(pathlib.Path(config.start.checkpoint), config.start.step, 'start.checkpoint', 'start.step')
  return checkpoints, checkpoints.found[-1]


def opened(workdir: pathlib.Path, step: int | None, where: str, which: str) -> checkpoint.Checkpoints:
  """The checkpoints of another run, to be read: this step alone, or all. UsageError, by the names of the two keys, if it has none."""
  checkpoints = checkpoint.Checkpoints(workdir, read_only=True)
  found = checkpoints.found
  if not found or (step and step not in found):
    raise UsageError(f'{where}={workdir}: has {f"the steps {found}" if found else "no checkpoints"}; '
                     f'{f"set {which} to one of them" if found else "name a workdir that has"}')
  checkpoints.found = [step] if step else found
  return checkpoints


def parameters(config: Config, fresh: dict, tokenizer: Tokenizer, mesh, say) -> dict:
  """`fresh` parameters (on the mesh) with all that start.checkpoint has for them. UsageError if its tokens are others, or it
  has nothing."""
  checkpoints, step = _open(config)
  meta = checkpoints.read_meta(step)
  if Tokenizer(meta['tokenizer']).sha256 != tokenizer.sha256:
    raise UsageError(f'start.checkpoint={config.start.checkpoint}: was trained on other tokens; set data.tokenizer=start')
  saved = configs.from_json(json.dumps(meta['config'])).model
  theirs = lora.flat(layout.named(kinds.abstract_params(saved), mesh))
  if saved.lora.rank and not config.model.lora.rank:
    raise UsageError(f'start.checkpoint={config.start.checkpoint}: has pairs of low rank; set model.lora.rank={saved.lora.rank}')
  mine = lora.flat(fresh)
  same = {path for path in theirs if path in mine and theirs[path].shape == mine[path].shape}
  grown = {path for path in TABLES if path in theirs and path in mine and path not in same
           and theirs[path].shape[0] < mine[path].shape[0] and theirs[path].shape[1:] == mine[path].shape[1:]}
  if not same:
    raise UsageError(f'start.checkpoint={config.start.checkpoint}: no array of it has the path and shape of one here; its '
                     f'model is {saved.kind} with D={saved.D}, N={saved.N}')
  read = checkpoints.read_state(step, {'params': lora.nested({p: theirs[p] for p in same | grown})})['params']
  checkpoints.close()
  loaded = lora.flat(read)
  for path in grown:
    loaded[path] = _extended(loaded[path], mine[path])
  count = sum(loaded[p].size for p in same)
  say(f'start: {len(same)} arrays, {count / 1e6:.1f}M parameters, of step {step} of {config.start.checkpoint}')
  for what, paths in (('more rows here, the first loaded', grown), ('fresh', set(mine) - same - grown),
                      ('left there', set(theirs) - same - grown)):
    if paths:
      say(f'start: {what}: {", ".join(sorted(paths))}')
  return lora.nested({**mine, **loaded})


@jax.jit
def _extended(first, whole):
  """`whole` with its first rows replaced; rows are cut over the mesh, so they come together and part again."""
  together = lambda a: jax.sharding.reshard(a, jax.P(None, *jax.typeof(a).sharding.spec[1:]))
  rows = jnp.concatenate([together(first), together(whole)[first.shape[0]:]])
  return jax.sharding.reshard(rows, jax.typeof(whole).sharding.spec)
