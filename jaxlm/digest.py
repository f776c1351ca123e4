"""A number of every bit of an array and its place: the same on any mesh, by any order of summation.

Each element's bits and its global linear index are mixed to two 32-bit words (murmur3's finaliser, Appleby 2011), and these are
summed modulo 2**32. Sums of integers are exact, so that how an array is cut changes nothing. For a given place the mix is one to
one: another value of one element always changes the digest; any other difference goes unseen once in about 2**64.
"""
import math

import jax
import jax.numpy as jnp

_A, _B, _C, _D = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F


def _mixed(x):
  """One to one on uint32, each bit of the result hanging on all of x."""
  x = (x ^ (x >> 16)) * jnp.uint32(_B)
  x = (x ^ (x >> 13)) * jnp.uint32(_C)
  return x ^ (x >> 16)


def _high(x, n: int):
  """The upper 32 bits of x · n, for n < 2**32."""
  x0, x1, n0, n1 = x & 0xFFFF, x >> 16, jnp.uint32(n & 0xFFFF), jnp.uint32(n >> 16)
  middle = x1 * n0 + (x0 * n0 >> 16)
  return x1 * n1 + (middle >> 16) + ((x0 * n1 + (middle & 0xFFFF)) >> 16)


def index_words(shape: tuple[int, ...], places):
  """places: the coordinate along each dimension, uint32 → (low, high) words of the linear index of an array of this shape."""
  low = high = jnp.uint32(0)
  for size, place in zip(shape, places):
    if math.prod(shape) > 2 ** 32:
      high = high * jnp.uint32(size) + _high(low, size)
    low = low * jnp.uint32(size) + place
    if math.prod(shape) > 2 ** 32:
      high = high + (low < place).astype(jnp.uint32)
  return low, high


def _words(a):
  """The bits of each element, in one uint32 or two."""
  if a.dtype == jnp.bool_:
    return [a.astype(jnp.uint32)]
  if not (jnp.issubdtype(a.dtype, jnp.integer) or jnp.issubdtype(a.dtype, jnp.floating)):
    raise TypeError(f'a digest is of real numbers and integers, not of {a.dtype}')
  bits = jnp.iinfo(a.dtype).bits if jnp.issubdtype(a.dtype, jnp.integer) else jnp.finfo(a.dtype).bits
  if bits < 8:  # no word of their own: all their values are int8's or float32's
    a, bits = (a.astype(jnp.int8), 8) if jnp.issubdtype(a.dtype, jnp.integer) else (a.astype(jnp.float32), 32)
  raw = jax.lax.bitcast_convert_type(a, jnp.dtype(f'uint{bits}'))
  return [raw.astype(jnp.uint32)] + ([(raw >> 32).astype(jnp.uint32)] if bits == 64 else [])


@jax.jit
def of_array(a) -> jax.Array:
  """The digest of an array of any shape and sharding → uint32 [2], replicated. TypeError for what is no
  array of numbers."""
  sharding = jax.typeof(a).sharding
  places = [jax.lax.broadcasted_iota(jnp.uint32, a.shape, axis, out_sharding=None if sharding.mesh.empty else sharding)
            for axis in range(a.ndim)]
  low, high = index_words(a.shape, places)
  place = _mixed(_mixed(high + jnp.uint32(_D)) ^ low)
  first = place
  for word in _words(a):
    first = _mixed(first ^ word)
  second = _mixed(first + place * jnp.uint32(_A) + jnp.uint32(_D))
  return jnp.stack([jnp.sum(word, dtype=jnp.uint32) for word in (first, second)])
