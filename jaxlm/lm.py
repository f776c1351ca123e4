"""A trained model as a Python object: `lm = jaxlm.load(workdir)`."""
import dataclasses
import functools
import pathlib

import jax
import numpy as np

from jaxlm import checkpoint, encode, generate, layout
from jaxlm.schema import Config, MeshConfig
from jaxlm.data import pipeline
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UsageError
from jaxlm.metrics import say
from jaxlm.models import cache, heads, kinds
from jaxlm.sampling import Sampling


_outputs = jax.jit(lambda cfg, params, batch: heads.outputs(cfg, params, kinds.forward(cfg, params, batch)), static_argnums=0)


@dataclasses.dataclass(frozen=True)
class LM:
  """Parameters on a mesh, with the tokenizer and config they were trained with."""
  config: Config
  tokenizer: Tokenizer
  params: dict
  mesh: jax.sharding.Mesh
  step: int

  def logits(self, tokens_BL, inputs_BM=None) -> np.ndarray:
    """float32 numpy logits [B, L, V] of token ids [B, L] (int; each row one document's beginning), which beside an encoder
    follow the ids [B, M] that it reads. UsageError for a model that makes none."""
    if self.config.model.head not in ('lm', 'mlm'):
      raise UsageError(f'model.head={self.config.model.head!r}: makes no logits; only lm and mlm do')
    return self.outputs(tokens_BL, inputs_BM)

  def outputs(self, tokens_BL, inputs_BM=None) -> np.ndarray:
    """float32 numpy, what the model is for (heads.outputs): logits, or scores of its classes, or hidden states [B, L, D]."""
    beside = self.config.model.kind in ('seq2seq', 'rnn_seq2seq')
    if beside != (inputs_BM is not None):
      raise UsageError(f'model.kind={self.config.model.kind}: {"wants" if beside else "has no use for"} inputs of an encoder')
    rows = len(tokens_BL)
    pad = lambda ids: np.pad(np.asarray(ids, np.int32), ((0, -rows % self.rows_multiple), (0, 0)))
    arrays = _one_document(pad(tokens_BL))
    if beside:
      names = {'tokens': 'inputs', 'positions': 'input_positions', 'segments': 'input_segments'}
      arrays |= {names[k]: a for k, a in _one_document(pad(inputs_BM)).items()}
    with jax.set_mesh(self.mesh):
      batch = pipeline.place(lambda low, high: {k: a[low:high] for k, a in arrays.items()}, len(arrays['tokens']), self.mesh)
      out = _outputs(self.config.model, self.params, batch)
    return np.asarray(jax.device_get(out), np.float32)[:rows]

  def scores(self, texts) -> np.ndarray:
    """float32 numpy scores of C classes, not normalised, of texts or pairs of texts: [B, C] with head=classify, [B, L, C] with
    tag and span, L the tokens of the longest text; −1e30 after those of a shorter. Texts are cut to config.length tokens."""
    return encode.scores(self, texts)

  def embed(self, texts) -> np.ndarray:
    """float32 numpy vectors [B, D] of texts, as model.pool and model.normalize say. Texts are cut to config.length tokens."""
    return encode.embed(self, texts)

  def generate(self, prompts: list[str], max_length: int = 100, temperature: float = 0.7, seed: int = 0, stop=(),
               stream=None, **sampling) -> list[str]:
    """Continuations of the prompts: up to max_length new tokens each; temperature 0 is greedy.

    sampling: the other fields of sampling.Sampling (top_k, top_p, num_beams, …); stop, stream: as generate.generate.
    """
    return generate.generate(self, prompts, max_length, Sampling(temperature, **sampling), seed, stop, stream)

  @functools.cached_property
  def decoding_params(self) -> dict:
    """The parameters as models/cache.py takes them: a second copy, made when something is first generated."""
    with jax.set_mesh(self.mesh):
      return cache.prepare(self.config.model, self.params)

  @functools.cached_property
  def reader(self):
    """What encodes texts for scores and embed."""
    return encode.reader(self)

  @functools.cached_property
  def stop_ids(self) -> set[int]:
    """Tokens that end a text: the boundary, and those of data.stop."""
    return {self.tokenizer.boundary, *self.tokenizer.ids_of(self.config.data.stop.split())}

  @property
  def rows_multiple(self) -> int:
    """Batches on this mesh have a multiple of so many rows."""
    return self.mesh.shape['data'] * self.mesh.shape['fsdp']


def _one_document(tokens_BL) -> dict:
  L = tokens_BL.shape[1]
  return {'tokens': tokens_BL, 'positions': np.broadcast_to(np.arange(L, dtype=np.int32), tokens_BL.shape),
          'segments': np.ones_like(tokens_BL)}


def load(workdir, step: int | None = None, mesh: MeshConfig | None = None) -> LM:
  """The newest good checkpoint of a workdir (or `step`) on all devices, laid out by `mesh` (the run's own if None).

  Raises UsageError (no such checkpoint; a mesh that does not fit), CheckpointError (none can be read).
  """
  made = {}

  def abstract(config: Config):
    config = dataclasses.replace(config, mesh=mesh or config.mesh, batch=2 ** 20)  # rows are padded to the mesh here
    made['mesh'] = layout.run_mesh(config)
    with jax.sharding.use_abstract_mesh(made['mesh'].abstract_mesh):
      return kinds.abstract_params(config.model), made['mesh']

  step, config, tokenizer, params = checkpoint.load(pathlib.Path(workdir), abstract, step, say)
  return LM(config, Tokenizer(tokenizer), params, made['mesh'], step)
