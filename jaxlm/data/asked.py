"""Objectives that ask of records with an answer (data.target, data.form): questions, classes, tags, spans, chats. Each is
(task, stream, rows, example numbers) → a batch."""
import numpy as np

from jaxlm.data.packing import Stream
from jaxlm.data.rows import Task, blank, recount
from jaxlm.errors import UsageError


RECORDS = ('answer', 'classify', 'tag', 'span')  # objectives whose rows are of whole records


def count(task: Task, stream: Stream) -> int:
  """Rows that a stream has."""
  if task.objective.name == 'classify':
    return len(labels_of(task, stream))  # which says at once if one is no class
  return len(rows_of_answers(task, stream)) if task.objective.name == 'answer' else len(stream.starts) - 1


def _fit(task: Task, question: int, answer: int) -> tuple[int, int]:
  """How many tokens of each are kept, with a boundary after it: the first of the answer, and of the question the first beside an
  encoder (what is asked stands there), else the last (the answer goes on from there)."""
  L, M = task.config.length, task.objective.source
  if M:
    return min(question, M - 1), min(answer, L - 1)
  answer = min(answer, L - 2)
  return min(question, L - 2 - answer), answer


def rows_of_answers(task: Task, stream: Stream) -> list[list[int]]:
  """The documents of each row: in an order that the seed chooses, as many as fit (a recurrent model takes one)."""
  if id(stream) not in task.packed:
    if task.config.data.form == 'chat':  # of one piece, cut at its end
      questions, answers = np.zeros(len(stream.starts) - 1), np.diff(stream.starts) - 3
    else:
      questions, answers = stream.answers - stream.starts[:-1] - 2, stream.starts[1:] - stream.answers - 1
    L, M, alone = task.config.length, task.objective.source, task.config.model.kind == 'rnn_seq2seq'
    rows, room = [], (0, 0)
    for n in task.rng(-1).permutation(len(answers)):
      question, answer = _fit(task, int(questions[n]), int(answers[n]))
      wants = (question + 1, answer + 1) if M else (0, question + answer + 2)
      if alone or not rows or wants[0] > room[0] or wants[1] > room[1]:
        rows.append([])
        room = (M, L)
      rows[-1].append(int(n))
      room = (room[0] - wants[0], room[1] - wants[1])
    task.packed[id(stream)] = rows
  return task.packed[id(stream)]


def answer(task: Task, stream: Stream, windows_B, numbers_B) -> dict[str, np.ndarray]:
  """Questions and their answers; only the answer counts. An encoder reads the question and a boundary, the decoder starts
  from one; a decoder alone reads [boundary, question, boundary, answer]."""
  del numbers_B
  if task.config.data.form == 'chat':
    return _chat(task, stream, windows_B)
  rows, out, boundary = rows_of_answers(task, stream), blank(task, len(windows_B)), task.tokenizer.boundary
  for b, window in enumerate(windows_B):
    at = at_source = 0
    for segment, n in enumerate(rows[window], 1):
      question, said = stream.document(n)
      kept, size = _fit(task, len(question), len(said))
      question, said = question[:kept] if task.objective.source else question[len(question) - kept:], said[:size]
      if task.objective.source:
        span = slice(at_source, at_source + kept + 1)
        out['inputs'][b, span], out['input_segments'][b, span] = [*question, boundary], segment
        at_source, before = span.stop, [boundary]
      else:
        before = [boundary, *question, boundary]
      ids = [*before, *said, boundary]
      span = slice(at, at + len(ids) - 1)
      out['tokens'][b, span], out['targets'][b, span], out['segments'][b, span] = ids[:-1], ids[1:], segment
      out['weights'][b, at + len(before) - 1:span.stop] = 1
      at = span.stop
  for prefix in ('', 'input_') if task.objective.source else ('',):
    out[f'{prefix}positions'] = recount(out[f'{prefix}segments'])
  return out


def _chat(task: Task, stream: Stream, windows_B) -> dict[str, np.ndarray]:
  """Whole chats, [boundary, messages …, boundary]; only what is marked counts."""
  rows, out = rows_of_answers(task, stream), blank(task, len(windows_B))
  for b, window in enumerate(windows_B):
    at = 0
    for segment, n in enumerate(rows[window], 1):
      ids, marks = (a[:task.config.length + 1] for a in stream.marked(n))
      span = slice(at, at + len(ids) - 1)
      out['tokens'][b, span], out['targets'][b, span], out['segments'][b, span] = ids[:-1], ids[1:], segment
      out['weights'][b, span] = marks[1:]
      at = span.stop
  out['positions'] = recount(out['segments'])
  return out


def labels_of(task: Task, stream: Stream) -> np.ndarray:
  """int32 [documents]: which of data.classes each answer is. UsageError for one that is none."""
  if ('labels', id(stream)) not in task.packed:
    classes = {name: n for n, name in enumerate(task.config.data.classes.split('|'))}
    said = [task.tokenizer.decode(stream.document(n)[1]) for n in range(len(stream.answers))]
    strange = sorted(set(said) - set(classes))
    if strange:
      raise UsageError(f'data.classes={task.config.data.classes!r}: field {task.config.data.target} also has {strange[0]!r}')
    task.packed['labels', id(stream)] = np.array([classes[name] for name in said], np.int32)
  return task.packed['labels', id(stream)]


def classify(task: Task, stream: Stream, windows_B, numbers_B) -> dict[str, np.ndarray]:
  """A text a row, [CLS] text [SEP], cut at its end, and which class it is of."""
  del numbers_B
  out = blank(task, len(windows_B))
  for b, n in enumerate(windows_B):
    _read(task, out, b, stream.document(n)[0])
  out['labels'], out['weights'] = labels_of(task, stream)[windows_B][:, None], np.ones_like(out['weights'])
  return out


def _read(task: Task, out: dict, b: int, ids) -> None:
  """A text into row b, as an encoder reads it."""
  row = [task.tokenizer.cls, *ids[:task.config.length - 2], task.tokenizer.sep]
  out['tokens'][b, :len(row)], out['segments'][b, :len(row)], out['positions'][b, :len(row)] = row, 1, np.arange(len(row))


def tag(task: Task, stream: Stream, windows_B, numbers_B) -> dict[str, np.ndarray]:
  """A sentence a row, as `classify`, and the tag of each word at its first token (BERT, Devlin et al. 2019, §5.3)."""
  del numbers_B
  out = blank(task, len(windows_B))
  for b, n in enumerate(windows_B):
    ids, marks = (a[1:-1][:task.config.length - 2] for a in stream.marked(n))
    _read(task, out, b, ids)
    out['labels'][b, 1:len(ids) + 1], out['weights'][b, 1:len(ids) + 1] = np.maximum(marks, 1) - 1, marks > 0
  return out


def span(task: Task, stream: Stream, windows_B, numbers_B) -> dict[str, np.ndarray]:
  """[CLS] question [SEP] text [SEP], and where the answer's first and last token are (BERT, §4.2); 0, the [CLS], where the text
  has none (§4.3). Of a text that is too long, a part that has the answer, drawn anew for each example."""
  out = blank(task, len(windows_B))
  out['weights'][:] = 1
  for b, (n, number) in enumerate(zip(windows_B, numbers_B)):
    ids, marks = (a[1:-1] for a in stream.marked(n))
    question, context = ids[marks == 0], ids[marks > 0]
    question, room = fit_question(task.config.length, task.tokenizer, question)
    answer_at = np.flatnonzero(marks[marks > 0] == 2)
    first, last = (int(answer_at[0]), int(answer_at[-1])) if len(answer_at) else (0, 0)
    low, high = max(0, min(last, first + room - 1) - room + 1), max(0, min(first, len(context) - room))
    start = int(task.rng(number).integers(low, high + 1)) if low <= high else high
    before = put_pair(task.tokenizer, out, b, question, context[start:start + room])
    if len(answer_at):
      out['labels'][b] = [before + first - start, before + min(last - start, room - 1)]
  return out


def fit_question(length: int, tokenizer, question) -> tuple[np.ndarray, int]:
  """(the question, cut to half of a row, the tokens of text that there is room for beside it)."""
  question = question[:length // 2 - 1]
  return question, length - 2 - len(tokenizer.between) - len(question)


def put_pair(tokenizer, out: dict, b: int, first, second) -> int:
  """Two texts into row b, as an encoder reads a pair → where the second begins."""
  before = [tokenizer.cls, *first, *tokenizer.between]
  row = [*before, *second, tokenizer.sep]
  out['tokens'][b, :len(row)], out['segments'][b, :len(row)], out['positions'][b, :len(row)] = row, 1, np.arange(len(row))
  out['types'][b, len(before):len(row)] = 1
  return len(before)
