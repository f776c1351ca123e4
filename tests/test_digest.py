"""The digest of an array is one number on every mesh, and another one after any change."""
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from jaxlm import digest

DTYPES = ['float32', 'bfloat16', 'float16', 'float8_e4m3fn', 'int32', 'int16', 'uint8', 'int8', 'uint32', 'bool']


def mixed(x):
  x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
  x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
  return x ^ x >> 16


def oracle(a):
  """In Python's integers, an element at a time."""
  a, sums = np.asarray(a), [0, 0]
  for index, element in enumerate(a.reshape(-1)):
    raw = int.from_bytes(element.tobytes(), 'little')
    place = mixed(mixed((index >> 32) + 0x27D4EB2F) ^ index & 0xFFFFFFFF)
    first = mixed(place ^ raw & 0xFFFFFFFF)
    if a.dtype.itemsize == 8:
      first = mixed(first ^ raw >> 32)
    second = mixed(first + place * 0x9E3779B9 + 0x27D4EB2F & 0xFFFFFFFF)
    sums = [sums[0] + first & 0xFFFFFFFF, sums[1] + second & 0xFFFFFFFF]
  return sums


def drawn(shape, dtype, seed=0):
  """Arrays of any bits."""
  rng = np.random.default_rng(seed)
  if dtype == 'bool':
    return rng.integers(0, 2, shape).astype(bool)
  size = np.dtype(dtype).itemsize
  return np.frombuffer(rng.bytes(int(np.prod(shape)) * size), dtype).reshape(shape)


of_array = jax.jit(digest.of_array)


@pytest.mark.parametrize('sizes, spec', [
    ((8,), P('a')), ((8,), P(None, 'a')), ((4, 2), P('a', 'b')), ((2, 4), P('b', 'a')), ((2, 4), P(('a', 'b'))), ((4, 2), P()),
    ((1,), P('a'))])
@pytest.mark.parametrize('kind', [AxisType.Explicit, AxisType.Auto])
def test_one_digest_on_every_mesh(sizes, spec, kind):
  mesh = jax.make_mesh(sizes, ('a', 'b')[:len(sizes)], devices=jax.devices()[:int(np.prod(sizes))], axis_types=(kind,) * len(sizes))
  sharding = jax.sharding.NamedSharding(mesh, spec)
  for dtype in ('float32', 'bfloat16', 'bool'):
    value = drawn((16, 8, 3), dtype)
    with jax.set_mesh(mesh):
      assert of_array(jax.device_put(value, sharding)).tolist() == oracle(value)
    assert of_array(jax.device_put(value, sharding)).tolist() == oracle(value)


@pytest.mark.parametrize('dtype', [getattr(ml_dtypes, d, d) for d in DTYPES])
@pytest.mark.parametrize('shape', [(), (1,), (33,), (5, 7), (2, 3, 4, 5), (0, 3)])
def test_of_any_type_and_shape(dtype, shape):
  assert of_array(drawn(shape, dtype)).tolist() == oracle(drawn(shape, dtype))


@pytest.mark.parametrize('dtype', ['float64', 'int64', 'uint64'])
def test_of_two_words(dtype):
  with jax.enable_x64(True):
    assert jax.jit(digest.of_array)(drawn((6, 5), dtype)).tolist() == oracle(drawn((6, 5), dtype))


def test_of_what_is_no_number():
  with pytest.raises(TypeError, match='complex64'):
    of_array(np.zeros(3, np.complex64))


def test_a_bit_that_flips_changes_it():
  rng, value = np.random.default_rng(1), drawn((64, 32), 'float32').copy()
  before, bits = of_array(value).tolist(), value.reshape(-1).view(np.uint32)
  for _ in range(1000):
    where, bit = rng.integers(bits.size), np.uint32(1 << rng.integers(32))
    bits[where] ^= bit
    changed = of_array(value).tolist()
    assert changed[0] != before[0]  # the first word alone would do: for one element the mix is one to one
    assert changed[1] != before[1]
    bits[where] ^= bit
  assert of_array(value).tolist() == before


def test_two_elements_that_change_places_change_it():
  rng, value = np.random.default_rng(2), drawn((40, 50), 'int32').copy()
  before, flat, done = of_array(value).tolist(), value.reshape(-1), 0
  while done < 200:
    i, j = rng.integers(flat.size, size=2)
    if flat[i] != flat[j]:
      flat[[i, j]] = flat[[j, i]]
      assert of_array(value).tolist() != before
      flat[[i, j]] = flat[[j, i]]
      done += 1


def test_zeros_of_different_lengths_differ():
  assert len({tuple(of_array(np.zeros(n, np.float32)).tolist()) for n in range(50)}) == 50
  assert of_array(np.float32(0)).tolist() != of_array(np.float32(-0.)).tolist()


@pytest.mark.parametrize('shape', [
    (3, 5), (2 ** 16, 2 ** 16), (2 ** 17, 2 ** 16 + 1, 3), (2 ** 31 - 1, 2 ** 31 - 1), (7, 2 ** 20, 2 ** 20)])
def test_the_index_of_more_than_fits_one_word(shape):
  rng = np.random.default_rng(3)
  places = [np.concatenate([[0, n - 1], rng.integers(0, n, 100)]) for n in shape]
  low, high = digest.index_words(shape, [jnp.asarray(p, jnp.uint32) for p in places])
  expected = [sum(int(p[k]) * int(np.prod(shape[d + 1:], dtype=object)) for d, p in enumerate(places)) for k in range(102)]
  assert [int(l) + (int(h) << 32) for l, h in zip(low, jnp.broadcast_to(high, low.shape))] == expected
