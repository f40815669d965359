"""Folders of images: in memory or read lazily the same, and every fault is named."""

import logging
import os

import numpy as np
import pytest
from PIL import Image

from jaxood.data import SOURCES
from jaxood.errors import UserError

rng = np.random.default_rng(0)


def picture(path, shape=(5, 5, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels[..., 0] if shape[-1] == 1 else pixels).save(path)
    return pixels


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.fixture
def pets(tmp_path):
    """cat/ with three images, one of them deeper; dog/ with two."""
    names = ('cat/1.png', 'cat/more/2.PNG', 'cat/3.bmp', 'dog/a.png', 'dog/b.png')
    pixels = {name: picture(tmp_path / name) for name in names}
    (tmp_path / 'notes.txt').write_text('no picture')
    (tmp_path / 'cat' / '._1.png').write_bytes(b'left by another system')
    (tmp_path / '.cache').mkdir()
    return tmp_path, pixels


def load(path, **keywords):
    return SOURCES['folder'](path=str(path), **keywords)


@pytest.mark.parametrize('limit', [2**30, 0])
def test_classes_are_folders_in_sorted_order(pets, limit):
    path, pixels = pets
    data = load(path, memory_limit=limit)['all']
    assert (data.images is None) == (limit == 0)
    assert data.names == tuple(sorted(pixels))
    assert data.class_names == ('cat', 'dog')
    np.testing.assert_array_equal(data.labels, [0, 0, 0, 1, 1])
    for row, name in enumerate(data.names):
        np.testing.assert_array_equal(data.take(np.array([row]))[0], pixels[name])


def test_lazily_read_is_the_same_as_in_memory(pets):
    settings = dict(size=3, channels=1)
    here, there = load(pets[0], **settings)['all'], load(pets[0], **settings, memory_limit=1)['all']
    rows = np.array([4, 0, 0, 2])
    np.testing.assert_array_equal(here.take(rows), there.take(rows))
    np.testing.assert_array_equal(here.labels, there.labels)
    assert here.names == there.names
    assert here.shape == there.shape == (3, 3, 1)


def test_the_lazy_digest_sees_names_and_sizes_not_the_place(pets, tmp_path_factory):
    path, pixels = pets
    before = load(path, memory_limit=0)['all'].digest
    moved = tmp_path_factory.mktemp('moved') / 'pets'
    os.rename(path, moved)
    assert load(moved, memory_limit=0)['all'].digest == before
    with open(moved / 'dog' / 'a.png', 'ab') as f:
        f.write(b'\n')
    assert load(moved, memory_limit=0)['all'].digest != before


def test_train_and_test_folders_are_the_splits(tmp_path):
    for name in ('train/cat/1.png', 'train/dog/1.png', 'test/dog/9.png'):
        picture(tmp_path / name)
    got = load(tmp_path)
    assert set(got) == {'train', 'test'}
    np.testing.assert_array_equal(got['train'].labels, [0, 1])
    np.testing.assert_array_equal(got['test'].labels, [1])
    assert got['test'].class_names == ('cat', 'dog')
    assert got['test'].names == ('dog/9.png',)


def test_a_flat_folder_has_no_labels(tmp_path):
    for name in ('b.png', 'a.png'):
        picture(tmp_path / name)
    data = load(tmp_path)['all']
    assert data.labels is None
    assert data.class_names == ()
    assert data.names == ('a.png', 'b.png')


def test_what_cannot_be_read_is_named(pets):
    path, _ = pets
    (path / 'cat' / '2.png').write_bytes(b'')
    with pytest.raises(UserError, match=r"cat/2\.png cannot be read: .*on_error='skip'"):
        load(path)
    (path / 'cat' / '2.png').unlink()
    cut_short(path / 'dog' / 'a.png')
    with pytest.raises(UserError, match=r'dog/a\.png cannot be read: .*truncated'):
        load(path)


def test_or_left_out(pets, caplog):
    path, pixels = pets
    (path / 'cat' / '2.png').write_bytes(b'')
    (path / 'cat' / '4.png').write_text('<html>not found</html>')
    cut_short(path / 'dog' / 'a.png')
    with caplog.at_level(logging.WARNING):
        data = load(path, on_error='skip')['all']
    assert data.names == ('cat/1.png', 'cat/3.bmp', 'cat/more/2.PNG', 'dog/b.png')
    np.testing.assert_array_equal(data.images[3], pixels['dog/b.png'])
    np.testing.assert_array_equal(data.labels, [0, 0, 0, 1])
    assert all(name in caplog.text for name in ('cat/2.png', 'cat/4.png', 'dog/a.png'))


def test_lazily_a_file_cut_short_shows_when_its_turn_comes(pets):
    path, pixels = pets
    cut_short(path / 'dog' / 'a.png')
    data = load(path, memory_limit=0)['all']
    np.testing.assert_array_equal(data.take(np.array([4]))[0], pixels['dog/b.png'])
    with pytest.raises(UserError, match=r'dog/a\.png cannot be read'):
        data.take(np.arange(5))
    data = load(path, memory_limit=0, on_error='skip')['all']
    np.testing.assert_array_equal(data.take(np.array([3]))[0], pixels['dog/b.png'])


def test_mixed_shapes_name_two_files_and_the_mend(pets):
    path, _ = pets
    picture(path / 'dog' / 'b.png', (5, 7, 1))
    wanted = r'cat/1\.png is 5 x 5 pixels in colour, .*dog/b\.png is 7 x 5 pixels in grey'
    with pytest.raises(UserError, match=wanted + r'\. Set size .* and channels'):
        load(path)
    with pytest.raises(UserError, match=wanted + r'\. Set size \(such as size=32\) to'):
        load(path, channels=3)
    with pytest.raises(UserError, match=wanted + r'\. Set channels'):
        load(path, size=5)
    assert load(path, size=4, channels=3)['all'].shape == (4, 4, 3)


def test_an_image_of_16_bits_is_named(tmp_path):
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(tmp_path / 'deep.png')
    with pytest.raises(UserError, match=r'deep\.png cannot be read: .*I;16.*8 bits'):
        load(tmp_path, channels=1)


@pytest.mark.parametrize(
    ('files', 'message'),
    [
        ((), 'data holds no images. It should hold image files'),
        (('notes.txt', 'a.npy'), 'data holds no images'),
        (('cat/notes.txt',), 'data holds no images'),
        (('cat/1.png', 'dog/notes.txt'), 'data/dog holds no images. Fill or remove it'),
        (('cat/1.png', '2.png'), r'data holds images \(2\.png\) beside folders of images \(cat/\)'),
        (('train/cat/1.png',), 'data has train/ with folders in it, but no test/ beside it'),
        (('train/cat/1.png', 'test/cta/1.png'), "class 'cta' is not known. Did you mean 'cat'"),
        (('train/cat/1.png', 'test/1.png'), 'one is sorted into class folders, the other not'),
        (('train/1.png', 'test/cat/1.png'), 'one is sorted into class folders, the other not'),
        (('train/cat/1.png', 'test/notes.txt'), 'data/test holds no images'),
    ],
)
def test_a_folder_that_cannot_be_used(tmp_path, files, message):
    base = tmp_path / 'data'
    base.mkdir()
    for name in files:
        if name.endswith('.png'):
            picture(base / name)
        else:
            (base / name).parent.mkdir(exist_ok=True)
            (base / name).write_text('no picture')
    with pytest.raises(UserError, match=message):
        load(base)


def test_a_folder_that_is_not_there_or_may_not_be_read(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r'gone cannot be listed: No such file.*path'):
        load('gone', root=str(tmp_path))
    picture(tmp_path / 'a.png')
    with pytest.raises(UserError, match=r'a\.png cannot be listed: Not a directory'):
        load(tmp_path / 'a.png')

    def forbidden(path):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(os, 'scandir', forbidden)
    with pytest.raises(UserError, match='cannot be listed: Permission denied'):
        load(tmp_path)


def test_a_folder_of_nothing_but_broken_images(tmp_path):
    (tmp_path / 'a.png').write_bytes(b'')
    with pytest.raises(UserError, match='none of its 1 images can be read'):
        load(tmp_path, on_error='skip')
    with pytest.raises(UserError, match="on_error='skp'.*Did you mean 'skip'"):
        load(tmp_path, on_error='skp')


@pytest.mark.parametrize('limit', [2**30, 0])
def test_a_folder_as_imagenet_lays_it_out(tmp_path, limit):
    """`val` tests where there is no `test`; how images are brought to shape is in the digest."""
    for split in ('train', 'val'):
        for name in ('n01', 'n02'):
            picture(tmp_path / split / name / '1.png', (9, 7, 3))
    data = load(tmp_path, size=4, memory_limit=limit)
    assert set(data) == {'train', 'test'}
    assert data['test'].class_names == ('n01', 'n02')
    looks = (dict(), dict(resize=6), dict(interpolation='bicubic'))
    digests = {load(tmp_path, size=4, memory_limit=limit, **k)['test'].digest for k in looks}
    assert len(digests) == 3
    picture(tmp_path / 'test' / 'n01' / '1.png')
    assert len(load(tmp_path, size=4)['test']) == 1
