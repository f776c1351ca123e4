"""Small configs, meshes and batches that the tests share."""
import glob
import pathlib
import subprocess

import jax
import numpy as np

from jaxlm import config as configs, layout
from jaxlm.data import packing, pipeline, tokenizer
from jaxlm.schema import Config, MeshConfig, ModelConfig

BYTES = tokenizer.make('bytes', iter(()))
LLAMA = dict(D=32, H=8, G=4, K=8, F=64, N=3, V=264)
GPT2 = dict(LLAMA, G=8, K=4, P=64, norm='layer', position='learned', mlp='gelu', bias='all')
BERT = dict(GPT2, kind='encoder', norm_place='after', embed_norm=True, mlp='gelu_exact', T=2, C=2, head='mlm', pooler=True,
            output_bias=True)
TRANSFORMER = dict(LLAMA, kind='seq2seq', G=8, K=4, encoder_N=2, norm='layer', norm_place='after', position='sinusoidal',
                   mlp='relu', bias='all', scale_embedding=True)
T5 = dict(LLAMA, kind='seq2seq', G=8, K=4, encoder_N=2, position='relative', mlp='geglu', attention_scale=1., V=360, tied=False)
LSTM = dict(LLAMA, kind='rnn', N=2)
MODELS = {'llama': LLAMA, 'gpt2': GPT2, 'bert': BERT, 'transformer': TRANSFORMER, 't5': T5, 'lstm': LSTM,
          'gru': dict(LSTM, **{'rnn.cell': 'gru'}),
         'cho': dict(LSTM, kind='rnn_seq2seq', **{'rnn.cell': 'gru'}),
         'bahdanau': dict(LSTM, kind='rnn_seq2seq', **{'rnn.cell': 'gru', 'rnn.attention': 'bahdanau', 'rnn.bidirectional': True}),
         'luong': dict(LSTM, kind='rnn_seq2seq', **{'rnn.attention': 'luong'})}
NEXT = {'objective.name': 'next', 'objective.source': 24}
RUNS = {'bert': {'objective.name': 'pairs', 'objective.share': 0.25}, 'transformer': NEXT, 'cho': NEXT, 'bahdanau': NEXT, 'luong': NEXT,
        't5': {'objective.name': 'spans', 'objective.source': 48}, 'lstm': {'data.order': 'contiguous'}}
MESHES = [(1, 1, 1), (1, 8, 1), (1, 4, 2), (1, 2, 4), (2, 2, 2)]  # data, fsdp, tensor


def shipped(pattern: str = 'configs/**/*.py') -> list[str]:
  """The config files of the repository: of a checkout those that git knows, so that a user's own beside them is none of its tests'."""
  found = sorted(glob.glob(pattern, recursive=True))
  if not pathlib.Path('.git').exists():
    return found
  known = subprocess.run(['git', 'ls-files', 'configs'], check=True, capture_output=True, text=True).stdout.split()
  return [path for path in found if path in known]


def mesh_of(*sizes):
  return layout.make_mesh(MeshConfig(*sizes), jax.devices()[:int(np.prod(sizes))])


def model(family: str = 'llama', **changes) -> ModelConfig:
  return ModelConfig(**{**MODELS[family], **changes})


def config(family: str = 'llama', **changes) -> Config:
  """A tiny run; changes by flat key, as {'optimizer.lr': 1e-2}."""
  flat = {**{f'model.{k}': v for k, v in MODELS[family].items()}, **(RUNS[family] if family in RUNS else {})}
  return configs.from_flat({**flat, 'data.source': 'stdlib', 'batch': 8, 'length': 32, 'loss.chunks': 4, 'optimizer.warmup': 2,
                            'optimizer.lr': 1e-2, 'data.tokenizer': 'bytes', **changes})


def stream(seed: int = 0, documents: int = 40) -> packing.Stream:
  """Documents of bytes, 10 to 90 tokens long, each between boundaries, in memory."""
  rng = np.random.default_rng(seed)
  sizes = rng.integers(10, 90, documents)
  tokens = np.concatenate([[BYTES.boundary, *(40 + rng.integers(0, 12, n) ** 2 // 3), BYTES.boundary] for n in sizes])
  starts = np.concatenate([[0], np.cumsum(sizes + 2)])
  return packing.Stream((tokens,), np.array([0, len(tokens)]), starts)


def examples_of(c: Config, step: int = 0) -> dict[str, np.ndarray]:
  """A batch of the run's objective, as the pipeline makes it."""
  cache = packing.Cache({}, BYTES, {'train': stream()})
  return pipeline.Pipeline(c, cache).rows(step, 0, c.batch)


def batch(c: Config, seed: int = 0, ragged: bool = True) -> dict[str, np.ndarray]:
  """A packed batch as data/packing.py makes it; ragged: rows have different numbers of segments and weights."""
  rng = np.random.default_rng(seed)
  tokens_BM = rng.integers(0, c.model.V, (c.batch, c.length + 1), dtype=np.int32)
  segments_BM = np.ones_like(tokens_BM)
  positions_BM = np.broadcast_to(np.arange(c.length + 1, dtype=np.int32), tokens_BM.shape).copy()
  if ragged:
    for row in range(c.batch):
      for cut in sorted(rng.choice(np.arange(1, c.length), row % 4, replace=False)):
        segments_BM[row, cut:] += 1
        positions_BM[row, cut:] = np.arange(c.length + 1 - cut)
      if row % 3 == 0:
        segments_BM[row, c.length - 2 * row - 1:] = 0  # padding
  weights_BL = (segments_BM[:, :-1] == segments_BM[:, 1:]) & (segments_BM[:, 1:] > 0)
  return {'tokens': tokens_BM[:, :-1], 'targets': tokens_BM[:, 1:], 'segments': segments_BM[:, :-1],
          'positions': positions_BM[:, :-1], 'weights': weights_BL.astype(np.float32)}


def put(arrays):
  """Arrays [B, L] on the current mesh."""
  return jax.device_put(arrays, layout.spec('BL'))


def perturbed(params, seed: int = 0, scale: float = 0.1):
  """Parameters with noise on every one, so that norms of 1 and biases of 0 hide nothing."""
  leaves, tree = jax.tree.flatten(jax.device_get(params))
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(tree, [a + scale * rng.standard_normal(a.shape, np.float32) for a in leaves])


def assert_trees_close(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), **tolerance),
               jax.device_get(a), jax.device_get(b))


def assert_trees_equal(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)),
               jax.device_get(a), jax.device_get(b))


def put_params(values, like):
  """Host arrays with the shardings of `like`, a tree of device arrays."""
  return jax.tree.map(lambda v, a: jax.device_put(v, a.sharding), values, like)
