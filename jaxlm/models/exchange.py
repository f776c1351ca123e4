"""Rows that go to the device of mesh.expert that has their expert, and what is made of them, which comes back.

How many rows a device gets is known only when the router has spoken. Its buffer holds the most that can come, or moe.room times the
mean: then what does not fit stays behind, is counted, and passes by on the residual stream.
"""
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import layout
from jaxlm.kernels import grouped
from jaxlm.models import sorting

AXIS = 'expert'
TILE = 512  # rows of a kernel's tile (kernels/grouped.py): buffers are multiples


class Route(NamedTuple):
  """Of rows between devices, all int32 [from, to]: how many, and where they begin with the sender and with the receiver."""
  sizes_XX: jax.Array
  at_sender_XX: jax.Array
  at_receiver_XX: jax.Array

  def back(self) -> 'Route':
    return Route(self.sizes_XX.T, self.at_receiver_XX.T, self.at_sender_XX.T)


def room(share: float, rows: int, choices: int, devices: int, own: int) -> int:
  """Rows that a device has room for. rows: of a device before the exchange; own: experts of a device; share: moe.room, 0 for no bound."""
  most = devices * (rows // choices) * min(choices, own)
  return min(most, -(-math.ceil(share * rows) // TILE) * TILE) if share else most


def at_experts(say, rows_TD, sizes_E, choices: int, share: float):
  """(out_TD, rows that found no room, of which out is 0) of rows sorted by expert, under shard_map. sizes_E: rows of each of all
  experts; say(rows, sizes of this device's experts) is asked where the experts are; choices: experts a token, all different."""
  X, T, me = jax.lax.axis_size(AXIS), rows_TD.shape[0], jax.lax.axis_index(AXIS)
  own = sizes_E.shape[0] // X
  most = room(share, T, choices, X, own)
  counts_XE = jax.lax.all_gather(sizes_E, AXIS).astype(jnp.int32)  # of each device's rows
  rows_XX = counts_XE.reshape(X, X, own).sum(-1)  # from, to
  fit_XX = jnp.clip(most - _before(rows_XX, 0), 0, rows_XX)
  route = Route(fit_XX, _before(rows_XX, 1), _before(fit_XX, 0))
  counts_XE = jax.lax.dynamic_slice_in_dim(counts_XE, me * own, own, 1)  # of this device's experts
  counts_XE = jnp.clip(fit_XX[:, me, None] - _before(counts_XE, 1), 0, counts_XE)
  came_TD = _send(most, (False, share > 0), route, rows_TD)
  end_N = jnp.cumsum(counts_XE.reshape(-1))  # they came by device, then expert
  run_T = (jnp.arange(most)[:, None] >= end_N[None]).sum(-1)
  expert_T = jnp.where(run_T < X * own, run_T % own, own)
  order_T = jnp.argsort(expert_T, stable=True)
  said_TD = say(sorting.to_experts(came_TD, order_T, 1), counts_XE.sum(0))
  out_TD = _send(T, (share > 0, False), route.back(), sorting.from_experts(said_TD, order_T, 1))
  return out_TD, (rows_XX - fit_XX)[me].sum()


def _before(sizes, axis: int):
  """Where each begins, if they follow each other along `axis`."""
  return (jnp.cumsum(sizes, axis) - sizes).astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _send(size: int, clean: tuple[bool, bool], route: Route, rows_TD):
  """What this device gets, [size, D]. Where nothing comes to is 0 if clean[0] says so, else it may be anything; clean[1]: the same of
  the gradient of rows."""
  me = jax.lax.axis_index(AXIS)
  sizes_XX, at_sender_XX, at_receiver_XX = route
  n_T = jnp.arange(size)
  sender_T = jnp.maximum((n_T[:, None] >= at_receiver_XX[None, :, me]).sum(-1) - 1, 0)
  place_T = n_T - at_receiver_XX[sender_T, me]
  comes_T1 = (place_T < sizes_XX[sender_T, me])[:, None]
  if layout.platform() in ('tpu', 'gpu'):
    # Filling a buffer with zeros takes a TPU longer than what is sent into it; its kernels touch only rows that came.
    buffer = (jax.lax.empty if grouped.has_kernel(size) else jnp.zeros)((size, rows_TD.shape[1]), rows_TD.dtype)
    got_TD = jax.lax.ragged_all_to_all(rows_TD, buffer, at_sender_XX[me], sizes_XX[me], at_receiver_XX[me], sizes_XX[:, me], axis_name=AXIS)
    return jnp.where(comes_T1, got_TD, 0) if clean[0] else got_TD
  all_XTD = jax.lax.all_gather(rows_TD, AXIS)  # XLA's CPU backend has no ragged all-to-all
  place_T = jnp.minimum(place_T + at_sender_XX[sender_T, me], rows_TD.shape[0] - 1)
  return jnp.where(comes_T1, all_XTD[sender_T, place_T], 0)


def _forward(size, clean, route, rows_TD):
  return _send(size, clean, route, rows_TD), (route, rows_TD.shape[0])


def _backward(size, clean, saved, g_TD):
  del size
  route, T = saved
  return jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), route), _send(T, clean[::-1], route.back(), g_TD)


_send.defvjp(_forward, _backward)
