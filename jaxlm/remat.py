"""What of a layer is kept from the forward pass for the backward pass, on the device or in the host's memory, and what is computed
again (Chen et al. 2016). Layers say by `tag` which of tensors.TENSORS an array is; the config says what becomes of it."""
import jax
from jax.ad_checkpoint import checkpoint_name

from jaxlm.schema import ModelConfig
from jaxlm.tensors import TENSORS, kept


def tag(a, tensor: str):
  """`a`, which is one of TENSORS from here on. KeyError if it is none."""
  if tensor not in TENSORS:
    raise KeyError(tensor)
  return checkpoint_name(a, tensor)


def remat(cfg: ModelConfig, f, **how):
  """f, of whose inside only what the config says is kept for the backward pass. how: of jax.checkpoint."""
  return f if cfg.remat == 'none' else jax.checkpoint(f, policy=policy(cfg), **how)


def policy(cfg: ModelConfig):
  """Of jax.checkpoint: which values are kept, and where."""
  if cfg.remat == 'dots':
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  offload = cfg.offload.split()
  save = [tensor for tensor in kept(cfg) if tensor not in offload]
  if not offload:
    return jax.checkpoint_policies.save_only_these_names(*save)
  return jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=save, names_which_can_be_offloaded=offload, offload_src='device', offload_dst='pinned_host')
