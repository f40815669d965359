"""Training images whose latents are noised and taken back: the first other way in DOG's table 2."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxood.data.augment import to_unit
from jaxood.diffusion.process import add_noise
from jaxood.errors import UserError
from jaxood.rng import key_each, key_for


def build(painter, labels, *, depth: int = 500):
    """Candidate i is training image i mod N (in an order drawn once), through level `depth` and
    back.

    DOG's strategy (a): "noise latents to t = 500 and reconstruct", z_t = √ᾱ_t z_0 + √(1 - ᾱ_t) ε.
    Towards what is not stated; here towards the prompt of the image's class, and z_0 is the mean
    of q(z | x) (our choices).

    Args:
        painter: `synthesis.painter.Painter`; `shared['contexts']` are the classes' prompts.
        labels: int[N] of the ID training images, which `rows` finds as `shared['images']`.
        depth: t in 0..T, of the training's T; at 0 nothing but the autoencoder's way there and
            back happens.

    Returns:
        rows; beside `image` they give `source` (the row of the image) and `first`, its class.
    """
    alpha_bar = painter.networks.schedule.alpha_bar
    if not 0 <= depth < len(alpha_bar):
        raise UserError(
            f'depth={depth} is no time of the pipeline: it counts steps of its training. Give one '
            f'in 0..{len(alpha_bar) - 1}.'
        )
    count = len(labels)
    order = jnp.asarray(np.random.Generator(np.random.PCG64(0)).permutation(count), jnp.int32)
    labels = jnp.asarray(labels, jnp.int32)

    def rows(shared, index, key):
        source = order[index % count]
        label = labels[source]
        latents = painter.encode(shared, to_unit(shared['images'][source]))
        keys = key_each(key_for(key, 'noise'), index)
        eps = jax.vmap(lambda k: jax.random.normal(k, latents.shape[1:]))(keys)
        z_t = add_noise(latents, eps, alpha_bar[depth])
        image = painter.paint(shared, z_t, shared['contexts'][label], key, index, depth=depth)
        return {'image': image, 'source': source, 'first': label}

    return rows
