"""Rows in the order of their experts, and back. Both ways, and both ways backward, rows are only gathered: a scatter, which is what JAX
makes of the transpose of a gather, takes TPUs several times as long."""
import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def to_experts(x_TD, order_R, choices: int):
  """[R, D]: row order[r] // choices of x for each r. order_R is a permutation of the R = T · choices choices of T tokens."""
  return x_TD[order_R // choices]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def from_experts(rows_RD, order_R, choices: int):
  """[T, D]: the transpose of `to_experts`; the rows of each token, added up in float32, in the dtype of rows."""
  place_TS = jnp.argsort(order_R).reshape(-1, choices)
  if choices == 1:
    return rows_RD[place_TS[:, 0]]
  # Not a sum over an axis of [T, choices, D]: TPUs keep pieces of eight rows together, of which it would use `choices`.
  return sum(rows_RD[place_TS[:, s]].astype(jnp.float32) for s in range(choices)).astype(rows_RD.dtype)


def _transposed(of, choices, order_R, g):
  return of(g, order_R, choices), None


to_experts.defvjp(lambda x_TD, order_R, choices: (to_experts(x_TD, order_R, choices), order_R),
                  functools.partial(_transposed, from_experts))
from_experts.defvjp(lambda rows_RD, order_R, choices: (from_experts(rows_RD, order_R, choices), order_R),
                    functools.partial(_transposed, to_experts))
