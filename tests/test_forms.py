"""Records whose tokens are marked: tags, spans and chats, from the record to the batch, and back from scores to words."""
import dataclasses
import json

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from jaxlm import answers
from jaxlm.data import examples, forms, packing, sources
from jaxlm.data.tokenizer import Tokenizer, make as make_tokenizer
from jaxlm.errors import UsageError
from jaxlm.schema import DataConfig
from tests import common

TAGS = DataConfig(form='tags', key='words', target='tags', classes='NOUN|VERB|.', source='jsonl:x')
SPAN = DataConfig(form='span', key='question', context='context', target='answers', source='jsonl:x')
CHATML = '<|im_start|>{role}\n{content}<|im_end|>\n'
CHAT = DataConfig(form='chat', key='messages', template=CHATML, source='jsonl:x')
JINJA = ('{% for m in messages %}<|im_start|>{{ m.role }}{{ "\n" }}{% if m.role == "assistant" %}{% generation %}{{ m.content }}<|im_end|>'
         '{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ "\n" }}{% endfor %}'
         '{% if add_generation_prompt %}<|im_start|>assistant{{ "\n" }}{% endif %}')


def bpe() -> Tokenizer:
  return make_tokenizer('bpe:300', iter(['the cat sat on the mat, and the dogs barked at it'] * 30))


def wordpiece(special=('[CLS]', '[SEP]')) -> Tokenizer:
  words = ['[PAD]', *special, '[UNK]', *'abcdefghijklmnopqrstuvwxyz.,\'', *(f'##{c}' for c in 'abcdefghijklmnopqrstuvwxyz'), 'cat', 'the']
  found = tokenizers.Tokenizer(models.WordPiece({w: n for n, w in enumerate(dict.fromkeys(words))}, unk_token='[UNK]'))
  found.normalizer, found.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
  cls, sep = special
  found.decoder = decoders.WordPiece()
  found.add_special_tokens([cls, sep])
  found.post_processor = processors.TemplateProcessing(single=f'{cls} $A {sep}', pair=f'{cls} $A {sep} $B:1 {sep}:1', special_tokens=[
      (t, found.token_to_id(t)) for t in special])
  return Tokenizer(found.to_str())


def fields(data: DataConfig, record: dict) -> tuple:
  return forms.read(record, data, 'here')


@pytest.mark.parametrize('tokenizer', [bpe, wordpiece, lambda: common.BYTES], ids=['bpe', 'wordpiece', 'bytes'])
def test_the_first_token_of_each_word_is_marked(tokenizer):
  t = tokenizer()
  words, tags = ['the', 'catsat', "isn't", '.', 'naïve', '...'], ['NOUN', 'VERB', 'VERB', '.', 'NOUN', '.']
  encoded, = forms.encode(t, TAGS, [fields(TAGS, {'words': words, 'tags': tags})])
  assert encoded.ids == t.encode(' '.join(words))
  marked = [n for n, m in enumerate(encoded.marks) if m]
  assert [TAGS.classes.split('|')[encoded.marks[n] - 1] for n in marked] == tags
  pieces = [t.decode(encoded.ids[a:b]).replace(' ', '') for a, b in zip(marked, [*marked[1:], None])]
  plain = [w.replace('ï', 'i') if 'wordpiece' in str(tokenizer) else w for w in words]
  assert pieces == plain
  assert fields(TAGS, {'words': ' '.join(words), 'tags': ' '.join(tags)}) == (tuple(words), tuple(tags))


def test_fields_as_tfds_has_them_are_texts():
  data = DataConfig(source='jsonl:x', target='label')
  assert fields(data, {'text': b'caf\xc3\xa9', 'label': np.int64(1)}) == ('café', '1')
  assert fields(TAGS, {'words': np.array([b'a', b'b'], object), 'tags': np.array([3, 1])}) == (('a', 'b'), ('3', '1'))
  assert fields(data, {'text': '', 'label': 0}) is None


def test_a_word_without_tokens_of_its_own_is_left_out():
  ids, first = forms.first_tokens(wordpiece(), ['the', '\x00', 'cat'])
  assert len(ids) == 2 and first == [0, None, 1]


@pytest.mark.parametrize('data, record, message', [
    (TAGS, {'words': ['a', 'b'], 'tags': ['NOUN']}, "here: 2 words in 'words' have 1 tags in 'tags'"),
    (TAGS, {'words': ['a b'], 'tags': ['NOUN']}, "here: 'a b' is no word"),
    (TAGS, {'text': 'a'}, "here: nothing in field 'words' .there is text.; set --config.data.key"),
    (SPAN, {'question': 'q', 'context': 'abc', 'answers': 'd'}, "here: the answer 'd' is not in its text at -1"),
    (SPAN, {'question': 'q', 'context': 'abc', 'answers': {'text': ['b'], 'answer_start': [2]}}, "the answer 'b' is not in its text at 2"),
    (CHAT, {'messages': [{'role': 'user'}]}, 'here: wants messages, as'),
    (CHAT, {'messages': 'hello'}, 'here: wants messages, as')])
def test_records_that_cannot_be_used(data, record, message):
  with pytest.raises(UsageError, match=message):
    fields(data, record)


def test_a_tag_that_is_no_class_is_refused():
  with pytest.raises(UsageError, match="data.classes='NOUN|VERB|.': field tags also has 'ADJ'"):
    list(forms.encode(common.BYTES, TAGS, [(('a',), ('ADJ',))]))


def test_tags_reach_their_tokens_in_a_batch():
  data = dataclasses.replace(TAGS, classes='odd|even')
  c = common.config('bert', **{'model.head': 'tag', 'objective.name': 'tag', 'data.form': 'tags', 'data.key': 'words', 'model.T': 0,
                               'data.target': 'tags', 'data.classes': 'odd|even', 'length': 12, 'loss.chunks': 1})
  stream = packing.in_memory(data, common.BYTES, [(('1', '22', '31'), ('odd', 'even', 'odd')), (('4' * 20, '5'), ('even', 'odd'))])
  batch = examples.make(examples.Task(c, common.BYTES), stream, np.array([0, 1]), np.array([0, 1]))
  assert {k: v.shape[1] for k, v in batch.items()} == {k: n for k, (n, _) in examples.shapes(c).items()}
  said = lambda b: ''.join(map(chr, common.BYTES.decode(batch['tokens'][b][1:11]).encode()))
  assert said(0).startswith('1 22 31') and said(1) == '4' * 10
  at = np.flatnonzero(batch['weights'][0])
  assert at.tolist() == [1, 3, 6] and batch['labels'][0, at].tolist() == [0, 1, 0]
  assert np.flatnonzero(batch['weights'][1]).tolist() == [1] and batch['labels'][1, 1] == 1


@pytest.mark.parametrize('tokenizer', [bpe, wordpiece], ids=['bpe', 'wordpiece'])
def test_spans_reach_their_tokens_whatever_part_of_the_text_is_drawn(tokenizer):
  t = tokenizer()
  record = {'question': 'who sat?', 'context': 'on the mat, the cat sat and the dogs barked at it',
            'answers': {'text': np.array([b'the cat', b'cat']), 'answer_start': np.array([12, 16])}}
  read = fields(SPAN, record)
  assert read[2] == (('the cat', 12), ('cat', 16)) and fields(SPAN, {**record, 'answers': []})[2] == ()
  assert fields(SPAN, {**record, 'answers': 'dogs'})[2] == (('dogs', 32),)
  c = common.config('bert', **{'model.head': 'span', 'objective.name': 'span', 'data.form': 'span', 'data.key': 'question', 'model.V': 400,
                               'data.target': 'answers', 'data.context': 'context', 'length': 20, 'loss.chunks': 1})
  stream = packing.in_memory(SPAN, t, [read, fields(SPAN, {**record, 'answers': []})])
  starts = set()
  for number in range(30):
    batch = examples.make(examples.Task(c, t), stream, np.array([0, 1]), np.array([number, 100 + number]))
    row, (first, last) = batch['tokens'][0], batch['labels'][0]
    assert t.decode(row[first:last + 1]).strip() == 'the cat'
    assert batch['types'][0, first] == 1 and batch['types'][0, 0] == 0 and batch['labels'][1].tolist() == [0, 0]
    assert row[0] == t.cls and row[batch['segments'][0] > 0][-1] == t.sep
    starts.add(int(first))
  assert len(starts) > 1  # other parts of the text with other examples


def test_what_stands_between_two_texts_is_the_tokenizers_own():
  assert wordpiece().between == [wordpiece().sep] and bpe().between == [bpe().boundary]
  found = tokenizers.Tokenizer.from_str(wordpiece(('<s>', '</s>')).json)
  s = [('<s>', found.token_to_id('<s>')), ('</s>', found.token_to_id('</s>'))]
  found.post_processor = processors.TemplateProcessing(single='<s> $A </s>', pair='<s> $A </s> </s> $B </s>', special_tokens=s)
  assert Tokenizer(found.to_str()).between == [s[1][1]] * 2


def test_chats_are_written_as_transformers_writes_them():
  t = tokenizers.Tokenizer.from_str(bpe().json)
  t.add_special_tokens(['<|im_start|>', '<|im_end|>'])
  t = Tokenizer(t.to_str())
  messages = [{'role': 'system', 'content': 'Be a cat.'}, {'role': 'user', 'content': 'the <|im_end|> mat?'},
              {'role': 'assistant', 'content': 'the dogs barked'}, {'role': 'user', 'content': 'at?'}, {'role': 'assistant', 'content': 'it'}]
  peer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(t.json), chat_template=JINJA)
  plain = [{**m, 'content': m['content'].replace('<|im_end|> ', '')} for m in messages]
  theirs = peer.apply_chat_template(plain, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
  encoded, = forms.encode(t, CHAT, [fields(CHAT, {'messages': plain})])
  assert encoded.ids == theirs['input_ids'] and encoded.marks == theirs['assistant_masks']
  prompt = peer.apply_chat_template(plain[:4], tokenize=True, add_generation_prompt=True, return_dict=True)['input_ids']
  assert forms.chat_prompt(t, CHAT, plain[:4]) == [t.boundary, *prompt]
  assert forms.chat_prompt(t, CHAT, 'at?') == forms.chat_prompt(t, CHAT, [{'role': 'user', 'content': 'at?'}])
  end, = t.encode_template('<|im_end|>')
  injected, = forms.encode(t, CHAT, [fields(CHAT, {'messages': messages})])
  assert injected.ids.count(end) == len(messages)  # what a user writes is text and ends nothing


def test_only_what_the_assistant_says_counts_in_a_batch():
  data = dataclasses.replace(CHAT, template='{role}: {content}\n')
  c = common.config('llama', **{'objective.name': 'answer', 'data.form': 'chat', 'data.key': 'messages', 'data.template': data.template,
                                'length': 80})
  chats = [((('user', 'hi'), ('assistant', 'hello'), ('user', 'bye'), ('assistant', 'so long')),),
           ((('user', 'hi'), ('assistant', 'x' * 200)),)]
  stream, task = packing.in_memory(data, common.BYTES, chats), examples.Task(c, common.BYTES)
  count = examples.count(task, stream)
  batch = examples.make(task, stream, np.arange(count), np.arange(count))
  said = sorted(common.BYTES.decode(batch['targets'][b][batch['weights'][b] > 0]) for b in range(count))
  assert said == ['hello\nso long\n', 'x' * (81 - 1 - len('user: hi\nassistant: '))]


@pytest.mark.parametrize('changes, key', [
    ({'data.form': 'chat', 'data.template': '{role}'}, 'data.template'), ({'data.form': 'chat', 'data.template': '{content}'}, 'data.template'),
    ({'data.form': 'chat', 'data.template': '{name}: {content}\n'}, 'data.template'), ({'data.form': 'tags'}, 'data.form'),
    ({'data.form': 'chat', 'data.template': CHATML, 'data.target': 'x'}, 'data.target'), ({'data.template': CHATML, 'data.target': 'x'},
                                                                                         'data.template')])
def test_configs_of_forms_that_are_none(changes, key):
  with pytest.raises(UsageError, match=f'^{key}='):
    common.config('llama', **{'objective.name': 'answer', **changes})


def test_the_cache_of_marked_records_is_what_is_in_memory(tmp_path):
  lines = [json.dumps({'words': ['a' * (n % 7 + 1), str(n)], 'tags': ['NOUN', 'VERB']}) for n in range(50)]
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
  data = dataclasses.replace(TAGS, source=f'jsonl:{tmp_path}/a.jsonl', tokenizer='bytes', heldout=0.2)
  packing.build(data, tmp_path / 'cache', lambda text: None)
  cache = packing.open_cache(data, tmp_path / 'cache')
  for split in packing.SPLITS:
    memory = packing.in_memory(data, cache.tokenizer, [r for _, *r in sources.records(data.source, data, split)])
    stream = cache.streams[split]
    assert len(stream.starts) == len(memory.starts) > 5
    for n in range(len(stream.starts) - 1):
      for ours, theirs in zip(stream.marked(n), memory.marked(n)):
        assert ours.tolist() == theirs.tolist()
  with pytest.raises(UsageError, match='was built with data.classes='):
    packing.open_cache(dataclasses.replace(data, classes='VERB|NOUN|.'), tmp_path / 'cache')
  with pytest.raises(UsageError, match="was built with data.form='tags'"):
    packing.open_cache(DataConfig(source=data.source, key='words', target='tags', heldout=0.2, tokenizer='bytes'), tmp_path / 'cache')
  (tmp_path / 'cache' / 'train-marks-00000.bin').write_bytes(b'00')
  with pytest.raises(UsageError, match='train-marks-00000.bin is not what was written'):
    packing.open_cache(data, tmp_path / 'cache')


def test_metrics_of_known_tags_and_spans():
  said, right = [['B-PER', 'I-PER', 'O'], ['B-LOC', 'O']], [['B-PER', 'I-PER', 'O'], ['B-LOC', 'I-LOC']]
  assert answers.METRICS['accuracy'](said, right) == {'accuracy': 4 / 5}
  assert answers.METRICS['seqeval'](said, right) == {'seqeval_precision': 0.5, 'seqeval_recall': 0.5, 'seqeval_f1': 0.5}
  squad = answers.METRICS['squad'](['The Cat!', 'a big dog', '', 'x'], [['cat'], ['dog', 'the dogs'], [], []])
  assert squad == {'squad_exact': 2 / 4, 'squad_f1': (1 + 2 / 3 + 1 + 0) / 4}
