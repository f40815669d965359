"""Prompts of two classes, mixed: the fourth other way in DOG's table 2."""

from jaxood.synthesis import label_mixup


def build(painter, num_classes, *, low: float = 0.3, high: float = 0.7):
    """Painted towards β c_i + (1 - β) c_j, the embeddings of the prompts of classes i and j.

    DOG's strategy (d): "mix text embeddings". As in its (c), β lies in 0.3 to 0.7, and as there
    β ~ U[low, high] and pairs of classes take turns (our choices). The embeddings are the last
    hidden states of all tokens, which is what the U-Net reads.

    Args:
        painter: `synthesis.painter.Painter`; `shared['contexts']` are the classes' prompts.

    Returns:
        rows; beside `image` they give `first`, `second` and `weight` (β of class i).
    """
    label_mixup.check(num_classes, low=low, high=high)

    def rows(shared, index, key):
        first, second, weight = label_mixup.draw(
            key, index, num_classes=num_classes, low=low, high=high
        )
        beta = weight[:, None, None]
        c_i, c_j = shared['contexts'][first], shared['contexts'][second]
        latents = painter.noise(key, index)
        image = painter.paint(shared, latents, beta * c_i + (1.0 - beta) * c_j, key, index)
        return {'image': image, 'first': first, 'second': second, 'weight': weight}

    return rows
