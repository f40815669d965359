"""Uniform noise is uniform, in every pixel and between them."""

import jax
import numpy as np

from jaxood.synthesis import noise


def test_every_level_is_as_likely_as_any_other():
    make = noise.uniform((8, 8, 3))
    x = np.asarray(make({}, np.arange(400), jax.random.key(0))['image'])
    counts, _ = np.histogram(x, bins=16, range=(-1.0, 1.0))
    share = counts / x.size
    np.testing.assert_allclose(share, 1 / 16, atol=5 * np.sqrt(1 / 16 / x.size))
    flat = x.reshape(len(x), -1)
    assert np.abs(flat.mean(axis=0)).max() < 5 / np.sqrt(3 * len(x))  # each pixel, over images
    correlation = np.corrcoef(flat[:, :20].T) - np.eye(20)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(x))
