"""Encoder and decoder: the Transformer of 2017, T5, BART and Marian are settings of the config."""
import dataclasses

import jax
import jax.numpy as jnp

from jaxlm.models import decoder, embedding, stack
from jaxlm.models.output import Hidden, Training
from jaxlm.schema import ModelConfig


def encoder_of(cfg: ModelConfig) -> ModelConfig:
  """The encoder's own config: of encoder_N layers, in which every token sees all others of its segment."""
  return dataclasses.replace(cfg, kind='encoder', N=cfg.encoder_N)


def init_params(cfg: ModelConfig, key) -> dict:
  """Fresh parameters: the decoder's as of a decoder, with layers that attend to a memory; the encoder's under 'encoder'."""
  vocabulary, around, layers, its_around, its_layers = jax.random.split(key, 5)
  its = encoder_of(cfg)
  return {**embedding.init_vocabulary(cfg, vocabulary), **embedding.init_around(cfg, around),
          'layers': stack.init(cfg, layers, across=True),
          'encoder': {**embedding.init_around(its, its_around), 'layers': stack.init(its, its_layers)}}


def encode(cfg: ModelConfig, params: dict, batch: dict, dropout_key=None):
  """(memory_BMD, reports) of batch['inputs'] at input_positions, in input_segments."""
  its, key = encoder_of(cfg), None if dropout_key is None else jax.random.fold_in(dropout_key, 0)
  x_BMD = embedding.embed(its, params['embed'], params['encoder'],
                          {'tokens': batch['inputs'], 'positions': batch['input_positions']}, key)
  return decoder.through(its, params['encoder'], x_BMD, batch['input_positions'], batch['input_segments'], key)


def forward(cfg: ModelConfig, params: dict, batch: dict, training: Training | None = None, carry=None) -> Hidden:
  """batch: inputs, input_positions, input_segments int32 [B, M] for the encoder; tokens, positions, segments [B, L] for the
  decoder, whose tokens see the inputs of their own segment (none, where it has none)."""
  key = training and training.dropout
  memory_BMD, reports = encode(cfg, params, batch, key)
  x_BLD = embedding.embed(cfg, params['embed'], params, batch, key)
  x_BLD, more = decoder.through(cfg, params, x_BLD, batch['positions'], batch['segments'], key,
                                (memory_BMD, batch['input_segments']))
  if reports and more:  # of mixtures in both stacks, the encoder's first
    more = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), reports, more)
  return Hidden(x_BLD, embedding.unembedding(cfg, params), more or reports, carry)
