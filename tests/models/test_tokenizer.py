"""Token ids: those of transformers, on everything a prompt may hold; pseudo-words."""

import json
import shutil

import numpy as np
import pytest
from pipelines import folder, golden
from reference import make_stable_diffusion as reference

from jaxood.errors import UserError
from jaxood.models.clip import tokenizer as tokenizers

LONG = 'ignore:The prompt .* tokens:UserWarning'


@pytest.fixture
def tokenizer():
    return tokenizers.load(folder('sd1') / 'tokenizer')


@pytest.mark.filterwarnings(LONG)
@pytest.mark.parametrize('pipeline', ['sd1', 'sd2'])  # the second pads with an exclamation mark
def test_ids_are_those_of_transformers(pipeline):
    got = tokenizers.load(folder(pipeline) / 'tokenizer')(reference.TEXTS)
    np.testing.assert_array_equal(got, golden()[f'{pipeline}/ids'])


@pytest.mark.slow
@pytest.mark.filterwarnings(LONG)
def test_ids_with_clips_own_merges_are_those_of_transformers(real_data):
    words = reference.real_vocabulary(real_data / 'bpe_simple_vocab_16e6.txt.gz')
    got = tokenizers.Tokenizer(tokenizers.build(*words))(reference.TEXTS)
    np.testing.assert_array_equal(got, golden()['real_ids'])


@pytest.mark.filterwarnings(LONG)
def test_one_file_does_as_well_as_two(tokenizer, tmp_path):
    """tokenizer.json is all that newer transformers write; what it says of padding is not used."""
    words = reference.vocabulary()
    backend = tokenizers.build(*words)
    backend.enable_padding(length=99)
    backend.enable_truncation(5)
    backend.save(str(tmp_path / 'tokenizer.json'))
    loaded = tokenizers.load(tmp_path)
    np.testing.assert_array_equal(loaded(reference.TEXTS), tokenizer(reference.TEXTS))


def test_a_long_prompt_is_cut_and_warned_of(tokenizer):
    with pytest.warns(UserWarning, match=r"'a photo of .*has 202 tokens .* first 76 and the end"):
        (row,) = tokenizer(['a photo of a three ' * 40])
    assert (len(row), row[-1]) == (77, tokenizer.end)


def test_no_texts(tokenizer):
    assert tokenizer([]).shape == (0, 77)


def test_pseudo_words_are_tokens_of_their_own_and_leave_the_others(tokenizer):
    before, size = tokenizer(['a photo of a cat']), tokenizer.size
    own = tokenizer.copy()
    assert own.add(['<toy>', 'sks']) == [size, size + 1]
    np.testing.assert_array_equal(own(['a photo of a cat']), before)
    end = own.end
    assert list(own(['<toy>sks'])[0, 1:4]) == [size, size + 1, end]
    assert size not in own(['<TOY>'])  # as it is written only
    assert own.ids('<toy>') == [size]
    assert tokenizer.size == size  # a copy's words are its own


def test_pseudo_words_that_a_folder_brings(tmp_path):
    shutil.copytree(folder('sd1') / 'tokenizer', tmp_path / 'it')
    size = tokenizers.load(tmp_path / 'it').size
    (tmp_path / 'it' / 'added_tokens.json').write_text(json.dumps({'<b>': size + 1, '<a>': size}))
    assert list(tokenizers.load(tmp_path / 'it')(['<a><b>'])[0, 1:3]) == [size, size + 1]


def test_a_vocabulary_of_our_own_knows_its_words_and_spells_others(tmp_path):
    texts = ["It's a photo of a three", 'over two', 'naïve 3']
    tokenizers.save(tmp_path, *tokenizers.learn(texts), length=20)
    own = tokenizers.load(tmp_path)
    words = ('it', "'s", 'photo', 'three', 'over', 'NAÏVE', '3')
    assert {word: len(own.ids(word)) for word in words} == dict.fromkeys(words, 1)
    assert len(own.ids('four')) > 1
    assert own(['three four']).shape == (1, 20)


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['cat</w>'], "'cat</w>' is a token already"),
        (['<a>', '<a>'], "'<a>' is given twice"),
        ([''], 'begins or ends blank'),
        ([' x'], 'begins or ends blank'),
    ],
)
def test_words_that_cannot_be_pseudo_words(words, message, tokenizer):
    with pytest.raises(UserError, match=message):
        tokenizer.add(words)


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match='neither vocab.json with merges.txt nor tokenizer.json'):
        tokenizers.load(tmp_path)
    (tmp_path / 'tokenizer.json').write_text('{')
    with pytest.raises(UserError, match='the tokenizer is damaged'):
        tokenizers.load(tmp_path)
    (tmp_path / 'vocab.json').write_text('{"a": 0}')
    (tmp_path / 'merges.txt').write_text('#version: 0.2\n')
    with pytest.raises(UserError, match=r"has no '<\|startoftext\|>'"):
        tokenizers.load(tmp_path)
