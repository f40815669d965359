"""Latents of two training images, mixed: the third other way in DOG's table 2."""

from jaxood.data.augment import to_unit
from jaxood.synthesis import real_mixup


def build(painter, labels, num_classes, *, low: float = 0.3, high: float = 0.7):
    """β z_i + (1 - β) z_j of random training images of classes i and j, decoded.

    DOG's strategy (c): "mix latents of two classes, β ∈ {0.3, ..., 0.7}". Here β ~ U[low, high],
    pairs of classes take turns, and the mixture goes through the decoder alone (our choices; the
    latents are the means of q(z | x)).

    Args:
        painter: `synthesis.painter.Painter`.
        labels: int[N] of the ID training images, which `rows` finds as `shared['images']`.

    Returns:
        rows; beside `image` they give `first`, `second`, `weight` (β of class i), and the two rows
        `of_first`, `of_second`.
    """
    draw = real_mixup.pairs(labels, num_classes, low=low, high=high)

    def rows(shared, index, key):
        facts = draw(key, index)
        z_i, z_j = (
            painter.encode(shared, to_unit(shared['images'][facts[k]]))
            for k in ('of_first', 'of_second')
        )
        beta = facts['weight'][:, None, None, None]
        return {'image': painter.decode(shared, beta * z_i + (1.0 - beta) * z_j)} | facts

    return rows
