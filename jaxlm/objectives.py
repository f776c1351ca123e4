"""What a model is trained on: (params, batch) → a sum to minimise, and sums and counts to report.

A batch is a dict of arrays [B, L] (see data/packing.py): tokens, targets, segments, positions int32; weights float32.
"""
from jaxlm.config import Config
from jaxlm.loss import cross_entropy
from jaxlm.models.decoder import Decoder


def causal_lm(config: Config, params, batch, dropout_key=None):
  """Next-token prediction. Returns (Σ loss, {'nll': Σ nats, 'tokens': Σ weights}); dropout only with a key."""
  train = dropout_key is not None
  x_BLD, unembed_VD = Decoder(config.model).apply(
      {'params': params}, batch['tokens'], batch['positions'], batch['segments'], train,
      rngs={'dropout': dropout_key} if train else None)
  loss, nll = cross_entropy(config.loss.chunks, not config.model.scan, config.loss.z_loss, x_BLD, unembed_VD,
                            batch['targets'], batch['weights'])
  return loss, {'nll': nll, 'tokens': batch['weights'].sum()}
