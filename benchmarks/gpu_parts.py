"""The parts of benchmarks/gpu.py. Each prints what it finds, and yields it for gpu.json; SystemExit, in the end, if it is not good."""
import argparse
import functools
import json
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxlm import config as configs
from jaxlm.plan.chips import CHIPS
from jaxlm.schema import Config
from running import ROOT

STEPS, WARMUP, NEW = 30, 5, 32
MODEL = {'batch': 4, 'steps': STEPS, 'optimizer.warmup': 10}
TINY = {**MODEL, 'batch': 2, 'length': 32, 'steps': 8, 'optimizer.lr': 1e-2, 'optimizer.warmup': 2,
        'model.D': 64, 'model.H': 4, 'model.G': 2, 'model.K': 16, 'model.F': 128, 'model.N': 2, 'model.V': 512}
TOLERANCE = .02  # of the largest value: bfloat16 resolves .004 of a value, and attention rounds its weights and results to it
LOGITS_TOLERANCE = .05  # the same, after all layers


def check_backend(flags: argparse.Namespace) -> None:
  """SystemExit if jax does not run where it should: without its CUDA plugin it takes the CPU, and hardly says so."""
  import jax  # pylint: disable=g-import-not-at-top
  if jax.default_backend() != ('cpu' if flags.dry_run else 'gpu'):
    raise SystemExit(f'jax runs on {jax.default_backend()}: is its CUDA plugin installed, and does it fit the driver?')


def note(text: str) -> None:
  print(text, flush=True)


def gib(size: float | None) -> float | None:
  return None if size is None else size / 2 ** 30


def shown(value: float | None) -> str:
  return '–' if value is None else f'{value:.1f}'


def of(found: dict) -> str:
  return (f'{found["step_seconds"]:.4f} s a step, {found["tokens_per_second"]:,.0f} tokens/s, MFU {found["mfu"]:.1%}, '
          f'peak {shown(found["peak_gib"])} GiB')


def config_of(flags: argparse.Namespace) -> Config:
  return configs.load(str(ROOT / 'configs/llama_1b.py'), [(key, str(value)) for key, value in (TINY if flags.dry_run else MODEL).items()])


def planned(flags: argparse.Namespace):
  """The planner's best for the config on one chip of this kind: search.Plan. Wants jax, no GPU."""
  from jaxlm.plan import search, topology  # pylint: disable=g-import-not-at-top
  found, refused = search.search(config_of(flags), topology.parse(f'{flags.chip}:1x1'), frozenset(MODEL))
  if not found:
    raise SystemExit(f'the planner finds nothing that fits one {flags.chip}: {"; ".join(refused)}')
  return found[0]


def rate(flags: argparse.Namespace, config: Config, seconds: list[float]) -> dict:
  """Of the steps after the first WARMUP ones: median seconds, tokens a second, and MFU as `jaxlm plan` counts it."""
  from jaxlm.plan import cost  # pylint: disable=g-import-not-at-top
  median = statistics.median(seconds[WARMUP:])
  return {'step_seconds': median, 'tokens_per_second': config.batch * config.length / median,
          'mfu': cost.mfu(config, median, 1, CHIPS[flags.chip].bf16), 'seconds': seconds}


class Case(NamedTuple):
  """Attention that is checked: which keys are seen, key-value heads of 8 query heads, head dim, documents a row."""
  window: int = 0
  G: int = 8
  K: int = 64
  documents: int = 1


CASES = {'causal': Case(), 'causal, head dim 128': Case(K=128), 'window': Case(window=300), 'grouped heads': Case(G=2),
         'packed documents': Case(documents=3), 'window, grouped heads, packed documents': Case(window=300, G=2, documents=3)}

SHORT = {name: CASES[name] for name in ('causal', 'window', 'window, grouped heads, packed documents')}  # of a dry run


def attention(flags: argparse.Namespace) -> Iterator[dict]:
  import jax  # pylint: disable=g-import-not-at-top
  import jax.numpy as jnp
  from jaxlm.kernels import cudnn, on_mesh
  from jaxlm.kernels.patterns import How, Rows
  check_backend(flags)
  kernel, L = ('dot_product', 64) if flags.dry_run else ('cudnn', 1024)
  found, bad = [], []
  for name, case in (SHORT if flags.dry_run else CASES).items():
    window = case.window * L // 1024
    how = How(case.K ** -.5, 'local' if window else 'global', window)
    rng = np.random.default_rng(0)
    q_BLHK, k_BMGK, v_BMGK, do_BLHK = (jnp.asarray(rng.standard_normal((2, L, heads, case.K)), jnp.bfloat16)
                                       for heads in (8, case.G, case.G, 8))
    segments_L = np.sort(rng.integers(1, case.documents + 1, L)).astype(np.int32)
    positions_L = np.arange(L, dtype=np.int32) - np.searchsorted(segments_L, segments_L).astype(np.int32)
    rows = Rows(*(jnp.asarray(np.broadcast_to(a, (2, L))) for a in (segments_L, positions_L)))
    refused = cudnn.refusal(how, q_BLHK, k_BMGK, v_BMGK)
    if refused:
      raise SystemExit(f'attention, {name}: cuDNN {refused}')

    def both(attend, dtype, how=how, rows=rows, arrays=(q_BLHK, k_BMGK, v_BMGK, do_BLHK)):
      """The output, and the gradients of q, k and v."""
      def run(q, k, v, do):
        o, back = jax.vjp(lambda q, k, v: on_mesh.ATTENTION[attend](how, q, k, v, rows, rows), q, k, v)
        return o, *back(do)
      return [np.asarray(a, np.float32) for a in jax.jit(run)(*(a.astype(dtype) for a in arrays))]
    with jax.default_matmul_precision('highest'):
      expected = both('plain', jnp.float32)
    errors = {name: float(np.abs(a - b).max() / np.abs(b).max())
              for name, a, b in zip(('o', 'dq', 'dk', 'dv'), both(kernel, jnp.bfloat16), expected)}
    good = all(error <= TOLERANCE for error in errors.values())
    found.append({'case': name, 'kernel': kernel, 'errors': errors, 'good': good})
    bad += [] if good else [name]
    shares = ', '.join(f'{name} {error:.4f}' for name, error in errors.items())
    note(f'attention, {name}: {kernel} is off by {shares} of the largest value; allowed {TOLERANCE}: {"good" if good else "BAD"}')
    yield {'attention': found}
  if bad:
    raise SystemExit(f'attention by {kernel} is not that of plain: {"; ".join(bad)}')


def tokens_of(config: Config, step: int) -> np.ndarray:
  """int32 [B, L + 1] of made-up text: the rank-th token as often as 1 / rank (Zipf), which a model learns in a few steps."""
  rank_V = np.arange(1, config.model.V + 1)
  odds_V = 1 / rank_V / (1 / rank_V).sum()
  return np.random.default_rng(step).choice(config.model.V, (config.batch, config.length + 1), p=odds_V).astype(np.int32)


def rows_of(config: Config, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
  """Rows [start, stop) of the batch of a step, as jaxlm/data/pipeline.py has them."""
  tokens_BM = tokens_of(config, step)[start:stop]
  ones_BL = np.ones_like(tokens_BM[:, :-1])
  return {'tokens': tokens_BM[:, :-1], 'targets': tokens_BM[:, 1:], 'segments': ones_BL, 'weights': ones_BL.astype(np.float32),
          'positions': np.broadcast_to(np.arange(config.length, dtype=np.int32), ones_BL.shape)}


def made_up_cache():
  """What a checkpoint says of the data."""
  from jaxlm.data import packing, tokenizer  # pylint: disable=g-import-not-at-top
  return packing.Cache({'hash': 'made up'}, tokenizer.make('bytes', iter(())), {})


def hashes(state) -> dict[str, str]:
  """path → a hash of the bytes of each array, taken on the host: nothing that jaxlm/digest.py has a part in."""
  import jax  # pylint: disable=g-import-not-at-top
  import xxhash
  from jaxlm.optimizer import path_of
  of = lambda a: xxhash.xxh3_128_hexdigest(np.ascontiguousarray(a).reshape(-1).view(np.uint8))
  return {path_of(path): of(jax.device_get(a)) for path, a in jax.tree_util.tree_leaves_with_path(state)}


def train(flags: argparse.Namespace) -> Iterator[dict]:
  import jax  # pylint: disable=g-import-not-at-top
  from jaxlm import layout, xla
  from jaxlm.checkpoint import Checkpoints, run_meta
  from jaxlm.data import pipeline
  from jaxlm.optimizer import make_optimizer
  from jaxlm.step import abstract_state, init_state, make_step
  from jaxlm.train import abstract_batch
  check_backend(flags)
  config, device = planned(flags).config, jax.devices()[0]
  mesh = layout.run_mesh(config, [device])
  with jax.set_mesh(mesh):
    tx, schedule = make_optimizer(config.optimizer, config.steps)
    lowered = jax.jit(make_step(config, tx, schedule), donate_argnums=0).lower(
        layout.named(abstract_state(config, tx), mesh), abstract_batch(config, mesh))
    began = time.perf_counter()
    step_fn = lowered.compile(xla.options(config.compiler_options, mesh))
    compiled = time.perf_counter() - began
    state = jax.jit(lambda key: init_state(config, tx, key))(jax.random.key(config.seed))
    seconds, losses = [], []
    for n in range(config.steps):
      batch = pipeline.place(functools.partial(rows_of, config, n), config.batch, mesh)
      jax.block_until_ready((state, batch))
      began = time.perf_counter()
      state, sums = step_fn(state, batch)
      losses.append(float(sums['nll']) / float(sums['tokens']))
      seconds.append(time.perf_counter() - began)
    stats = device.memory_stats() or {}
    found = {**rate(flags, config, seconds), 'remat': config.model.remat, 'peak_gib': gib(stats.get('peak_bytes_in_use')),
             'compiler_peak_gib': gib(step_fn.memory_analysis().peak_memory_in_bytes), 'compile_seconds': compiled,
             'attention': 'cudnn' if 'cudnn' in step_fn.as_text() else 'XLA', 'first_loss': losses[0], 'last_loss': losses[-1]}
    note(f'train: {of(found)}; remat={found["remat"]}, attention by {found["attention"]}, compiled in {compiled:.0f} s; '
         f'loss {losses[0]:.3f} → {losses[-1]:.3f}')
    yield {'train': found}
    began = time.perf_counter()
    checkpoints = Checkpoints(flags.workdir, config.checkpoint)
    checkpoints.save(config.steps, state, run_meta(config, made_up_cache(), config.steps * config.batch))
    stall = time.perf_counter() - began
    checkpoints.finish()
    checkpoints.close()
    saved = {'gib': gib(sum(a.nbytes for a in jax.tree.leaves(state))), 'stall_seconds': stall,
             'save_seconds': time.perf_counter() - began}
    (flags.workdir / 'hashes.json').write_text(json.dumps(hashes(state)), encoding='utf-8')
  note(f'checkpoint: {saved["gib"]:.2f} GiB; training waits {stall:.1f} s; sealed and visible after {saved["save_seconds"]:.1f} s')
  yield {'saved': saved}
  if not np.isfinite(losses).all() or losses[-1] >= losses[0]:
    raise SystemExit(f'training did not lower the loss: {losses[0]:.4f}, {losses[-1]:.4f} after {config.steps} steps')


def torch(flags: argparse.Namespace) -> Iterator[dict]:
  """Parameters are float32 and products bfloat16 (autocast), as jaxlm's are."""
  import torch as th  # pylint: disable=g-import-not-at-top
  import transformers
  from transformers.integrations.sdpa_attention import sdpa_attention_forward
  config, device = config_of(flags), 'cpu' if flags.dry_run else 'cuda'
  m, o = config.model, config.optimizer
  # Under torch.compile (torch < 2.14), transformers gives `sdpa` its causal mask as an array, and flash attention takes none. For a kind
  # of attention of which it knows no mask it makes none; the same function then says is_causal.
  transformers.AttentionInterface.register('sdpa_without_mask', sdpa_attention_forward)
  th.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
      hidden_size=m.D, num_attention_heads=m.H, num_key_value_heads=m.G, head_dim=m.K, intermediate_size=m.F, num_hidden_layers=m.N,
      vocab_size=m.V, max_position_embeddings=config.length, rms_norm_eps=m.norm_eps, tie_word_embeddings=m.tied, use_cache=False,
      rope_parameters={'rope_type': 'default', 'rope_theta': m.rope.base}, attn_implementation='sdpa_without_mask')).to(device).train()
  adam = th.optim.AdamW(model.parameters(), lr=o.lr, betas=(o.b1, o.b2), eps=o.eps, weight_decay=o.weight_decay, fused=True)
  if not flags.dry_run:
    model.compile()
  seconds, losses = [], []
  for n in range(config.steps):
    tokens = th.from_numpy(tokens_of(config, n)[:, :-1].astype(np.int64)).to(device)
    began = time.perf_counter()
    with th.autocast(device, dtype=th.bfloat16):
      loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    th.nn.utils.clip_grad_norm_(model.parameters(), o.clip)
    adam.step()
    adam.zero_grad()
    losses.append(loss.item())
    if not flags.dry_run:
      th.cuda.synchronize()
    seconds.append(time.perf_counter() - began)
  found = {**rate(flags, config, seconds), 'peak_gib': None if flags.dry_run else gib(th.cuda.max_memory_allocated()),
           'compiled': not flags.dry_run, 'compile_seconds': seconds[0], 'first_loss': losses[0], 'last_loss': losses[-1]}
  note(f'torch: {of(found)}; torch.compile is {"off in a dry run" if flags.dry_run else "on"}, the first step took {seconds[0]:.0f} s; '
       f'loss {losses[0]:.3f} → {losses[-1]:.3f}')
  yield {'torch': found}


def plan(flags: argparse.Namespace) -> Iterator[dict]:
  p = planned(flags)
  c = p.config
  found = {'step_seconds': p.step.seconds, 'tokens_per_second': c.batch * c.length / p.step.seconds, 'mfu': p.mfu,
           'peak_gib': p.hbm.peak, 'topology': p.job.pod.name, 'remat': c.model.remat, 'bound_by': p.step.bound_by}
  note(f'plan: {found["topology"]}: {of(found)}')
  yield {'plan': found}


def checkpoint(flags: argparse.Namespace) -> Iterator[dict]:
  import jax  # pylint: disable=g-import-not-at-top
  import jaxlm
  from jaxlm import decoding, generate, layout
  from jaxlm.checkpoint import Checkpoints
  from jaxlm.optimizer import make_optimizer
  from jaxlm.sampling import Sampling
  from jaxlm.step import abstract_state
  check_backend(flags)
  config = planned(flags).config
  mesh = layout.run_mesh(config, jax.devices()[:1])
  began, checkpoints = time.perf_counter(), Checkpoints(flags.workdir, read_only=True)
  with jax.set_mesh(mesh):
    abstract = layout.named(abstract_state(config, make_optimizer(config.optimizer, config.steps)[0]), mesh)
    state = jax.block_until_ready(checkpoints.read_state(config.steps, abstract))
  found, checked = {'restore_seconds': time.perf_counter() - began}, hashes(state)
  checkpoints.close()
  del state
  expected = json.loads((flags.workdir / 'hashes.json').read_text(encoding='utf-8'))
  wrong = sorted(path for path in {*checked, *expected} if checked.get(path) != expected.get(path))
  found |= {'arrays': len(expected), 'wrong': wrong}
  note(f'checkpoint: restored in {found["restore_seconds"]:.1f} s; {len(expected) - len(wrong)} of {len(expected)} arrays are bit for bit '
       f'those that were trained{"; wrong: " + ", ".join(wrong[:3]) if wrong else ""}')
  yield {'restored': found}

  lm = jaxlm.load(flags.workdir)
  prompt, seconds = lm.prompt('The '), []
  for _ in range(2):  # the first compiles
    began = time.perf_counter()
    said, = generate.sample(lm, [prompt], NEW, Sampling(0.), 0, lambda row, ids: False)
    seconds.append(time.perf_counter() - began)
  whole_LV = lm.logits([[*prompt, *said[:-1]]])[0, len(prompt) - 1:]
  with jax.set_mesh(lm.mesh):  # again, a token at a time through the cache
    rows = decoding.make(lm, [prompt], NEW)
    cached_LV = np.concatenate([rows.start(), *(rows.extend(jax.device_put(np.array([t], np.int32), layout.spec('B'))) for t in said[:-1])])
  error = float(np.abs(cached_LV - whole_LV).max() / np.abs(whole_LV).max())
  found = {'tokens': len(said), 'error': error, 'first_seconds': seconds[0], 'seconds': seconds[1]}
  note(f'generate: {len(said)} tokens in {seconds[1]:.2f} s ({seconds[0]:.1f} s with compiling): {lm.tokenizer.decode(said)!r}; their logits '
       f'are off by {error:.4f} of the largest from those of one forward pass over all')
  yield {'generated': found}
  if wrong:
    raise SystemExit('what was restored is not what was trained')
  if len(said) != NEW or not error <= LOGITS_TOLERANCE:
    raise SystemExit(f'{len(said)} tokens, for {NEW}; logits that are off by {error}, where {LOGITS_TOLERANCE} is allowed')


PARTS = {'attention': attention, 'train': train, 'torch': torch, 'plan': plan, 'checkpoint': checkpoint}
