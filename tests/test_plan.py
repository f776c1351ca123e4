"""Costs counted from a config against formulas of the literature and what the arrays are."""
import math

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxlm import config as configs, layout
from jaxlm.models import kinds, pipeline
from jaxlm.optimizer import path_of
from jaxlm.plan import cost
from jaxlm.schema import PipelineConfig

MESH = AbstractMesh((1,) * len(layout.AXES), layout.AXES, axis_types=(AxisType.Explicit,) * len(layout.AXES))


@pytest.mark.parametrize('name', ['llama3.py:8b', 'gpt2.py:124m', 'gemma2.py:9b', 'mixtral.py:8x7b', 'qwen3.py:30b-a3b', 'deepseek_v3.py'])
def test_weights_of_a_token_are_the_matrices_it_meets(name):
  m = configs.load(f'configs/{name}').model
  with jax.sharding.use_abstract_mesh(MESH):
    flat = jax.tree_util.tree_flatten_with_path(kinds.abstract_params(m))[0]
  total = 0
  for path, a in flat:
    path, size = path_of(path), math.prod(a.shape)
    if path.startswith('layers/moe/') and path.split('/')[2] in ('gate', 'up', 'down'):
      total += size * m.moe.top_k // m.moe.E
    elif path.endswith('/w') or path.endswith('/router') or path == ('embed' if m.tied else 'unembed'):
      total += size
  assert cost.weights_of_a_token(m) == total


def test_flops_of_llama_8b():
  """6 a weight and token; 12 a score, of which a causal mask leaves half (4,096 keys of 8,192)."""
  c = configs.load('configs/llama3_8b.py', [('batch', '128')])
  tokens = 128 * 8192
  weights = 32 * (2 * 4096 ** 2 + 2 * 4096 * 1024 + 3 * 4096 * 14_336) + 128_256 * 4096
  assert cost.model_flops(c) == pytest.approx(tokens * (6 * weights + 12 * 32 * 4096 * 4096), rel=1e-9)
  assert cost.mfu(c, 2 * cost.model_flops(c) / (128 * 459e12), 128, 459e12) == pytest.approx(0.5)


def test_a_window_is_what_a_loop_over_queries_counts():
  m = configs.from_flat({'model.pattern': 'local global', 'model.window': 7, 'model.N': 4}).model
  length = 64
  local = sum(min(i + 0.5, 7) for i in range(length)) / length  # continuous, as half of the length is
  assert cost.scores(m, length) == pytest.approx(2 * length / 2 + 2 * local, rel=0.01)


@pytest.mark.parametrize('pieces, stages, rounds, ticks', [(4, 2, 1, 5), (4, 2, 2, 9), (2, 4, 2, 9), (8, 4, 1, 11)])
def test_ticks_and_bubbles_of_a_pipeline(pieces, stages, rounds, ticks):
  """Against a simulation: a stage does a microbatch as soon as it is free and the one before has handed it over, rounds in turn."""
  free, ready = [0] * stages, {piece: 0 for piece in range(pieces)}
  for _ in range(rounds):
    for piece in range(pieces):
      for stage in range(stages):
        start = max(free[stage], ready[piece])
        free[stage] = ready[piece] = start + 1
  assert max(free) == ticks == pipeline.ticks(pieces, stages, rounds)
  assert pipeline.bubble(PipelineConfig(pieces, rounds), stages, pieces) == pytest.approx(1 - pieces * rounds / ticks)
