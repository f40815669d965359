"""Given images: each once, to the bit, in an order of the seed's."""

import jax
import numpy as np

from jaxood.data.augment import from_unit
from jaxood.synthesis import images


def test_each_image_comes_once_and_unchanged():
    given = np.random.default_rng(0).integers(256, size=(20, 4, 4, 3)).astype(np.uint8)
    rows = jax.jit(images.build(len(given)))
    orders = []
    for seed in (0, 0, 1):
        made = rows({'given': given}, np.arange(20), jax.random.key(seed))
        order = np.asarray(made['of_given'])
        assert sorted(order) == list(range(20))
        np.testing.assert_array_equal(from_unit(made['image']), given[order])
        orders.append(order.tolist())
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != list(range(20))
