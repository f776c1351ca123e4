"""One decoder: GPT-2, Llama, Gemma, DeepSeek and the others are settings of its config."""
import functools

import jax

from jaxlm import layout
from jaxlm.kernels import context, on_mesh
from jaxlm.kernels.patterns import Rows
from jaxlm.models import attention, embedding, pipeline, relative, stack
from jaxlm.models.output import Hidden, Training
from jaxlm.schema import ModelConfig


def init_params(cfg: ModelConfig, key) -> dict:
  """Fresh parameters, born sharded: a nested dict, layers stacked (stack.py). Their values do not depend on the mesh."""
  vocabulary, around, layers = jax.random.split(key, 3)
  return {**embedding.init_vocabulary(cfg, vocabulary), **embedding.init_around(cfg, around),
          'layers': stack.init(cfg, layers)}


def forward(cfg: ModelConfig, params: dict, batch: dict, training: Training | None = None, carry=None) -> Hidden:
  """batch: tokens int32 [B, L] in [0, V), positions int32 (from 0 in each document), segments int32 (which document of the
  row; equal = may attend; 0 is padding)."""
  key = training and training.dropout
  batch = {name: context.zigzag(batch[name]) for name in ('tokens', 'positions', 'segments', 'types') if name in batch}
  x_BLD = embedding.embed(cfg, params['embed'], params, batch, key)
  x_BLD, reports = through(cfg, params, x_BLD, batch['positions'], batch['segments'], key)
  return Hidden(context.zigzag(x_BLD, back=True), embedding.unembedding(cfg, params), reports, carry)


def through(cfg: ModelConfig, around: dict, x_BLD, positions_BL, segments_BL, dropout_key=None, memory=None):
  """(x_BLD after all layers and the last norm, reports). memory: see stack.run; (memory_BMD, its segments_BM)."""
  rows = Rows(segments_BL, positions_BL)
  places_L = context.places(x_BLD.shape[1], layout.shards('L'))
  bias_HLM = relative.bias(cfg, around['relative'], places_L, places_L) if cfg.position == 'relative' else None

  def attend(rows, where, q_BLHK, k_BMGK, v_BMGK):
    across = where == attention.MEMORY
    k_rows = Rows(memory[1], memory[1]) if across else rows
    return on_mesh.attend(cfg, attention.how(cfg, where), q_BLHK, k_BMGK, v_BMGK, rows, k_rows,
                          None if across else bias_HLM), None
  attend_of = lambda rows: functools.partial(attend, rows)
  if layout.stages() > 1:
    x_BLD, reports = pipeline.run(cfg, around['layers'], x_BLD, rows, attend_of)
  else:
    x_BLD, reports = stack.run(cfg, around['layers'], x_BLD, rows, attend_of, dropout_key, memory and memory[0])
  return embedding.final_norm(cfg, around, x_BLD), reports
