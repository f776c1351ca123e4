"""What a record is, by data.form, and the tokens of its document. Besides texts, and questions with their answers, there are
documents whose tokens are marked:

    tags   words (data.key) and their tags (data.target), lists or texts with spaces between. The first token of a word is
           marked with 1 + the number of its tag in data.classes.
    span   a question (data.key), a text (data.context), and what of the text answers it (data.target): a text, a list of texts
           that are all right, or SQuAD's {'text': […], 'answer_start': […]}; nothing, where the text has no answer. Tokens
           of the text are marked 1, and 2 where they are of the (first) answer.
    chat   messages (data.key), [{'role': 'user', 'content': …}, …]: each is written by data.template. What the assistant says,
           and the first token of the template after it, are marked 1.

The mark of all other tokens is 0.
"""
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UsageError
from jaxlm.schema import DataConfig

ASSISTANT = 'assistant'


class Encoded(NamedTuple):
  """A document between its boundaries. answer: where an answer begins, counted from the boundary before the document."""
  ids: list[int]
  answer: int | None = None
  marks: list[int] | None = None


def read(record, data: DataConfig, where: str) -> tuple | None:
  """The fields of a record, None if it is empty. UsageError naming `where` and the key for what cannot be used."""
  field = lambda name: _field(record, getattr(data, name), name, where)
  if data.form == 'chat':
    fields = (_messages(field('key'), where),)
  elif data.form == 'tags':
    words, tags = (_words(field(name), where) for name in ('key', 'target'))
    if len(words) != len(tags):
      raise UsageError(f'{where}: {len(words)} words in {data.key!r} have {len(tags)} tags in {data.target!r}')
    fields = (words, tags)
  elif data.form == 'span':
    question, context = (_text(field(name), getattr(data, name), name, where) for name in ('key', 'context'))
    fields = (question, context, _answers(field('target'), context, where)) if question and context else ('',)
  else:
    fields = tuple(_text(field(name), getattr(data, name), name, where) for name in ('key', 'target') if getattr(data, name))
  return fields if all(fields[:2]) else None


def _field(record, key: str, name: str, where: str):
  value = record.get(key) if isinstance(record, dict) else None
  if value is None:
    known = ', '.join(record) if isinstance(record, dict) else type(record).__name__
    raise UsageError(f'{where}: nothing in field {key!r} (there is {known}); set --config.data.{name}')
  return value.tolist() if hasattr(value, 'tolist') else value


def _text(value, key: str, name: str, where: str) -> str:
  """Texts as they are; a whole number (TFDS keeps labels as such) by its digits."""
  value = value.decode() if isinstance(value, bytes) else str(value) if type(value) is int else value
  if not isinstance(value, str):
    raise UsageError(f'{where}: no text in field {key!r} ({type(value).__name__}); set --config.data.{name}')
  return value


def _words(value, where: str) -> tuple[str, ...]:
  value = value.decode() if isinstance(value, bytes) else value
  words = value.split() if isinstance(value, str) else [_text(v, 'words', 'key', where) for v in value]
  strange = next((w for w in words if len(w.split()) != 1), None)
  if strange is not None:
    raise UsageError(f'{where}: {strange!r} is no word: it is empty, or has a space in it')
  return tuple(words)


def _answers(value, context: str, where: str) -> tuple[tuple[str, int], ...]:
  """(text, where it begins in the context) of each answer that is right."""
  starts = None
  if isinstance(value, dict):
    value, starts = (list(value[k]) if k in value else None for k in ('text', 'answer_start'))
  texts = [_text(v, 'answers', 'target', where) for v in ([value] if isinstance(value, (str, bytes)) else value or [])]
  starts = [context.find(t) for t in texts] if starts is None else list(map(int, starts))
  for text, start in zip(texts, starts, strict=True):
    if start < 0 or context[start:start + len(text)] != text:
      raise UsageError(f'{where}: the answer {text!r} is not in its text at {start}')
  return tuple((text, start) for text, start in zip(texts, starts) if text)


def _messages(value, where: str) -> tuple[tuple[str, str], ...]:
  """(role, content) of each."""
  good = lambda m: isinstance(m, dict) and all(isinstance(m.get(k), (str, bytes)) for k in ('role', 'content'))
  if not isinstance(value, (list, tuple)) or not all(map(good, value)):
    raise UsageError(f"{where}: wants messages, as [{{'role': 'user', 'content': 'Hello'}}]")
  return tuple((_text(m['role'], 'role', 'key', where), _text(m['content'], 'content', 'key', where)) for m in value)


def texts(data: DataConfig, fields: tuple) -> Iterator[str]:
  """The texts of a record, for a tokenizer to be trained on."""
  if data.form == 'chat':
    yield from (content for _, content in fields[0])
  elif data.form == 'tags':
    yield ' '.join(fields[0])
  else:
    yield from fields[:2]


def encode(tokenizer: Tokenizer, data: DataConfig, records: Sequence[tuple]) -> Iterator[Encoded]:
  """The document of each record (its fields). UsageError for a tag that is none of data.classes."""
  if data.form == 'text':
    count = 2 if data.target else 1
    encoded = tokenizer.encode_batch([text for fields in records for text in fields])
    for ids, *answer in zip(*(encoded[k::count] for k in range(count))):
      yield Encoded([*ids, tokenizer.boundary, *answer[0]], len(ids) + 2) if answer else Encoded(ids)
  else:
    for fields in records:
      yield FORMS[data.form](tokenizer, data, *fields)


def _tags(tokenizer: Tokenizer, data: DataConfig, words: tuple, tags: tuple) -> Encoded:
  numbers = {name: n for n, name in enumerate(data.classes.split('|'), 1)}
  if strange := sorted(set(tags) - set(numbers)):
    raise UsageError(f'data.classes={data.classes!r}: field {data.target} also has {strange[0]!r}')
  ids, first = first_tokens(tokenizer, words)
  marks = [0] * len(ids)
  for word, at in enumerate(first):
    if at is not None:
      marks[at] = numbers[tags[word]]
  return Encoded(ids, None, marks)


def first_tokens(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[list[int], list[int | None]]:
  """(ids of the words with spaces between, where each word's first token is); None for a word that has none of its own."""
  ids, offsets = tokenizer.with_offsets(text := ' '.join(words))
  word_of = [n for n, word in enumerate(words) for _ in range(len(word) + 1)]
  first: list[int | None] = [None] * len(words)
  for at, (start, end) in enumerate(offsets):
    start = next((i for i in range(start, end) if not text[i].isspace()), None)
    if start is not None and first[word_of[start]] is None:
      first[word_of[start]] = at
  return ids, first


def _span(tokenizer: Tokenizer, data: DataConfig, question: str, context: str, answers: tuple) -> Encoded:
  asked, (ids, offsets) = tokenizer.encode(question), tokenizer.with_offsets(context)
  text, start = answers[0] if answers else ('', len(context))
  inside = lambda low, high: low < start + len(text) and high > start and bool(context[low:high].strip())
  return Encoded([*asked, *ids], None, [0] * len(asked) + [1 + inside(*offset) for offset in offsets])


def _chat(tokenizer: Tokenizer, data: DataConfig, messages: tuple) -> Encoded:
  ids, marks = [], []
  for role, content in messages:
    before, after = (tokenizer.encode_template(part) for part in parts(data.template, role))
    said = [*tokenizer.encode(content), *after[:1]]
    ids += [*before, *said, *after[1:]]
    marks += [0] * len(before) + [int(role == ASSISTANT)] * len(said) + [0] * len(after[1:])
  return Encoded(ids, None, marks)


def parts(template: str, role: str) -> tuple[str, str]:
  """What stands before a message's content and after it."""
  before, after = template.split('{content}')
  return before.replace('{role}', role), after.replace('{role}', role)


def chat_prompt(tokenizer: Tokenizer, data: DataConfig, messages: Sequence) -> list[int]:
  """Ids of messages, up to where the assistant goes on. messages: as in a record, or one text of the user."""
  messages = [{'role': 'user', 'content': messages}] if isinstance(messages, str) else messages
  encoded = _chat(tokenizer, data, _messages(messages, 'chat'))
  return [tokenizer.boundary, *encoded.ids, *tokenizer.encode_template(parts(data.template, ASSISTANT)[0])]


FORMS = {'tags': _tags, 'span': _span, 'chat': _chat}
