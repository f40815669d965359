"""Given images as outliers: nothing is invented."""

import jax
import jax.numpy as jnp

from jaxood.data.augment import to_unit
from jaxood.rng import key_for


def build(given: int):
    """Candidate i is the i-th of the given images, in an order drawn from the key; each comes once.

    Outlier exposure's own outliers (Hendrycks et al. 2019, arXiv:1812.04606), and the way in for
    those that were rendered elsewhere. Exact to the bit: `augment.from_unit` undoes `to_unit`.

    Args:
        given: how many there are; `rows` finds them as `shared['given']`.

    Returns:
        rows; beside `image` it gives `of_given`, the image's row. Numbers from `given` on begin
        again.
    """

    def rows(shared, index, key):
        order = jax.random.permutation(key_for(key, 'order'), given)
        of_given = order[index % given]
        image = jnp.clip(to_unit(shared['given'][of_given]), -1.0, 1.0)  # compiled, 255 is 1 + 1e-7
        return {'image': image, 'of_given': of_given}

    return rows
