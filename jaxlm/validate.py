"""Every check of a config that needs no device. A failure is one line: the key, its value, the mend."""
import difflib
import re

from jaxlm.errors import UsageError
from jaxlm.schema import GATED, Config, flatten, layer_kinds

CHOICES = {
    'model.norm': ('rms', 'layer'), 'model.norm_place': ('pre', 'post', 'both'),
    'model.qk_norm': ('none', 'head', 'all'), 'model.position': ('rope', 'learned'),
    'model.mlp': ('swiglu', 'geglu', 'gelu', 'gelu_exact', 'relu'), 'model.bias': ('none', 'all', 'qkv', 'not_qkv'),
    'model.dtype': ('float32', 'bfloat16'), 'model.attention': ('auto', 'dot_product', 'blocked', 'plain'),
    'model.remat': ('none', 'dots', 'full'), 'model.rope.scaling': ('none', 'linear', 'llama3', 'yarn'),
    'model.moe.score': ('softmax', 'sigmoid'), 'model.moe.dispatch': ('dropless', 'capacity'),
    'optimizer.name': ('adamw', 'muon'), 'optimizer.schedule': ('constant', 'cosine', 'linear', 'wsd', 'inverse_sqrt'),
}
# Keys that may be zero; every other number but the mesh's is above it.
ZERO_OK = re.compile(
    r'(seed|eval_every|loss\.z_loss|data\.heldout|checkpoint\.keep_every|'
    r'model\.(P|vocab|window|norm_offset|attention_scale|attention_cap|logit_cap|dropout|rope\.(local_base|original)|'
    r'moe\.(E|F|first|shared|bias_rate|balance_loss|z_loss)|mla\..*)|'
    r'optimizer\.(warmup|decay|final|weight_decay|clip|b1|b2))$')


def validate(c: Config) -> None:
  """Every check that needs no device. Raises UsageError: the key, its value, the mend."""
  flat, m = flatten(c), c.model

  def need(ok: bool, key: str, mend: str):
    if not ok:
      raise UsageError(f'{key}={flat[key]!r}: {mend}')

  for key, choices in CHOICES.items():
    near = difflib.get_close_matches(flat[key], choices, n=1, cutoff=0.3)
    need(flat[key] in choices, key, f'wants one of {", ".join(choices)}{"; did you mean " + near[0] + "?" if near else ""}')
  for key, value in flat.items():
    if type(value) in (int, float) and not key.startswith('mesh.'):
      need(value > 0 or (value == 0 and ZERO_OK.match(key)), key, 'wants a number above 0')
  for key in ('model.dropout', 'data.heldout', 'optimizer.decay', 'optimizer.b1', 'optimizer.b2'):
    need(0 <= flat[key] < 1, key, 'wants a number from 0 up to, not including, 1')
  _model(m, need)
  need(m.position == 'rope' or m.P >= c.length, 'model.P', f'learned positions must cover length={c.length}')
  need(c.batch % c.microbatches == 0, 'microbatches', f'does not divide batch={c.batch}')
  need(c.length % c.loss.chunks == 0, 'loss.chunks', f'does not divide length={c.length}')
  try:
    re.compile(c.optimizer.no_decay)
  except re.error as e:
    need(False, 'optimizer.no_decay', f'is no regular expression ({e})')
  sizes = {axis: flat[f'mesh.{axis}'] for axis in ('data', 'fsdp', 'tensor')}
  for axis, size in sizes.items():
    need(size >= 1 or size == -1, f'mesh.{axis}', 'wants a count of devices, or -1 for what is left')
  fill = [axis for axis, size in sizes.items() if size == -1]
  need(len(fill) < 2, f'mesh.{(fill or ["fsdp"])[-1]}', f'only one axis may be -1, and {fill[:1]} is')
  if -1 not in (sizes['data'], sizes['fsdp'], sizes['tensor']):
    check_mesh(c, sizes)


def _model(m, need) -> None:
  need(m.H % m.G == 0, 'model.G', f'does not divide model.H={m.H}')
  need(m.vocab <= m.V, 'model.vocab', f'is more than the rows there are, model.V={m.V}')
  need(set(m.pattern.split()) <= {'global', 'local'} and m.pattern.strip(), 'model.pattern',
       'wants the words global and local, as "local local global"')
  need(('local' in m.pattern) == (m.window > 0), 'model.window',
       'wants the tokens that a local layer of model.pattern sees, and 0 if there is no such layer')
  need(m.norm == 'rms' or m.norm_offset == 0, 'model.norm_offset', 'only norm=rms has an offset; set 0')
  if m.position == 'learned':
    need(not m.mla.kv, 'model.position', 'latent attention (model.mla) carries positions by rope')
  else:
    need(m.P == 0, 'model.P', 'only position=learned has positions; set 0')
    turned = m.mla.rope if m.mla.kv else m.K * m.rope.share
    need(turned == int(turned) and turned % 2 == 0, 'model.K', f'rope turns pairs: {turned:g} dims are no even number')
  need(m.rope.share <= 1, 'model.rope.share', 'wants a share, up to 1')
  need(m.rope.scaling in ('none', 'linear') or m.rope.original > 0, 'model.rope.original',
       f'rope.scaling={m.rope.scaling} wants the positions trained on before')
  if m.mla.kv:
    need(m.mla.v > 0, 'model.mla.v', 'wants the head dim of values')
    need(0 < m.mla.rope < m.K, 'model.mla.rope', f'wants some of the dims of model.K={m.K}, not all')
    need(m.G == m.H, 'model.G', f'latent attention has a key and value a head: set {m.H}')
    need(m.qk_norm == 'none' and m.bias == 'none', 'model.bias', 'latent attention knows neither biases nor qk_norm')
  if m.moe.E:
    moe = m.moe
    need(moe.F > 0, 'model.moe.F', 'wants the ffn width of an expert')
    need(m.mlp in GATED and m.bias in ('none', 'qkv'), 'model.mlp', f'experts are gated ({", ".join(GATED)}), with no bias')
    need(moe.E % moe.groups == 0, 'model.moe.groups', f'does not divide model.moe.E={moe.E}')
    need(moe.top_groups <= moe.groups, 'model.moe.top_groups', f'is more than model.moe.groups={moe.groups}')
    need(moe.top_k <= moe.E // moe.groups * moe.top_groups, 'model.moe.top_k', 'is more than the experts to choose from')
    need(any(kind == 'moe' for _, kind in layer_kinds(m)), 'model.moe.first', f'leaves no layer of model.N={m.N}')
    need(moe.bias or not moe.bias_rate, 'model.moe.bias_rate', 'wants model.moe.bias=True')


def check_mesh(c: Config, sizes: dict) -> None:
  """Everything that a mesh of these sizes must divide. Raises UsageError."""
  rows = sizes['data'] * sizes['fsdp']
  per = c.batch // c.microbatches
  if per % rows:
    raise UsageError(f'batch={c.batch} in {c.microbatches} microbatches gives {per} sequences, which mesh.data × '
                     f'mesh.fsdp = {rows} does not divide; set batch to a multiple of {rows * c.microbatches}')
  cut = {'H': sizes['tensor'], 'G': sizes['tensor'], 'F': sizes['tensor'], 'V': sizes['tensor'], 'D': sizes['fsdp']}
  for letter, size in cut.items():
    value = getattr(c.model, letter)
    if value % size:
      axis = 'fsdp' if letter == 'D' else 'tensor'
      raise UsageError(f'model.{letter}={value}: mesh.{axis}={size} does not divide it; '
                       f'the next that fits is {-(-value // size) * size}')
