"""GPT-2 training steps beside transformers' GPT2LMHeadModel in torch, on the same cores, in turn.

    python benchmarks/gpt2_step.py [--size=124m|small|both] [--rounds=N]

Both do the same work: float32, no dropout, forward, backward, clip at 1.0, AdamW; random tokens; see interleaved.py. Above
1, jaxlm is faster. jaxlm keeps its memory as its command line does (jaxlm/memory.py); torch is run as people run it, or with
--torch_memory in the same way.
"""
import argparse
import os

import numpy as np

from interleaved import race, report, serve
from running import parse, parser
from jaxlm import config as configs, schema
from jaxlm.memory import tunables
from jaxlm.plan import cost

SIZES = {  # name → sizes, batch, length, rounds
    'small': (dict(D=256, H=4, G=4, K=64, F=1024, N=4, V=4096, P=256), 16, 256, 20),
    '124m': (dict(D=768, H=12, G=12, K=64, F=3072, N=12, V=50_304, P=512), 4, 512, 6),
}
SHORT = {'tiny': (dict(D=32, H=4, G=4, K=8, F=64, N=2, V=256, P=16), 2, 16, 2)}


def config_of(size: str) -> schema.Config:
  model, batch, length, _ = {**SIZES, **SHORT}[size]
  return configs.from_flat({**{f'model.{k}': v for k, v in model.items()}, 'model.norm': 'layer', 'model.mlp': 'gelu',
                            'model.position': 'learned', 'model.bias': 'all', 'model.scan': False, 'batch': batch,
                            'length': length, 'loss.chunks': 4})


def jaxlm_step(flags: argparse.Namespace):
  """A step of jaxlm's, as a function → the loss; compiled, and run once."""
  import jax  # pylint: disable=g-import-not-at-top
  from jaxlm import layout, optimizer, step as steps
  c = config_of(flags.size)
  tokens_BM = np.random.default_rng(0).integers(0, c.model.V, (c.batch, c.length + 1), dtype=np.int32)
  ones_BL = np.ones((c.batch, c.length), np.int32)
  mesh = layout.run_mesh(c)
  with jax.set_mesh(mesh):
    tx, schedule = optimizer.make_optimizer(c.optimizer, c.steps)
    state = jax.jit(lambda key: steps.init_state(c, tx, key))(jax.random.key(0))
    arrays = jax.device_put({'tokens': tokens_BM[:, :-1], 'targets': tokens_BM[:, 1:], 'segments': ones_BL,
                             'positions': np.broadcast_to(np.arange(c.length, dtype=np.int32), ones_BL.shape),
                             'weights': ones_BL.astype(np.float32)}, layout.spec('BL'))
    train_step = jax.jit(steps.make_step(c, tx, schedule), donate_argnums=0)

  def step():
    nonlocal state
    with jax.set_mesh(mesh):
      state, sums = jax.block_until_ready(train_step(state, arrays))
    return float(sums['nll'] / sums['tokens'])
  step()
  return step


def torch_step(flags: argparse.Namespace):
  """The same of torch's."""
  import torch  # pylint: disable=g-import-not-at-top
  import transformers
  m, batch, length, _ = {**SIZES, **SHORT}[flags.size]
  torch.set_num_threads(os.cpu_count())
  model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
      n_embd=m['D'], n_head=m['H'], n_layer=m['N'], n_inner=m['F'], vocab_size=m['V'], n_positions=m['P'],
      resid_pdrop=0., embd_pdrop=0., attn_pdrop=0., use_cache=False, bos_token_id=0, eos_token_id=0)).train()
  adam = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
  tokens = torch.randint(0, m['V'], (batch, length))

  def step():
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
    adam.step()
    adam.zero_grad()
    return loss.item()
  step()
  return step


WORKERS = {'jaxlm': jaxlm_step, 'torch': torch_step}


def compare(flags: argparse.Namespace, size: str) -> float:
  _, batch, length, rounds = {**SIZES, **SHORT}[size]
  memory = {'GLIBC_TUNABLES': tunables(cost.approximate_params(config_of(size).model))}
  env = {'jaxlm': memory, **({'torch': memory} if flags.torch_memory else {})}
  return report(f'{size:>6}', race(flags, __file__, WORKERS, flags.rounds or rounds, env, size=size), batch * length)


def main() -> None:
  p = parser(__doc__)
  p.add_argument('--size', default='both')
  p.add_argument('--rounds', type=int, default=0)
  p.add_argument('--torch_memory', action='store_true')
  p.add_argument('--worker')
  flags = parse(p, size='tiny')
  if flags.worker:
    serve(WORKERS[flags.worker](flags))
    return
  for size in SIZES if flags.size == 'both' else [flags.size]:
    compare(flags, size)


if __name__ == '__main__':
  main()
