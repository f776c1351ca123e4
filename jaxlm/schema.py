"""The config of a run: frozen dataclasses, each key with its one meaning.

One alphabet names sizes here, suffixes of arrays, einsum subscripts and rows of the sharding table:

    B batch   L length   M memory/key length   D model   H query heads   G key-value heads   K head dim
    F ffn     V vocab    N layers              P positions   E experts   R low rank
    C classes    T token types    S selected places or choices    J gates of a cell

config.py reads them, validate.py checks them; none of the three imports jax.
"""
import dataclasses
import math
import re

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary positions (Su et al. 2021), and how they reach beyond the length they were trained on."""
  base: float = 10_000.
  share: float = 1.         # of the head dim that is turned (GPT-NeoX: 0.25)
  local_base: float = 0.    # of 'local' layers, which are never scaled (Gemma 3); 0: as all others
  scaling: str = 'none'     # none | linear | llama3 | yarn
  factor: float = 1.        # how many times `original`
  original: int = 0         # positions trained on before (llama3, yarn)
  low: float = 1.           # llama3: low_freq_factor; yarn: beta_slow
  high: float = 4.          # llama3: high_freq_factor; yarn: beta_fast
  magnitude: float = 1.     # yarn: cos and sin times this


@dataclasses.dataclass(frozen=True)
class MoeConfig:
  """A mixture of experts in place of the mlp (Shazeer et al. 2017). E = 0: none."""
  E: int = 0                # experts
  F: int = 0                # ffn width of an expert
  top_k: int = 2            # experts a token
  first: int = 0            # the first so many layers are dense (DeepSeek-V3: 3)
  every: int = 1            # of the others, each so many-th is a mixture
  shared: int = 0           # ffn width of the expert that every token passes; 0: none
  score: str = 'softmax'    # softmax | sigmoid, of the router's logits
  normalize: bool = True    # the weights of a token's experts are made to sum to 1
  scale: float = 1.         # × those weights (DeepSeek-V3: 2.5)
  groups: int = 1           # experts lie in so many groups …
  top_groups: int = 1       # … and a token's all come from the best so many (DeepSeek-V2, §2.1.3)
  bias: bool = False        # a bias that is added only to choose (DeepSeek-V3, §2.1.2) …
  bias_rate: float = 0.     # … and is moved by so much a step towards equal loads
  dispatch: str = 'dropless'  # dropless | capacity
  capacity: float = 1.25    # capacity: tokens an expert takes at most, as a multiple of the mean
  room: float = 0.          # dropless over mesh.expert: rows a device takes at most, as a multiple of the mean; 0: all that can come
  balance_loss: float = 0.  # × E · Σ share of tokens · mean score (Switch Transformer, §2.2)
  z_loss: float = 0.        # × mean log²Σexp of the router's logits (ST-MoE, §3.3)


@dataclasses.dataclass(frozen=True)
class MlaConfig:
  """Multi-head latent attention (DeepSeek-V2, §2.1). kv = 0: none; then model.K is the whole head dim of q and k."""
  kv: int = 0               # rank of keys and values
  q: int = 0                # rank of queries; 0: no bottleneck
  rope: int = 0             # dims of K that carry the position, one key for all heads
  v: int = 0                # head dim of values


@dataclasses.dataclass(frozen=True)
class RelativeConfig:
  """T5's relative positions (Raffel et al. 2020, §2.1): a learned bias a head and bucket of distances."""
  buckets: int = 32
  distance: int = 128       # from here on all distances share the last bucket


@dataclasses.dataclass(frozen=True)
class RnnConfig:
  """Recurrent cells of width model.D, model.N of them stacked (kinds rnn and rnn_seq2seq, there in encoder and decoder)."""
  cell: str = 'lstm'        # lstm (Hochreiter & Schmidhuber 1997) | gru (Cho et al. 2014)
  bidirectional: bool = False  # rnn_seq2seq: a second encoder reads from the end (Schuster & Paliwal 1997)
  attention: str = 'none'   # rnn_seq2seq: none | bahdanau (additive, 2015) | luong (multiplicative, 2015)
  teacher: float = 1.       # rnn_seq2seq, training: share of inputs that are the text's; the others are the model's own
  sampling: float = 0.      # inverse-sigmoid decay of `teacher` (Bengio et al. 2015), its k in steps; 0: constant


@dataclasses.dataclass(frozen=True)
class NgramConfig:
  """Counted, not trained (kind ngram): interpolated modified Kneser-Ney (Chen & Goodman 1998)."""
  order: int = 5            # symbols of a gram, 1 to 7: each is predicted from the order − 1 before it


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adaptation (Hu et al. 2021): only pairs of narrow matrices beside the frozen weights are trained."""
  rank: int = 0             # of the pairs; 0: none, all parameters are trained
  alpha: float = 16.        # the product of a pair counts α / rank
  targets: str = r'attention/(q|v)/w'  # paths of layers' weights that match get a pair


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
  """How microbatches follow each other through the stages of mesh.stage (models/pipeline.py)."""
  pieces: int = 0           # microbatches of a batch; 0: as many as stages
  rounds: int = 1           # times that each passes all stages, each stage having so many runs of layers


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A model. Each field has one meaning, whatever the family; the defaults are Llama's (configs/ has the others)."""
  kind: str = 'decoder'     # decoder | encoder | seq2seq | rnn | rnn_seq2seq: a key of models.kinds.KINDS; or ngram
  D: int = 256              # model width
  H: int = 4                # query heads
  G: int = 4                # key-value heads (grouped-query attention when G < H)
  K: int = 64               # head dim
  F: int = 768              # ffn width
  N: int = 4                # layers
  encoder_N: int = 0        # layers of a seq2seq's encoder
  V: int = 4096             # vocabulary rows; at least the tokenizer's, and a multiple of mesh.tensor
  vocab: int = 0            # rows from here to V are padding, never predicted; 0: no row is
  P: int = 0                # learned positions; 0 with any other
  first_position: int = 0   # row of the first of them (RoBERTa, BART: 2)
  T: int = 0                # token types, of the two texts of a pair (BERT: 2); 0: none
  C: int = 0                # classes of the head
  norm: str = 'rms'         # rms | layer
  norm_place: str = 'pre'   # pre | post (of a sublayer's output, before it is added) | both | after (it is added: 2017)
  norm_offset: float = 0.   # scales are stored less this (Gemma: 1)
  norm_eps: float = 1e-5
  qk_norm: str = 'none'     # RMS norm of queries and keys: none | head (over K) | all (over heads and K)
  embed_norm: bool = False  # a norm of the embeddings (BERT, BART)
  position: str = 'rope'    # rope | learned | sinusoidal | relative (T5) | none
  pattern: str = 'global'   # kinds of layers, repeated over them, as 'local local global': words of kernels.patterns.SEEN, or some of
                            # them joined by +, as 'local+stride' (Sparse Transformer, strided)
  window: int = 0           # tokens that a local layer sees, itself included; the stride; the size of a block
  first: int = 0            # of the word first: tokens that all see and that see all; of summary: the last so many of a block
  attention_scale: float = 0.  # × scores; 0: 1/√K
  attention_cap: float = 0. # scores become cap · tanh(score/cap); 0: off
  logit_cap: float = 0.     # as attention_cap, of the logits
  logit_scale: float = 1.   # × logits (T5 with tied embeddings: 1/√D)
  output_bias: bool = False # a bias of the logits
  head: str = 'lm'          # what is made of hidden states: lm | mlm (logits; mlm through BERT's transform) | none | classify
                            # (C scores of a text) | tag | span (C scores of a token; span's: of either end)
  pooler: bool = False      # BERT's: a dense layer and tanh of the first token
  pool: str = 'none'        # LM.embed's vector of a text: none | mean | first (hidden state), and
  normalize: bool = False   # … of length 1
  mlp: str = 'swiglu'       # swiglu | geglu (gated) | gelu (both by the tanh approximation) | gelu_exact | relu | silu
  parallel: bool = False    # attention and mlp both read the block's input (GPT-NeoX)
  bias: str = 'none'        # in projections: none | all | qkv | not_qkv; layer norms have one unless none
  tied: bool = True         # the output matrix is the embedding
  scale_embedding: bool = False  # embeddings × √D (Gemma)
  dropout: float = 0.
  init_std: float = 0.02    # of embeddings and projections; those back into the residual get ÷ √(2N)
  dtype: str = 'float32'    # of compute: float32 | bfloat16; master weights are always float32
  reduce_dtype: str = 'float32'  # gradients of the layers' projections are summed over devices in it: float32 | bfloat16 (half the
                            # bytes); over microbatches and in the optimizer they are float32
  matmul: str = 'full'      # of the layers' projections and experts, forward and backward: full (dtype) | int8 | fp8 (models/quantised.py; Qwix)
  attention: str = 'auto'   # auto | dot_product | blocked | plain | splash (TPU) | cudnn (GPU)
  remat: str = 'none'       # what the backward pass recomputes: none | dots (all but matrix products) | all of a layer but the
                            # tensors that it names (tensors.REMAT: full | attention | qkv | minimal), and of these also not
  save: str = ''            # … these, which are kept on the device, and
  offload: str = ''         # … these, which are kept in the host's memory: names of tensors.TENSORS, as 'q k v'
  context: str = 'ring'     # how attention crosses mesh.context: gather (all keys to all) | ring (keys go round; on_mesh.goes_round
                            # says which layers then gather all the same)
  scan: bool = True         # True: one compiled layer, looped; False: unrolled (on CPU 7% faster, compiles longer)
  rope: RopeConfig = RopeConfig()
  relative: RelativeConfig = RelativeConfig()
  rnn: RnnConfig = RnnConfig()
  ngram: NgramConfig = NgramConfig()
  moe: MoeConfig = MoeConfig()
  mla: MlaConfig = MlaConfig()
  lora: LoraConfig = LoraConfig()
  pipeline: PipelineConfig = PipelineConfig()


GATED = ('swiglu', 'geglu')
WORDS = ('global', 'local', 'stride', 'block', 'summary', 'first')  # of a pattern: kernels.patterns.SEEN says what they mean


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Cross entropy in `chunks` pieces, so that [B, L, V] never exists at once."""
  chunks: int = 8
  z_loss: float = 0.        # × log²Z, added to the training loss (PaLM, §5)
  smoothing: float = 0.     # label smoothing: so much of each target is spread over the vocabulary
  over: str = 'length'      # what is cut: length | vocabulary (much less memory on many devices, one more matmul)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """What is asked of the model: how a window of the text becomes an example (a key of data/examples.EXAMPLES)."""
  name: str = 'causal'      # causal | next | prefix | spans (for seq2seq kinds) | mask | pairs (for encoders) | answer |
                            # classify | tag | span (encoders with that head)
  source: int = 0           # tokens that an encoder reads; 0 where there is none
  share: float = 0.15       # of tokens that are masked (mask, pairs, spans)
  span: float = 3.          # spans: mean tokens of a masked span
  whole_words: bool = False # mask, pairs: all tokens of a word, or none
  static: bool = False      # mask, pairs: the same masks in every epoch (BERT); False: new ones (RoBERTa)
  next_sentence: float = 1. # pairs: × the loss of next-sentence prediction


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The optimizer (a key of optimizer.OPTIMIZERS) and its learning-rate schedule (a key of SCHEDULES).

  muon (Jordan 2024): the matrices of the layers are updated by orthogonalised momentum, scaled to AdamW's usual size
  (× 0.2 √max(fan-in, fan-out), Liu et al. 2025), so that one `lr` serves them and AdamW, which updates the rest. Weight decay is
  the same for both.
  """
  name: str = 'adamw'
  lr: float = 3e-4
  schedule: str = 'cosine'  # constant | cosine | linear | wsd | inverse_sqrt
  warmup: int = 100         # steps of linear warmup from 0
  decay: float = 0.2        # wsd: the share of steps that decays
  final: float = 0.1        # learning rate at the last step, as a share of lr
  b1: float = 0.9           # AdamW's, as b2
  b2: float = 0.95
  momentum: float = 0.95    # muon: decay of the mean of gradients
  nesterov: bool = True     # muon: that mean is taken a step ahead, as Nesterov's momentum
  ns_steps: int = 5         # muon: Newton-Schulz iterations that orthogonalise it
  eps: float = 1e-8
  weight_decay: float = 0.1
  no_decay: str = r'scale|bias'  # paths (as layers/q/w) in which this regular expression is found are not decayed; '': all are
  clip: float = 1.          # by global norm; 0 is off
  offload: bool = False     # its moments rest in the host's memory, and are on the device only while they are used


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices an axis; one of them may be -1: what is left."""
  data: int = 1             # replicas: only gradients cross it
  fsdp: int = -1            # batch and weights are cut over it; weights are gathered a layer at a time
  tensor: int = 1           # heads, ffn and vocabulary are cut over it; and the length, between the blocks of a layer
  context: int = 1          # the length is cut over it
  expert: int = 1           # experts are cut over it; tokens are sent to theirs and back. Others take it as fsdp
  stage: int = 1            # layers are cut over it, and microbatches follow each other through them


_TEXTS = ('exact', 'bleu', 'chrf', 'rouge', 'f1')
# What answers of an objective can be scored by (answers.METRICS), the first by default.
METRICS = {'answer': _TEXTS, 'classify': _TEXTS, 'tag': ('accuracy', 'seqeval'), 'span': ('squad',)}


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What to train on. Tokens are written once to `cache`, then memory-mapped."""
  source: str = ''          # stdlib | text:GLOB | jsonl:GLOB | arrayrecord:GLOB | tfds:NAME/SPLIT; none is asked for when it is read
  heldout: float = 0.05     # share of documents, by hash of their name, never trained on
  tokenizer: str = 'bpe:4096'  # bpe:SIZE (trained on the documents) | bytes | a tokenizer.json | start (start.checkpoint's)
  stop: str = ''            # tokens that end a generated text besides the boundary, by name, with spaces between
  never: str = ''           # tokens that are never generated, by name, with spaces between
  start: str = ''           # the token, by name, that a decoder beside an encoder begins with, which then reads all of the
                            # prompt; '': as it was trained (decoding.py)
  cache: str = ''           # a folder; '' is data/ in the workdir
  form: str = 'text'        # what a record is (data/forms.py): text | tags (of words) | span (of a text) | chat
  key: str = 'text'         # the field that holds the text: jsonl, arrayrecord, tfds; the words (tags), question (span), messages
  target: str = ''          # the field that holds its answer (objectives answer, classify, tag, span); '': texts have none
  context: str = ''         # form=span: the field that holds the text of which the answer is a part
  prefix: str = ''          # put before each text, or question (T5's task prefix)
  classes: str = ''         # of heads classify and tag: the answers that there are, with | between, as 'ham|spam'
  template: str = ''        # form=chat: how a message is written, as '<|im_start|>{role}\n{content}<|im_end|>\n'; tokens of the
                            # vocabulary may be named in it; the first of what follows {content} ends what is said
  order: str = 'shuffled'   # shuffled | contiguous: row b of a step goes on where row b of the step before ended


RUN_DATA = ('tokenizer', 'stop', 'start', 'never', 'cache', 'order')  # keys of data that tasks of a mixture share


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  """One task of a mixture. Keys are tasks.NAME.weight, .metrics, .prefix (which is data.prefix), .objective.KEY and, but for
  those of RUN_DATA, .data.KEY; an objective, data or prefix that a task does not state is the run's own."""
  name: str
  weight: float = 1.        # its share of the examples is weight / Σ weights
  metrics: str = ''         # what `jaxlm eval` scores its answers by, with , between
  objective: ObjectiveConfig = ObjectiveConfig()
  data: DataConfig = DataConfig()  # keys of RUN_DATA are at their defaults: of_task knows them


@dataclasses.dataclass(frozen=True)
class StartConfig:
  """Another run's checkpoint, or an import, whose parameters a new run starts from: those of the same path and shape. A run
  that has checkpoints of its own goes on from these."""
  checkpoint: str = ''      # its workdir; '': fresh parameters
  step: int = 0             # 0: the newest


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  keep: int = 3             # the newest so many
  keep_every: int = 0       # and each step that is a multiple of this; 0 is none
  when_full: str = 'stop'   # the disk: stop | skip, which trains on unsaved
  timeout: int = 1800       # seconds that a save may take


@dataclasses.dataclass(frozen=True)
class GuardConfig:
  """What is done about steps that go wrong (guard.py). `spike` is off by default: gradient norms of small batches have heavy tails,
  and a healthy run would lose updates by it; OLMo-core runs its large ones with 6. An update that is not finite is always skipped."""
  spike: float = 0.         # skips updates above mean + so many std of the last good steps, of loss or gradient norm; 0: none
  window: int = 128         # good steps that these are of; half of them must have been
  patience: int = 5         # updates skipped in a row, and then back to the newest good checkpoint, and over the data since
  rollbacks: int = 3        # so often to the same checkpoint; then the run ends
  replicas_every: int = 0   # steps between two comparisons of what devices should hold alike (replicas.py); 0: none


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
  """When a run that does nothing is ended (watchdog.py). The defaults are long for any step, save or evaluation, yet far below a day."""
  seconds: float = 1800.    # without a step, save or evaluation done; 0: it is never ended
  start: float = 7200.      # the same, while a run restores and compiles


@dataclasses.dataclass(frozen=True)
class Config:
  """A run."""
  steps: int = 1000
  batch: int = 16           # sequences a step, over all devices
  length: int = 256         # tokens a sequence
  microbatches: int = 1     # a step's batch is worked off in so many pieces
  seed: int = 0
  log_every: int = 10
  save_every: int = 200
  eval_every: int = 0       # 0: no held-out loss during training
  eval_windows: int = 64    # held-out windows of `length` for eval_every
  compile_cache: str = ''   # a folder; '' is compile_cache/ in the workdir
  compiler_options: str = ''  # of XLA, for the train step, as 'xla_name=value …'; =default leaves one of jaxlm's own (xla.py) out
  model: ModelConfig = ModelConfig()
  objective: ObjectiveConfig = ObjectiveConfig()
  loss: LossConfig = LossConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  data: DataConfig = DataConfig()
  tasks: tuple[TaskConfig, ...] = ()  # by name; none: the run's objective on its data
  start: StartConfig = StartConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  guard: GuardConfig = GuardConfig()
  watchdog: WatchdogConfig = WatchdogConfig()


# What may differ between a checkpoint and the run that goes on from it: none of these changes what a step computes
# from the same state and data, except `steps`, which people raise to train on, and `guard`, which they set when a run spikes; and in some
# runs those of `means`.
FREE = re.compile(r'(steps|log_every|save_every|eval_every|eval_windows|compile_cache|compiler_options|(mesh|checkpoint|start|guard|watchdog)\..*|'
                  r'data\.(cache|stop|start|never)|tasks\.[^.]+\.metrics|microbatches|loss\.chunks|'
                  r'loss\.over|model\.pipeline\..*|model\.(attention|context|remat|save|offload|scan|pool|normalize)|optimizer\.offload)$')


def means(c: Config) -> dict[str, int]:
  """The keys of FREE that some runs' objective depends on, where this run's does, and into how many pieces each cuts a batch: router
  losses of a mixture, and next-sentence prediction, are means over such a piece (objectives.token_loss); what dropout and a decoder that
  is not taught everywhere draw is drawn for each."""
  m, routed, o = c.model, c.model.moe.E and (c.model.moe.balance_loss or c.model.moe.z_loss), lead(c).objective
  drawn = m.dropout or (m.kind == 'rnn_seq2seq' and (m.rnn.teacher < 1 or m.rnn.sampling))
  out = {'microbatches': c.microbatches} if routed or drawn or (o.name == 'pairs' and o.next_sentence) else {}
  return out | ({'model.pipeline.pieces': 1 if c.mesh.stage == 1 else m.pipeline.pieces or c.mesh.stage} if routed else {})


# What of a model is about training it, and not about which function its parameters are.
TRAINING = re.compile(r'model\.(dtype|reduce_dtype|matmul|dropout|init_std|rnn\.(teacher|sampling)|'
                      r'moe\.(dispatch|capacity|room|balance_loss|z_loss|bias_rate))$')


def flatten(config, prefix: str = '') -> dict:
  """A dataclass (or dict) of dataclasses → {'model.D': 256, …} in order of declaration; of tasks, as tasks.NAME.weight."""
  items = ({f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
           if dataclasses.is_dataclass(config) else config)
  flat = {}
  for name, value in items.items():
    if name == 'tasks' and isinstance(value, tuple):
      value = {task.name: task_keys(task) for task in value}
    nested = dataclasses.is_dataclass(value) or isinstance(value, (dict, ConfigDict))
    nested = nested and (prefix != 'tasks.' or len(value) > 0)  # a task that says nothing is no key
    flat.update(flatten(value, f'{prefix}{name}.') if nested else {prefix + name: value})
  return flat


def task_keys(task: TaskConfig) -> dict:
  """A task as its keys in a config file: {'weight': …, 'prefix': …, 'metrics': …, 'objective': {…}, 'data': {…}}."""
  data = dataclasses.asdict(task.data)
  return {'weight': task.weight, 'prefix': data.pop('prefix'), 'metrics': task.metrics,
          'objective': dataclasses.asdict(task.objective), 'data': {k: v for k, v in data.items() if k not in RUN_DATA}}


def of_task(c: Config, task: TaskConfig) -> Config:
  """The run that has this task alone, and is no mixture."""
  shared = {key: getattr(c.data, key) for key in RUN_DATA}
  return dataclasses.replace(c, tasks=(), objective=task.objective, data=dataclasses.replace(task.data, **shared))


def lead(c: Config) -> Config:
  """The run of the first task, c if there are none: what is so for all tasks (shapes, which loss) can be read from it."""
  return of_task(c, c.tasks[0]) if c.tasks else c


def layer_kinds(m: ModelConfig) -> tuple[tuple[str, str], ...]:
  """(attention kind, 'mlp' | 'moe') of each layer."""
  pattern = m.pattern.split()
  moe = lambda n: m.moe.E and n >= m.moe.first and (n - m.moe.first + 1) % m.moe.every == 0
  return tuple((pattern[n % len(pattern)], 'moe' if moe(n) else 'mlp') for n in range(m.N))


def selected(c: Config) -> int:
  """S: places of a row that objectives mask and pairs can mask."""
  return math.ceil(c.objective.share * c.length)


def span_lengths(o: ObjectiveConfig) -> tuple[int, int]:
  """Of objective spans: (tokens of a window, tokens of its targets) such that what is left of a window with its sentinels,
  and a token more, fills the source (T5's random_spans_helper)."""
  def lengths(tokens):
    noise = round(tokens * o.share)
    count = max(1, round(noise / o.span))
    return tokens - noise + count + 1, noise + count + 1
  tokens = o.source
  while lengths(tokens + 1)[0] <= o.source:
    tokens += 1
  return tokens, lengths(tokens)[1]
