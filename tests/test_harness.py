"""The harness on a jaxlm LM against its own `hf` model with the same weights: answer by answer, and whole tasks."""
import dataclasses
import importlib
import json
import sys
from unittest import mock

import jax
import lm_eval
import numpy as np
import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import jaxlm
from jaxlm import cli, harness, layout
from jaxlm.data import tokenizer as tokenizers
from jaxlm.errors import UsageError
from jaxlm.interop import importing
from jaxlm.models import kinds
from jaxlm.schema import MeshConfig
from tests import common, families

CONTEXT = 64
LONG = ('The quick brown fox jumps over the lazy dog, and runs. ' * 4).strip()
TEXTS = ['', 'x', LONG[:62], LONG[:63], LONG[:64], LONG[:127], LONG[:200] + 'naïve λόγος',
         '<|endoftext|>it is written out']
PAIRS = [('the cat', ' sat'), ('the cat  ', 'sat'), ('', 'alone'), ('', '<|endoftext|>z'), (' \n', 'blank before'),
         (LONG, 'end'), (LONG, LONG[:64]), ('', LONG[:64]), (LONG[:40], LONG[:30]), ('<|endoftext|>x', 'y'),
         ('a<|endoftext|>b', 'c')]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
fewshot_split: test
fewshot_config: {{sampler: first_n}}
"""
TASKS = {'choice': ("""
output_type: multiple_choice
doc_to_text: "{{text}}\\nEnd:"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: brier_score}]
""", [{'text': LONG[:n], 'choices': [f' {n}', 'yes', LONG[:n // 4]], 'gold': n % 3} for n in (5, 17, 40, 61, 100, 200)]),
         'rolling': ("""
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
""", [{'text': LONG[n:3 * n]} for n in (1, 20, 33, 70)]),
         'go_on': ("""
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["e"], max_gen_toks: 20}
metric_list: [{metric: chrf}, {metric: exact_match}]
""", [{'text': LONG[:n], 'target': 'Zebras, ' + LONG[n:n + 9]} for n in (4, 31, 90)])}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A tiny llama in transformers, as a Hugging Face folder, its import, and a folder of tasks."""
  root = tmp_path_factory.mktemp('harness')
  words = tokenizers.make('bytes', iter(()))
  sizes = dict(families.SIZES, vocab_size=257, bos_token_id=words.boundary, eos_token_id=words.boundary, pad_token_id=None)
  with mock.patch.dict(families.FAMILIES, tiny=('LlamaConfig', sizes)):
    model = families.make('tiny', seed=3)  # with which some texts end by themselves and some do not
  with torch.no_grad():  # it says what can be read: bytes that are no text on their own have a logit of 0
    model.lm_head.weight[[i for i in range(257) if not words.decode([i]).isascii()]] = 0
  model.save_pretrained(root / 'hf')
  (root / 'hf' / 'tokenizer.json').write_text(words.json, encoding='utf-8')
  importing.run(str(root / 'hf'), root / 'run', None, 4, [], print)
  (root / 'tasks').mkdir()
  for name, (yaml, documents) in TASKS.items():
    file = root / 'tasks' / f'{name}.jsonl'
    file.write_text(''.join(json.dumps(d) + '\n' for d in documents), encoding='utf-8')
    head = TASK.format(name=name, file=file, cache=root / 'cache')
    (root / 'tasks' / f'{name}.yaml').write_text(head + yaml, encoding='utf-8')
  return root


def hf_model(model, tokenizer_file):
  words = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), bos_token='<|endoftext|>',
                                               eos_token='<|endoftext|>')
  return HFLM(model, tokenizer=words)


@pytest.fixture(scope='module')
def theirs(folder):
  return hf_model(transformers.AutoModelForCausalLM.from_pretrained(folder / 'hf'), folder / 'hf' / 'tokenizer.json')


@pytest.fixture(scope='module')
def lm(folder):
  return on_mesh(jaxlm.load(folder / 'run', mesh=MeshConfig(1, 8, 1)), (1, 1, 1))


def on_mesh(lm, sizes):
  mesh = common.mesh_of(*sizes)
  with jax.set_mesh(mesh):
    shardings = layout.named(kinds.abstract_params(lm.config.model), mesh)
    params = jax.tree.map(lambda v, a: jax.device_put(np.asarray(v), a.sharding), lm.params, shardings)
  return dataclasses.replace(lm, params=params, mesh=mesh)


def asked(kind, arguments):
  return [Instance(kind, {}, a, 0, ('some', 0, 1)) for a in arguments]


def pairs(theirs):
  """One whose continuation is what the model itself says, one that differs from that at its end, and PAIRS."""
  said = theirs.generate_until(asked('generate_until', [('Speak:', {'until': [], 'max_gen_toks': 3})]))[0]
  return [('Speak:', said), ('Speak:', said[:2] + ('a' if said[2] != 'a' else 'b')), *PAIRS]


def test_loglikelihoods_equal_those_of_the_hf_model(lm, theirs):
  every = pairs(theirs)
  expected = theirs.loglikelihood(asked('loglikelihood', every), disable_tqdm=True)
  ours = harness.Harness(lm, batch=4).loglikelihood(asked('loglikelihood', [*every, ('q', '')]))
  np.testing.assert_allclose([p for p, _ in ours[:-1]], [p for p, _ in expected], atol=1e-4)
  assert [g for _, g in ours[:-1]] == [g for _, g in expected] and [g for _, g in ours[:2]] == [True, False]
  assert ours[-1] == (0, True)


def test_rolling_loglikelihoods_equal_those_of_the_hf_model(lm, theirs):
  for context in (CONTEXT, 10):
    theirs._max_length = context
    expected = theirs.loglikelihood_rolling(asked('loglikelihood_rolling', [(t,) for t in TEXTS]), disable_tqdm=True)
    ours = harness.Harness(lm, context).loglikelihood_rolling(asked('loglikelihood_rolling', [(t,) for t in TEXTS]))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)
  theirs._max_length = None


def test_texts_equal_those_of_the_hf_model(lm, theirs):
  prompts = ['a', 'The', LONG, LONG[:31], '<|endoftext|>b']
  free = {'until': [], 'max_gen_toks': 24}
  said = theirs.generate_until(asked('generate_until', [(p, free) for p in prompts]), disable_tqdm=True)
  assert len(set(said)) == len(prompts) and 0 < sum(len(s) < 24 for s in said) < len(said)
  requests = [(p, free) for p in prompts]
  for prompt, text in zip(prompts, said):
    stops = [x for x in (text[3:5], text[9:10]) if x]
    requests.append((prompt, {'until': stops, 'max_gen_toks': 24, 'do_sample': False}))
  requests += [(p, {'until': said[1][4], 'max_new_tokens': 9, 'temperature': 0.}) for p in prompts]
  expected = theirs.generate_until(asked('generate_until', requests), disable_tqdm=True)
  assert harness.Harness(lm, batch=3).generate_until(asked('generate_until', requests)) == expected
  assert sum(len(e) < len(s) for e, s in zip(expected[5:10], said)) > 2


def test_a_tokenizer_with_no_template_equals_too(lm, theirs, tmp_path):
  text = json.dumps(json.loads(lm.tokenizer.json) | {'post_processor': None})
  (tmp_path / 'bare.json').write_text(text, encoding='utf-8')
  theirs = hf_model(theirs.model, tmp_path / 'bare.json')
  ours = harness.Harness(dataclasses.replace(lm, tokenizer=tokenizers.Tokenizer(text)))
  requests = asked('loglikelihood', [p for p in PAIRS if not p[0].isspace()])  # hf has nothing to begin with there
  np.testing.assert_allclose(ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True), atol=1e-4)
  requests = asked('loglikelihood_rolling', [(t,) for t in TEXTS])
  np.testing.assert_allclose(ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests), rtol=1e-5)
  requests = asked('generate_until', [(p, {'until': [], 'max_gen_toks': 6}) for p in ('b', LONG)])
  assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)
  assert ours.loglikelihood(asked('loglikelihood', [(' ', 'x')])) == ours.loglikelihood(asked('loglikelihood', [('', ' x')]))


def test_a_mesh_changes_nothing(lm, theirs):
  there = harness.Harness(on_mesh(lm, (1, 2, 2)), batch=3)
  here = harness.Harness(lm)
  for a, b in zip(*(m.loglikelihood(asked('loglikelihood', pairs(theirs))) for m in (here, there))):
    np.testing.assert_allclose(a, b, atol=1e-4)
  np.testing.assert_allclose(*(m.loglikelihood_rolling(asked('loglikelihood_rolling', [(t,) for t in TEXTS]))
                               for m in (here, there)), rtol=1e-5)
  sampled = [(p, {'until': ['e'], 'max_gen_toks': 8, 'temperature': t, 'top_k': 5}) for p in ('a', 'The') for t in (0, 0.9)]
  one, two = (m.generate_until(asked('generate_until', sampled)) for m in (here, there))
  assert one == two and one[1] != one[0]


def test_logits_of_all_tokens_are_never_there(lm):
  batch = {k: np.zeros((2, 256), np.int32) for k in ('tokens', 'targets', 'segments', 'positions')}
  batch['weights'] = np.ones((2, 256), np.float32)
  with jax.set_mesh(lm.mesh):
    text = harness._scores.lower(lm.config.model, lm.params, common.put(batch)).as_text()
  assert f'2x{harness.PIECE}x260xf32' in text and '2x256x260' not in text


@pytest.mark.parametrize('names, options', [(list(TASKS), {}), (['choice'], {'num_fewshot': 2, 'limit': 3})], ids=str)
def test_tasks_equal_those_of_the_hf_model(folder, lm, theirs, names, options):
  result = harness.run(lm, names, str(folder / 'tasks'), **options)
  manager = TaskManager(include_path=str(folder / 'tasks'), include_defaults=False)
  expected = lm_eval.simple_evaluate(theirs, tasks=names, task_manager=manager, bootstrap_iters=0, **options)
  for name in names:
    for metric, value in result['results'][name].items():
      np.testing.assert_allclose(value, expected['results'][name][metric + ',none'], rtol=1e-4, err_msg=f'{name} {metric}')
    assert result['documents'][name] == options.get('limit', len(TASKS[name][1]))
    assert result['fewshot'][name] == options.get('num_fewshot', 0)
  assert result['results'].keys() == set(names) and result['results']['choice'].keys() == {'acc', 'acc_norm', 'brier_score'}


def test_command_line(folder, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('GLIBC_TUNABLES', '')  # it restarts itself otherwise
  words = ['eval', f'--workdir={folder / "run"}', '--mesh=1,8,1']
  cli.run([*words, '--tasks=rolling,choice', f'--task_path={folder / "tasks"}', '--limit=2',
           f'--json={tmp_path / "out.json"}'])
  out = json.loads((tmp_path / 'out.json').read_text())
  assert out['step'] == 0 and out['context'] == CONTEXT and out['documents'] == {'rolling': 2, 'choice': 2}
  assert f'{out["results"]["rolling"]["bits_per_byte"]:.4f}' in capsys.readouterr().out
  for more, message in [(['--num_fewshot=2'], 'num_fewshot is for scoring tasks, and here it is texts or answers'), (['--tasks=choice', '--baselines'], 'baselines is for scoring texts, and here it is tasks'),
                        (['--tasks=choice', f'--task_path={tmp_path / "none"}'], 'no such folder')]:
    with pytest.raises(UsageError, match=message):
      cli.run([*words, *more])


def test_what_cannot_be_done_is_said(folder, lm, monkeypatch):
  model = harness.Harness(lm)
  for kwargs, message in [({'num_beams': 3, 'max_gen_toks': 9}, 'num_beams'), ({'max_gen_toks': 64}, 'max_gen_toks=64')]:
    with pytest.raises(UsageError, match=message):
      model.generate_until(asked('generate_until', [('x', kwargs)]))
  with pytest.raises(UsageError, match='a continuation has 65 tokens'):
    model.loglikelihood(asked('loglikelihood', [('x', 'y' * 65)]))
  with mock.patch.object(harness.harness_tasks, 'TaskManager', lambda include_path, include_defaults=False: TaskManager(
      include_path=include_path, include_defaults=False)), pytest.raises(UsageError, match='--tasks=choise: .* choice?'):
    harness.run(lm, ['choise'], str(folder / 'tasks'))  # without reading the harness's thousands
  (folder / 'tasks' / 'choice.jsonl').rename(folder / 'tasks' / 'away')
  with pytest.raises(UsageError, match='--tasks=choice: .*choice.jsonl'):
    harness.run(lm, ['choice'], str(folder / 'tasks'))
  (folder / 'tasks' / 'away').rename(folder / 'tasks' / 'choice.jsonl')
  monkeypatch.setitem(sys.modules, 'lm_eval', None)
  monkeypatch.delitem(sys.modules, 'jaxlm.harness')
  with pytest.raises(UsageError, match=r'--tasks wants the evaluation harness: .*\[harness\]'):
    importlib.import_module('jaxlm.harness')
