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
from jaxlm import config as configs, schema
from jaxlm.memory import tunables

SIZES = {  # name → sizes, batch, length, rounds
    'small': (dict(D=256, H=4, G=4, K=64, F=1024, N=4, V=4096, P=256), 16, 256, 20),
    '124m': (dict(D=768, H=12, G=12, K=64, F=3072, N=12, V=50_304, P=512), 4, 512, 6),
}


def config_of(size: str) -> schema.Config:
  model, batch, length, _ = SIZES[size]
  return configs.from_flat({**{f'model.{k}': v for k, v in model.items()}, 'model.norm': 'layer', 'model.mlp': 'gelu',
                            'model.position': 'learned', 'model.bias': 'all', 'model.scan': False, 'batch': batch,
                            'length': length, 'loss.chunks': 4})


def jaxlm_worker(size: str) -> None:
  import jax  # pylint: disable=g-import-not-at-top
  from jaxlm import layout, optimizer, step as steps
  c = config_of(size)
  model, batch, length, _ = SIZES[size]
  jax.set_mesh(layout.run_mesh(c))
  tx, schedule = optimizer.make_optimizer(c.optimizer, c.steps)
  state = jax.jit(lambda key: steps.init_state(c, tx, key))(jax.random.key(0))
  tokens = np.random.default_rng(0).integers(0, model['V'], (batch, length + 1), dtype=np.int32)
  ones = np.ones((batch, length), np.int32)
  arrays = jax.device_put({'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'segments': ones,
                           'positions': np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length)),
                           'weights': ones.astype(np.float32)}, layout.spec('BL'))
  train_step = jax.jit(steps.make_step(c, tx, schedule), donate_argnums=0)

  def step():
    nonlocal state
    state, sums = jax.block_until_ready(train_step(state, arrays))
    return float(sums['nll'] / sums['tokens'])
  step()
  serve(step)


def torch_worker(size: str) -> None:
  import torch  # pylint: disable=g-import-not-at-top
  import transformers
  m, batch, length, _ = SIZES[size]
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
  serve(step)


def compare(size: str, rounds: int, torch_memory: bool) -> float:
  _, batch, length, default = SIZES[size]
  memory = {'GLIBC_TUNABLES': tunables(schema.approximate_params(config_of(size).model))}
  worker = lambda name, env: ([__file__, f'--worker={name}', f'--size={size}'], {**os.environ, **env})
  results = race({'jaxlm': worker('jaxlm', memory), 'torch': worker('torch', memory if torch_memory else {})},
                 rounds or default)
  return report(f'{size:>6}', results, batch * length)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--size', default='both')
  parser.add_argument('--rounds', type=int, default=0)
  parser.add_argument('--torch_memory', action='store_true')
  parser.add_argument('--worker')
  args = parser.parse_args()
  if args.worker:
    {'jaxlm': jaxlm_worker, 'torch': torch_worker}[args.worker](args.size)
  else:
    for chosen in SIZES if args.size == 'both' else [args.size]:
      compare(chosen, args.rounds, args.torch_memory)
