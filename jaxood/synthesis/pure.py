"""Images of one class as the diffusion model renders them: no outliers at all, a control."""

import jax
import jax.numpy as jnp

from jaxood.diffusion.samplers import guided
from jaxood.rng import key_each, key_for


def build(shape, num_classes, generate):
    """Candidate i shows class i mod C, from pure noise: label mixup with all weight on one class.

    Our choice of control: what a detector gains from these as outliers, it gains from something
    else than what they show. Confidence on ID images must suffer, accuracy need not: where a
    detector cannot tell generated from real, p_y = (1 + weight/C) / (1 + weight) is its optimum.

    Returns:
        rows; beside `image` it gives `first`, the class.
    """

    def rows(shared, index, key):
        first = (index % num_classes).astype(jnp.int32)
        keys = key_each(key_for(key, 'start'), index)
        x_start = jax.vmap(lambda k: jax.random.normal(k, shape))(keys)
        one_hot = jax.nn.one_hot(first, num_classes + 1)
        bind = lambda network, guidance: guided(network, one_hot, guidance)
        return {'image': generate(shared, x_start, bind, key_for(key, 'steps'), index)} | {
            'first': first
        }

    return rows
