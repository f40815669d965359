"""Real-image mixup: two training images of different classes, averaged pixel by pixel."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxood.data.augment import to_unit
from jaxood.rng import key_each, key_for
from jaxood.synthesis import label_mixup


def build(labels, num_classes, *, low: float = 0.3, high: float = 0.7):
    """w x_i + (1 - w) x_j of random training images of classes i and j: label mixup's control.

    Zhang et al. 2018 (arXiv:1710.09412) mix images for training; as outliers they are our choice of
    control: what does the generator add to overlaying two pictures? Pairs and w as in label mixup.

    Args:
        labels: int[N] of the ID training images, which `rows` finds as `shared['images']`.
        low, high: the range of w ~ U[low, high].

    Returns:
        rows; beside `image` it gives `first`, `second`, `weight`, and the two rows `of_first`,
        `of_second`.
    """
    draw = pairs(labels, num_classes, low=low, high=high)

    def rows(shared, index, key):
        facts = draw(key, index)
        x_i, x_j = (to_unit(shared['images'][facts[k]]) for k in ('of_first', 'of_second'))
        w = facts['weight'][:, None, None, None]
        return {'image': w * x_i + (1.0 - w) * x_j} | facts

    return rows


def pairs(labels, num_classes: int, *, low: float, high: float):
    """`draw(key, index)` -> the facts of candidates `index`: `first`, `second` and `weight` as
    `label_mixup.draw` has them, and a random training row of each class, `of_first`, `of_second`.
    """
    label_mixup.check(num_classes, low=low, high=high)
    counts = np.bincount(labels, minlength=num_classes)
    by_class = jnp.asarray(np.argsort(labels, kind='stable'), jnp.int32)
    starts = jnp.asarray(np.cumsum(counts) - counts, jnp.int32)
    counts = jnp.asarray(counts, jnp.int32)

    def pick(keys, classes):
        """A training row of each class."""
        at = jax.vmap(lambda k, n: jax.random.randint(k, (), 0, n))(keys, counts[classes])
        return by_class[starts[classes] + at]

    def draw(key, index):
        first, second, weight = label_mixup.draw(
            key, index, num_classes=num_classes, low=low, high=high
        )
        of_first, of_second = (
            pick(key_each(key_for(key, purpose), index), classes)
            for purpose, classes in (('first', first), ('second', second))
        )
        facts = {'first': first, 'second': second, 'weight': weight}
        return facts | {'of_first': of_first, 'of_second': of_second}

    return draw
