"""Every view keeps shape and range, follows its row's key, and leaves an image its class."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

from jaxood.data import views
from jaxood.errors import UserError
from jaxood.rng import key_each

CASES = [(name, channels) for name in views.VIEWS for channels in (1, 3)]
KEYWORDS = {'strong': {'cutout': 4, 'operations': 2}}  # of 8 x 8 pixels; unrolled, so few


def batch(channels, count=12):
    x = np.random.default_rng(0).random((count, 8, 8, channels)).astype(np.float32)
    return x, key_each(jax.random.key(0), np.arange(count))


@pytest.mark.parametrize(('name', 'channels'), CASES)
def test_a_view_is_an_image_of_its_key_alone(name, channels):
    x, keys = batch(channels)
    view = jax.jit(lambda x, keys: views.VIEWS[name](x, keys, **KEYWORDS.get(name, {})))
    seen = np.asarray(view(x, keys))
    assert seen.shape == x.shape
    assert (seen >= 0).all()
    assert (seen <= 1).all()
    order = np.random.default_rng(1).permutation(len(x))
    np.testing.assert_allclose(view(x[order], keys[order]), seen[order], atol=1e-6)
    if name == 'plain':
        np.testing.assert_array_equal(seen, x)
        return
    again = np.asarray(view(np.repeat(x[:1], 12, axis=0), keys))  # one image under many keys
    assert np.abs(again[1:] - again[:1]).mean() > 0.01


def test_grey_pictures_in_colour_stay_grey():
    x, keys = batch(1)
    seen = np.asarray(jax.jit(views.simclr)(jnp.repeat(x, 3, axis=-1), keys))
    np.testing.assert_allclose(seen, seen[..., :1].repeat(3, axis=-1), atol=2e-2)


def test_warp_moves_turns_and_leaves_alone():
    x = batch(1)[0][0]
    still, eye = np.zeros(2), np.eye(2)
    np.testing.assert_allclose(views.warp(x, eye, still), x, atol=1e-6)
    np.testing.assert_allclose(views.warp(x, eye, np.array([1.0, 0.0]))[:-1], x[1:], atol=1e-6)
    quarter = np.array([[0.0, -1.0], [1.0, 0.0]])
    np.testing.assert_allclose(views.warp(x, quarter, still), np.rot90(x, -1), atol=1e-5)
    outside = views.warp(x, eye, np.array([8.0, 0.0]))
    np.testing.assert_array_equal(outside, 0.0)


def test_a_full_crop_is_the_image_and_half_of_them_mirrored():
    x, keys = batch(3, 64)
    crop = jax.jit(jax.vmap(lambda x, k: views._random_crop(x, k, (1.0, 1.0), True)))
    seen = np.asarray(crop(x, keys))
    assert np.abs(seen[:, :, ::-1] - x).mean() < np.abs(seen - x).mean()
    same = np.asarray(views.weak(x, keys, pad=0))
    mirrored = np.array([not np.allclose(a, b) for a, b in zip(same, x)])
    np.testing.assert_allclose(same[mirrored], x[mirrored][:, :, ::-1])
    assert 0.25 < mirrored.mean() < 0.75


def test_operations_agree_with_pillow():
    """Auto-contrast and posterising level by level, equalising up to Pillow's own rounding."""
    levels = np.random.default_rng(0).integers(40, 200, (64, 64, 3), np.uint8)
    picture, x = Image.fromarray(levels), levels / np.float32(255)
    for ours, theirs, tolerance in (
        (views._auto_contrast(x, 0.0), ImageOps.autocontrast(picture), 2 / 255),
        (views._posterize(x, 4.3), ImageOps.posterize(picture, 4), 1e-5),
        (views._equalize(x, 0.0), ImageOps.equalize(picture), 0.08),
    ):
        np.testing.assert_allclose(ours, np.asarray(theirs, np.float32) / 255, atol=tolerance)


@pytest.mark.parametrize('at', range(len(views.OPERATIONS)))
def test_operations_stay_in_range_on_flat_images(at):
    for level in (0.0, 0.5, 1.0):
        seen = views.OPERATIONS[at](jnp.full((8, 8, 1), level), 0.7)
        assert np.isfinite(seen).all()
        assert (seen > -1e-6).all()
        assert (seen < 1 + 1e-6).all()


def test_a_hole_is_a_grey_square():
    x, keys = jnp.zeros((200, 8, 8, 1)), key_each(jax.random.key(1), np.arange(200))
    holes = np.asarray(jax.vmap(lambda x, k: views._cut_out(x, k, 3))(x, keys))
    assert set(np.unique(holes)) == {0.0, 0.5}
    assert {int(n) for n in (holes > 0).sum((1, 2, 3))} <= {1, 2, 3, 4, 6, 9}
    assert (holes.mean(0) > 0).all()  # anywhere


@pytest.mark.parametrize(
    ('keywords', 'message'),
    [
        (dict(name='strong'), 'cutout=16 must be from 1 to 8'),  # the default
        (dict(name='simclr', scale=(0.0, 1.0)), r'scale=\(0\.0, 1\.0\) must be shares'),
        (dict(name='handwriting', noise=-1.0), 'noise=-1.0 .* must not be negative'),
    ],
)
def test_what_views_refuse(keywords, message):
    with pytest.raises(UserError, match=message):
        views.check(size=8, **keywords)
