"""Outliers made of ID validation images."""

import numpy as np
import pytest

from jaxood.data.examples import Examples
from jaxood.data.surrogates import surrogates
from jaxood.errors import UserError


def flat(count, size=8):
    """Image i has the level 10 i everywhere and the label i % 2."""
    levels = (10 * np.arange(count)).astype(np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (count, size, size, 3)).copy()
    return Examples(images, (np.arange(count) % 2).astype(np.int32), ('a', 'b'))


def test_means_are_of_two_classes_and_inversions_of_one_image():
    out = surrogates(flat(24)).images[:, 0, 0, 0].astype(int)
    assert all(2 * m // 10 % 2 == 1 for m in out[0::3])  # an even and an odd level
    assert all((255 - m) % 10 == 0 for m in out[2::3])
    assert all(m % 10 == 0 for m in out[1::3])  # a jigsaw of one grey is that grey


def test_a_jigsaw_moves_tiles_whole():
    rng = np.random.default_rng(0)
    tiles = rng.integers(1, 256, size=(4, 4))
    image = np.kron(tiles, np.ones((2, 2))).astype(np.uint8)
    image = np.pad(image, ((0, 1), (0, 1)))[..., None]  # 9 x 9: one row and column left over
    out = surrogates(Examples(np.stack([image] * 3))).images[1][..., 0]
    assert (out[8] == 0).all()
    assert (out[:, 8] == 0).all()
    moved = out[:8:2, :8:2]
    np.testing.assert_array_equal(np.kron(moved, np.ones((2, 2))), out[:8, :8])
    np.testing.assert_array_equal(np.sort(moved, axis=None), np.sort(tiles, axis=None))
    assert (moved != tiles).any()


def test_the_same_every_time_and_no_more_than_asked_for():
    a, b = surrogates(flat(24), count=7), surrogates(flat(24), count=7)
    np.testing.assert_array_equal(a.images, b.images)
    assert len(a) == 7
    assert (surrogates(flat(24), count=7, seed=1).images != a.images).any()


@pytest.mark.parametrize(('count', 'size'), [(1, 8), (5, 3)])
def test_too_little_to_distort(count, size):
    with pytest.raises(UserError, match='validation_ood'):
        surrogates(flat(count, size))
