"""The words of CIFAR-10's classes: what is kept, what is said, and what cannot work."""

import csv
import gzip
import io
import re

import ml_collections
import numpy as np
import pytest
import spoken
from etils import epath

from jaxood import artefacts, main, parallel
from jaxood.errors import ConfigError, UserError
from jaxood.stages import words
from jaxood.stages.parts import clips, memo

NAMES = dict(tokens__name='none', stages=('words',))


def made(workdir, stage='words'):
    return [
        artefacts.Artefact(stage, p.name, epath.Path(p))
        for p in sorted((workdir / 'artefacts' / stage).iterdir(), key=lambda p: p.stat().st_mtime)
    ]


def listed(workdir):
    return list(csv.DictReader(io.StringIO((workdir / 'words.csv').read_text())))


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    place = tmp_path_factory.mktemp('words')
    main.execute(spoken.config(place, **NAMES), str(place / 'run'))
    return place / 'run'


def test_every_class_has_its_anchors_in_order(workdir):
    (artefact,) = made(workdir)
    found, facts = words.anchors(artefact), artefact.done
    assert len(found) == 10
    for pairs in found:
        assert 1 <= len(pairs) <= 4
        similarities = [similarity for _, similarity in pairs]
        assert similarities == sorted(similarities, reverse=True)
        assert not {'dog', 'puppy', 'pug', 'chap', 'canine', 'plane', 'cat', 'true cat'} & {
            word for word, _ in pairs
        }
    assert facts['kept'] == len({word for pairs in found for word, _ in pairs})
    assert facts['kept'] == int(np.ceil(0.5 * facts['candidates']))  # keep=0.5
    assert facts['vocabulary'] == 25


def test_the_listing_says_why(workdir):
    rows, (artefact,) = listed(workdir), made(workdir)
    limit = artefact.done['threshold']
    assert {row['class'] for row in rows} == set(spoken.CLASSES)
    for row in rows:
        if row['kept'] == 'yes':
            assert row['why_not'] == ''
            assert float(row['value']) <= limit + 1e-4
        elif row['value']:
            assert row['why_not'] == f'value above {limit:.4f}'
            assert float(row['value']) >= limit - 1e-4
        else:
            assert row['why_not'].startswith(('the class', 'a synonym', 'a kind of', 'what '))
    kept = [(row['class'], row['word']) for row in rows if row['kept'] == 'yes']
    pairs = zip(spoken.CLASSES, words.anchors(artefact))
    assert kept == [(name, word) for name, found in pairs for word, _ in found]


def test_what_is_there_is_not_computed_again(workdir, tmp_path, monkeypatch, capsys):
    """Another K, η or λ embeds nothing; another template embeds the words, not the images."""
    filled, fill = [], memo.fill
    noted = lambda artefact, *args: filled.append(args[-2].split(',')[0]) or fill(artefact, *args)
    monkeypatch.setattr(memo, 'fill', noted)
    for change in (dict(k=3), dict(eta=0.5), dict(keep=1.0), dict(rule='literal')):
        changes = {f'words__{k}': v for k, v in change.items()}
        main.execute(spoken.config(tmp_path, **NAMES, **changes), str(workdir))
        assert filled == []
    assert len(made(workdir)) == 5
    main.execute(spoken.config(tmp_path, **NAMES, words__template='the {}'), str(workdir))
    assert filled == ['prompts']
    assert 'dog (nearest: ' in capsys.readouterr().err
    main.execute(spoken.config(tmp_path, **NAMES), str(workdir))  # shown, though nothing was done
    assert 'words: 25, 17 of them mean an ID class; ' in capsys.readouterr().err


def test_collisions_can_be_let_in(tmp_path, workdir):
    config = spoken.config(tmp_path, **NAMES, words__collisions=False, words__keep=1.0)
    main.execute(config, str(workdir), only=['words'])
    found = made(workdir)[-1]
    assert found.done['collisions'] == 0
    assert found.done['nearest_is_name'] == 1.0  # the name's own prompt
    assert [pairs[0][0] for pairs in words.anchors(found)][3:6:2] == ['cat', 'dog']


def test_prompts_of_any_length_are_embedded_alike(tmp_path):
    """Cut to what is needed, in any batch, on any devices."""
    config = spoken.config(tmp_path)
    prompts = ['a photo of a dog', 'dog', 'a photo of a ' + 'very ' * 9 + 'dog', 'cat']
    load = lambda rows, *devices: clips.load(config, {}, parallel.setup(*devices), rows)
    one = load(4, 'jit', 1)
    want = one.ids(one.tokenizer(prompts))
    np.testing.assert_allclose(np.linalg.norm(want, axis=1), 1.0, atol=1e-5)
    text, ids = one.text.apply, one.tokenizer(prompts)
    whole = np.asarray(text(one.params['text'], ids)['projected'])
    whole = whole / np.linalg.norm(whole, axis=1, keepdims=True)
    np.testing.assert_allclose(want, whole, atol=1e-5)
    two = load(3, 'pmap', 2)
    np.testing.assert_allclose(two.ids(ids), want, atol=1e-5)
    np.testing.assert_allclose(one.ids(ids[1:2]), want[1:2], atol=1e-5)


def test_images_of_other_sizes_are_fitted():
    x = np.random.RandomState(0).uniform(size=(2, 12, 16, 3)).astype(np.float32)
    got = clips.vision.fitted(x, 6)
    assert got.shape == (2, 6, 6, 3)
    np.testing.assert_array_equal(clips.vision.fitted(x[:, :, 2:14], 12), x[:, :, 2:14])
    flat = clips.vision.fitted(np.full((1, 4, 6, 3), 0.3, np.float32), 8)
    np.testing.assert_allclose(flat, 0.3, atol=1e-6)


def test_the_estimate_counts_images_and_calls(tmp_path):
    done = {'classes': ['a', 'b', 'c'], 'images': 40}
    store = artefacts.Store(epath.Path(tmp_path))
    sampler = dict(steps=20, guidance=6.5)
    config = ml_collections.ConfigDict(dict(outliers=dict(per_class=100), sampler=sampler))
    said = words.estimate(config, done, store)
    assert said == 'rendering: 300 images, 12000 U-Net evaluations, hours: not known yet'
    store.find('synthesise', 'x').finish(images_per_s=0.5)
    config.sampler.guidance = 0.0
    config.outliers = dict(per_image=45)
    said = words.estimate(config, done, store)
    assert said == 'rendering: 1800 images, 36000 U-Net evaluations, hours: 1 (at 0.5/s)'


@pytest.mark.slow
def test_the_listing_of_the_real_wordnet(real_data, tmp_path, capsys):
    """Of its animals and artifacts, a quarter of it."""
    lines = gzip.decompress((real_data / 'wordnet_nouns.tsv.gz').read_bytes()).decode().split('\n')
    part = [line for line in lines if '\tnoun.animal\t' in line or '\tnoun.artifact\t' in line]
    path = tmp_path / 'nouns.tsv'
    path.write_text('\n'.join([lines[0], *part]))
    config = spoken.config(tmp_path, **NAMES, words__path=str(path), words__k=100)
    config.parallel.inference_batch = 1024
    main.execute(config, str(tmp_path / 'run'))
    said = capsys.readouterr().err
    assert re.search(r'words: \d{5}, 2\d{3} of them mean an ID class', said)
    assert said.count('    kept ') == 10
    rows = listed(tmp_path / 'run')
    dropped = {row['word']: row['why_not'] for row in rows if not row['value']}
    kept = {row['word'] for row in rows if row['kept'] == 'yes'}
    assert dropped['dog'] == 'the class dog'
    assert not kept & {'dog', 'puppy', 'domestic dog', 'plane', 'motorcar', 'auto'}
    assert sum(row['value'] != '' for row in rows) == 10 * 100


def test_an_anchor_set_that_is_empty_says_which_threshold_keeps_how_many():
    values = np.array([0.2, 0.3, 0.4, 0.5])
    own = [[0.4, 0.5], [0.2, 0.3]]
    with pytest.raises(UserError) as found:
        words.check_anchors(('cat', 'dog'), own, values, 0.25)
    said = str(found.value)
    assert "anchors of the class 'cat' are none (1 of 2 classes)" in said
    assert 'λ = 0.2000 (1), 0.2000 (1), 0.3000 (2), 0.4000 (3), 0.5000 (4)' in said
    assert 'every class has one from 0.4000 (3) on' in said
    with pytest.raises(UserError, match=r'anchors of all classes are none'):
        words.check_anchors(('cat', 'dog'), own, values, 0.1)
    words.check_anchors(('cat', 'dog'), own, values, 0.4)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(words__eta=1.5), r'config\.words\.eta=1\.5 must be a number, between 0\.0 and 1\.0'),
        (dict(words__keep=-0.1), r'config\.words\.keep=-0\.1 must be a number'),
        (dict(words__threshold=float('nan')), r'config\.words\.threshold=nan must be a finite'),
        (dict(words__rule='far'), r"config\.words\.rule='far' is not known.*Known: near, literal"),
        (dict(words__k=0), r'config\.words\.k=0 must be a whole number'),
        (dict(words__template='a photo'), r"template='a photo' must have one \{\}"),
        (dict(words__name='wordnett'), r"words\.name='wordnett' is not known\. Did you mean 'word"),
        (dict(words__clip='/nowhere'), r'config\.words\.clip: /nowhere: there is no such folder'),
        (dict(words__path='/nowhere/words'), r'config\.words: /nowhere/words: there is no folder'),
        (dict(words=dict(name='captions')), r'config\.words\.names is not set: what do the capt'),
    ],
)
def test_settings_that_cannot_work(changes, message, tmp_path):
    config = spoken.config(tmp_path, **NAMES)
    own = {k: v for k, v in config.words.items() if k in words.OWN}
    if isinstance(changes.get('words'), dict):
        changes = {'words': own | changes['words']}
    config = spoken.config(tmp_path, **NAMES, **changes)
    with pytest.raises(UserError, match=message):
        main.execute(config, str(tmp_path / 'run'))
    assert not (tmp_path / 'run' / 'artefacts').exists()


def test_no_word_survives(tmp_path):
    (tmp_path / 'words.txt').write_text('dog\ncat\n')
    config = spoken.config(tmp_path, **NAMES, words__name='list')
    config.words.path = str(tmp_path / 'words.txt')
    with pytest.raises(ConfigError, match=r'none of the 2 words survives.*cat: the class cat'):
        main.execute(config, str(tmp_path / 'run'))


def test_a_generator_without_a_projection_needs_a_clip(tmp_path):
    (tmp_path / 'bare').mkdir()
    for part in spoken.pipeline().iterdir():
        if part.name != 'clip':
            (tmp_path / 'bare' / part.name).symlink_to(part)
    config = spoken.config(tmp_path, **NAMES, generator__path=str(tmp_path / 'bare'))
    with pytest.raises(ConfigError, match=r'config\.words\.clip is not set.* no projection'):
        main.execute(config, str(tmp_path / 'run'))
    config.words.clip = str(spoken.pipeline() / 'clip')
    words.check(config)
