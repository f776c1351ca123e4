"""cuDNN's fused attention on GPUs, through jax.nn. See on_mesh.py for the signature.

Documents that share a row reach the kernel as a bias of 0 and −∞ (jax.nn makes it of a mask), [B, 1, L, M] in bfloat16: 128 MiB a
row of 8,192. Causality and a window it knows by itself, and skips what they hide.
"""
import dataclasses

import jax
import jax.numpy as jnp

from jaxlm import layout
from jaxlm.kernels.patterns import How, allowed


def refusal(how: How, q_BLHK, k_BMGK, v_BMGK, bias_HLM=None) -> str:
  """Why the kernel cannot do this, or ''. Head dims up to 128 do on every GPU that has it (Ampere and later)."""
  K = q_BLHK.shape[-1]
  if bias_HLM is not None or how.cap:
    return 'knows neither caps of scores nor, with gradients, biases of relative positions'
  if K != v_BMGK.shape[-1] or K > 128 or K % 8:
    return f'wants one head dim of up to 128, a multiple of 8, not {K} and {v_BMGK.shape[-1]}'
  if q_BLHK.dtype not in (jnp.bfloat16, jnp.float16):
    return f'wants bfloat16, not {q_BLHK.dtype}'
  if layout.stages() > 1:
    return 'cannot be mapped over the stages of mesh.stage by JAX, whose rule takes its bias for one of all heads'
  if q_BLHK.shape[1] % 2 or k_BMGK.shape[1] % 2:
    return f'wants even lengths, not {q_BLHK.shape[1]} and {k_BMGK.shape[1]}'
  return ''


def cudnn(how: How, q_BLHK, k_BMGK, v_BMGK, q_rows, k_rows, bias_HLM=None):
  """One device has whole rows of keys."""
  del bias_HLM  # `refusal` saw to it
  known = how.in_order and how.causal and how.where in ('global', 'local')
  allowed_BLM = allowed(dataclasses.replace(how, causal=False, where='global') if known else how, q_rows, k_rows)
  window = (how.window - 1, 0) if known and how.where == 'local' else None
  return jax.nn.dot_product_attention(q_BLHK, k_BMGK, v_BMGK, mask=allowed_BLM[:, None], is_causal=known, scale=how.scale,
                                      local_window_size=window, implementation='cudnn')
