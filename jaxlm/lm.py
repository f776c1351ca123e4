"""A trained model as a Python object: `lm = jaxlm.load(workdir)`."""
import dataclasses
import functools
import pathlib

import jax
import numpy as np

from jaxlm import encode, generate, layout, resume
from jaxlm.schema import Config, LoraConfig, MeshConfig, of_task
from jaxlm.data import forms, pipeline
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UsageError
from jaxlm.metrics import say
from jaxlm.models import cache, heads, kinds, lora, ngram
from jaxlm.sampling import Sampling
from jaxlm.validate import check_weights


_outputs = jax.jit(lambda cfg, params, batch: heads.outputs(cfg, params, kinds.forward(cfg, params, batch)), static_argnums=0)


@dataclasses.dataclass(frozen=True)
class LM:
  """Parameters on a mesh (of kind ngram: in numpy), with the tokenizer and config they were trained with."""
  config: Config
  tokenizer: Tokenizer
  params: dict
  mesh: jax.sharding.Mesh
  step: int

  def of(self, name: str) -> 'LM':
    """The model of a mixture at one of its tasks: asked and scored as a run that has this task alone."""
    tasks = {task.name: task for task in self.config.tasks}
    if name not in tasks:
      raise UsageError(f'task {name!r}: the run has {", ".join(tasks) or "none"}')
    return dataclasses.replace(self, config=of_task(self.config, tasks[name]))

  def logits(self, tokens_BL, inputs_BM=None) -> np.ndarray:
    """float32 numpy logits [B, L, V] of token ids [B, L] (int; each row one document's beginning), which beside an encoder
    follow the ids [B, M] that it reads. UsageError for a model that makes none."""
    if self.config.model.head not in ('lm', 'mlm'):
      raise UsageError(f'model.head={self.config.model.head!r}: makes no logits; only lm and mlm do')
    if self.config.model.kind == 'ngram':
      return self._log_probabilities(np.asarray(tokens_BL, np.int32))
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

  def tag(self, sentences) -> list[list[str]]:
    """The likeliest of data.classes for each word of each sentence, a list of words; a long sentence is read in parts."""
    return encode.tags(self, sentences)

  def answer(self, questions, contexts) -> list[str]:
    """What of each context answers its question, '' if nothing does; a long context is read in parts that overlap by half."""
    return encode.answers(self, questions, contexts)

  def embed(self, texts) -> np.ndarray:
    """float32 numpy vectors [B, D] of texts, as model.pool and model.normalize say. Texts are cut to config.length tokens."""
    return encode.embed(self, texts)

  def _log_probabilities(self, tokens_BL) -> np.ndarray:
    out_BLV = np.full((*tokens_BL.shape, self.config.model.V), -np.inf, np.float32)
    for out_LV, ids in zip(out_BLV, map(self.symbols, tokens_BL)):
      for at in range(len(ids)):
        out_LV[at, :self.counted.V] = np.log(self.counted.distribution(ids[:at + 1]))
    return out_BLV

  @functools.cached_property
  def counted(self) -> ngram.NGram:
    """The n-gram that the parameters of kind ngram are."""
    m = self.config.model
    return ngram.NGram(m.vocab or m.V, [self.params[f'level_{k}'] for k in range(1, m.ngram.order + 1)])

  def symbols(self, ids) -> np.ndarray:
    """Token ids as `counted` takes them: what opens a document is START."""
    ids = np.asarray(ids, np.int64)
    return np.where((ids == self.tokenizer.boundary) | (ids == self.tokenizer.opening), self.counted.V, ids)

  def generate(self, prompts: list[str], max_length: int = 100, temperature: float = 0.7, seed: int = 0, stop=(),
               stream=None, **sampling) -> list[str]:
    """Continuations of the prompts: up to max_length new tokens each; temperature 0 is greedy.

    sampling: the other fields of sampling.Sampling (top_k, top_p, num_beams, …); stop, stream: as generate.generate.
    """
    return generate.generate(self, prompts, max_length, Sampling(temperature, **sampling), seed, stop, stream)

  def prompt(self, text) -> list[int]:
    """Ids of a text to go on from; of a question, where the model was trained to answer; of messages (forms.chat_prompt), where
    it was trained on chats. UsageError for a mixture."""
    if self.config.tasks:
      raise UsageError(f'a mixture of {", ".join(t.name for t in self.config.tasks)}: name the one to ask (--of=NAME, LM.of)')
    if self.config.data.form == 'chat':
      return forms.chat_prompt(self.tokenizer, self.config.data, text)
    if self.config.objective.name != 'answer':
      return self.tokenizer.prompt(text)
    boundary, ids, source = self.tokenizer.boundary, self.tokenizer.encode(text), self.config.objective.source
    return [*ids[:source - 1], boundary] if source else [boundary, *ids, boundary]  # cut as in training: data/asked.py

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
    """Tokens that end a text: the boundary, those of data.stop, and what ends what a chat's assistant says."""
    data = self.config.data
    ends = self.tokenizer.encode_template(forms.parts(data.template, '')[1])[:1] if data.form == 'chat' else []
    return {self.tokenizer.boundary, *self.tokenizer.ids_of(data.stop.split()), *ends}

  @property
  def rows_multiple(self) -> int:
    """Batches on this mesh have a multiple of so many rows."""
    return layout.shards('B', sizes=self.mesh.shape)


def _one_document(tokens_BL) -> dict:
  L = tokens_BL.shape[1]
  return {'tokens': tokens_BL, 'positions': np.broadcast_to(np.arange(L, dtype=np.int32), tokens_BL.shape),
          'segments': np.ones_like(tokens_BL)}


def load(workdir, step: int | None = None, mesh: MeshConfig | None = None, merge: bool = True) -> LM:
  """The newest good checkpoint of a workdir (or `step`) on all devices, laid out by `mesh`, the run's own if None, as layout.serving
  makes it.
  merge: pairs of low rank are added into the weights; else they stay params['lora'].

  Raises UsageError (no such checkpoint; a mesh that does not fit), CheckpointError (none can be read).
  """
  made = {}

  def abstract(config: Config):
    if config.model.kind == 'ngram':
      if mesh:
        raise UsageError(f'--mesh={mesh.data},{mesh.fsdp},{mesh.tensor}: an n-gram is on the host; leave it out')
      made['mesh'] = layout.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])  # for sampling alone
      return None, made['mesh']
    made['mesh'] = layout.make_mesh(layout.serving(mesh or config.mesh))
    check_weights(config.model, dict(made['mesh'].shape))  # rows are those that are asked for, padded to the mesh
    with jax.sharding.use_abstract_mesh(made['mesh'].abstract_mesh):
      return kinds.abstract_params(config.model), made['mesh']

  step, config, tokenizer, params = resume.load(pathlib.Path(workdir), abstract, step, say)
  if config.model.lora.rank and merge:  # from here on it is a model like any other
    with jax.set_mesh(made['mesh']):
      params = jax.jit(lora.merged, static_argnums=0)(config.model, params)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=LoraConfig()))
  return LM(config, Tokenizer(tokenizer), params, made['mesh'], step)
