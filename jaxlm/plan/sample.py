"""A little of a run's data, for its rehearsal: the first records of a source that is on this machine, made-up ones for another."""
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator

from jaxlm.data import sources
from jaxlm.schema import Config, DataConfig, of_task

RECORDS = 128
CHARACTERS = 2000  # of a text
SAID = 40          # characters of a message, so that what the assistant says is in the row


def take(config: Config, source: Config, folder: pathlib.Path) -> tuple[Config, list[str]]:
  """`config` with the data of `source` cut to a few records, written to `folder`, and what was made up, in words. UsageError for a
  source, record or field that cannot be used."""
  made_up = []

  def small(data: DataConfig, whole: DataConfig, name: str) -> DataConfig:
    plain = dataclasses.replace(whole, prefix='')
    try:
      found = sources.records(whole.source, plain, 'all') if whole.source else ()
      records = [fields for _, *fields in itertools.islice(found, RECORDS)]
    except sources.Missing:
      made_up.append(f'{whole.source} is not on this machine, made-up records stand in')
      records = list(_invented(whole))
    if not whole.source:
      made_up.append('the config states no data.source, made-up records stand in')
      records = list(_invented(whole))
    file = folder / f'{name}.jsonl'
    file.write_text(''.join(json.dumps(_record(whole, fields)) + '\n' for fields in records), encoding='utf-8')
    return dataclasses.replace(data, source=f'jsonl:{file}')

  data = dataclasses.replace(config.data, cache=str(folder / 'cache'))
  if not config.tasks:
    return dataclasses.replace(config, data=small(data, source.data, 'records')), made_up
  tasks = tuple(dataclasses.replace(task, data=small(task.data, of_task(source, whole).data, task.name))
                for task, whole in zip(config.tasks, source.tasks, strict=True))
  return dataclasses.replace(config, data=data, tasks=tasks), made_up


def _record(data: DataConfig, fields: list) -> dict:
  """What data/forms.py reads the same fields from."""
  if data.form == 'chat':
    return {data.key: [{'role': role, 'content': content[:SAID]} for role, content in fields[0]]}
  if data.form == 'span':
    question, context, answers = fields
    return {data.key: question, data.context: context,
            data.target: {'text': [text for text, _ in answers], 'answer_start': [at for _, at in answers]}}
  if data.form == 'tags' or data.target:
    return {data.key: fields[0], data.target: fields[1]}
  return {data.key: fields[0][:CHARACTERS]}


def _invented(data: DataConfig) -> Iterator[tuple]:
  """Fields of records, as sources.records yields them after the name."""
  words = 'she saw that the small boat was on the river and asked who had left it there'.split()
  classes = data.classes.split('|') if data.classes else words
  for n in range(RECORDS):
    said = [words[(n + i * (n % 7 + 1)) % len(words)] for i in range(8 + n % 17)]
    text, answer = ' '.join(said), classes[n % len(classes)]
    if data.form == 'chat':
      yield ((('user', answer), ('assistant', text)),)
    elif data.form == 'tags':
      yield said, [classes[(n + i) % len(classes)] for i in range(len(said))]
    elif data.form == 'span':
      yield f'where is {said[2]}?', text, ((said[2], text.find(said[2])),)
    else:
      yield (text, answer) if data.target else (text,)
