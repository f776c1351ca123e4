"""A device whose copy differs in one bit is named."""
import jax
import numpy as np
import pytest
from jax import P

from jaxlm import loop, replicas, train as training
from jaxlm.checkpoint import steps
from jaxlm.errors import ReplicaError
from tests import common, matrix
from tests.test_checkpoint import run_config


def flipped(a, device, bit=0):
  """`a`, of whose piece on one device a bit differs."""
  def piece(shard):
    raw = np.array(shard.data)
    if shard.device == device:
      raw.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
    return jax.device_put(raw, shard.device)
  return jax.make_array_from_single_device_arrays(a.shape, a.sharding, [piece(s) for s in a.addressable_shards])


def tree(mesh):
  rng = np.random.default_rng(0)
  put = lambda value, *spec: jax.device_put(value, jax.NamedSharding(mesh, P(*spec)))
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  return {'over': {'fsdp': put(draw(8, 6), 'fsdp'), 'both': put(draw(8, 6), 'fsdp', 'tensor'), 'tensor': put(draw(4, 6), None, 'tensor')},
          'step': put(np.int32(7)), 'whole': put(draw(5).astype(jax.numpy.bfloat16))}


@pytest.mark.parametrize('sizes', [(8, 1, 1), (2, 2, 2), (1, 4, 2), (4, 2, 1)])
def test_the_device_that_differs_is_named(sizes):
  mesh = common.mesh_of(*sizes)
  with jax.set_mesh(mesh):
    good = tree(mesh)
    assert replicas.differing(good) == []
    replicas.check(good, 3, 0)
    for path, leaf in (('step', good['step']), ('whole', good['whole'])):  # on all 8 devices
      for device in jax.devices():
        assert replicas.differing({**good, path: flipped(leaf, device, 17)}) == [(path, [device])]
    for name, leaf in good['over'].items():
      copies = 8 // (np.prod([mesh.shape[axis] for axis in leaf.sharding.spec if axis]))
      for device in jax.devices()[::3]:
        found = replicas.differing({**good, 'over': {**good['over'], name: flipped(leaf, device)}})
        if copies == 1:
          assert found == []  # no other has that piece
        elif copies == 2:
          assert found[0][0] == f'over/{name}' and device in found[0][1] and len(found[0][1]) == 2
        else:
          assert found == [(f'over/{name}', [device])]


def test_two_devices_that_are_wrong():
  mesh = common.mesh_of(8, 1, 1)
  with jax.set_mesh(mesh):
    good = tree(mesh)
    bad = [jax.devices()[n] for n in (2, 5)]
    both = flipped(flipped(good['whole'], bad[0], 3), bad[1], 9)
    message = rf'^step 9: step on {bad[1]} of process 0 is not .*, nor are 1 more arrays; .*checkpoint 6'
    with pytest.raises(ReplicaError, match=message) as e:
      replicas.check({**good, 'whole': both, 'step': flipped(good['step'], bad[1])}, 9, 6)
    assert e.value.code == 14
    assert replicas.differing({**good, 'whole': both}) == [('whole', bad)]


def test_a_run_ends_before_it_saves_what_differs(texts, tmp_path, monkeypatch):
  read, device = loop.Loop._read, jax.devices()[5]

  def read_and_flip(self):
    if self._pending and self._pending[0] == 4:
      with jax.transfer_guard('allow'):
        self._state['params']['embed'] = jax.tree.map(lambda a: flipped(a, device, 40), self._state['params']['embed'])
    read(self)
  c = run_config(texts, **{'mesh.data': 8, 'mesh.fsdp': 1, 'mesh.tensor': 1, 'guard.replicas_every': 3})
  training.train(c, tmp_path / 'good')
  assert steps(tmp_path / 'good') == [3, 6, 9, 12]
  monkeypatch.setattr(loop.Loop, '_read', read_and_flip)
  with pytest.raises(ReplicaError, match=rf'step 6: .* on .*{device}.* checkpoint 3'):
    training.train(c, tmp_path / 'bad')
  assert steps(tmp_path / 'bad') == [3]
  matrix.record('F15', 'a bit of a parameter on 1 of 8 devices', 'exit code 14, the device is named', lost=3)
