"""`jaxlm export`: a model of ours → a folder that transformers' class for it and AutoTokenizer load.

The folder is complete or not there: it is written beside its name and renamed at the end, with parity.json, which says
how far the logits of what was written are from ours.
"""
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from jaxlm.decoding import never_of, start_of
from jaxlm.errors import UsageError
from jaxlm.interop import convert
from jaxlm.interop.huggingface import POOLING, Folder, read_json
from jaxlm.metrics import say
from jaxlm.schema import ModelConfig

SHARD = 4 * 10 ** 9  # bytes of a safetensors file
DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}
POSITIONS = (2, 64)  # of the parity report: rows × tokens


def run(lm, out: pathlib.Path, family: str | None, dtype: str) -> dict:
  """Writes `lm` to the folder `out` → the parity report. UsageError if no family holds the model, or `out` exists."""
  family = family_of(lm.config.model, family)
  convert.to_config_json(family, lm.config.model)
  with complete(out) as temporary:
    write_model(lm, temporary, family, dtype)
    report = parity(lm, temporary, dtype)
    write_json(temporary / 'parity.json', report)
  say(f'{out}: {family}, {dtype}; {told(report)}')
  return report


def told(report: dict) -> str:
  return (f'logits differ by at most {report["max_abs_logit_difference"]:.2e} at {report["positions"]} positions, '
          f'read back by {report["read_by"]}')


def family_of(m: ModelConfig, family: str | None) -> str:
  """The family to write: the one that is asked for, or the first that holds the model."""
  if family is not None and family not in convert.FAMILIES:
    raise UsageError(f'--family={family}: wants one of {", ".join(convert.FAMILIES)}')
  return family or convert.family_of(m)


@contextlib.contextmanager
def complete(out: pathlib.Path):
  """A folder to write that gets the name `out` when all went well, and is gone when not. UsageError if `out` exists."""
  if out.exists():
    raise UsageError(f'--out={out}: exists; name a folder that does not')
  temporary = out.with_name(out.name + '.writing')
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  try:
    yield temporary
    temporary.rename(out)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def write_model(lm, folder: pathlib.Path, family: str, dtype: str) -> None:
  """All files of the model into a folder that is there. UsageError if the family does not hold it."""
  m = lm.config.model
  config = convert.to_config_json(family, m)
  ends = sorted(lm.stop_ids, key=lambda i: i == lm.tokenizer.boundary)
  reach = max(lm.config.length, lm.config.objective.source, m.P - m.first_position, round(m.rope.original * m.rope.factor))
  special = _special(lm)
  config = {'max_position_embeddings': reach, 'pad_token_id': special['pad'], **config, 'bos_token_id': lm.tokenizer.opening,
            'eos_token_id': ends, 'dtype': dtype}
  said = {'bos_token_id': config['bos_token_id'], 'eos_token_id': ends}
  if m.kind == 'seq2seq' and start_of(lm):
    said |= {'decoder_start_token_id': start_of(lm)[0], 'pad_token_id': config['pad_token_id']}
  config |= said
  if names := [name for name in lm.config.data.classes.split('|') if name]:
    config |= {'id2label': {str(n): name for n, name in enumerate(names)}, 'label2id': {name: n for n, name in enumerate(names)}}
  if never_of(lm):
    said['bad_words_ids'] = [[i] for i in never_of(lm)]
  write_tensors(folder, convert.write(family, m, functools.partial(get, lm.params)), dtype)
  write_json(folder / 'config.json', config)
  write_json(folder / 'generation_config.json', said)
  (folder / 'tokenizer.json').write_text(lm.tokenizer.json, encoding='utf-8')
  name = lambda i: lm.tokenizer.text_of(i)
  write_json(folder / 'tokenizer_config.json', {
      'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': name(lm.tokenizer.opening), 'eos_token': name(ends[0]),
      **{f'{kind}_token': name(i) for kind, i in special.items() if i is not None},
      'model_input_names': ['input_ids', *(['token_type_ids'] if m.T > 1 else []), 'attention_mask'],
      'model_max_length': reach, 'clean_up_tokenization_spaces': False})
  _write_sentence_files(folder, lm)


def _special(lm) -> dict[str, int | None]:
  """Tokens that encoders and encoder-decoders name: {'pad': 0, …}; 'pad' is None where there is none, and of a decoder."""
  if lm.config.model.kind == 'decoder':
    return {'pad': None}
  known = {'pad': ('[PAD]', '<pad>'), 'mask': ('[MASK]', '<mask>'), 'cls': ('[CLS]', '<s>'), 'sep': ('[SEP]', '</s>')}
  ids = {lm.tokenizer.text_of(i): i for i in range(lm.tokenizer.vocab_size)}
  found = {kind: next((ids[name] for name in names if name in ids), None) for kind, names in known.items()}
  return {kind: i for kind, i in found.items() if kind == 'pad' or i is not None}


def _write_sentence_files(folder: pathlib.Path, lm) -> None:
  """What sentence-transformers reads of an encoder that makes vectors of texts."""
  m = lm.config.model
  if m.pool == 'none':
    return
  kinds = [('', 'Transformer'), ('1_Pooling', 'Pooling'), *([('2_Normalize', 'Normalize')] if m.normalize else [])]
  write_json(folder / 'modules.json', [{'idx': i, 'name': str(i), 'path': path, 'type': f'sentence_transformers.models.{kind}'}
                                        for i, (path, kind) in enumerate(kinds)])
  (folder / '1_Pooling').mkdir()
  write_json(folder / '1_Pooling' / 'config.json', {
      'word_embedding_dimension': m.D, **{mode: pool == m.pool for mode, pool in POOLING.items()}})
  write_json(folder / 'sentence_bert_config.json', {'max_seq_length': lm.config.length, 'do_lower_case': False})


def get(params, path: str, index) -> np.ndarray:
  leaf = functools.reduce(lambda tree, key: tree[key], path.split('/'), params)
  if index:  # of layers, which no mesh cuts, and of experts, which one may
    rest = jax.sharding.NamedSharding(leaf.sharding.mesh, jax.P(*leaf.sharding.spec[len(index):]))
    leaf = leaf.at[index].get(out_sharding=rest)
  return np.asarray(jax.device_get(leaf))


def write_json(file: pathlib.Path, value: dict | list) -> None:
  file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def write_tensors(folder: pathlib.Path, tensors, dtype: str) -> None:
  """Files of at most SHARD bytes (or one tensor), and their index if there is more than one."""
  kind = DTYPES[dtype]
  shards, held, size = [], {}, 0

  def flush():
    nonlocal held, size
    safetensors.numpy.save_file(held, folder / f'{len(shards)}.safetensors', metadata={'format': 'pt'})
    shards.append(list(held))
    held, size = {}, 0
  total = 0
  for name, tensor in tensors:
    if held and size + tensor.size * kind.itemsize > SHARD:
      flush()
    held[name] = np.ascontiguousarray(tensor.astype(kind))
    size += held[name].nbytes
    total += held[name].nbytes
  flush()
  if len(shards) == 1:
    (folder / '0.safetensors').rename(folder / 'model.safetensors')
    return
  names = [f'model-{i + 1:05}-of-{len(shards):05}.safetensors' for i in range(len(shards))]
  for i, name in enumerate(names):
    (folder / f'{i}.safetensors').rename(folder / name)
  write_json(folder / 'model.safetensors.index.json', {
      'metadata': {'total_size': total}, 'weight_map': {key: names[i] for i, keys in enumerate(shards) for key in keys}})


def parity(lm, folder: pathlib.Path, dtype: str, adapter: pathlib.Path | None = None) -> dict:
  """How far logits of what the folder holds (of a model without: its scores, or hidden states) are from lm's, on random tokens:
  by transformers if it is installed, else by our own reading of the folder. adapter: what peft puts on it before."""
  m, config, rng = lm.config.model, read_json(folder / 'config.json'), np.random.default_rng(0)
  vocab = m.vocab or m.V
  table = {'learned': m.P - m.first_position, 'sinusoidal': config['max_position_embeddings']}  # theirs is one in both cases
  L = min(POSITIONS[1], table.get(m.position, POSITIONS[1]))

  def random_tokens():
    tokens_BL = rng.integers(0, vocab, (POSITIONS[0], L), dtype=np.int32)
    return np.where(tokens_BL == config['pad_token_id'], (tokens_BL + 1) % vocab, tokens_BL)  # RoBERTa counts no padding
  tokens_BL, inputs_BM = random_tokens(), random_tokens() if m.kind == 'seq2seq' else None
  cut = (lambda a: a[..., :vocab]) if m.head in ('lm', 'mlm') else np.asarray
  ours = cut(lm.outputs(tokens_BL, inputs_BM))
  if importlib.util.find_spec('transformers') and importlib.util.find_spec('torch'):
    import torch  # pylint: disable=g-import-not-at-top
    import transformers
    kind = getattr(transformers, config['architectures'][0])
    peer = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation='eager').eval()
    reader = f'transformers {transformers.__version__}'
    if adapter:
      import peft  # pylint: disable=g-import-not-at-top
      peer = peft.PeftModel.from_pretrained(peer, adapter).eval()
      reader = f'peft {peft.__version__} on {reader}'
    ids = lambda a: torch.tensor(a, dtype=torch.long)
    batch = {} if m.kind == 'encoder' else {'use_cache': False}
    batch |= ({'input_ids': ids(tokens_BL)} if inputs_BM is None else
              {'input_ids': ids(inputs_BM), 'decoder_input_ids': ids(tokens_BL)})
    with torch.no_grad():
      said = peer(**batch)
    names = ('start_logits', 'end_logits') if m.head == 'span' else ('prediction_logits', 'logits', 'last_hidden_state')
    found = [said[name].numpy() for name in names if name in said]
    theirs = np.stack(found, -1) if m.head == 'span' else found[0]
  else:
    theirs = cut(_read_back(lm, folder).outputs(tokens_BL, inputs_BM))
    reader = f'jaxlm {importlib.metadata.version("jaxlm")}'
  return {'max_abs_logit_difference': float(np.abs(ours - theirs).max()), 'positions': tokens_BL.size,
          'dtype': dtype, 'compute_dtype': m.dtype, 'read_by': reader}


def _read_back(lm, folder: pathlib.Path):
  """lm with the parameters that the folder holds."""
  host = jax.tree.map(lambda a: np.zeros(a.shape, np.float32), lm.params)
  for path, index, array in convert.read(Folder(folder), lm.config.model):
    leaf = functools.reduce(lambda tree, key: tree[key], path.split('/'), host)
    leaf[index if index else slice(len(array))][...] = array
  return dataclasses.replace(lm, params=jax.tree.map(lambda v, a: jax.device_put(v, a.sharding), host, lm.params))
