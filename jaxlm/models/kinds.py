"""Kinds of models. Each is a module with init_params(cfg, key) → params and forward(cfg, params, batch, training, carry) →
output.Hidden; what a batch holds is said in data/examples.py."""
import functools

import jax

from jaxlm.models import decoder, encoder, lora, output, rnn, rnn_seq2seq, seq2seq
from jaxlm.schema import ModelConfig

KINDS = {'decoder': decoder, 'encoder': encoder, 'seq2seq': seq2seq, 'rnn': rnn,
         'rnn_seq2seq': rnn_seq2seq}


def init_params(cfg: ModelConfig, key) -> dict:
  """Fresh parameters, born sharded, the same on every mesh."""
  params = KINDS[cfg.kind].init_params(cfg, key)
  return {**params, 'lora': lora.init(cfg, params, jax.random.fold_in(key, 1))} if cfg.lora.rank else params


def abstract_params(cfg: ModelConfig):
  """Shapes, dtypes and shardings of the parameters under the current mesh; nothing is allocated."""
  return jax.eval_shape(functools.partial(init_params, cfg), jax.eval_shape(lambda: jax.random.key(0)))


def forward(cfg: ModelConfig, params: dict, batch: dict, training: output.Training | None = None,
            carry=None) -> output.Hidden:
  """training: only there; carry: of a recurrent model, its state before the batch; None is that before a document."""
  return KINDS[cfg.kind].forward(cfg, lora.merged(cfg, params), batch, training, carry)


def empty_carry(cfg: ModelConfig, B: int):
  """The carry before a document, B rows of it. Kinds that have none are no good with data.order=contiguous."""
  return KINDS[cfg.kind].empty_carry(cfg, B)


def logits(cfg: ModelConfig, params: dict, batch: dict):
  """float32 logits_BLV, all of them."""
  return output.logits(cfg, forward(cfg, params, batch))
