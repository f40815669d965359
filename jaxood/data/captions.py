"""Captions of labelled images, and the compositions that they speak of. Our choice.

A caption has a number, so that a training step picks it by arithmetic: first every class in every
`VIEWS`, then every class over every class.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

VIEWS = {  # how a caption says it -> what happens to an image [H, W, C] in [-1, 1]
    '{}': lambda x: x,
    'mirrored {}': lambda x: x[:, ::-1],
    'upside down {}': lambda x: x[::-1],
    'inverted {}': lambda x: -x,
}
OVER = '{} over a {}'


def captions(names: Sequence[str], template: str) -> list[str]:
    """All captions of classes with these names, by their numbers: (V + K) K of them.

    Args:
        template: e.g. 'a photo of a {}'.
    """
    views = [view.format(name) for view in VIEWS for name in names]
    pairs = [OVER.format(name, other) for name in names for other in names]
    return [template.format(what) for what in views + pairs]


def compose(
    images: jax.Array,
    labels: jax.Array,
    others: jax.Array,
    other_labels: jax.Array,
    keys: jax.Array,
    *,
    num_classes: int,
    plain: float,
) -> tuple[jax.Array, jax.Array]:
    """Draws a composition for each row -> its image, and its caption's number int32[B].

    Two images over each other are their pointwise maximum: light strokes on a dark ground.

    Args:
        images, labels: float [B, H, W, C] in [-1, 1] and int [B], what is looked at.
        others, other_labels: likewise, what may lie below.
        keys: a key for each row.
        num_classes: K.
        plain: the share of images that stay as they are; all other compositions are as likely as
            each other.
    """
    views = len(VIEWS)

    def one(image, label, other, other_label, key):
        share = (1.0 - plain) / views  # of each of the other views, and of pairs
        chances = jnp.array([plain] + [share] * views)
        kind = jax.random.choice(key, views + 1, p=chances)
        made = jnp.stack([*(view(image) for view in VIEWS.values()), jnp.maximum(image, other)])
        pair = views * num_classes + label * num_classes + other_label
        return made[kind], jnp.where(kind < views, kind * num_classes + label, pair)

    return jax.vmap(one)(images, labels, others, other_labels, keys)
