"""Mixtures: who gets which example, that each task is what it would be alone, and what is said of each."""
import contextlib
import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from jaxlm import answers, cli, config as configs, eval_command, evaluate, objectives, schema, train
from jaxlm import lm as lms
from jaxlm.data import caches, mixture, packing, pipeline, tokenizer
from jaxlm.errors import UsageError
from jaxlm.models import kinds
from jaxlm.schema import flatten, of_task
from tests import common

DIGITS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')


@pytest.fixture(scope='module')
def flat(texts, tmp_path_factory):
  """Keys of a tiny T5 that spells digits and restores spans, two to one; its caches are made once."""
  folder = tmp_path_factory.mktemp('mixture')
  numbers = np.random.default_rng(0).integers(0, 10, (60, 2))
  lines = [json.dumps({'q': ''.join(map(str, n)), 'a': ' '.join(DIGITS[i] for i in n)}) for n in numbers]
  (folder / 'pairs.jsonl').write_text('\n'.join(lines))
  return {
      **{f'model.{k}': v for k, v in common.T5.items()}, 'model.N': 1, 'model.encoder_N': 1, 'batch': 8, 'length': 32,
      'loss.chunks': 4, 'optimizer.lr': 1e-2, 'optimizer.warmup': 2, 'optimizer.schedule': 'constant', 'steps': 4,
      'save_every': 2, 'log_every': 1, 'eval_every': 2, 'eval_windows': 16, 'data.tokenizer': 'bytes', 'data.heldout': 0.2,
      'data.cache': str(folder / 'cache'), 'objective.source': 48, 'tasks.spell.objective.name': 'answer',
      'tasks.spell.weight': 2, 'tasks.spell.prefix': 'spell: ', 'tasks.spell.metrics': 'exact,chrf',
      'tasks.spell.data.source': f'jsonl:{folder}/pairs.jsonl', 'tasks.spell.data.key': 'q', 'tasks.spell.data.target': 'a',
      'tasks.text.objective.name': 'spans', 'tasks.text.data.source': f'text:{texts}/*.txt'}


@pytest.fixture(scope='module')
def made(flat):
  config = configs.from_flat(flat)
  return mixture.make(config, mixture.prepare(config, None, lambda _: None))


@pytest.fixture(scope='module')
def llama(flat):
  """The same tasks for a decoder, which compiles sooner: answers and next tokens."""
  t5 = {f'model.{k}' for k in common.T5}
  return {**{k: v for k, v in flat.items() if k not in t5}, **{f'model.{k}': v for k, v in common.LLAMA.items()}, 'model.N': 1,
          'model.encoder_N': 0, 'objective.source': 0, 'tasks.text.objective.name': 'causal'}


@pytest.fixture(scope='module')
def decoding(llama, made):
  return mixture.make(configs.from_flat(llama), made.cache)


@contextlib.contextmanager
def one_cpu():
  """As if the machine had one device."""
  devices = jax.devices()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda *a: devices[:1])
    yield


@pytest.fixture(scope='module')
def unbroken(llama, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('unbroken')
  with one_cpu():
    train.train(configs.from_flat(llama), workdir)
  return workdir


def without_tasks(flat):
  return {k: v for k, v in flat.items() if not k.startswith('tasks.')}


def logged(workdir):
  timed = ('tokens_per_second', 'step_seconds', 'model_flops_per_second')
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{k: v for k, v in line.items() if k not in timed} for line in lines]


# ---- data

@pytest.mark.parametrize('weights, expected', [
    ((1.,), (1000,)), ((2., 1.), (667, 333)), ((1., 1., 1.), (334, 333, 333)), ((0.3, 0.7), (300, 700)),
    ((1e-9, 1., 1e-300), (1, 998, 1)), ((1e308, 1e308), (500, 500)), ((5., 3., 2.), (500, 300, 200))])
def test_quotas_are_the_weights_by_largest_remainder(weights, expected):
  assert tuple(mixture.quotas(weights)) == expected


def test_each_block_has_its_quotas_and_each_task_counts_its_own_from_zero(made):
  numbers = np.arange(3500)
  tasks, own = made.tasks_of(numbers)
  for block in range(3):
    assert np.bincount(tasks[block * 1000:(block + 1) * 1000]).tolist() == [667, 333]
  for k in range(2):  # told by counting: the n-th of a task is its example n
    assert own[tasks == k].tolist() == list(range(np.sum(tasks == k)))
  assert (tasks[:1000] != tasks[1000:2000]).mean() > 0.3  # each block has an order of its own …
  assert np.std(tasks[:1000].reshape(10, 100).sum(1)) < 12  # … that is well mixed
  some = np.array([3001, 7, 1000, 999_999_999])
  assert all((a[:3] == b[some[:3]]).all() for a, b in zip(made.tasks_of(some), (tasks, own)))


@pytest.mark.parametrize('at', [0, 700, 1000, 2337])
def test_when_weights_or_tasks_change_each_task_goes_on_with_its_next_example(made, at):
  """Twice, and then one goes and comes back. Told by counting, whatever the blocks."""
  both, meta, had = made.config, {}, {'spell': 0, 'text': 0}
  spell, text = both.tasks
  reweighted = lambda a, b: dataclasses.replace(both, tasks=(dataclasses.replace(spell, weight=a), dataclasses.replace(text, weight=b)))
  mix, began = made, 0
  for config in (reweighted(1., 4.), reweighted(3., 1.), dataclasses.replace(both, tasks=(text,)), reweighted(3., 1.), both):
    seen, own = mix.tasks_of(np.arange(began, began + at))
    for k, task in enumerate(mix.config.tasks):
      assert own[seen == k].tolist() == list(range(had[task.name], had[task.name] + np.sum(seen == k)))
      had[task.name] += int(np.sum(seen == k))
    began += at
    meta = json.loads(json.dumps({**mix.meta(), 'examples': began}))
    mix = mixture.Mixture(config, made.cache, made.pipelines).after(mix.config, meta, 0)
    again = mixture.Mixture(config, made.cache, made.pipelines).after(config, json.loads(json.dumps({**mix.meta(), 'examples': began + 7})), 0)
    assert again.origin == mix.origin  # a stop that changes nothing
  assert had['text'] > had['spell'] > 0 or not at


def test_a_run_whose_weights_change_reads_on(llama, tmp_path):
  """From end to end: the rows of the steps after are those of after()."""
  changed = {**llama, 'tasks.spell.weight': 1., 'tasks.text.weight': 4.}
  seen = []
  with one_cpu(), pytest.MonkeyPatch.context() as patch:
    rows = mixture.Mixture.rows
    patch.setattr(mixture.Mixture, 'rows', lambda self, step, *a: seen.append((step, self)) or rows(self, step, *a))
    train.train(configs.from_flat({**llama, 'steps': 2}), tmp_path)
    train.train(configs.from_flat({**changed, 'steps': 3}), tmp_path, ('tasks.spell.weight', 'tasks.text.weight'))
    train.train(configs.from_flat({**changed, 'steps': 4}), tmp_path)
  each = {task: [] for task in ('spell', 'text')}
  for step, mix in sorted({step: mix for step, mix in seen}.items()):
    tasks, own = mix.tasks_of(mix.skipped + step * mix.config.batch + np.arange(mix.config.batch))
    for k, task in enumerate(mix.config.tasks):
      each[task.name] += own[tasks == k].tolist()
  assert all(own == list(range(len(own))) for own in each.values()) and sum(map(len, each.values())) == 4 * mix.config.batch


def test_rows_are_those_of_each_task_alone(made):
  rows = {k: np.concatenate([made.rows(step, 0, 8)[k] for step in range(20)]) for k in mixture.shapes(made.config)}
  for k, task in enumerate(made.config.tasks):
    here = rows['task'][:, 0] == k
    alone = pipeline.make(of_task(made.config, task), packing.open_cache(of_task(made.config, task).data, made_at(made, task)))
    for name, a in alone.examples(np.arange(here.sum())).items():
      np.testing.assert_array_equal(rows[name][here], a, task.name)
    order = lambda a, n: sorted(map(bytes, a[:n]))
    first, second = rows['targets'][here][:alone.windows], rows['targets'][here][alone.windows:2 * alone.windows]
    if task.name == 'spell':
      assert len(second) == alone.windows and order(first, None) == order(second, None)  # each row once an epoch
  part = made.rows(3, 2, 5)
  assert all((part[name] == a[2:5]).all() for name, a in made.rows(3, 0, 8).items())
  question = made.cache.tokenizer.decode(rows['inputs'][rows['task'][:, 0] == 0][0])
  assert question.count('spell: ') > 1 and question.startswith('spell: ')


def made_at(made, task):
  return pathlib.Path(made.config.data.cache) / task.name


def test_one_tokenizer_is_trained_on_all_tasks(flat, tmp_path):
  c = configs.from_flat({**flat, 'data.tokenizer': 'bpe:300', 'model.V': 400})
  tasks = {task.name: of_task(c, task).data for task in c.tasks}
  caches.build(tasks, tmp_path / 'cache', lambda _: None)
  found = caches.prepare(c, tmp_path / 'cache')
  texts = [text for data in tasks.values() for text in packing.texts(data)]
  assert found.tokenizer.json == tokenizer.make('bpe:300', iter(texts)).json
  assert {cache.tokenizer.sha256 for cache in found.of.values()} == {found.tokenizer.sha256}
  assert sorted(p.name for p in tmp_path.iterdir()) == ['cache']


def test_caches_of_other_tasks_are_refused(flat, made, tmp_path):
  folder = made_at(made, made.config.tasks[0]).parent
  say = lambda **changes: caches.prepare(configs.from_flat({**flat, **changes}), folder)
  with pytest.raises(UsageError, match="task spell: .*data.prefix='spell: ', the config has 'say: '; .*remove .*/cache, whose"):
    say(**{'tasks.spell.prefix': 'say: '})
  with pytest.raises(UsageError, match='built for the tasks spell, text, the config has spell, text, third; '):
    say(**{'tasks.third.objective.name': 'spans'})
  with pytest.raises(UsageError, match="data.tokenizer='bytes', the config has 'bpe:300'; "):
    say(**{'data.tokenizer': 'bpe:300'})
  with pytest.raises(UsageError, match='mixture.json is missing'):
    caches.prepare(configs.from_flat(flat), folder / 'spell')
  none = configs.from_flat({**flat, 'data.cache': str(tmp_path / 'c'), 'tasks.text.data.source': 'text:/none/*'})
  with pytest.raises(UsageError, match='task text: .*no file matches'):
    mixture.prepare(none, None, lambda _: None)
  assert not list(tmp_path.iterdir())


# ---- config

def test_configs_of_tasks(flat):
  c = configs.from_flat(flat)
  assert [t.name for t in c.tasks] == ['spell', 'text'] and hash(c) == hash(configs.from_flat(flat))
  assert configs.from_json(configs.to_json(c)) == c == configs.from_flat(flatten(c))
  spell = of_task(c, c.tasks[0])
  assert (spell.objective.name, spell.objective.source, spell.data.prefix, spell.data.heldout, spell.data.tokenizer) == (
      'answer', 48, 'spell: ', 0.2, 'bytes')
  assert 'tasks.spell weight=2.0 prefix=spell:  metrics=exact,chrf' in configs.summary(c)
  assert 'tasks.text.objective name=spans' in configs.summary(c)
  plain = configs.from_flat({})
  assert json.loads(configs.to_json(plain))['tasks'] == {} and 'tasks' not in configs.summary(plain)
  old = json.loads(configs.to_json(plain))
  del old['tasks'], old['data']['prefix']
  assert configs.from_json(json.dumps(old)) == plain
  assert {m for names in schema.METRICS.values() for m in names} == set(answers.METRICS)


def test_overrides_of_tasks(flat, tmp_path):
  (tmp_path / 'config.json').write_text(configs.to_json(configs.from_flat(flat)))
  load = lambda *overrides: configs.load(str(tmp_path / 'config.json'), overrides)
  c = load(('tasks.spell.weight', '3'), ('objective.share', '0.2'), ('tasks.text.data.heldout', '0.1'))
  assert c.tasks[0].weight == 3. and c.tasks[1].objective.share == 0.2 and c.tasks[1].data.heldout == 0.1
  for override, says in [
      (('tasks.spel.weight', '3'), "no task 'spel'; did you mean tasks.spell.weight?"),
      (('tasks.spell.wieght', '3'), 'did you mean tasks.spell.weight?'),
      (('tasks.spell.data.tokenizer', 'x'), 'all tasks share data.tokenizer'),
      (('tasks.spell.data.prefix', 'x'), 'did you mean tasks.spell.prefix?'),
      (('tasks.spell.source', 'x'), 'did you mean tasks.spell.objective.source or tasks.spell.data.source?')]:
    with pytest.raises(UsageError) as e:
      load(override)
    assert says in str(e.value) and '\n' not in str(e.value)


def test_the_config_of_three_tasks_is_good():
  c = configs.load('configs/finetune/multitask.py')
  assert [(t.name, t.objective.name, t.data.prefix, t.metrics) for t in c.tasks] == [
      ('field', 'answer', 'field: ', 'exact,f1'), ('text', 'spans', '', ''),
      ('translate', 'answer', 'translate German to English: ', 'bleu')]
  assert len({t.objective.source for t in c.tasks}) == 1 and c.model.V >= 8000 + tokenizer.SENTINELS


@pytest.mark.parametrize('changes, says', [
    ({'tasks.text.objective.source': 40},
     r'tasks spell and text have batches of different shapes, inputs \[B, 48\] and inputs \[B, 40\]'),
    ({'tasks.text.objective.name': 'mask'}, "tasks.text.objective.name='mask': model.kind=seq2seq wants one of"),
    ({'tasks.text.objective.name': 'answer'}, "tasks.text.data.target='': objective.name=answer wants"),
    ({'tasks.spell.weight': 0}, 'tasks.spell.weight=0.0: wants a number above 0'),
    ({'tasks.spell.metrics': 'blue'}, "tasks.spell.metrics='blue': objective.name=answer wants some of exact, bleu"),
    ({'tasks.text.metrics': 'bleu'}, "tasks.text.metrics='bleu': objective.name=[a-z]* wants ''; metrics are of answers"),
    ({'tasks.a b.weight': 1.}, "tasks.a b: a task's name is of letters"),
    ({'tasks.weight': 1.}, 'keys of tasks are tasks.NAME.weight'),
    ({'data.order': 'contiguous'}, "data.order='contiguous': rows of a mixture"),
    ({'model.kind': 'ngram', 'model.encoder_N': 0, 'steps': 1}, 'model.kind=.ngram.: an n-gram'),
    ({'loss.chunks': 5}, 'tasks.spell: loss.chunks=5: does not divide'), ({'model.G': 3}, 'model.G=3: does not divide')])
def test_what_a_mixture_refuses(flat, changes, says):
  with pytest.raises(UsageError, match='^[^\n]*' + says):
    configs.from_flat({**flat, **changes})


def test_pairs_have_one_weight_of_next_sentences():
  flat = {**{f'model.{k}': v for k, v in common.BERT.items()}, 'length': 32, 'loss.chunks': 1, 'tasks.a.objective.name': 'pairs',
          'tasks.b.objective.name': 'pairs'}
  assert configs.from_flat(flat).tasks
  with pytest.raises(UsageError, match='tasks a and b have objective.next_sentence=1.0 and 0.5: it is one loss'):
    configs.from_flat({**flat, 'tasks.b.objective.next_sentence': 0.5})
  with pytest.raises(UsageError, match=r'tasks a and b have batches of different shapes, types \[B, 32\] and no types'):
    configs.from_flat({**flat, 'tasks.b.objective.name': 'mask'})


# ---- training

def test_sums_of_tasks_are_those_of_their_rows(llama, decoding, one_device):
  c, plain = decoding.config, configs.from_flat(without_tasks(llama))
  rows = decoding.rows(0, 0, 8)
  params = jax.jit(lambda key: kinds.init_params(c.model, key))(jax.random.key(0))
  grad = lambda config: jax.jit(jax.value_and_grad(lambda p, b: objectives.token_loss(config, p, b), has_aux=True))
  (loss, (sums, _)), grads = grad(c)(params, common.put(rows))
  alone = grad(plain)
  (whole, (expected, _)), expected_grads = alone(params, common.put(rows))
  np.testing.assert_allclose([loss, sums['nll']], [whole, expected['nll']], rtol=1e-6)
  common.assert_trees_close(grads, expected_grads, rtol=1e-5, atol=1e-5)
  for k in range(2):
    own = {**rows, 'weights': rows['weights'] * (rows['task'] == k)}
    _, (of_k, _) = alone(params, common.put(own))[0]
    np.testing.assert_allclose([sums['task_nll'][k], sums['task_tokens'][k]], [of_k['nll'], of_k['tokens']], rtol=1e-6)
    assert of_k['tokens'] > 0


def test_a_mixture_of_one_task_is_the_run_of_that_task(llama, made, one_device):
  c = configs.from_flat({k: v for k, v in llama.items() if not k.startswith('tasks.text.')})
  alone, cache = of_task(c, c.tasks[0]), made.cache.of['spell']
  params = jax.jit(lambda key: kinds.init_params(c.model, key))(jax.random.key(0))
  found = []
  for config, data in [(c, mixture.make(c, caches.Caches({'spell': cache}))), (alone, pipeline.Pipeline(alone, cache))]:
    loss = jax.jit(lambda rows, config=config: objectives.of(config)(config, params, rows))
    rows = [data.rows(step, 0, 8) for step in (0, 1, 200)]
    found.append(([{k: a for k, a in r.items() if k != 'task'} for r in rows], [float(loss(common.put(r))[0]) for r in rows]))
  common.assert_trees_equal(found[0][0], found[1][0])
  np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-6)
  assert len(set(found[0][1])) == 3


def test_classifiers_of_two_texts_share_their_classes(one_device):
  c = configs.from_flat({
      **{f'model.{k}': v for k, v in common.BERT.items()}, 'model.N': 1, 'model.head': 'classify',
      'objective.name': 'classify', 'length': 16, 'loss.chunks': 1, 'batch': 4, 'data.target': 'a',
      'data.classes': 'no|yes', 'tasks.x.weight': 1., 'tasks.y.weight': 3.})
  rng, sizes = np.random.default_rng(0), mixture.shapes(c)
  rows = {k: rng.integers(0, 2, (4, size)).astype(dtype) for k, (size, dtype) in sizes.items()}
  rows |= {'weights': np.ones((4, 1), np.float32), 'task': np.array([[0], [1], [1], [1]], np.int32)}
  params = jax.jit(lambda key: kinds.init_params(c.model, key))(jax.random.key(0))
  loss = jax.jit(lambda batch: objectives.of(c)(c, params, batch)[1][0])
  sums, first = loss(common.put(rows)), loss(common.put({**rows, 'weights': rows['weights'] * (rows['task'] == 0)}))
  assert sums['task_tokens'].tolist() == [1, 3]
  np.testing.assert_allclose(sums['task_nll'], [first['nll'], sums['nll'] - first['nll']], rtol=1e-5)


def test_a_run_says_what_each_task_costs(unbroken, decoding):
  lines = logged(unbroken)
  steps = [line for line in lines if 'loss' in line]
  assert [line['step'] for line in steps] == list(range(1, 5))
  for n, line in enumerate(steps):
    rows = decoding.rows(n, 0, 8)
    tokens = [int(rows['weights'][rows['task'][:, 0] == k].sum()) for k in range(2)]
    assert [line['tokens/spell'], line['tokens/text']] == tokens
    total = sum(line[f'loss/{name}'] * count for name, count in zip(('spell', 'text'), tokens) if count)
    np.testing.assert_allclose(total / sum(tokens), line['loss'], rtol=1e-5)
  held_out = [line for line in lines if 'heldout_loss' in line]
  assert [line['step'] for line in held_out] == [2, 4]
  for line in held_out:
    np.testing.assert_allclose(line['heldout_loss'], (2 * line['heldout_loss/spell'] + line['heldout_loss/text']) / 3, rtol=1e-6)


def test_resume_is_bit_for_bit_and_refuses_other_tasks(llama, unbroken, tmp_path):
  with one_cpu():
    for steps in (2, 4):
      train.train(configs.from_flat({**llama, 'steps': steps}), tmp_path)
  assert [l for l in logged(tmp_path) if 'loss' in l] == [l for l in logged(unbroken) if 'loss' in l]
  common.assert_trees_equal(*(lms.load(w).params for w in (tmp_path, unbroken)))
  with pytest.raises(UsageError, match='tasks.spell.weight was 2.0 and is now 3.0; set --config.tasks.spell.weight=2.0 to go on'):
    configs.refuse_change(configs.from_flat(llama), configs.from_flat({**llama, 'tasks.spell.weight': 3}))
  with pytest.raises(UsageError, match='its tasks were spell, text and are now none'):
    configs.refuse_change(configs.from_flat(llama), configs.from_flat(without_tasks(llama)))
  configs.refuse_change(configs.from_flat(llama), configs.from_flat({**llama, 'tasks.spell.metrics': 'bleu'}))


def test_a_task_with_nothing_held_out_is_named(llama, decoding, one_device):
  c = configs.from_flat({**llama, 'tasks.text.data.heldout': 0.})
  cache = decoding.cache.of['text']
  nothing = dataclasses.replace(cache.streams['heldout'], starts=np.array([0]))
  of = {**decoding.cache.of, 'text': dataclasses.replace(cache, streams={**cache.streams, 'heldout': nothing})}
  with pytest.raises(UsageError, match='task text: eval_every=2: nothing is held out'):
    evaluate.held_out(c, caches.Caches(of), common.mesh_of(1, 1, 1))


def test_losses_are_those_of_another_mesh_in_microbatches(llama, unbroken, tmp_path):
  mesh = {'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2}
  train.train(configs.from_flat({**llama, **mesh, 'microbatches': 2, 'steps': 2}), tmp_path)
  for line, expected in zip(logged(tmp_path), logged(unbroken)):
    assert set(line) == set(expected)
    assert line.pop('data', '') == expected.pop('data', '')  # a hash of what was seen
    np.testing.assert_allclose([line[k] for k in line], [expected[k] for k in line], rtol=1e-4)


# ---- commands

@pytest.fixture
def loaded(unbroken):
  with one_cpu():
    yield lms.load(unbroken)


def test_eval_of_each_task(unbroken, loaded, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(cli, 'restart_with_kept_memory', lambda *a: None)
  out = tmp_path / 'out.json'
  run = lambda *words: cli.run(['eval', f'--workdir={unbroken}', f'--json={out}', *words]) or json.loads(out.read_text())
  found = run('--limit=3', '--max_length=4')
  assert set(found) == {'tasks'} and list(found['tasks']) == ['spell', 'text']
  spell, text = found['tasks'].values()
  assert spell['questions'] == 3 and {'exact', 'chrf', 'nll_per_token'} <= set(spell) and 'bleu' not in spell
  lm = loaded.of('spell')
  assert answers.evaluate_answers(lm, 'heldout', ['chrf'], limit=3, max_length=4)[0]['chrf'] == spell['chrf']
  (asked,) = answers.evaluate_answers(lm, 'heldout', ['exact'], limit=1, max_length=4)[1]
  assert asked['question'].startswith('spell: ')
  assert text['bits_per_byte'] > 0 and text['documents'] > 3
  held_out = [line['heldout_loss/spell'] for line in logged(unbroken) if 'heldout_loss' in line][-1]
  whole = run('--of=spell', '--metrics=exact', '--max_length=1', f'--answers={tmp_path / "a.jsonl"}')
  np.testing.assert_allclose(whole['tasks']['spell']['nll_per_token'], held_out, rtol=1e-5)
  assert list(whole['tasks']) == ['spell'] and (tmp_path / 'a.jsonl').exists()
  assert 'task spell' in capsys.readouterr().out
  for words, says in [((f'--answers={tmp_path / "b"}',), 'is of one task; say which, --of=spell|text'),
                      (('--data=stdlib',), '--data=stdlib: is of one task'),
                      (('--of=tekst',), "task 'tekst': the run has spell, text"),
                      (('--of=text', '--metrics=exact'), '--metrics is for scoring answers')]:
    with pytest.raises(UsageError, match=says.replace('|', r'\|')):
      run(*words)
  with pytest.raises(UsageError, match='is of several tasks; say which, --of='):
    cli.run(['generate', f'--workdir={unbroken}', '--prompt=spell: 12'])
  with pytest.raises(UsageError, match='name the one to ask'):
    loaded.generate(['spell: 12'], 2)
  assert len(lm.generate(['spell: 12'], 2, temperature=0)) == 1


def test_data_show_and_stats_name_the_tasks(made, capsys, tmp_path):
  from jaxlm.data import inspect
  inspect.show(made.config, tmp_path, 0)
  inspect.stats(made.config, tmp_path, 0)
  shown = ' '.join(capsys.readouterr().out.split())
  assert 'row 0 spell' in shown or 'row 0 text' in shown
  assert '[1 source] spell: ' in shown and '▢' in shown
  assert 'spell train' in shown and 'spell 66.7%:' in shown and 'text 33.3%:' in shown


def test_bytes_of_a_prefix_are_not_the_texts(loaded, tmp_path):
  (tmp_path / 'a.txt').write_text('some text')
  lm = loaded.of('text')
  lm = dataclasses.replace(lm, config=dataclasses.replace(lm.config, data=dataclasses.replace(lm.config.data, prefix='read: ')))
  f, _, _ = cli._parse('eval', ['--workdir=x', f'--data=text:{tmp_path}/*.txt'])
  found = eval_command._text(f, lm)
  assert found['bytes'] == len('some text') and found['tokens'] == len('read: some text')
