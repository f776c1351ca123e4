"""Rotary positions (Su et al. 2021), and the scalings that carry them beyond the length they were trained on."""
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.schema import RopeConfig


def turn(x_BLHK, positions_BL, cfg: RopeConfig, local: bool, dims: int):
  """Turns the pair (k, k + dims/2) of the first `dims` of K by position · frequency; the others pass.

  Halves, not neighbours, are paired, as in Hugging Face's models; angles are float32. local: see RopeConfig.
  """
  frequencies_K, magnitude = frequencies(cfg, local, dims)
  angle_BLK = positions_BL[..., None].astype(jnp.float32) * jnp.asarray(frequencies_K)[None, None]
  cos, sin = ((f(angle_BLK) * magnitude)[:, :, None].astype(x_BLHK.dtype) for f in (jnp.cos, jnp.sin))
  a, b, rest = jnp.split(x_BLHK, (dims // 2, dims), -1)
  as_x = lambda a: jax.sharding.reshard(a, jax.typeof(x_BLHK).sharding.spec)  # with one head, products lose its axis (jax 0.12)
  return jnp.concatenate([as_x(a * cos - b * sin), as_x(b * cos + a * sin), rest], -1)


def frequencies(cfg: RopeConfig, local: bool, dims: int) -> tuple[np.ndarray, float]:
  """(float32 [dims/2] in radians a position, what cos and sin are multiplied by)."""
  base = cfg.local_base if local and cfg.local_base else cfg.base
  plain_K = (1. / base ** (np.arange(0, dims, 2, dtype=np.float64) / dims)).astype(np.float32)
  if local and cfg.local_base:
    return plain_K, 1.
  return SCALINGS[cfg.scaling](cfg, plain_K, dims).astype(np.float32), cfg.magnitude


def _llama3(cfg: RopeConfig, plain_K, dims):
  """Llama 3.1: waves longer than original/low are stretched by `factor`, those shorter than original/high stay, and
  in between it is blended (Grattafiori et al. 2024; the reference code of llama-models)."""
  del dims
  waves = cfg.original * plain_K / (2 * math.pi)  # turns within the original length
  smooth = np.clip((waves - cfg.low) / (cfg.high - cfg.low), 0, 1)
  return (1 - smooth) * plain_K / cfg.factor + smooth * plain_K


def _yarn(cfg: RopeConfig, plain_K, dims):
  """YaRN (Peng et al. 2023, §3.2): a ramp over dims between those that turn `high` times and `low` times."""
  def dim_of(turns):
    return dims * math.log(cfg.original / (turns * 2 * math.pi)) / (2 * math.log(cfg.base))
  first, last = max(math.floor(dim_of(cfg.high)), 0), min(math.ceil(dim_of(cfg.low)), dims - 1)
  ramp = np.clip((np.arange(dims // 2) - first) / max(last - first, 1e-3), 0, 1)
  return ramp * plain_K / cfg.factor + (1 - ramp) * plain_K


SCALINGS = {
    'none': lambda cfg, plain_K, dims: plain_K,
    'linear': lambda cfg, plain_K, dims: plain_K / cfg.factor,  # Chen et al. 2023
    'llama3': _llama3,
    'yarn': _yarn,
}
