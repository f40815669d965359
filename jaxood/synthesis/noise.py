"""Outliers that need no generator."""

import jax

from jaxood.rng import key_each, key_for


def uniform(shape: tuple[int, int, int]):
    """Every pixel drawn uniformly from the whole range: the simplest outlier there is."""

    def rows(shared, index, key):
        keys = key_each(key_for(key, 'pixels'), index)
        draw = lambda k: jax.random.uniform(k, shape, minval=-1.0, maxval=1.0)  # noqa: E731
        return {'image': jax.vmap(draw)(keys)}

    return rows
