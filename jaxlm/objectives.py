"""What a model is trained on: (params, batch) → a sum to minimise, and sums and counts to report.

A batch is a dict of arrays [B, L] (see data/packing.py): tokens, targets, segments, positions int32; weights float32.
"""
from jaxlm.loss import cross_entropy
from jaxlm.models import decoder
from jaxlm.schema import Config


def causal_lm(config: Config, params, batch, dropout_key=None):
  """Next-token prediction. Returns (Σ loss, {'nll': Σ nats, 'tokens': Σ weights}); dropout only with a key.

  A mixture's router losses are means over tokens, so they enter times the tokens; {'load': choices an expert, [N, E]}
  is reported too. They are means of a microbatch: with mixtures, the number of microbatches is part of the objective.
  """
  x_BLD, unembed_VD, reports = decoder.forward(config.model, params, batch['tokens'], batch['positions'],
                                               batch['segments'], dropout_key)
  loss, nll = cross_entropy(config.model, config.loss, x_BLD, unembed_VD, batch['targets'], batch['weights'])
  sums = {'nll': nll, 'tokens': batch['weights'].sum()}
  if reports:
    moe = config.model.moe
    loss += sums['tokens'] * (moe.balance_loss * reports['balance'].sum() + moe.z_loss * reports['z'].sum())
    sums['load'] = reports['load_E']
  return loss, sums
