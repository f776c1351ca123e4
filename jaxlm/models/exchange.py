"""Rows that go to the device of mesh.expert that has their expert, and what is made of them, which comes back.

Dropless: how many rows a device gets is known only when the router has spoken, so buffers hold the most that can come.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import layout

AXIS = 'expert'


def at_experts(say, rows_TD, sizes_E, choices: int):
  """out_TD of rows sorted by expert, under shard_map. sizes_E: rows of each of all experts; say(rows, sizes of this device's
  experts) is asked where the experts are; choices: experts a token, all different."""
  X, T = jax.lax.axis_size(AXIS), rows_TD.shape[0]
  own = sizes_E.shape[0] // X
  counts_XE = jax.lax.all_gather(sizes_E, AXIS)  # of each device's rows
  rows_XX = counts_XE.reshape(X, X, own).sum(-1)  # from, to
  most = X * (T // choices) * min(choices, own)
  counts_XE = jax.lax.dynamic_slice_in_dim(counts_XE, jax.lax.axis_index(AXIS) * own, own, 1)  # of this device's experts
  came_TD = _send(most, rows_XX, rows_TD)
  end_N = jnp.cumsum(counts_XE.reshape(-1))  # they came by device, then expert
  run_T = (jnp.arange(most)[:, None] >= end_N[None]).sum(-1)
  expert_T = jnp.where(run_T < X * own, run_T % own, own)
  order_T = jnp.argsort(expert_T, stable=True)
  said_TD = say(came_TD[order_T], counts_XE.sum(0))
  return _send(T, rows_XX.T, jnp.zeros_like(said_TD).at[order_T].set(said_TD))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _send(size: int, rows_XX, rows_TD):
  """What this device gets, [size, D], by sender, where each has rows_XX[from, to] rows for each, in the order of receivers."""
  me = jax.lax.axis_index(AXIS)
  before = lambda axis: (jnp.cumsum(rows_XX, axis) - rows_XX).astype(jnp.int32)
  at_sender_XX, at_receiver_XX = before(1), before(0)
  if layout.platform() in ('tpu', 'gpu'):
    empty = jnp.zeros((size, rows_TD.shape[1]), rows_TD.dtype)
    return jax.lax.ragged_all_to_all(rows_TD, empty, at_sender_XX[me], rows_XX[me], at_receiver_XX[me], rows_XX[:, me], axis_name=AXIS)
  all_XTD = jax.lax.all_gather(rows_TD, AXIS)  # XLA's CPU backend has no ragged all-to-all
  n_T = jnp.arange(size)
  end_X = at_receiver_XX[:, me] + rows_XX[:, me]
  sender_T = jnp.minimum((n_T[:, None] >= end_X[None]).sum(-1), len(end_X) - 1)
  place_T = n_T - at_receiver_XX[sender_T, me] + at_sender_XX[sender_T, me]
  return jnp.where((n_T < end_X[-1])[:, None], all_XTD[sender_T, jnp.minimum(place_T, rows_TD.shape[0] - 1)], 0)


def _forward(size, rows_XX, rows_TD):
  return _send(size, rows_XX, rows_TD), (rows_XX, rows_TD.shape[0])


def _backward(size, saved, g_TD):
  del size
  rows_XX, T = saved
  return np.zeros(rows_XX.shape, jax.dtypes.float0), _send(T, rows_XX.T, g_TD)


_send.defvjp(_forward, _backward)
