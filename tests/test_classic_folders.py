"""Folders of encoders and encoder-decoders: imported, used on texts, exported, and refused. Parity: tests/test_classics.py."""
import dataclasses
import json
import re

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import torch
import transformers
from hypothesis import given, settings, strategies as st

import jaxlm
from jaxlm import decoding, generate, objectives
from jaxlm.errors import UsageError
from jaxlm.interop import convert, exporting, importing
from jaxlm.interop.classics import CLASSICS
from jaxlm.interop.huggingface import Folder
from jaxlm.interop.mapping import units
from jaxlm.schema import flatten
from tests import classics, common
from tests.test_classics import checkpoint, config_of  # noqa: F401  pylint: disable=unused-import
from tests.test_families import tree_of
from tests.test_interop import check_bijection
from tests.test_kinds import make_lm

LETTERS = 'abcdefghijklmnopqrstuvwxyz'
WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '<pad>', '</s>', '<s>', *LETTERS, *'.,?', *(f'##{c}' for c in LETTERS)]
WORDS += [f'rare{n}' for n in range(classics.V - len(WORDS))]
TEXTS = ['the cat sat.', 'a dog', 'who, if not we? ' * 9, 'zebra']
PAIRS = [('the cat sat.', 'where?'), ('a', 'b c d'), ('who, if not we? ' * 9, 'long ' * 5)]


def wordpiece(cls: str, sep: str, pair: str) -> str:
  """A tokenizer.json of letters."""
  made = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token='[UNK]'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  made.post_processor = tokenizers.processors.TemplateProcessing(
      single=f'{cls} $A {sep}', pair=pair, special_tokens=[(w, WORDS.index(w)) for w in (cls, sep)])
  made.add_special_tokens(WORDS[:8])
  return made.to_str()


TOKENIZERS = {'bert': wordpiece('[CLS]', '[SEP]', '[CLS] $A [SEP] $B:1 [SEP]:1'),
              'roberta': wordpiece('<s>', '</s>', '<s> $A </s> </s> $B </s>')}


def imported(name, folder, *overrides):
  """(the model in transformers, what encodes for it, ours) by a folder with a tokenizer."""
  peer = classics.make(name)
  peer.save_pretrained(folder / 'hf')
  kind = peer.config.model_type
  (folder / 'hf' / 'tokenizer.json').write_text(TOKENIZERS[kind if kind in TOKENIZERS else 'roberta'], encoding='utf-8')
  importing.run(str(folder / 'hf'), folder / 'run', None, 1, overrides, lambda text: None)
  return peer, transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / 'hf' / 'tokenizer.json'), pad_token='[PAD]',
                                                    clean_up_tokenization_spaces=False), jaxlm.load(folder / 'run')


def encoded(encode, peer, texts, length):
  firsts, seconds = (texts, None) if isinstance(texts[0], str) else map(list, zip(*texts))
  out = encode(firsts, seconds, padding=True, truncation=True, max_length=length,
               return_tensors='pt', return_token_type_ids=True)
  if peer.config.model_type == 'roberta':  # it knows padding by its id, and has one type
    out['input_ids'][out['attention_mask'] == 0] = peer.config.pad_token_id
    out['token_type_ids'][:] = 0
  return out


@pytest.mark.parametrize('name', [name for name in classics.HEADS if 'bare' not in name])
def test_scores_of_texts_and_pairs_equal_transformers(name, tmp_path):
  peer, encode, lm = imported(name, tmp_path)
  assert lm.config.length == 64 - lm.config.model.first_position
  for texts in (TEXTS, PAIRS):
    batch = encoded(encode, peer, texts, lm.config.length)
    with torch.no_grad():
      expected = classics.outputs(peer, **batch).numpy()
    found = lm.scores(texts)
    assert found.shape == expected.shape and found.dtype == np.float32
    real = np.asarray(batch['attention_mask'], bool) if found.ndim == 3 else slice(None)
    np.testing.assert_allclose(found[real], expected[real], atol=1e-5)
    if found.ndim == 3:
      assert (found[~real] == -1e30).all() and (~real).any()
  with pytest.raises(UsageError, match='model.head=.*: makes no logits'):
    lm.logits([[1, 2]])
  with pytest.raises(UsageError, match="model.pool='none'"):
    lm.embed(TEXTS)


def sentence_folder(folder, pooling, normalize):
  """The files that sentence-transformers keeps beside a BertModel."""
  parts = [('', 'Transformer'), ('1_Pooling', 'Pooling'), *([('2_Normalize', 'Normalize')] if normalize else [])]
  (folder / '1_Pooling').mkdir(parents=True)
  (folder / 'modules.json').write_text(json.dumps([
      {'idx': i, 'name': str(i), 'path': path, 'type': f'sentence_transformers.models.{kind}'}
      for i, (path, kind) in enumerate(parts)]))
  (folder / '1_Pooling' / 'config.json').write_text(json.dumps({'word_embedding_dimension': 32, **pooling}))
  (folder / 'sentence_bert_config.json').write_text(json.dumps({'max_seq_length': 40, 'do_lower_case': False}))


@pytest.mark.parametrize('name, mode, normalize', [
    ('bert, bare', 'mean', True), ('roberta, bare', 'mean', False), ('bert, bare', 'cls', True)])
def test_vectors_of_texts_are_pooled_as_the_folder_says(name, mode, normalize, tmp_path):
  modes = {f'pooling_mode_{m}': m.startswith(mode) for m in ('cls_token', 'mean_tokens', 'max_tokens')}
  sentence_folder(tmp_path / 'hf', modes, normalize)
  peer, encode, lm = imported(name, tmp_path)
  batch = encoded(encode, peer, TEXTS, 40)
  assert lm.config.length == batch['input_ids'].shape[1] == 40
  with torch.no_grad():
    hidden = peer(**batch).last_hidden_state
  mask = batch['attention_mask'][..., None].float()
  expected = hidden[:, 0] if mode == 'cls' else (hidden * mask).sum(1) / mask.sum(1)
  expected = torch.nn.functional.normalize(expected, dim=1) if normalize else expected
  found = lm.embed(TEXTS)
  assert found.dtype == np.float32 and found.shape == (len(TEXTS), 32)
  np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
  with pytest.raises(UsageError, match="model.head='none': makes no such scores"):
    lm.scores(TEXTS)
  with pytest.raises(UsageError, match='wants a list of texts'):
    lm.embed('one text')
  report = exporting.run(lm, tmp_path / 'out', None, 'float32')
  assert report['max_abs_logit_difference'] <= 1e-5
  for file in ('modules.json', 'sentence_bert_config.json'):
    assert json.loads((tmp_path / 'out' / file).read_text()) == json.loads((tmp_path / 'hf' / file).read_text())
  importing.run(str(tmp_path / 'out'), tmp_path / 'again', None, 1, [], lambda text: None)
  np.testing.assert_array_equal(jaxlm.load(tmp_path / 'again').embed(TEXTS), found)


def test_vectors_of_an_encoder_with_a_head_are_of_what_is_before_it(tmp_path):
  peer, encode, lm = imported('bert', tmp_path, ('model.pool', 'mean'))
  batch = encoded(encode, peer, TEXTS, lm.config.length)
  with torch.no_grad():
    hidden = peer.bert(**batch).last_hidden_state
  mask = batch['attention_mask'][..., None].float()
  np.testing.assert_allclose(lm.embed(TEXTS), ((hidden * mask).sum(1) / mask.sum(1)).numpy(), atol=1e-5)


@pytest.mark.parametrize('head', ['classify', 'tag'])
def test_scores_and_vectors_are_the_same_on_a_mesh_and_for_any_company(head):
  """Also with a tokenizer whose template closes no text, and for more texts than go through at once."""
  changes = {'model.head': head, 'model.C': 3, 'model.pool': 'mean', 'objective.name': 'mask'}
  lm, texts = make_lm('bert', **changes), [*TEXTS, *(f'text {n}' for n in range(33))]
  assert lm.reader.encode('ab').ids == [lm.tokenizer.cls, *lm.tokenizer.encode('ab'), lm.tokenizer.sep]
  alone = [lm.scores([t])[0] for t in texts[:5]]
  for sizes in ((1, 1, 1), (2, 2, 2)):
    other = make_lm('bert', sizes, **changes)
    np.testing.assert_allclose(other.embed(texts), lm.embed(texts), atol=1e-5)
    found = other.scores(texts)
    for a, b in zip(alone, found):
      np.testing.assert_allclose(b[:len(a)] if head == 'tag' else b, a, atol=1e-5)
  assert lm.embed([]).shape == (0, lm.config.model.D) and lm.scores([]).shape[0] == 0


@pytest.mark.parametrize('name', classics.ALL)
def test_what_was_imported_is_exported(name, tmp_path):
  """The command's whole way: transformers' own class finds the same tensors, and the report says how far it is from us."""
  peer, _, lm = imported(name, tmp_path)
  report = exporting.run(lm, tmp_path / 'out', None, 'float32')
  assert report['max_abs_logit_difference'] <= 2e-4 and report['read_by'].startswith('transformers')
  auto = {'none': transformers.AutoModel, 'classify': transformers.AutoModelForSequenceClassification,
          'tag': transformers.AutoModelForTokenClassification, 'span': transformers.AutoModelForQuestionAnswering,
          'mlm': transformers.AutoModelForPreTraining if lm.config.model.C else transformers.AutoModelForMaskedLM,
          'lm': transformers.AutoModelForSeq2SeqLM}[lm.config.model.head]
  again, before = auto.from_pretrained(tmp_path / 'out'), dict(peer.state_dict())
  assert type(again) is type(peer)
  for key, tensor in again.state_dict().items():
    assert torch.equal(tensor, before.pop(key)), key
  assert not before
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  assert [theirs(t)['input_ids'] for t in TEXTS] == [lm.tokenizer.prompt(t) for t in TEXTS]
  if lm.config.model.kind == 'seq2seq':
    start = peer.config.decoder_start_token_id
    assert again.generation_config.decoder_start_token_id == start and lm.config.data.start == lm.tokenizer.text_of(start)


@pytest.mark.parametrize('name, labels, classes', [
    ('bert, classes', ['no spam', 'Spam', 'eggs'], 'no spam|Spam|eggs'), ('roberta, tags', list('ABCDE'), 'A|B|C|D|E'),
    ('bert, classes', ['a|b', 'c', 'd'], ''), ('bert, classes', ['LABEL_0', 'LABEL_1', 'LABEL_2'], '')])
def test_the_names_of_classes_are_kept(name, labels, classes, tmp_path):
  peer = classics.make(name, id2label=dict(enumerate(labels)), label2id={label: n for n, label in enumerate(labels)})
  peer.save_pretrained(tmp_path / 'hf')
  kind = peer.config.model_type
  (tmp_path / 'hf' / 'tokenizer.json').write_text(TOKENIZERS[kind], encoding='utf-8')
  importing.run(str(tmp_path / 'hf'), tmp_path / 'run', None, 1, [], lambda text: None)
  lm = jaxlm.load(tmp_path / 'run')
  assert lm.config.data.classes == classes
  (tmp_path / 'out').mkdir()
  exporting.write_model(lm, tmp_path / 'out', kind, 'float32')
  names = labels if classes else [f'LABEL_{n}' for n in range(len(labels))]
  config = transformers.AutoConfig.from_pretrained(tmp_path / 'out')
  assert config.id2label == dict(enumerate(names)) and config.label2id == {label: n for n, label in enumerate(names)}
  with pytest.raises(UsageError, match='^model.C='):
    importing.run(str(tmp_path / 'hf'), tmp_path / 'no', None, 1, [('data.classes', 'x|y')], lambda text: None)


def test_what_a_marian_never_says_is_kept(tmp_path):
  """Its padding, with which its decoder begins: nor is it said here, and the folder says so again."""
  peer = classics.make('marian')
  pad = WORDS.index('<pad>')
  peer.generation_config.update(decoder_start_token_id=pad, bad_words_ids=[[pad]], eos_token_id=WORDS.index('</s>'))
  peer.save_pretrained(tmp_path / 'hf')
  (tmp_path / 'hf' / 'tokenizer.json').write_text(TOKENIZERS['roberta'], encoding='utf-8')
  for never in ('', '<pad>'):
    overrides = [] if never else [('data.never', '')]
    importing.run(str(tmp_path / 'hf'), tmp_path / f'run{never}', None, 1, overrides, lambda text: None)
    lm = jaxlm.load(tmp_path / f'run{never}')
    assert (lm.config.data.start, lm.config.data.never) == ('<pad>', never)
    logits = np.zeros((1, lm.config.model.V), np.float32)
    logits[0, [pad, 9]] = 2, 1
    token, _ = generate._choose(generate.Sampling(0.), lm.tokenizer.vocab_size, decoding.never_of(lm), logits,
                                np.zeros((1, 1), bool), np.zeros(1, np.uint32), 0)
    assert token == (9 if never else pad)
  exporting.run(lm, tmp_path / 'out', None, 'float32')
  again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / 'out').generation_config
  assert again.bad_words_ids == [[pad]] and again.decoder_start_token_id == pad
  assert 'bad_words_ids' not in json.loads((tmp_path / 'out' / 'config.json').read_text())


@pytest.mark.parametrize('family, model_type', [('bert', 'bert'), ('t5', 't5'), ('transformer', 'marian')])
def test_models_that_are_made_here_are_exported(family, model_type, tmp_path):
  """The Transformer of 2017 is a Marian without a bias of its logits."""
  report = exporting.run(make_lm(family), tmp_path / 'out', None, 'float32')
  assert report['max_abs_logit_difference'] <= 2e-4
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())['model_type'] == model_type


# ---- any size, and what is refused

@st.composite
def models(draw, kind):
  """Any tiny model that the family holds."""
  whole, pick = lambda low, high: draw(st.integers(low, high)), lambda *of: draw(st.sampled_from(of))
  H, K, vocab, pad = whole(1, 4), whole(1, 5), whole(5, 20), whole(0, 7)
  m = dict(H=H, G=H, K=K, D=H * K, F=whole(1, 9), N=whole(1, 4), V=vocab + pad, vocab=vocab if pad else 0)
  bert = dict(kind='encoder', norm='layer', norm_place='after', embed_norm=True, position='learned', P=whole(50, 60),
              bias='all',
              T=whole(1, 3), norm_eps=pick(1e-5, 1e-12))
  bart = dict(kind='seq2seq', encoder_N=whole(1, 4), norm='layer', norm_place='after', bias='all',
              output_bias=pick(True, False),
              scale_embedding=pick(True, False), mlp=pick('gelu_exact', 'gelu', 'relu', 'silu'), tied=pick(True, False))
  C = whole(1, 4)
  head = pick(dict(head='mlm', output_bias=True, pooler=pick(True, False), tied=pick(True, False)),
              dict(head='none', pooler=pick(True, False)),
              dict(head='classify', pooler=True, C=C), dict(head='tag', pooler=pick(True, False), C=C), dict(head='span', C=2))
  pairs = pick({}, {'C': 2}) if head['head'] == 'mlm' else {}
  more = {
      'bert': {**bert, **head, **pairs, 'mlp': pick('gelu_exact', 'gelu', 'relu', 'silu')},
      'roberta': {**bert, **head, 'mlp': 'gelu_exact', 'first_position': whole(1, 3)},
      't5': dict(kind='seq2seq', encoder_N=whole(1, 4), position='relative', attention_scale=1., D=whole(3, 9),
                 tied=pick(True, False),
                 mlp=pick('relu', 'geglu', 'swiglu', 'gelu_exact'), norm_eps=1e-6,
                 logit_scale=1., **{'relative.buckets': whole(2, 9)}),
      'bart': {**bart, 'position': 'learned', 'P': whole(50, 60), 'first_position': 2, 'embed_norm': True},
      'marian': {**bart, 'position': 'sinusoidal'},
  }
  flat = {**m, **more[kind]}
  if kind == 't5' and draw(st.booleans()):
    flat['logit_scale'] = flat['D'] ** -0.5
  objective = {'objective.name': 'mask'} if flat['kind'] == 'encoder' else {'objective.name': 'prefix', 'objective.source': 8}
  return common.configs.from_flat({'length': 8, 'loss.chunks': 1, **objective,
                                 **{f'model.{k}': v for k, v in flat.items()}}).model


@pytest.mark.parametrize('kind', CLASSICS)
def test_both_directions_are_bijections(kind):
  @settings(max_examples=12, deadline=None, derandomize=True, database=None)
  @given(models(kind))
  def check(m):
    check_bijection(CLASSICS[kind].rows_of(m), m)
    written = json.loads(json.dumps(convert.to_config_json(kind, m)))
    back = {f'model.{k}': v for k, v in convert.to_model(CLASSICS[kind], written).items()}
    mine = flatten(common.Config(model=dataclasses.replace(m, V=m.vocab or m.V, vocab=0)))
    assert {k: v for k, v in back.items() if v != mine[k]} == {}
    rows = {unit.theirs for unit in units(CLASSICS[kind].rows_of(m), m, convert.shapes(m))}
    assert set(CLASSICS[kind].named({CLASSICS[kind].stored(m, name) for name in rows}).values()) == rows
  check()


def test_names_of_older_files_are_known(checkpoint, tmp_path):
  """gamma and beta of norms, positions as a buffer, tied copies, a classifier of pairs that BertForMaskedLM does not use."""
  peer, folder, c, params = checkpoint('bert, pairs')
  stored = safetensors.numpy.load_file(folder / 'model.safetensors')
  old = {re.sub('LayerNorm.weight$', 'LayerNorm.gamma',
           re.sub('LayerNorm.bias$', 'LayerNorm.beta', k)): v for k, v in stored.items()}
  old |= {'bert.embeddings.position_ids': np.arange(64)[None], 'cls.predictions.decoder.bias': stored['cls.predictions.bias'],
          'cls.predictions.decoder.weight': stored['bert.embeddings.word_embeddings.weight']}
  safetensors.numpy.save_file(old, tmp_path / 'model.safetensors')
  said = json.loads((folder / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps({**said, 'architectures': ['BertForMaskedLM']}))
  source = Folder(tmp_path)
  assert config_of(source) == c
  common.assert_trees_equal(tree_of(source, c.model), params)
  key = 'bert.embeddings.LayerNorm.weight'
  safetensors.numpy.save_file({**old, key: stored[key]}, tmp_path / 'model.safetensors')
  with pytest.raises(UsageError, match=f'holds {key} twice, as .*gamma and as .*weight'):
    Folder(tmp_path)


REFUSED = {  # case → (model, file, what of it, one line)
    'an unknown head': ('bert', 'config.json', {'architectures': ['BertForMultipleChoice']},
                       r"architectures=\['BertForMultipleChoice'\]: wants"),
    'no head': ('bert', 'config.json', {'architectures': None}, 'architectures=None: wants one of BertModel'),
    'heads that are no list': ('bert', 'config.json', {'architectures': 7}, 'config.json'),
    'relative keys': ('bert', 'config.json',
                      {'position_embedding_type': 'relative_key'}, "position_embedding_type='relative_key'"),
    'a decoder': ('bert', 'config.json', {'is_decoder': True}, 'is_decoder=True'),
    'another activation': ('bert', 'config.json', {'hidden_act': 'tanh'}, "hidden_act='tanh': known are gelu"),
    'a list of activations': ('bert', 'config.json', {'hidden_act': ['gelu']}, 'config.json'),
    'positions that are text': ('bert', 'config.json', {'max_position_embeddings': 'x'}, 'max_position_embeddings'),
    'RoBERTa of another activation': ('roberta', 'config.json', {'hidden_act': 'relu'}, "hidden_act='relu': known are gelu"),
    'no pad': ('roberta', 'config.json', {'pad_token_id': None}, 'config.json'),
    'uneven heads': ('bart', 'config.json',
                     {'decoder_attention_heads': 2}, 'decoder_attention_heads=2: wants that of the encoder, 4'),
    'norms before': ('bart', 'config.json', {'normalize_before': True}, 'normalize_before=True'),
    'two vocabularies': ('marian', 'config.json',
                         {'share_encoder_decoder_embeddings': False}, 'share_encoder_decoder_embeddings=False'),
    'a start that is no token': ('t5', 'generation_config.json',
                                {'decoder_start_token_id': 9999}, 'decoder_start_token_id=9999 is no token'),
    'words that are never said': ('t5', 'generation_config.json', {'bad_words_ids': [[1, 2]]},
                                  r'bad_words_ids has \[1, 2\]: known are lists of one token'),
    'a word that is no list': ('t5', 'generation_config.json', {'bad_words_ids': 7}, 'bad_words_ids has 7: known'),
    'a word that is no token': ('t5', 'generation_config.json', {'bad_words_ids': [[9999]]}, 'bad_words_ids=9999 is no token'),
    'two ways to pool': ('bert, bare', '1_Pooling/config.json', {'pooling_mode_cls_token': True},
                         'pooling_mode_mean_tokens and pooling_mode_cls_token: known is one of'),
    'another way to pool': ('bert, bare', '1_Pooling/config.json',
                            {'pooling_mode_mean_tokens': False, 'pooling_mode_max_tokens': True},
                            'pooling_mode_max_tokens: known is one of'),
    'a length that is none': ('bert, bare', 'sentence_bert_config.json', {'max_seq_length': 'x'}, "max_seq_length='x'"),
    'another module': ('bert, bare', 'modules.json', [{'type': 'sentence_transformers.models.Dense'}], "'Dense': known are"),
    'no list of modules': ('bert, bare', 'modules.json', {'type': 'Dense'}, 'modules.json: is no JSON list'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_a_folder_that_is_not_known_is_refused_in_one_line(case, checkpoint, tmp_path):
  name, file, change, match = REFUSED[case]
  sentence_folder(tmp_path / 'hf', {'pooling_mode_mean_tokens': True}, True)
  for path in checkpoint(name)[1].iterdir():
    (tmp_path / 'hf' / path.name).write_bytes(path.read_bytes())
  (tmp_path / 'hf' / 'tokenizer.json').write_text(TOKENIZERS['bert' if 'bert' == name[:4] else 'roberta'], encoding='utf-8')
  old = json.loads((tmp_path / 'hf' / file).read_text())
  (tmp_path / 'hf' / file).write_text(json.dumps(
      {**old, **change} if isinstance(change, dict) and isinstance(old, dict) else change))
  with pytest.raises(UsageError, match=match) as e:
    importing.run(str(tmp_path / 'hf'), tmp_path / 'run', None, 1, [], lambda text: None)
  assert str(tmp_path / 'hf') in str(e.value) and '\n' not in str(e.value) and not (tmp_path / 'run').exists()


@pytest.mark.parametrize('changes, key', [
    ({'model.head': 'lm'}, 'model.head'), ({'model.head': 'classify', 'model.C': 0}, 'model.C'),
    ({'model.head': 'span', 'model.C': 3}, 'model.C'),
    ({'model.head': 'classify', 'model.C': 3, 'model.pooler': False, 'objective.name': 'mask'}, 'model.pooler'),
    ({'model.head': 'tags'}, 'model.head'), ({'model.pool': 'max'}, 'model.pool')])
def test_a_config_of_heads_that_is_none_is_refused(changes, key):
  with pytest.raises(UsageError, match=f'^{key}='):
    common.config('bert', **changes)
  with pytest.raises(UsageError, match='^model.head='):
    common.config('llama', **{'model.head': 'mlm'})
  with pytest.raises(UsageError, match='^model.pool='):
    common.config('llama', **{'model.pool': 'mean'})


def test_a_model_without_logits_is_not_trained_on_texts():
  with pytest.raises(UsageError, match="model.head='tag': has no logits"):
    objectives.of(common.config('bert', **{'model.head': 'tag', 'objective.name': 'mask'}))


def test_a_start_that_is_no_token_is_refused():
  with pytest.raises(UsageError, match="^data.start='nothing': is no token"):
    make_lm('t5', **{'data.start': 'nothing'}).generate(['x'], 2)
