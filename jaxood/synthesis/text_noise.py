"""Prompts of classes, disturbed: the second other way in DOG's table 2."""

import jax
import jax.numpy as jnp

from jaxood.errors import UserError
from jaxood.rng import key_each, key_for


def build(painter, num_classes, *, scale: float = 0.3):
    """Candidate i is painted towards the prompt of class i mod C plus scale · N(0, I).

    DOG's strategy (b): "Gaussian noise 0.3 on the class text embedding". Taken for the last hidden
    states of all tokens, which is what the U-Net reads, and 0.3 for the standard deviation of each
    of their numbers (our reading; the final layer norm leaves them of about unit size).

    Args:
        painter: `synthesis.painter.Painter`; `shared['contexts']` are the classes' prompts.

    Returns:
        rows; beside `image` they give `first`, the class.
    """
    if scale < 0.0:
        raise UserError(f'scale={scale} is a standard deviation and must not be negative.')

    def rows(shared, index, key):
        first = (index % num_classes).astype(jnp.int32)
        context = shared['contexts'][first]
        keys = key_each(key_for(key, 'text'), index)
        xi = jax.vmap(lambda k: jax.random.normal(k, context.shape[1:]))(keys)
        latents = painter.noise(key, index)
        return {
            'image': painter.paint(shared, latents, context + scale * xi, key, index),
            'first': first,
        }

    return rows
