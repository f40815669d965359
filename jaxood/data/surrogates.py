"""Outliers to choose settings on when there is no validation OOD set: ID images, distorted."""

import numpy as np

from jaxood.data.examples import Examples
from jaxood.errors import UserError

TILES = 4  # a side, of a jigsaw


def surrogates(validation: Examples, *, count: int = 1000, seed: int = 0) -> Examples:
    """Images made of ID validation images that show no ID class as it is; no labels.

    A third each: the mean of two images, of different classes where labels are known; the 4 x 4
    tiles of an image in another order; its colours inverted. These are three of the validation
    distributions of outlier exposure (Hendrycks et al. 2019, arXiv:1812.04606, App. B; official
    code). No image that a detector is tested on has a part in them.

    Args:
        count: how many, or as many as there are validation images if those are fewer.

    Raises:
        UserError: fewer than two images, or smaller than 4 x 4 pixels.
    """
    height, width, _ = validation.shape
    if len(validation) < 2 or min(height, width) < TILES:
        raise UserError(
            f'{len(validation)} validation images of {height} x {width} pixels make no surrogate '
            'outliers: it takes two of at least 4 x 4. Name a set in config.data.validation_ood.'
        )
    rng = np.random.Generator(np.random.PCG64(seed))
    rows = rng.permutation(len(validation))[:count]
    images = validation.take(rows)
    kind = np.arange(len(rows)) % 3
    others = _others(rows if validation.labels is None else validation.labels[rows], rng)
    out = images.copy()
    pairs = np.stack([images[kind == 0], images[others[kind == 0]]]).astype(np.uint16)
    out[kind == 0] = (pairs.sum(axis=0) + 1) // 2
    out[kind == 1] = _jigsaw(images[kind == 1], rng)
    out[kind == 2] = 255 - images[kind == 2]
    return Examples(out)


def _others(labels, rng):
    """For each row a random one of another label; any, if nearly all have the same."""
    others = rng.integers(len(labels), size=len(labels))
    for _ in range(50):
        alike = labels[others] == labels
        others[alike] = rng.integers(len(labels), size=alike.sum())
    return others


def _jigsaw(images, rng):
    """The tiles of each image in a random order; what is left over at the border stays."""
    out, count = images.copy(), len(images)
    height, width = (side // TILES for side in images.shape[1:3])
    middle = images[:, : TILES * height, : TILES * width]
    tiles = middle.reshape(count, TILES, height, TILES, width, -1).swapaxes(2, 3)
    tiles = tiles.reshape(count, TILES**2, -1)
    order = rng.permuted(np.tile(np.arange(TILES**2), (count, 1)), axis=1)
    tiles = np.take_along_axis(tiles, order[..., None], axis=1)
    tiles = tiles.reshape(count, TILES, TILES, height, width, -1).swapaxes(2, 3)
    out[:, : TILES * height, : TILES * width] = tiles.reshape(middle.shape)
    return out
