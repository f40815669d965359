"""Images of one class as the diffusion model renders them: no outliers at all, a control."""

import jax
import jax.numpy as jnp

from jaxood.diffusion.samplers import guided
from jaxood.rng import key_each, key_for


def build(shape, num_classes, generate):
    """Candidate i shows class i mod C, from pure noise: label mixup with all weight on one class.

    Trained on as outliers these must cost ID accuracy (our choice of control): if they do not, the
    detector tells generated images by something else than what they show.

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
