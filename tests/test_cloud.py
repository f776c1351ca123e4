"""Clouds' names of pods against the clouds' own tables."""
import math

import pytest

from jaxlm import config as configs
from jaxlm.errors import UsageError
from jaxlm.plan import cloud, shapes
from jaxlm.plan.chips import CHIPS
from jaxlm.plan.topology import parse

# Rows of docs.cloud.google.com/tpu/docs/v5p and …/v4 (topology, cores, chips, hosts), …/v5e (topology, chips, hosts of 8) and …/v6e
# (topology, chips, machines of 4), of xpk's system_characteristics.py (tpu7x, and v5p's odd sizes), and of the pages on machines.
ACCELERATORS = {
    'v5p-8': 'v5p:2x2x1', 'v5p-16': 'v5p:2x2x2', 'v5p-32': 'v5p:2x2x4', 'v5p-64': 'v5p:2x4x4', 'v5p-128': 'v5p:4x4x4', 'v5p-256': 'v5p:4x4x8',
    'v5p-512': 'v5p:4x8x8', 'v5p-1024': 'v5p:8x8x8', 'v5p-2048': 'v5p:8x8x16', 'v5p-4096': 'v5p:8x16x16', 'v5p-8192': 'v5p:16x16x16',
    'v5p-12288': 'v5p:16x16x24', 'v5p-384': 'v5p:4x4x12', 'v5p-640': 'v5p:4x4x20', 'v5p-768': 'v5p:4x8x12', 'v5p-1152': 'v5p:4x12x12',
    'v5p-1280': 'v5p:4x8x20', 'v5p-1536': 'v5p:8x8x12', 'v5p-1792': 'v5p:4x8x28', 'v5p-2304': 'v5p:8x12x12', 'v5p-3072': 'v5p:8x12x16',
    'v5p-3456': 'v5p:12x12x12', 'v5p-4608': 'v5p:12x12x16', 'v5p-6144': 'v5p:12x16x16', 'v5p-9216': 'v5p:12x16x24',
    'v5p-17920': 'v5p:16x20x28',
    'v4-8': 'v4:2x2x1', 'v4-16': 'v4:2x2x2', 'v4-32': 'v4:2x2x4', 'v4-64': 'v4:2x4x4', 'v4-128': 'v4:4x4x4', 'v4-256': 'v4:4x4x8',
    'v4-512': 'v4:4x8x8', 'v4-1024': 'v4:8x8x8', 'v4-1536': 'v4:8x8x12', 'v4-2048': 'v4:8x8x16', 'v4-4096': 'v4:8x16x16',
    'v5litepod-8': 'v5e:2x4', 'v5litepod-16': 'v5e:4x4', 'v5litepod-32': 'v5e:4x8', 'v5litepod-64': 'v5e:8x8', 'v5litepod-128': 'v5e:8x16',
    'v5litepod-256': 'v5e:16x16', 'v5e-64': 'v5e:8x8',
    'v6e-4': 'v6e:2x2', 'v6e-8': 'v6e:2x4', 'v6e-16': 'v6e:4x4', 'v6e-32': 'v6e:4x8', 'v6e-64': 'v6e:8x8', 'v6e-128': 'v6e:8x16',
    'v6e-256': 'v6e:16x16',
    'tpu7x-8': 'tpu7x:2x2x1', 'tpu7x-16': 'tpu7x:2x2x2', 'tpu7x-32': 'tpu7x:2x2x4', 'tpu7x-64': 'tpu7x:2x4x4', 'tpu7x-128': 'tpu7x:4x4x4',
    'tpu7x-256': 'tpu7x:4x4x8', 'tpu7x-512': 'tpu7x:4x8x8', 'tpu7x-1024': 'tpu7x:8x8x8', 'tpu7x-8192': 'tpu7x:16x16x16',
    'tpu7x-4x4x8': 'tpu7x:4x4x8', 'v5p-4x4x16': 'v5p:4x4x16', 'v5litepod-4x8': 'v5e:4x8',
    'tpu-v5p-slice:4x4x8': 'v5p:4x4x8', 'tpu-v6e-slice:8x8': 'v6e:8x8', 'tpu-v5-lite-podslice:4x4': 'v5e:4x4', 'tpu-v4-podslice:2x2x4': 'v4:2x2x4',
}
MACHINES = {
    'ct5p-hightpu-4t': 'v5p:2x2x1', 'ct5p-hightpu-4t:32': 'v5p:4x4x8', 'ct5p-hightpu-4t x 32': 'v5p:4x4x8', 'ct5p-hightpu-4t × 1024': 'v5p:16x16x16',
    'ct4p-hightpu-4t:16': 'v4:4x4x4', 'ct6e-standard-4t:16': 'v6e:8x8', 'ct6e-standard-4t:64': 'v6e:16x16', 'ct6e-standard-4t:2': 'v6e:2x4',
    'ct6e-standard-8t': 'v6e:2x4', 'ct5lp-hightpu-4t:4': 'v5e:4x4', 'ct5lp-hightpu-4t:64': 'v5e:16x16', 'ct5lp-hightpu-8t': 'v5e:2x4',
    'tpu7x-standard-4t:16': 'tpu7x:4x4x4',
    'a2-highgpu-8g:2': 'a100-40gb:2x8', 'a2-ultragpu-8g:2': 'a100:2x8', 'a3-highgpu-8g:16': 'h100:16x8', 'a3-megagpu-8g:4': 'h100:4x8',
    'a3-megagpu-8g': 'h100:1x8', 'a3-ultragpu-8g:16': 'h200:16x8', 'a4-highgpu-8g:16': 'b200:16x8',
    'p4d.24xlarge:2': 'a100-40gb:2x8', 'p4de.24xlarge:2': 'a100:2x8', 'p5.48xlarge:16': 'h100:16x8', 'p5e.48xlarge': 'h200:1x8',
    'p5en.48xlarge:3': 'h200:3x8', 'p6-b200.48xlarge': 'b200:1x8',
    'Standard_ND96asr_v4:2': 'a100-40gb:2x8', 'Standard_ND96amsr_A100_v4:2': 'a100:2x8', 'Standard_ND96isr_H100_v5:16': 'h100:16x8',
    'Standard_ND96isr_H200_v5': 'h200:1x8',
}
NETWORK = {  # Gb/s of a host's GPUs: cloud.google.com/compute/docs/gpus/gpu-network-bandwidth, AWS's and Azure's pages
    'a3-highgpu-8g:16': 800, 'a3-megagpu-8g:16': 1600, 'a3-ultragpu-8g:16': 3200, 'p4d.24xlarge:16': 400, 'p5.48xlarge:16': 3200,
    'Standard_ND96asr_v4:16': 1600}


@pytest.mark.parametrize('name', [*ACCELERATORS, *MACHINES])
def test_clouds_names_are_pods_of_ours(name):
  ours = {**ACCELERATORS, **MACHINES}[name]
  pod, own = parse(name), parse(ours)
  assert (pod.name, pod.kind, pod.shape, pod.devices) == (ours, own.kind, own.shape, own.devices)
  assert pod.understood.startswith(f'{name} = ') and pod.understood.endswith(ours) and own.understood == ''


@pytest.mark.parametrize('name', [name for name in ACCELERATORS if name.rpartition('-')[2].isdigit()])
def test_counts_are_of_tensorcores_or_of_chips(name):
  """v4, v5p and TPU7x have two TensorCores a chip (docs.cloud.google.com/tpu/docs/system-architecture), v5e and v6e one."""
  prefix, count = name.split('-')
  assert parse(name).chips == int(count) // (2 if prefix in ('v4', 'v5p', 'tpu7x') else 1)


@pytest.mark.parametrize('name', NETWORK)
def test_gpus_have_the_network_of_their_cloud(name):
  pod = parse(name)
  assert pod.chip.out == pytest.approx(NETWORK[name] * 1e9 / 8 / 8)  # bits to bytes; eight GPUs a host
  assert parse(pod.name).chip == CHIPS[pod.kind]  # our own name: as its maker builds it


def test_what_was_understood_is_said():
  assert parse('v5p-256').understood == 'v5p-256 = 128 chips (v5p-N counts TensorCores, 2 a chip), v5p:4x4x8'
  assert parse('v5p-1024').understood.startswith('v5p-1024 = 512 chips, the default of 2 shapes')  # 8x8x8, and 4x8x16
  assert parse('ct5p-hightpu-4t:32').understood == 'ct5p-hightpu-4t:32 = 32 hosts of 4 chips = 128 chips, v5p:4x4x8'
  assert parse('a3-highgpu-8g:16').understood == 'a3-highgpu-8g:16 = 16 hosts of 8 h100, 800 Gb/s from a host to others, h100:16x8'
  assert parse('v6e-64', 4).devices == 256


@pytest.mark.parametrize('name, said', [
    ('v5p-100', 'v5p-N counts TensorCores, 2 a chip, and no v5p slice has 100 of them; near it are v5p-128, v5p-64'),
    ('v5p-255', 'no v5p slice has 255 of them'), ('v6e-96', 'v6e-N counts chips, and no v6e slice has 96 of them; near it are v6e-128, v6e-64'),
    ('ct5p-hightpu-4t:3', 'no v5p slice has 12 chips; near it are ct5p-hightpu-4t:4'),
    ('ct6e-standard-8t:4', 'no slice has several ct6e-standard-8t; say ct6e-standard-4t:8'), ('a3-highgpu-8g:0', 'as a3-highgpu-8g:16'),
    ('ct5p-hightpu-4', 'did you mean .*ct5p-hightpu-4t'), ('p5.24xlarge:2', 'did you mean .*p5.48xlarge'), ('v5-256', 'did you mean .*v5p-256'),
    ('tpu-v5p-slice:4x4x9', 'no such v5p slice; near it are v5p:4x4x8'), ('a3-mega-8g', 'did you mean .*a3-megagpu-8g'),
    ('nonsense', 'v5p-256, ct5p-hightpu-4t:32, a3-highgpu-8g:16')])
def test_unknown_names_list_near_ones(name, said):
  with pytest.raises(UsageError, match=f'--topology={name}: .*{said}'):
    parse(name)


def test_the_default_shape_is_the_most_like_a_cube():
  """Of all shapes of a count the one with the least surface (cloud.google.com/tpu/docs/types-topologies: "most similar to a cube")."""
  surface = lambda s: s[0] * s[1] + s[1] * s[2] + s[0] * s[2]
  for kind in shapes.CUBES:
    for chips in sorted(set(map(math.prod, shapes.known(kind)))):
      found = shapes.of_chips(kind, chips)
      assert surface(found[0]) == min(map(surface, found)) and all(math.prod(s) == chips and shapes.exists(kind, s) for s in found)


def test_recommendations_are_found_by_clouds_names_too():
  for name, ours in (('v5p-256', 'v5p:4x4x8'), ('ct6e-standard-4t:64', 'v6e:16x16')):
    assert configs.load(f'configs/llama3.py:8b@{name}') == configs.load(f'configs/llama3.py:8b@{ours}')
  with pytest.raises(UsageError, match='--config=configs/llama3.py:8b@v5p-100: v5p-N counts TensorCores'):
    configs.load('configs/llama3.py:8b@v5p-100')
  assert cloud.ours('v5p:4x4x8') == 'v5p:4x4x8'
