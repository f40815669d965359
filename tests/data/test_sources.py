"""What the sources return, and what they say of what they cannot use."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxood.data import SOURCES, decoding
from jaxood.errors import UserError


def test_importing_the_data_is_light():
    code = (
        'import sys, jaxood.data, jaxood.data.roles, jaxood.data.loader\n'
        "heavy = {'jax', 'PIL', 'sklearn', 'scipy', 'grain', 'tensorflow_datasets'}\n"
        'print(*heavy & set(sys.modules))'
    )
    assert subprocess.check_output([sys.executable, '-c', code], text=True) == '\n'


def test_digits_are_the_scans():
    from sklearn.datasets import load_digits

    (data,) = SOURCES['digits']().values()
    scans = load_digits()
    assert data.images.shape == (1797, 8, 8, 1)
    np.testing.assert_allclose(data.images[..., 0] / 255 * 16, scans.images, atol=0.5 / 255 * 16)
    assert (data.images.min(), data.images.max()) == (0, 255)
    np.testing.assert_array_equal(data.labels, scans.target)
    assert data.class_names == tuple('0123456789')
    larger = SOURCES['digits'](size=16, channels=3)['all']
    assert larger.shape == (16, 16, 3)
    assert (larger.images[..., 0] == larger.images[..., 2]).all()


def test_photos_are_always_the_same_and_all_different():
    one, two = (SOURCES['photos'](count=20, size=8)['all'] for _ in range(2))
    assert one.images.shape == (20, 8, 8, 3)
    assert one.labels is None
    assert one.digest == two.digest
    assert len({image.tobytes() for image in one.images}) == 20
    first = SOURCES['photos'](count=5, size=8)['all']
    np.testing.assert_array_equal(first.images, one.images[:5])
    with pytest.raises(UserError, match='size=1000: the photographs are 427 pixels high'):
        SOURCES['photos'](size=1000)


def test_fit_takes_the_middle_and_averages():
    """A 6 x 4 picture of vertical stripes, halved: antialiasing mixes, the sides are cut off."""
    stripes = np.tile(np.array([255, 0, 0, 255, 0, 0], np.uint8), (4, 1))
    whole = Image.fromarray(stripes)
    np.testing.assert_array_equal(decoding.fit(whole, 4, None)[..., 0], stripes[:, 1:5])
    flat = decoding.fit(Image.fromarray(np.full((9, 5, 3), 77, np.uint8)), 3, 1)
    np.testing.assert_array_equal(flat, np.full((3, 3, 1), 77))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    small = decoding.fit(Image.fromarray(noise), 4, None)
    assert small.std() < noise.std() / 8  # 16 x 16 levels go into one; without antialias, four


def test_fit_turns_all_8_bit_modes_into_grey_or_colour():
    grey, colour = Image.new('L', (2, 2), 50), Image.new('RGB', (2, 2), (10, 20, 30))
    for mode in ('1', 'L', 'LA'):
        assert decoding.fit(grey.convert(mode), None, None).shape == (2, 2, 1)
    for mode in ('P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV'):
        converted = colour.convert(mode, palette=Image.Palette.ADAPTIVE)
        pixels = decoding.fit(converted, None, None)
        np.testing.assert_allclose(pixels, np.full((2, 2, 3), [10, 20, 30]), atol=2)
    for mode in ('I;16', 'F'):
        with pytest.raises(UserError, match=mode):
            decoding.fit(Image.new(mode, (2, 2)), None, 1)


@pytest.mark.parametrize(
    ('keywords', 'message'),
    [(dict(size=0), 'size=0'), (dict(size=2.5), 'size=2.5'), (dict(channels=4), 'channels=4')],
)
def test_a_size_or_depth_that_cannot_be(keywords, message):
    with pytest.raises(UserError, match=message):
        SOURCES['digits'](**keywords)


GREY = np.random.default_rng(0).integers(0, 256, (6, 4, 4), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)


def write(path, **arrays):
    np.savez(path, **arrays)
    return path.name


def test_npz_round_trip(tmp_path):
    write(tmp_path / 'a.npz', images=GREY, labels=np.arange(6) % 2, class_names=['cat', 'dog'])
    got = SOURCES['npz'](path='a.npz', root=str(tmp_path))['all']
    np.testing.assert_array_equal(got.images, GREY[..., None])
    np.testing.assert_array_equal(got.labels, np.arange(6) % 2)
    assert got.labels.dtype == np.int32
    assert got.class_names == ('cat', 'dog')
    fitted = SOURCES['npz'](path='a.npz', root=str(tmp_path), size=2, channels=3)['all']
    wanted = [decoding.fit(Image.fromarray(image), 2, 3) for image in GREY]
    np.testing.assert_array_equal(fitted.images, wanted)


def test_npz_in_two_files_or_without_names(tmp_path):
    train = write(tmp_path / 'train.npz', images=COLOUR, labels=np.array([0, 2, 1], np.uint8))
    test = write(tmp_path / 'test.npz', images=COLOUR[:1], labels=[3])
    got = SOURCES['npz'](train=train, test=test, root=str(tmp_path))
    assert set(got) == {'train', 'test'}
    assert got['train'].class_names == got['test'].class_names == ('0', '1', '2', '3')
    bare = SOURCES['npz'](path=write(tmp_path / 'bare.npz', images=COLOUR), root=str(tmp_path))
    assert bare['all'].labels is None


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    write(tmp_path / 'a.npz', images=GREY)
    assert len(SOURCES['npz'](path='a.npz', root='~')['all']) == 6
    assert len(SOURCES['npz'](path='~/a.npz', root='/elsewhere')['all']) == 6


@pytest.mark.parametrize(
    ('arrays', 'message'),
    [
        (dict(x=GREY, y=GREY), r"no array 'images' \(it has: x, y\)"),
        (dict(images=GREY / 255), r'float64, not uint8.*np\.round\(images \* 255\)'),
        (dict(images=GREY.astype(np.int64)), r'int64, not uint8.*astype\(np\.uint8\)'),
        (dict(images=GREY[0]), r'shape \(4, 4\)'),
        (dict(images=COLOUR.transpose(0, 3, 1, 2)), r'channels seem to come first.*transpose'),
        (dict(images=GREY[:0]), "'images' is empty"),
        (dict(images=np.array([GREY, None], object)), 'Python objects'),
        (dict(images=GREY, labels=[0, 1]), r'shape \(2,\); 6 images need .*\(6,\)'),
        (dict(images=GREY, labels=np.zeros(6)), "'labels' is float64"),
        (
            dict(images=GREY, labels=[0, 1, 0, 2, 2, 0], class_names=['cat', 'dog']),
            r'labels\[3\] = 2, but labels count from 0\.\.1, as there are 2 .*\(2 such',
        ),
        (dict(images=GREY, labels=[0, 0, 0, 0, -1, 0]), r'labels\[4\] = -1'),
        (dict(images=GREY, labels=[0] * 6, class_names=['cat', 'cat']), 'different strings'),
    ],
)
def test_an_npz_that_cannot_be_used(tmp_path, arrays, message):
    write(tmp_path / 'bad.npz', **arrays)
    with pytest.raises(UserError, match=rf'(?s)bad\.npz.*{message}'):
        SOURCES['npz'](path='bad.npz', root=str(tmp_path))


def test_an_npz_that_is_none(tmp_path):
    good = tmp_path / 'good.npz'
    write(good, images=GREY)
    damaged = {
        'text.npz': b'hello',
        'empty.npz': b'',
        'cut.npz': good.read_bytes()[:-60],
        'flipped.npz': good.read_bytes().replace(GREY.tobytes(), bytes(GREY.size)),
    }
    np.save(tmp_path / 'array.npz.npy', GREY)
    damaged['array.npz'] = (tmp_path / 'array.npz.npy').read_bytes()
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f'{name} is (no NPZ file|damaged).*Write it again'):
            SOURCES['npz'](path=str(tmp_path / name))
    with pytest.raises(UserError, match='gone.npz is not there'):
        SOURCES['npz'](path='gone.npz', root=str(tmp_path))


def test_npz_files_that_do_not_go_together(tmp_path):
    names = dict(images=GREY, labels=[0] * 6)
    a = write(tmp_path / 'a.npz', **names, class_names=['cat', 'dog'])
    b = write(tmp_path / 'b.npz', **names, class_names=['dog', 'cat'])
    bare = write(tmp_path / 'bare.npz', images=GREY)
    with pytest.raises(UserError, match=r"'class_names' differ: .*cat, dog, .*dog, cat"):
        SOURCES['npz'](train=a, test=b, root=str(tmp_path))
    with pytest.raises(UserError, match=r"bare.npz has no 'labels'"):
        SOURCES['npz'](train=a, test=bare, root=str(tmp_path))
    for wrong in (dict(), dict(train=a), dict(path=a, test=b)):
        with pytest.raises(UserError, match='either one file'):
            SOURCES['npz'](**wrong)


def test_resize_comes_before_the_crop():
    """The short side to `resize`, then the middle `size` x `size`: torchvision's two steps."""
    ramp = np.tile(np.arange(0, 160, 10, dtype=np.uint8), (16, 1))  # 16 x 16, left to right
    image = Image.fromarray(ramp)
    cut = decoding.fit(image, 8, None, resize=16)[..., 0]
    np.testing.assert_array_equal(cut, ramp[4:12, 4:12])
    np.testing.assert_array_equal(  # images that have the size already are enlarged, too
        decoding.fit_all(ramp[None, :8, :8, None], 8, None, resize=16).shape, (1, 8, 8, 1)
    )
    half = decoding.fit(image, 4, None, resize=8)[..., 0].astype(int)
    np.testing.assert_allclose(half[0], [45, 65, 85, 105], atol=1)  # pairs' means, the middle four
    whole = decoding.fit(Image.fromarray(ramp[:4]), 4, None, resize='stretch')[..., 0].astype(int)
    np.testing.assert_allclose(whole[0], [15, 55, 95, 135], atol=4)  # all of it, 4 x 16 made square
    steep = Image.fromarray(np.uint8([[0, 0, 0, 255, 255, 255]] * 6))
    looks = [decoding.fit(steep, 12, None, interpolation=i) for i in decoding.INTERPOLATIONS]
    assert (looks[0] != looks[1]).any()


@pytest.mark.parametrize(
    ('look', 'message'),
    [
        (dict(resize=4), 'resize=4 must be a whole number of at least size=8'),
        (dict(size=None, resize=8), 'resize=8'),
        (dict(size=None, resize='stretch'), r"resize='stretch' must be.* and set size"),
        (dict(resize='strech'), r"resize='strech' must be a whole number"),
        (dict(interpolation='bicubik'), "Did you mean 'bicubic'"),
    ],
)
def test_fittings_that_cannot_be(look, message):
    with pytest.raises(UserError, match=message):
        decoding.check(**(dict(size=8, channels=None) | look))
