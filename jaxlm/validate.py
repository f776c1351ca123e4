"""Every check of a config that needs no device. A failure is one line: the key, its value, the mend."""
import dataclasses
import difflib
import importlib.util
import math
import operator
import re

from jaxlm.errors import UsageError, extra
from jaxlm.schema import (GATED, METRICS, WORDS, Config, MeshConfig, ModelConfig, flatten, layer_kinds, lead, of_task, selected,
                          span_lengths)
from jaxlm.tensors import REMAT, TENSORS, made, weights

CHOICES = {
    'model.kind': ('decoder', 'encoder', 'seq2seq', 'rnn', 'rnn_seq2seq', 'ngram'),
    'model.norm': ('rms', 'layer'), 'model.norm_place': ('pre', 'post', 'both', 'after'),
    'model.qk_norm': ('none', 'head', 'all'), 'model.position': ('rope', 'learned', 'sinusoidal', 'relative', 'none'),
    'model.head': ('lm', 'mlm', 'none', 'classify', 'tag', 'span'), 'model.pool': ('none', 'mean', 'first'),
    'model.rnn.cell': ('lstm', 'gru'), 'model.rnn.attention': ('none', 'bahdanau', 'luong'),
    'objective.name': ('causal', 'next', 'prefix', 'spans', 'mask', 'pairs', 'answer', 'classify', 'tag', 'span'),
    'data.order': ('shuffled', 'contiguous'), 'data.form': ('text', 'tags', 'span', 'chat'),
    'model.mlp': ('swiglu', 'geglu', 'gelu', 'gelu_exact', 'relu', 'silu'), 'model.bias': ('none', 'all', 'qkv', 'not_qkv'),
    'model.dtype': ('float32', 'bfloat16'), 'model.reduce_dtype': ('float32', 'bfloat16'), 'model.matmul': ('full', 'int8', 'fp8'),
    'model.attention': ('auto', 'dot_product', 'blocked', 'plain', 'splash', 'cudnn'),
    'loss.over': ('length', 'vocabulary'), 'model.remat': ('none', 'dots', *REMAT), 'model.context': ('ring', 'gather'),
    'model.rope.scaling': ('none', 'linear', 'llama3', 'yarn'),
    'model.moe.score': ('softmax', 'sigmoid'), 'model.moe.dispatch': ('dropless', 'capacity'),
    'checkpoint.when_full': ('stop', 'skip'),
    'optimizer.name': ('adamw', 'muon'), 'optimizer.schedule': ('constant', 'cosine', 'linear', 'wsd', 'inverse_sqrt'),
}
# Keys that may be zero; every other number but the mesh's is above it.
ZERO_OK = re.compile(
    r'(seed|eval_every|loss\.(z_loss|smoothing)|objective\.(source|next_sentence)|start\.step|data\.heldout|'
    r'checkpoint\.keep_every|guard\.(spike|rollbacks|replicas_every)|watchdog\.seconds|'
    r'model\.(P|vocab|window|first|first_position|encoder_N|T|C|norm_offset|attention_scale|'
    r'attention_cap|logit_cap|dropout|lora\.rank|rnn\.(teacher|sampling)|rope\.(local_base|original)|'
    r'pipeline\.pieces|moe\.(E|F|first|room|shared|bias_rate|balance_loss|z_loss)|mla\..*)|'
    r'optimizer\.(warmup|decay|final|weight_decay|clip|b1|b2|momentum))$')


def validate(c: Config) -> None:
  """Every check that needs no device. Raises UsageError: the key, its value, the mend."""
  flat, m = flatten(dataclasses.replace(c, tasks=())), c.model

  def need(ok: bool, key: str, mend: str):
    if not ok:
      raise UsageError(f'{key}={flat[key]!r}: {mend}')

  for key, choices in CHOICES.items():
    near = difflib.get_close_matches(flat[key], choices, n=1, cutoff=0.3)
    need(flat[key] in choices, key, f'wants one of {", ".join(choices)}{"; did you mean " + near[0] + "?" if near else ""}')
  for key, value in flat.items():
    if type(value) in (int, float) and not key.startswith('mesh.'):
      need(value > 0 or (value == 0 and ZERO_OK.match(key)), key, 'wants a number above 0')
      need(value < math.inf, key, 'wants a finite number')
      need(type(value) is float or value < 2 ** (32 if key == 'seed' else 31), key, 'wants an integer of 32 bits')
  for key in ('model.dropout', 'data.heldout', 'optimizer.decay', 'optimizer.b1', 'optimizer.b2', 'optimizer.momentum',
              'loss.smoothing', 'objective.share'):
    need(0 <= flat[key] < 1, key, 'wants a number from 0 up to, not including, 1')
  for key in ('optimizer.no_decay', 'model.lora.targets'):
    try:
      re.compile(flat[key])
    except re.error as e:
      need(False, key, f'is no regular expression ({e})')
  _model(m, need)
  _remat(m, need)
  need(m.ngram.order <= 7, 'model.ngram.order', 'wants 1 to 7')
  if m.kind == 'ngram':
    need(m.V <= 2 ** 20, 'model.V', 'an n-gram knows at most 2^20 = 1,048,576 symbols')
    need(c.steps == 1, 'steps', 'an n-gram is counted once, at step 1: set 1')
  need(all(re.fullmatch(r'xla_\w+=\S+', word) for word in c.compiler_options.split()), 'compiler_options',
       'wants words such as xla_name=value, with spaces between')
  need(c.batch % c.microbatches == 0, 'microbatches', f'does not divide batch={c.batch}')
  if not c.tasks:  # the objective of a mixture is its tasks'
    _objective(c, need)
    _check_chunks(c, dataclasses.asdict(MeshConfig(fsdp=1)))
  need(c.guard.window >= 2, 'guard.window', 'wants 2 steps or more')
  _sizes(c.mesh)
  if -1 not in (sizes := dataclasses.asdict(c.mesh)).values():
    check_mesh(c, sizes)
  _tasks(c, need)


def _tasks(c: Config, need) -> None:
  """Each task must be a run of its own, and batches of all must look alike."""
  if not c.tasks:
    return
  need(c.model.kind != 'ngram', 'model.kind', 'an n-gram is counted on one text: it has no tasks')
  need(c.data.order == 'shuffled', 'data.order', 'rows of a mixture do not go on where others ended: set shuffled')
  if len(c.tasks) > 1000:
    raise UsageError(f'tasks: {len(c.tasks)} of them; each has an example in every 1,000, so at most 1,000')
  for task in c.tasks:
    key = f'tasks.{task.name}'
    if not re.fullmatch(r'[A-Za-z0-9_-]+', task.name):
      raise UsageError(f'{key}: a task\'s name is of letters, digits, _ and -')
    if not 0 < task.weight < math.inf:
      raise UsageError(f'{key}.weight={task.weight!r}: wants a number above 0')
    known = METRICS.get(task.objective.name, ())
    if task.metrics and not set(task.metrics.split(',')) <= set(known):
      raise UsageError(f'{key}.metrics={task.metrics!r}: objective.name={task.objective.name} wants '
                       + (f'some of {", ".join(known)}, with , between' if known else "''; metrics are of answers"))
    try:
      validate(of_task(c, task))
    except UsageError as e:
      raise UsageError(f'{key}{"." if str(e).startswith(("objective.", "data.")) else ": "}{e}') from e
  from jaxlm.data import examples  # pylint: disable=g-import-not-at-top  # it reads schema.py as this file does, and no jax
  runs = {task.name: of_task(c, task) for task in c.tasks}
  (first, run), *others = runs.items()
  for name, other in others:
    shapes = [{k: f'{k} [B, {size}]' for k, (size, _) in examples.shapes(r).items()} for r in (run, other)]
    for array in shapes[0] | shapes[1]:
      found = [s[array] if array in s else f'no {array}' for s in shapes]
      if found[0] != found[1]:
        raise UsageError(f'tasks {first} and {name} have batches of different shapes, {found[0]} and {found[1]}: their '
                         'objectives must be of one kind and size (objective.source, objective.share)')
    if run.objective.next_sentence != other.objective.next_sentence:
      raise UsageError(f'tasks {first} and {name} have objective.next_sentence={run.objective.next_sentence} and '
                       f'{other.objective.next_sentence}: it is one loss, set one')


HEADS = ('classify', 'tag', 'span')  # objectives that want the head of their name
# Which objectives a kind of model can have.
OBJECTIVES = {'decoder': ('causal', 'answer'), 'rnn': ('causal',), 'ngram': ('causal',),
              'encoder': ('mask', 'pairs', 'classify', 'tag', 'span'),
              'seq2seq': ('next', 'prefix', 'spans', 'answer'), 'rnn_seq2seq': ('next', 'prefix', 'answer')}


def template_is_good(template: str) -> bool:
  """It has the content once, the role before it or nowhere, no other field, and an end."""
  before, content, after = template.partition('{content}')
  return bool(content and after) and not re.search(r'\{\w*\}', before.replace('{role}', '') + after)


def _objective(c: Config, need) -> None:
  """The objective, the data and the kind of model must go together."""
  m, o = c.model, c.objective
  need(o.name in OBJECTIVES[m.kind], 'objective.name', f'model.kind={m.kind} wants one of {", ".join(OBJECTIVES[m.kind])}')
  from jaxlm.data import sources  # pylint: disable=g-import-not-at-top  # which imports no jax
  need(not c.data.source or not sources.refusal(c.data.source), 'data.source', sources.refusal(c.data.source))
  kind, _, size = c.data.tokenizer.partition(':')
  need(kind != 'bpe' or (size.isdecimal() and int(size) >= 257), 'data.tokenizer',
       'bpe wants a size of at least 257: 256 bytes and a boundary')
  reads = m.kind in ('seq2seq', 'rnn_seq2seq')
  need((o.source > 0) == reads, 'objective.source', 'wants the tokens that the encoder reads' if reads else
       f'model.kind={m.kind} has no encoder beside it: set 0')
  if o.name == 'spans':
    need(span_lengths(o)[1] <= c.length, 'length', f'spans of objective.source={o.source} have {span_lengths(o)[1]} targets')
  forms = {'tag': ('tags',), 'span': ('span',), 'answer': ('text', 'chat') if m.kind == 'decoder' else ('text',)}.get(
      o.name, ('text',))
  need(c.data.form in forms, 'data.form', f'objective.name={o.name} of model.kind={m.kind} wants {" or ".join(forms)}')
  answers = o.name in ('answer', *HEADS) and c.data.form != 'chat'
  need(answers == bool(c.data.target), 'data.target', f'objective.name={o.name} wants the field of the answers' if answers else
       f'objective.name={o.name}, data.form={c.data.form} has no answers: set \'\'')
  need(not c.data.prefix or c.data.form in ('text', 'span'), 'data.prefix', f'data.form={c.data.form} has no place for it: set \'\'')
  need(bool(c.data.context) == (o.name == 'span'), 'data.context', 'wants the field of the text for objective.name=span; else \'\'')
  need(template_is_good(c.data.template) if c.data.form == 'chat' else not c.data.template, 'data.template',
       'wants one {content}, {role} if need be, and something after {content} that ends it; but for data.form=chat, \'\'')
  classes = [name for name in c.data.classes.split('|') if name]
  named = m.head in ('classify', 'tag')
  need((classes or o.name not in ('classify', 'tag')) and (named or not classes) and len(set(classes)) == len(classes),
       'data.classes', 'wants the different answers of objective.name=classify or tag, with | between; without model.head=classify '
       'or tag, \'\'')
  if o.name in HEADS:
    need(m.head == o.name and (m.pooler or o.name != 'classify'), 'model.head',
         f'{o.name} wants model.head={o.name}' + (' and model.pooler=True' if o.name == 'classify' else ''))
  if o.name == 'span' or classes:
    need(m.C == (len(classes) or 2), 'model.C', f'data.classes are {len(classes)}' if classes else 'span wants 2')
  if o.name == 'span':
    need(c.length >= 8, 'length', 'a question and a text want 8 or more')
  if o.name == 'pairs':
    need(m.pooler and m.T == 2 and m.C == 2, 'model.pooler', 'pairs want model.pooler=True, model.T=2 and model.C=2')
    need(c.length >= 8, 'length', 'pairs want 8 or more')
  need(c.data.order == 'shuffled' or m.kind == 'rnn', 'data.order', f'model.kind={m.kind} remembers nothing from step to step')
  reach = max(c.length, o.source) + m.first_position
  need(m.position != 'learned' or m.P >= reach, 'model.P', f'learned positions must cover {reach}')


def _model(m, need) -> None:
  need(m.H % m.G == 0, 'model.G', f'does not divide model.H={m.H}')
  need(m.vocab <= m.V, 'model.vocab', f'is more than the rows there are, model.V={m.V}')
  words = set(m.pattern.replace('+', ' ').split())
  need(words <= set(WORDS) and words, 'model.pattern',
       f'wants words of {", ".join(WORDS)}, as "local local global" or "local+stride"')
  need(bool(words & {'local', 'stride', 'block', 'summary'}) == (m.window > 0), 'model.window',
       'wants the tokens that the words local, stride, block and summary of model.pattern mean, and 0 without them')
  need(bool(words & {'first', 'summary'}) == (m.first > 0), 'model.first',
       'wants the tokens that the words first and summary of model.pattern mean, and 0 without them')
  need('summary' not in words or m.first <= m.window, 'model.first', f'is more than a block, model.window={m.window}')
  need((m.encoder_N > 0) == (m.kind == 'seq2seq'), 'model.encoder_N', 'wants the layers of a seq2seq\'s encoder, 0 for all others')
  need((m.head == 'lm') == (m.kind != 'encoder'), 'model.head',
       'an encoder wants mlm, none, classify, tag or span' if m.kind == 'encoder' else f'model.kind={m.kind} wants lm')
  if m.head in ('classify', 'tag', 'span'):
    need(m.C == 2 if m.head == 'span' else m.C > 0, 'model.C',
         f'head={m.head} wants {"2: both ends" if m.head == "span" else "its classes"}')
  need(m.head != 'classify' or m.pooler, 'model.pooler', 'head=classify scores what model.pooler makes: set True')
  need(m.pool == 'none' or m.kind == 'encoder', 'model.pool', 'only an encoder makes vectors of texts: set none')
  need(m.norm_place != 'after' or not m.parallel, 'model.norm_place', 'parallel layers have no norm after them')
  need(m.norm == 'rms' or m.norm_offset == 0, 'model.norm_offset', 'only norm=rms has an offset; set 0')
  need(m.position == 'rope' or not m.mla.kv, 'model.position', 'latent attention (model.mla) carries positions by rope')
  need((m.P > 0) == (m.position == 'learned'), 'model.P', 'wants the positions of position=learned; with any other, 0')
  if m.position == 'rope':
    turned = m.mla.rope if m.mla.kv else m.K * m.rope.share
    need(turned == int(turned) and turned % 2 == 0, 'model.K', f'rope turns pairs: {turned:g} dims are no even number')
  need(not m.lora.rank or (m.lora.targets and any(re.search(m.lora.targets, path) for path in weights(m))), 'model.lora.targets',
       'is found in the path of no weight of the layers; there are ' + (', '.join(weights(m)) or f'none of model.kind={m.kind}'))
  need(m.rope.share <= 1, 'model.rope.share', 'wants a share, up to 1')
  need(m.rope.scaling in ('none', 'linear') or m.rope.original > 0, 'model.rope.original',
       f'rope.scaling={m.rope.scaling} wants the positions trained on before')
  if m.mla.kv:
    need(m.mla.v > 0, 'model.mla.v', 'wants the head dim of values')
    need(0 < m.mla.rope < m.K, 'model.mla.rope', f'wants some of the dims of model.K={m.K}, not all')
    need(m.G == m.H, 'model.G', f'latent attention has a key and value a head: set {m.H}')
    need(m.qk_norm == 'none' and m.bias == 'none', 'model.bias', 'latent attention knows neither biases nor qk_norm')
  if m.matmul != 'full':
    need(importlib.util.find_spec('qwix'), 'model.matmul', f'wants Qwix: {extra("quant")}; or set full')
    need(m.kind in ('decoder', 'encoder', 'seq2seq'), 'model.matmul', f'model.kind={m.kind} has no layers with projections: set full')
    need(not m.moe.E or m.moe.dispatch == 'dropless', 'model.matmul',
         f'model.moe.dispatch={m.moe.dispatch} has no quantised experts: set dropless, or model.matmul=full')
  if m.moe.E:
    moe = m.moe
    need(moe.F > 0, 'model.moe.F', 'wants the ffn width of an expert')
    need(m.mlp in GATED and m.bias in ('none', 'qkv'), 'model.mlp', f'experts are gated ({", ".join(GATED)}), with no bias')
    need(moe.room == 0 or moe.room >= 1, 'model.moe.room', 'wants at least 1, the mean; or 0, for all that can come')
    need(moe.E % moe.groups == 0, 'model.moe.groups', f'does not divide model.moe.E={moe.E}')
    need(moe.top_groups <= moe.groups, 'model.moe.top_groups', f'is more than model.moe.groups={moe.groups}')
    need(moe.top_k <= moe.E // moe.groups * moe.top_groups, 'model.moe.top_k', 'is more than the experts to choose from')
    need(any(kind == 'moe' for _, kind in layer_kinds(m)), 'model.moe.first', f'leaves no layer of model.N={m.N}')
    need(m.kind == 'decoder' or not moe.bias_rate, 'model.moe.bias_rate', 'only a decoder evens its loads out')
    need(moe.bias or not moe.bias_rate, 'model.moe.bias_rate', 'wants model.moe.bias=True')


def _remat(m, need) -> None:
  """What is kept must be named right, be there, and be recomputed else."""
  named = m.kind not in ('rnn', 'rnn_seq2seq')
  need(named or m.remat in ('none', 'dots', 'full'), 'model.remat', f'model.kind={m.kind} has no named tensors: set none, dots or full')
  for key in ('model.save', 'model.offload'):
    names = getattr(m, key.removeprefix('model.')).split()
    need(not names or (named and m.remat in REMAT), key,
         f'is of tensors that are recomputed else, which wants model.remat to be one of {", ".join(REMAT)}' if named else
         f'model.kind={m.kind} has no named tensors: set \'\'')
    for name in names:
      near = difflib.get_close_matches(name, TENSORS, n=2, cutoff=0.5)
      need(name in TENSORS, key, f'{name!r} is no tensor of a layer'
           + (f'; did you mean {" or ".join(near)}?' if near else f'; there are {", ".join(TENSORS)}'))
      need(name in made(m), key, f'layers of this model make no {name!r}; they make {", ".join(made(m))}')
  both = set(m.save.split()) & set(m.offload.split())
  need(not both, 'model.offload', f'{" and ".join(sorted(both))} cannot be in model.save too: take it out of one')


def _sizes(mesh: MeshConfig) -> dict[str, int]:
  """Devices an axis, one of them perhaps −1. Raises UsageError."""
  sizes = dataclasses.asdict(mesh)
  for axis, size in sizes.items():
    if size < 1 and size != -1:
      raise UsageError(f'mesh.{axis}={size}: wants a count of devices, or -1 for what is left')
  fill = [f'mesh.{axis}' for axis, size in sizes.items() if size == -1]
  if len(fill) > 1:
    raise UsageError(f'{fill[1]}=-1: only one axis may be what is left, and {fill[0]} is')
  return sizes


def filled(mesh: MeshConfig, devices: int) -> dict[str, int]:
  """Devices an axis, −1 filled. UsageError if the axes do not use exactly so many: a run never silently leaves some idle."""
  sizes = _sizes(mesh)
  known = math.prod(size for size in sizes.values() if size != -1)
  if devices % known or (-1 not in sizes.values() and known != devices):
    text = ' × '.join(f'{axis}={size}' for axis, size in sizes.items())
    raise UsageError(f'mesh {text} does not fit {devices} devices; set one axis to -1 to fill')
  return {axis: devices // known if size == -1 else size for axis, size in sizes.items()}


def check_weights(m: ModelConfig, sizes: dict) -> None:
  """What a mesh of these sizes must divide of a model, whatever it is used for. Raises UsageError."""
  cut = {'H': ('tensor',), 'G': ('tensor',), 'F': ('tensor',), 'V': ('tensor', 'stage'), 'D': ('fsdp', 'stage', 'expert')}
  cut |= {'moe.F': cut['F'], 'moe.shared': cut['F']} if m.moe.E else {}
  cut |= {'mla.kv': cut['D'], 'mla.q': cut['D']} if m.mla.kv else {}
  for key, axes in cut.items():
    value = operator.attrgetter(key)(m)
    size = math.prod(sizes[a] for a in axes)
    if value % size:
      named = ' × '.join(f'mesh.{a}={sizes[a]}' for a in axes if sizes[a] > 1)
      raise UsageError(f'model.{key}={value}: {named} does not divide it; '
                       f'the next that fits is {-(-value // size) * size}')
  if sizes['expert'] > 1 and (not m.moe.E or m.moe.E % sizes['expert']):
    raise UsageError(f'model.moe.E={m.moe.E}: mesh.expert={sizes["expert"]} does not divide it; set mesh.expert to a divisor')


def check_mesh(c: Config, sizes: dict) -> None:
  """Everything that a mesh of these sizes must divide of a training step. Raises UsageError."""
  m = c.model
  rows = sizes['data'] * sizes['fsdp'] * sizes['expert']
  per = c.batch // c.microbatches
  if per % rows:
    raise UsageError(f'batch={c.batch} in {c.microbatches} microbatches gives {per} sequences, which mesh.data × '
                     f'mesh.fsdp × mesh.expert = {rows} does not divide; set batch to a multiple of {rows * c.microbatches}')
  check_weights(m, sizes)
  for axis in ('context', 'stage'):
    if sizes[axis] > 1 and m.kind != 'decoder':
      raise UsageError(f'model.kind={m.kind}: mesh.{axis}={sizes[axis]} wants a decoder; set 1')
  if sizes['stage'] > 1:
    _check_stages(c, sizes['stage'], per // rows)
  if sizes['context'] > 1 and c.length % (2 * sizes['context']):
    raise UsageError(f'length={c.length}: mesh.context={sizes["context"]} wants a multiple of {2 * sizes["context"]}')
  if m.matmul == 'int8' and c.length // sizes['context'] > 2 ** 17:
    raise UsageError(f'length={c.length}: with model.matmul=int8 a device sums products of at most 131,072 tokens in int32; set '
                     'mesh.context to cut the length, or model.matmul=full')
  if sizes['context'] > 1 and m.moe.E and m.moe.dispatch == 'capacity':
    raise UsageError(f'model.moe.dispatch=capacity: places go by order in a row, which mesh.context={sizes["context"]} cuts; '
                     'set dropless, or mesh.context=1')
  _check_chunks(lead(c), sizes)


def _check_chunks(c: Config, sizes: dict) -> None:
  """loss.cross_entropy cuts what a device has of a row's targets, or of the vocabulary, into loss.chunks even pieces. UsageError."""
  if c.model.kind == 'ngram' or c.objective.name in HEADS:  # which have another loss, or none
    return
  if c.loss.over == 'length':
    axes, whole = ('context',), selected(c) if c.model.kind == 'encoder' else c.length
    what = f'targets of a row of length={c.length}'
  else:
    axes, whole, what = ('tensor', 'stage'), c.model.V, f'rows of model.V={c.model.V}'
  parts = math.prod(sizes[a] for a in axes)
  if whole // parts % c.loss.chunks:
    on = ' × '.join(f'mesh.{a}={sizes[a]}' for a in axes if sizes[a] > 1)
    cut = f'{whole} / {parts} = {whole // parts} {what} that a device of {on} has' if on else f'{whole} {what}'
    raise UsageError(f'loss.chunks={c.loss.chunks}: does not divide the {cut}; set {math.gcd(whole // parts, c.loss.chunks)}')


def _check_stages(c: Config, stages: int, rows: int) -> None:
  """rows: sequences of a device."""
  m = c.model
  runs, pieces, kinds = stages * m.pipeline.rounds, m.pipeline.pieces or stages, layer_kinds(m)
  if m.N % runs:
    raise UsageError(f'model.N={m.N}: mesh.stage={stages} × model.pipeline.rounds={m.pipeline.rounds} does not divide it')
  if kinds != kinds[:m.N // runs] * runs:
    raise UsageError(f'mesh.stage={stages}: all {runs} runs of layers must be of the same kinds; model.pattern and model.moe make '
                     'them different')
  if rows % pieces:
    raise UsageError(f'model.pipeline.pieces={pieces}: does not divide the {rows} sequences that a device has of batch={c.batch}')
  if m.offload:
    raise UsageError(f'model.offload={m.offload!r}: the TPU\'s compiler knows no host memory within a pipeline; set \'\', or mesh.stage=1')
  if m.dropout:
    raise UsageError(f'model.dropout={m.dropout}: a pipeline has none; set 0, or mesh.stage=1')
