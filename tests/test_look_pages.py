"""What people see of a model that is looked at: pictures open in their size, pages and the terminal show what was found, and
what cannot be looked at is one line."""
import base64
import html.parser
import json

import numpy as np
import PIL.Image
import pytest

from jaxlm import cli, scoring
from jaxlm.errors import UsageError
from jaxlm.look import attention, lens, loss, pictures, reading
from tests import common
from tests.test_look import TEXT, lm_of


class Page(html.parser.HTMLParser):
  """The texts of a page by the tag they are in, and its titles; a page refers to nothing outside it."""

  def __init__(self, text):
    super().__init__()
    self.texts, self.titles, self.tags = {}, [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    assert not {'src', 'href'} & {k for k, _ in attrs}
    if tag not in ('meta', 'br'):
      self.tags.append(tag)
    self.titles += [v for k, v in attrs if k == 'title']

  def handle_endtag(self, tag):
    assert self.tags.pop() == tag

  def handle_data(self, data):
    if self.tags:
      self.texts.setdefault(self.tags[-1], []).append(data)


def test_stretches_are_the_text():
  for text in (TEXT, 'naïve λόγος 🙂🙂 ende', '🙂', '\ufffdx', ''):
    ids = common.BYTES.encode(text)
    found = reading.stretches(common.BYTES, ids)
    assert ''.join(part for _, _, part in found) == text
    assert [i for start, end, _ in found for i in range(start, end)] == list(range(len(ids)))
  assert [part for _, _, part in reading.stretches(common.BYTES, common.BYTES.encode('aλ🙂'))] == ['a', 'λ', '🙂']
  assert reading.labels(common.BYTES, [*common.BYTES.encode('a \n<'), 999]) == ['a', '␣', '⏎', '<', '#999']


@pytest.fixture
def look(monkeypatch):
  """Runs `jaxlm look …` on a model that is in memory."""
  def run(family, *words):
    monkeypatch.setattr(cli, '_load', lambda f: lm_of(family))
    cli.run(['look', *words, '--workdir=some & <run>'])
  return run


def test_pages_of_attention_show_every_token_and_weight(look, tmp_path):
  out, m = tmp_path / 'a.html', lm_of('llama').config.model
  look('llama', 'attention', f'--text={TEXT}', f'--out={out}')
  page = Page(out.read_text(encoding='utf-8'))
  labels = reading.labels(common.BYTES, reading.read(lm_of('llama'), TEXT).ids)
  assert page.texts['span'] == 2 * labels and {'<', '&', '"', '\''} <= set(labels)
  assert page.texts['title'] == ['Attention, some & <run>']
  data = json.loads(page.texts['script'][0])
  assert [d['name'] for d in data['maps']] == [f'layer {n}, head {h}' for n in range(m.N) for h in range(m.H)]
  shown = np.stack([np.frombuffer(base64.b64decode(d['weights']), '<u2') for d in data['maps']]) / 65535
  expected = np.stack(attention.maps(lm_of('llama'), TEXT))
  np.testing.assert_allclose(shown.reshape(expected.shape), expected, atol=1e-5)
  look('t5', 'attention', f'--text={TEXT}', '--source=&lt;', '--part=memory', '--layer=1', f'--out={out}')
  page = Page(out.read_text(encoding='utf-8'))
  assert page.texts['span'][-4:] == ['&', 'l', 't', ';'] and len(json.loads(page.texts['script'][0])['maps']) == 8


def test_pictures_open_in_their_size(look, tmp_path):
  out, m, L = tmp_path / 'a.png', lm_of('llama').config.model, len(common.BYTES.encode('$_$ < λ')) + 1
  def size_after(*words):
    look('llama', *words, '--text=$_$ < λ', f'--out={out}')
    with PIL.Image.open(out) as image:
      image.load()
      return image.format, image.size
  assert size_after('attention') == ('PNG', (160 * m.H, 160 * m.N + 40))
  assert size_after('attention', '--head=1') == ('PNG', (160, 160 * m.N + 40))
  assert size_after('attention', '--layer=2', '--head=1') == ('PNG', (22 * L + 150, 22 * L + 150))
  assert size_after('lens') == ('PNG', (90 * L + 150, 30 * (m.N + 1) + 150))


def test_pictures_show_the_maps():
  maps = [np.full((2, 3, 4), n + .25, np.float32) * np.arange(1, 3)[:, None, None] / 8 for n in range(3)]
  found = attention.chosen(maps, None, 1)
  figure = pictures.heatmaps(found, list('abc'), list('wxyz'), 'maps')
  assert [(ax.get_title(), float(ax.images[0].get_array().max())) for ax in figure.axes] == [
      (f'layer {n}, head 1', (n + .25) / 4) for n in range(3)]
  alone = pictures.heatmaps(found[:1], ['a', '$b$', 'c'], list('wxyz'), 'maps').axes[0]
  assert [t.get_text() for t in alone.get_yticklabels()] == ['a', '$b$', 'c']
  assert [t.get_text() for t in alone.get_xticklabels()] == list('wxyz')
  with pytest.raises(UsageError, match='has 401 tokens, and a .png shows at most 400'):
    pictures.heatmaps(found, ['a'] * 401, ['b'], 'maps')


def test_pages_of_the_lens_and_the_loss(look, tmp_path, capsys):
  out, lm = tmp_path / 'a.html', lm_of('llama')
  look('llama', 'lens', f'--text={TEXT}', f'--out={out}', '--top=2')
  page = Page(out.read_text(encoding='utf-8'))
  ids_NLK, p_NLK = lens.likeliest(lm, TEXT, 2)
  names = lambda ids: reading.labels(lm.tokenizer, ids)
  assert page.texts['th'][1:] == names(reading.read(lm, TEXT).ids) + [f'after {n}' for n in (3, 2, 1, 0)]
  assert page.texts['td'] == [name for layer in ids_NLK[::-1] for name in names(layer[:, 0])]
  first, second = names(ids_NLK[-1, 0])
  assert page.titles[0] == f'{p_NLK[-1, 0, 0]:.4f} {first}\n{p_NLK[-1, 0, 1]:.4f} {second}'
  look('llama', 'loss', f'--text={TEXT}', f'--out={out}')
  page, (ids, nll_L) = Page(out.read_text(encoding='utf-8')), scoring.per_token(lm, TEXT, 32, 16, 16)
  assert ''.join(page.texts['span']) == TEXT
  nats = [float(line.split(': ')[1].split(' nats')[0]) for title in page.titles for line in title.split('\n')]
  np.testing.assert_allclose(nats, nll_L, atol=1e-4)
  capsys.readouterr()
  (tmp_path / 'text').write_text('a\x1b[31m' + TEXT, encoding='utf-8')
  look('llama', 'loss', f'--file={tmp_path / "text"}')
  said = capsys.readouterr().out
  assert TEXT in said and '\x1b' not in said and f'{len(ids) + 5} tokens' in said
  assert loss.shades([0, np.log(264) / 2, 99], lm.config.model).tolist() == [0, 0.5, 1]


def test_probe_from_the_command_line(look, tmp_path, capsys):
  data, out = tmp_path / 'd.jsonl', tmp_path / 'out.json'
  records = [{'body': f'{"qu" if i % 2 else "ze"} {i}', 'odd': i % 2 == 1} for i in range(40)]
  data.write_text('\n'.join(map(json.dumps, records)) + '\n')
  look('lstm', 'probe', f'--data={data}', '--label=odd', '--text=body', '--layers=0,2', '--folds=4', f'--json={out}')
  result = json.loads(out.read_text())
  assert list(result['layers']) == ['0', '2'] and result['folds'] == 4 and result['classes'] == {'False': 20, 'True': 20}
  assert result['layers']['0']['accuracy'] > 0.95 and result['majority']['accuracy'] == 0.5
  assert 'majority class' in capsys.readouterr().out
  data.write_text('{"text": "a", "label": 1}\n{"text": "b"}\n')
  with pytest.raises(UsageError, match=r"d.jsonl:2: no label in field 'label' \(there is text\); set --label=FIELD"):
    look('lstm', 'probe', f'--data={data}', '--label=label')
  data.write_text('{"text": "a", "label": 1}\nnope\n')
  with pytest.raises(UsageError, match='d.jsonl:2: is not JSON'):
    look('lstm', 'probe', f'--data={data}', '--label=label')
  data.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n')
  with pytest.raises(UsageError, match="--folds=5: wants 2 or more, and as many texts in each class: '1' has 1"):
    look('lstm', 'probe', f'--data={data}', '--label=label')


@pytest.mark.parametrize('family, words, said', [
    ('llama', ['nothing'], 'look nothing: wants one of attention, lens, loss, probe'),
    ('llama', [], 'look : wants one of'),
    ('llama', ['loss'], 'look wants one of --text=… and --file=…'),
    ('llama', ['loss', '--text='], '--text: the text is empty'),
    ('llama', ['loss', '--file=/nowhere'], '--file=/nowhere: cannot be read'),
    ('llama', ['loss', '--text=a', '--out=a.png'], '--out=a.png: wants a file that ends in .html'),
    ('llama', ['attention', '--text=a', '--out=a.gif'], '--out=a.gif: wants a file that ends in .png or .html'),
    ('llama', ['attention', '--text=a'], '--out=: wants a file that ends in .png or .html'),
    ('llama', ['attention', '--text=a', '--out=/nowhere/a.png'], 'there is no folder /nowhere'),
    ('llama', ['lens', '--text=a', '--out=a.png', '--head=1'], 'look lens: --head belongs to look attention'),
    ('llama', ['attention', '--text=a', '--out=a.png', '--layer=3'], '--layer=3: the model has layers 0 to 2'),
    ('llama', ['attention', '--text=a', '--out=a.png', '--head=-1'], '--head=-1: the model has heads 0 to 7'),
    ('llama', ['attention', '--text=a', '--out=a.png', '--part=memory'], 'model.kind=decoder has one stack of layers'),
    ('llama', ['attention', '--text=a', '--out=a.png', '--source=b'], "--source='b': model.kind=decoder has no encoder"),
    ('t5', ['lens', '--text=a', '--out=a.png'], 'model.kind=seq2seq: wants --source='),
    ('lstm', ['attention', '--text=a', '--out=a.png'], 'model.kind=rnn: a recurrent model has no attention to show'),
    ('gpt2', ['attention', '--text=' + 'a' * 64, '--out=a.png'], '--text: has 65 tokens, and the model 64 learned positions'),
    ('llama', ['loss', '--text=a', '--stride=99'], '--stride=99: wants 1 up to the context, 32'),
    ('llama', ['loss', '--text=a', '--batch=0'], '--batch=0: wants at least 1'),
    ('llama', ['probe', '--label=x'], 'look probe: wants --data='),
    ('llama', ['probe', '--data=/nowhere', '--label=x'], '--data=/nowhere: no such file'),
    ('llama', ['probe', '--data=/nowhere', '--label=x', '--layers=a'], '--layers=a: wants all, or counts of layers'),
])
def test_what_cannot_be_looked_at_is_one_line(family, words, said, look):
  with pytest.raises(UsageError) as e:
    look(family, *words)
  assert said in str(e.value) and '\n' not in str(e.value)
