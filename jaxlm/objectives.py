"""What a model is trained on: (params, batch) → a sum to minimise, and sums and counts to report. What is asked of which
kind of model is in the batch (data/examples.py): here, it is all cross entropy."""
import jax.numpy as jnp

from jaxlm.data.rows import CHOICES
from jaxlm.errors import UsageError
from jaxlm.loss import cross_entropy
from jaxlm.models import heads, kinds
from jaxlm.models.output import Training
from jaxlm.schema import Config, lead


def token_loss(config: Config, params, batch, training: Training | None = None, carry=None):
  """Cross entropy of the targets. Returns (Σ loss, ({'nll': Σ nats, 'tokens': Σ weights}, carry)).

  A mixture's router losses are means over tokens, so they enter times the tokens; {'load': choices an expert, [N, E],
  'dropped': choices that none took} are reported too. They are means of a microbatch: with mixtures, the number of microbatches is part of the objective.
  With labels (objective pairs), next-sentence prediction enters times the tokens a row, and is reported as pairs_nll,
  pairs_right and pairs; of a mixture, by_task's too. carry: of a recurrent model, its state before and after the batch.
  """
  hidden = kinds.forward(config.model, params, batch, training, carry)
  loss, nll = cross_entropy(config.model, config.loss, hidden.x_BLD, hidden.unembed, batch['targets'], batch['weights'],
                            bool(config.tasks))
  sums = {'nll': nll.sum(), 'tokens': batch['weights'].sum(), **by_task(config, batch, nll)}
  if hidden.reports:
    moe = config.model.moe
    loss += sums['tokens'] * (moe.balance_loss * hidden.reports['balance'].sum() + moe.z_loss * hidden.reports['z'].sum())
    sums |= {'load': hidden.reports['load_E'], 'dropped': hidden.reports['dropped'].sum()}
  if 'labels' in batch:
    logits_BC = heads.of_pairs(config.model, params, hidden.pooled_BD)
    sums |= {'pairs_nll': heads.class_nll(logits_BC, batch['labels'][:, 0]).sum(), 'pairs': jnp.sum(jnp.ones_like(logits_BC[:, 0])),
             'pairs_right': jnp.sum(logits_BC.argmax(-1) == batch['labels'][:, 0]).astype(jnp.float32)}
    loss += lead(config).objective.next_sentence * sums['tokens'] * sums['pairs_nll'] / sums['pairs']
  return loss, (sums, hidden.carry)


def choice_loss(config: Config, params, batch, training: Training | None = None, carry=None):
  """Cross entropy of what is to be chosen (heads.choices): 'tokens' are choices, 'right' those whose likeliest is theirs."""
  hidden = kinds.forward(config.model, params, batch, training, carry)
  scores_BSC = heads.choices(config.model, params, hidden, batch['segments'])
  nll_BS = heads.class_nll(scores_BSC, batch['labels']) * batch['weights']
  loss = jnp.sum(nll_BS)
  right_BS = (scores_BSC.argmax(-1) == batch['labels']).astype(jnp.float32)
  return loss, ({'nll': loss, 'tokens': batch['weights'].sum(), 'right': jnp.sum(right_BS * batch['weights']),
                 **by_task(config, batch, nll_BS.sum(1))}, hidden.carry)


def by_task(config: Config, batch, nll_B) -> dict:
  """{'task_nll', 'task_tokens'}: sums of the rows of each task of a mixture, in order; {} of any other run."""
  if not config.tasks:
    return {}
  own_BK = (batch['task'] == jnp.arange(len(config.tasks))[None]).astype(jnp.float32)
  tokens_B1 = batch['weights'].sum(1, keepdims=True)
  return {'task_nll': jnp.sum(own_BK * nll_B[:, None], 0), 'task_tokens': jnp.sum(own_BK * tokens_B1, 0)}


def of(config: Config):
  """The objective that a config names."""
  if lead(config).objective.name in CHOICES:
    return choice_loss
  if config.model.head not in ('lm', 'mlm'):
    raise UsageError(f'model.head={config.model.head!r}: has no logits to train on texts; only lm and mlm do')
  return token_loss
