"""`jaxlm export`: a model of ours → a folder that transformers' AutoModelForCausalLM and AutoTokenizer load.

The folder is complete or not there: it is written beside its name and renamed at the end, with parity.json, which says
how far the logits of what was written are from ours.
"""
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

from jaxlm.errors import UsageError
from jaxlm.interop import convert
from jaxlm.interop.huggingface import Folder
from jaxlm.metrics import say

SHARD = 4 * 10 ** 9  # bytes of a safetensors file
POSITIONS = (2, 64)  # of the parity report: rows × tokens


def run(lm, out: pathlib.Path, family: str | None, dtype: str) -> dict:
  """Writes `lm` to the folder `out` → the parity report. UsageError if no family holds the model, or `out` exists."""
  if out.exists():
    raise UsageError(f'--out={out}: exists; name a folder that does not')
  m = lm.config.model
  if family is not None and family not in convert.FAMILIES:
    raise UsageError(f'--family={family}: wants one of {", ".join(convert.FAMILIES)}')
  family = family or convert.family_of(m)
  config = convert.to_config_json(family, m)
  ends = sorted(lm.stop_ids, key=lambda i: i == lm.tokenizer.boundary)
  reach = max(lm.config.length, m.P, round(m.rope.original * m.rope.factor))
  config = {'max_position_embeddings': reach, **config, 'bos_token_id': lm.tokenizer.opening, 'eos_token_id': ends,
            'pad_token_id': None, 'dtype': dtype}
  temporary = out.with_name(out.name + '.writing')
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  try:
    _write_tensors(temporary, convert.write(family, m, functools.partial(_get, lm.params)), dtype)
    _write_json(temporary / 'config.json', config)
    _write_json(temporary / 'generation_config.json', {'bos_token_id': config['bos_token_id'], 'eos_token_id': ends})
    (temporary / 'tokenizer.json').write_text(lm.tokenizer.json, encoding='utf-8')
    name = lambda i: lm.tokenizer.text_of(i)
    _write_json(temporary / 'tokenizer_config.json', {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': name(lm.tokenizer.opening), 'eos_token': name(ends[0]),
        'model_max_length': reach, 'clean_up_tokenization_spaces': False})
    report = parity(lm, temporary, dtype)
    _write_json(temporary / 'parity.json', report)
    temporary.rename(out)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  say(f'{out}: {family}, {dtype}; logits differ by at most {report["max_abs_logit_difference"]:.2e} at '
      f'{report["positions"]} positions, read back by {report["read_by"]}')
  return report


def _get(params, path: str, index) -> np.ndarray:
  leaf = functools.reduce(lambda tree, key: tree[key], path.split('/'), params)
  return np.asarray(jax.device_get(leaf[index] if index else leaf))


def _write_json(file: pathlib.Path, value: dict) -> None:
  file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def _write_tensors(folder: pathlib.Path, tensors, dtype: str) -> None:
  """Files of at most SHARD bytes (or one tensor), and their index if there is more than one."""
  kind = np.dtype(np.float32) if dtype == 'float32' else np.dtype(ml_dtypes.bfloat16)
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
  _write_json(folder / 'model.safetensors.index.json', {
      'metadata': {'total_size': total}, 'weight_map': {key: names[i] for i, keys in enumerate(shards) for key in keys}})


def parity(lm, folder: pathlib.Path, dtype: str) -> dict:
  """How far logits of what the folder holds are from lm's, on random tokens: by transformers if it is installed, else by
  our own reading of the folder."""
  m = lm.config.model
  vocab = m.vocab or m.V
  L = min(POSITIONS[1], m.P or POSITIONS[1])
  tokens_BL = np.random.default_rng(0).integers(0, vocab, (POSITIONS[0], L), dtype=np.int32)
  ours_BLV = lm.logits(tokens_BL)[..., :vocab]
  if importlib.util.find_spec('transformers') and importlib.util.find_spec('torch'):
    import torch  # pylint: disable=g-import-not-at-top
    import transformers
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation='eager')
    with torch.no_grad():
      theirs_BLV = peer.eval()(torch.tensor(tokens_BL, dtype=torch.long), use_cache=False).logits.numpy()
    reader = f'transformers {transformers.__version__}'
  else:
    theirs_BLV = _read_back(lm, folder).logits(tokens_BL)[..., :vocab]
    reader = f'jaxlm {importlib.metadata.version("jaxlm")}'
  return {'max_abs_logit_difference': float(np.abs(ours_BLV - theirs_BLV).max()), 'positions': tokens_BL.size,
          'dtype': dtype, 'compute_dtype': m.dtype, 'read_by': reader}


def _read_back(lm, folder: pathlib.Path):
  """lm with the parameters that the folder holds."""
  host = jax.tree.map(lambda a: np.zeros(a.shape, np.float32), lm.params)
  for path, index, array in convert.read(Folder(folder), lm.config.model):
    leaf = functools.reduce(lambda tree, key: tree[key], path.split('/'), host)
    leaf[index if index else slice(len(array))][...] = array
  return dataclasses.replace(lm, params=jax.tree.map(lambda v, a: jax.device_put(v, a.sharding), host, lm.params))
