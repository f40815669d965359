"""Vocabularies: WordNet in each of its forms, lists, captions; and the words that mean a class."""

import gzip
import zipfile

import pytest
import spoken

from jaxood.data import wordnet
from jaxood.errors import UserError

LICENCE = '  1 This software and database is being provided to you, the LICENSEE, by\n'
# wndb(5WN): offset, file, type, words in hex, (word, id) each, pointers, (symbol, offset, part of
# speech, source/target) each
DATA_NOUN = (
    '00001740 05 n 01 animal 0 002 ~ 00001930 n 0000 + 00002000 v 0101 | a living thing\n'
    '00001930 05 n 02 dog 0 domestic_dog 0 002 @ 00001740 n 0000 ~ 00002137 n 0000 | man | friend\n'
    '00002137 05 n 01 Puppy 0 001 @ 00001930 n 0000 | young\n'
    '00002452 05 n 0b a 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 k 0 000 | eleven\n'
    '00002684 18 n 01 Fido 0 001 @i 00001930 n 0000 | an instance\n'
)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / 'synsets.tsv'
    path.write_text(spoken.SYNSETS)
    return wordnet.nouns(path=str(path))


def test_wordnet_is_read_in_every_form(tmp_path):
    text, folder = LICENCE + DATA_NOUN, tmp_path / 'WordNet-3.0'
    for place in ('WordNet-3.0/dict', 'nltk_data/corpora/wordnet'):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / 'data.noun').write_text(text)
    (tmp_path / 'zipped' / 'corpora').mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / 'zipped' / 'corpora' / 'wordnet.zip', 'w') as archive:
        archive.writestr('wordnet/data.noun', text)
    found = wordnet.nouns(path=str(folder))
    words = {*'abcdefghijk', 'animal', 'dog', 'domestic dog', 'puppy', 'fido'}
    assert found.words == tuple(sorted(words))
    assert found.senses['domestic dog'] == ('00001930',)
    assert found.above['00002684'] == ('00001930',)  # what an instance is of
    assert found.above['00001740'] == ()  # neither a hyponym nor a verb is above
    others = ('WordNet-3.0/dict/data.noun', 'nltk_data', 'nltk_data/corpora', 'zipped')
    for other in others:
        assert wordnet.nouns(path=str(tmp_path / other)).digest == found.digest
    lines = ['synset\tmembers\thypernyms']
    for synset, above in found.above.items():
        members = [word for word in found.words if synset in found.senses[word]]
        lines.append(f'{synset}\t{"|".join(members)}\t{"|".join(above)}')
    (tmp_path / 'table.tsv.gz').write_bytes(gzip.compress('\n'.join(lines).encode()))
    assert wordnet.nouns(path=str(tmp_path / 'table.tsv.gz')).digest == found.digest


def test_words_of_a_class_and_what_is_above_and_below_it_are_dropped(table):
    found = table.collisions(['dog', 'Airplane'])
    assert found == {
        'dog': 'the class dog',
        'domestic dog': 'a synonym of dog',
        'chap': 'a synonym of dog',  # in another of its senses
        'puppy': 'a kind of dog',
        'pug': 'a kind of dog',  # of a kind of it
        'fido': 'a kind of dog',
        'lawn mower': 'a kind of dog',
        'canine': 'what dog is a kind of',
        'canid': 'what dog is a kind of',
        'airplane': 'the class Airplane',
        'aeroplane': 'a synonym of Airplane',
        'plane': 'a synonym of Airplane',
        'heavier-than-air craft': 'what Airplane is a kind of',
    }  # but neither what is above that, nor its sisters: animal, wolf, kite
    assert table.collisions([]) == {}


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('lawn_mower', ['lawn mower']),
        ('Lawnmower', ['lawn mower']),
        ('DOG', ['dog']),
        ('dogs', ['dog']),
        ('puppies', ['puppy']),
        ('wolves', ['wolf']),
        ('heavier than air craft', ['heavier-than-air craft']),
        ('tulip', []),
    ],
)
def test_class_names_are_found_however_they_are_written(table, name, words):
    assert table.find(name) == words


def test_a_list_knows_no_meanings(tmp_path):
    (tmp_path / 'words.txt').write_text('Wolf\n\n domestic_dog \nwolf\ndog\n')
    found = wordnet.word_list(path=str(tmp_path / 'words.txt'))
    assert found.words == ('dog', 'domestic dog', 'wolf')
    assert found.collisions(['dogs']) == {'dog': 'the class dogs'}


def test_captions_show_a_class_alone_or_not(tmp_path):
    found = wordnet.captions(names=('three', 'six'))
    assert len(found.words) == (4 + 2) * 2
    assert set(found.collisions(['three'])) == {'three', 'three over a three'}
    assert {'six', 'mirrored three', 'three over a six'} < set(found.words)


def test_the_real_wordnet_has_no_synonym_of_a_class_left(real_data):
    found = wordnet.nouns(path=str(real_data / 'wordnet_nouns.tsv.gz'))
    dropped = found.collisions(spoken.CLASSES)
    left = set(found.words) - set(dropped)
    for word in ('dog', 'puppy', 'domestic dog', 'poodle', 'canine', 'plane', 'aeroplane', 'jet'):
        assert word in dropped
    assert {'wolf', 'balloon', 'vehicle', 'camel', 'bicycle'} < left
    synsets = {s for name in spoken.CLASSES for s in found.senses[name]}
    assert not [word for word in left if synsets & {*found.senses[word]}]
    assert 0.9 < len(left) / len(found.words) < 1.0


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('', r"has no column 'synset'"),
        ('dog\ncat\n', r"has no column 'synset'.*name='list'"),
        ('synset\tmembers\thypernyms\n1\tdog\n', r'line 2: 2 columns, not 3'),
    ],
)
def test_tables_that_are_none(tmp_path, content, message):
    (tmp_path / 'table.tsv').write_text(content)
    with pytest.raises(UserError, match=message):
        wordnet.nouns(path=str(tmp_path / 'table.tsv'))


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / 'words.txt').write_text('\n')
    (tmp_path / 'bad.gz').write_bytes(b'\x1f\x8bcut')
    (tmp_path / 'data.noun').write_text(LICENCE + DATA_NOUN[:40])
    for path, message in (
        ('word.txt', r"word\.txt: this is not known\. Did you mean 'words\.txt'"),
        ('no/words.txt', r'there is no folder .*no\. Check'),
        ('words.txt', r'holds no words'),
        ('bad.gz', r'cannot be read as UTF-8 text .* Fetch it again'),
    ):
        with pytest.raises(UserError, match=message):
            wordnet.word_list(path=str(tmp_path / path))
    with pytest.raises(UserError, match=r'data\.noun, line 2: it is no line of data\.noun'):
        wordnet.nouns(path=str(tmp_path / 'data.noun'))
    (tmp_path / 'data.noun').unlink()
    with pytest.raises(UserError, match=r'holds no data\.noun \(it holds bad\.gz, words\.txt\)'):
        wordnet.nouns(path=str(tmp_path))
