"""Pixel ranges are exact, and each row's crop and flip are its own key's affair."""

import jax
import numpy as np
import pytest

from jaxood.data import augment
from jaxood.rng import key_each


@pytest.fixture
def batch():
    images = np.random.default_rng(0).integers(1, 256, (16, 6, 6, 3), dtype=np.uint8)
    return images, key_each(jax.random.key(0), np.arange(16))


def test_unit_range_and_back_is_the_identity_on_all_levels():
    levels = np.arange(256, dtype=np.uint8)
    x = augment.to_unit(levels)
    assert x.dtype == np.float32
    assert (x[0], x[-1]) == (-1.0, 1.0)
    np.testing.assert_array_equal(augment.from_unit(x), levels)


def test_from_unit_clips_and_rounds_to_the_nearest_level():
    x = np.array([-7.0, -1.0 + 0.4 / 127.5, -1.0 + 0.6 / 127.5, 3.0], np.float32)
    np.testing.assert_array_equal(augment.from_unit(x), [0, 0, 1, 255])


def test_standardise_gives_zero_mean_and_unit_deviation(batch):
    images, _ = batch
    mean, std = (images / 255).mean((0, 1, 2)), (images / 255).std((0, 1, 2))
    x = np.asarray(augment.standardise(images, mean, std))
    np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(x.std((0, 1, 2)), 1, atol=1e-5)


def test_a_crop_is_a_window_of_the_image_on_black(batch):
    images, keys = batch
    pad = 2
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    offsets = set()
    for image, big in zip(np.asarray(augment.random_crop(images, keys, pad=pad)), padded):
        places = [
            (i, j)
            for i in range(2 * pad + 1)
            for j in range(2 * pad + 1)
            if np.array_equal(big[i : i + 6, j : j + 6], image)
        ]
        assert len(places) == 1
        offsets |= set(places)
    assert len(offsets) > 8  # of 25, in 16 draws


def test_every_offset_is_equally_likely():
    pixel = np.zeros((4000, 3, 3, 1), np.uint8)
    pixel[:, 1, 1] = 1
    keys = key_each(jax.random.key(1), np.arange(4000))
    where = np.asarray(augment.random_crop(pixel, keys, pad=1))[..., 0].mean(0)
    np.testing.assert_allclose(where, 1 / 9, atol=4 * np.sqrt(1 / 9 * 8 / 9 / 4000))


def test_a_flip_mirrors_half_of_the_images_left_to_right():
    image = np.arange(6, dtype=np.uint8).reshape(1, 2, 3, 1)
    keys = key_each(jax.random.key(2), np.arange(1000))
    out = np.asarray(augment.random_flip(np.repeat(image, 1000, 0), keys))
    mirrored = (out == image[:, :, ::-1]).all((1, 2, 3))
    assert ((out == image).all((1, 2, 3)) ^ mirrored).all()
    assert abs(mirrored.mean() - 0.5) < 0.06


@pytest.mark.parametrize('change', [augment.random_crop, augment.random_flip])
def test_the_rest_of_the_batch_makes_no_difference(batch, change):
    images, keys = batch
    some = np.array([11, 2, 7])
    whole = change(images, keys)
    np.testing.assert_array_equal(jax.jit(change)(images[some], keys[some]), whole[some])
    assert not np.array_equal(whole, images)


def test_matched_images_lose_what_the_small_ones_never_had():
    """A picture as large as it comes, and the same shrunk before: equal once both are matched."""
    rng = np.random.default_rng(0)
    large = rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
    look = dict(mean=0.5, std=0.5, size=64)
    native, matched = (augment.standardise(large, **look, matched=m) for m in (None, 8))
    assert native.shape == matched.shape == (2, 64, 64, 3)
    detail = lambda x: float(np.abs(np.diff(x, axis=1)).mean())
    assert detail(native) > 4 * detail(matched)
    small = large[:, ::4, ::4]
    as_it_is = augment.standardise(small, **look)
    np.testing.assert_array_equal(augment.standardise(small, **look, matched=8), as_it_is)


def test_a_mark_follows_from_the_pixels():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (200, 8, 8, 3), np.uint8)
    marks = np.asarray(augment.mark(images))
    assert marks.dtype == np.uint32
    assert len({*marks.tolist()}) == 200
    np.testing.assert_array_equal(augment.mark(images[7:9]), marks[7:9])
    other = images.copy()
    other[:, 3, 3, 1] ^= 1  # one bit of one pixel
    assert (np.asarray(augment.mark(other)) != marks).all()
    black = np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 4, 4, 3), np.uint8)
    assert augment.mark(black[0]) != augment.mark(black[1])
