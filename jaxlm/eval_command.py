"""`jaxlm eval`: texts, answers, the tasks of a mixture, or tasks of lm-evaluation-harness, scored as the flags say."""
import dataclasses
import json
import pathlib

from absl import flags

from jaxlm.errors import UsageError

# flag → what it is for.
USES = {'data': ('texts', 'answers'), 'context': ('texts', 'tasks'), 'stride': ('texts',), 'baselines': ('texts',),
        'by_document': ('texts',), 'task_path': ('tasks',), 'num_fewshot': ('tasks',), 'limit': ('tasks', 'answers'),
        'metrics': ('answers',), 'answers': ('answers',), 'num_beams': ('answers',), 'max_length': ('answers',)}


def define(f: flags.FlagValues) -> None:
  """Flags of eval alone."""
  flags.DEFINE_string('data', 'heldout', 'heldout, train, or a SOURCE as in data/sources.py', flag_values=f)
  flags.DEFINE_integer('context', None, 'tokens a window (default: the run\'s length)', flag_values=f)
  flags.DEFINE_integer('stride', None, 'tokens a window scores after the first (default: half of context)',
                       flag_values=f)
  flags.DEFINE_integer('batch', 16, 'rows at a time; changes speed only', flag_values=f)
  flags.DEFINE_string('by_document', None, 'write name, bytes, tokens and nats of each document to this file, a JSON a line',
                      flag_values=f)
  flags.DEFINE_list('metrics', [], 'of answers: exact, bleu, chrf, rouge, f1; of tags: accuracy, seqeval; of spans: squad (default: '
                    'what the task says, or the first)', flag_values=f)
  flags.DEFINE_string('answers', None, 'write question, what was said and what is right to this file, a JSON a line',
                      flag_values=f)
  flags.DEFINE_integer('num_beams', 1, 'of answers: above 1: beam search', flag_values=f)
  flags.DEFINE_integer('max_length', None, 'of answers: tokens at most (default: what the run\'s length holds)', flag_values=f)
  flags.DEFINE_bool('baselines', False, 'gzip -9, xz -9 and a byte 5-gram on the same bytes', flag_values=f)
  flags.DEFINE_list('tasks', None, 'tasks of lm-evaluation-harness, in place of scoring a text', flag_values=f)
  flags.DEFINE_string('task_path', None, 'a folder with tasks of your own (YAML)', flag_values=f)
  flags.DEFINE_integer('num_fewshot', None, 'examples before each question (default: as the task says)', flag_values=f)
  flags.DEFINE_integer('limit', None, 'documents a task, or questions, at most', flag_values=f)


def run(f, load, load_one) -> dict:
  """What `jaxlm eval` says. load(f) → the run's LM; load_one: if it is of a mixture, as the run of the task --of."""
  _refuse_flags(f, ('tasks',) if f.tasks else ('texts', 'answers'))
  if f.tasks:
    return _tasks(f, load_one(f))
  lm = load(f)
  if lm.config.tasks or f.of:
    return _mixture(f, lm)
  _refuse_flags(f, (_asked(lm),))
  return _one(f, lm, f.metrics)


def _asked(lm) -> str:
  from jaxlm.data import asked  # pylint: disable=g-import-not-at-top
  return 'answers' if lm.config.objective.name in asked.RECORDS else 'texts'


def _one(f, lm, metrics) -> dict:
  return {**(_answers(f, lm, metrics) if _asked(lm) == 'answers' else _text(f, lm)), 'data': f.data}


def _mixture(f, lm) -> dict:
  """The tasks of a mixture in turn, or --of alone, each as the run that it would be by itself."""
  from jaxlm import report  # pylint: disable=g-import-not-at-top
  tasks = {task.name: task for task in lm.config.tasks}
  parts = {name: lm.of(name) for name in ([f.of] if f.of else tasks)}
  _refuse_flags(f, tuple(map(_asked, parts.values())))
  for name in ('data', 'answers', 'by_document') if len(parts) > 1 else ():
    if f[name].present and f[name].value not in ('heldout', 'train'):
      raise UsageError(f'--{name}={f[name].value}: is of one task; say which, --of={"|".join(tasks)}')
  results = {}
  for name, part in parts.items():
    report.say(f'task {name}')
    metrics = tasks[name].metrics.split(',') if tasks[name].metrics and not f['metrics'].present else f.metrics
    results[name] = _one(f, part, metrics)
  return {'tasks': results}


def _refuse_flags(f, scored: tuple[str, ...]) -> None:
  """UsageError for a flag of eval that none of what is scored has a use for."""
  for name, whose in USES.items():
    if f[name].present and not set(whose) & set(scored):
      raise UsageError(f'--{name} is for scoring {" and ".join(whose)}, and here it is {" or ".join(scored)}')


def _answers(f, lm, metrics) -> dict:
  from jaxlm import answers, report  # pylint: disable=g-import-not-at-top
  result, each = answers.evaluate_answers(lm, f.data, metrics, f.batch, f.limit, f.max_length, f.num_beams)
  report.print_answers(result, each)
  if f.answers:
    lines = (json.dumps(a, ensure_ascii=False) + '\n' for a in each)
    pathlib.Path(f.answers).write_text(''.join(lines), encoding='utf-8')
  return result


def _tasks(f, lm) -> dict:
  from jaxlm import harness, report  # pylint: disable=g-import-not-at-top  # an optional extra
  result = harness.run(lm, f.tasks, f.task_path, f.num_fewshot, f.limit, f.context, f.batch)
  report.print_tasks(result)
  return result


def _text(f, lm) -> dict:
  from jaxlm import evaluate, report, scoring  # pylint: disable=g-import-not-at-top
  described, documents = evaluate.source_documents(f.data, lm.config)
  context = f.context if f.context is not None else lm.config.length
  stride = f.stride if f.stride is not None else max(1, context // 2)
  size = sum(len(text.encode()) for _, text in documents)
  report.say(f'scores {described}: {len(documents):,} documents, {size:,} bytes')
  with report.progress('scoring', size) as tick:
    scored = scoring.score(lm, documents, context, stride, f.batch, tick)
  prefix = lm.config.data.prefix  # is read, and its tokens cost nats, but its bytes are not the text's
  for document in scored:
    document.bytes -= len(prefix.encode())
  result = evaluate.result(lm, scored, context, stride)
  if f.by_document:
    lines = (json.dumps(dataclasses.asdict(d), ensure_ascii=False) + '\n' for d in scored)
    pathlib.Path(f.by_document).write_text(''.join(lines), encoding='utf-8')
  if f.baselines:
    result.update(evaluate.baselines([(name, text.removeprefix(prefix)) for name, text in documents], lm.config))
  report.print_eval(described, result)
  return result
