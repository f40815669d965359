"""Semantic-discrepant outliers: a training image's background with another class's content."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxood.data.augment import to_unit
from jaxood.diffusion.process import add_noise
from jaxood.diffusion.samplers import guided
from jaxood.errors import UserError
from jaxood.rng import key_each, key_for


def build(labels, num_classes, alpha_bar, edit, *, depth: int = 100, same: float = 0.0):
    """Noises an image up to depth S, and takes it back asking for another class than its own.

    Yoon et al., "Diffusion-based Semantic-Discrepant Outlier Generation for Out-of-Distribution
    Detection" (poster):

        c_r ~ U({1..C} \\ {ỹ}),   x_S = √ᾱ_S x_0 + √(1 - ᾱ_S) ε,
        then for t = S..1 a reverse step with (1 + w) ε(x_t, t, c_r) - w ε(x_t, t, ∅)

    Candidate i is made of image i mod N in an order drawn once, so N candidates are one outlier an
    image, 2 N are two. An image whose label is wrong may be led to its true class, which about
    error / (C - 1) of them are.

    Args:
        labels: int[N], ỹ of the ID images, which `rows` finds as `shared['images']`.
        edit: `synthesis.generator` whose times begin at S. With a sampler that strides it takes
            S's share of the steps; S itself counts the training's T.
        depth: S in 0..T; 0 leaves the image as it is, bit for bit. The poster has 50 to 200 of
            T = 1000, best 100.
        same: share of candidates that are led to their own class, c_r = ỹ: ID images that have been
            through the denoiser, no outliers. Our control for detectors that only see its traces.
            `shared['same']` overrides it where it is: traced, so another share compiles nothing.

    Returns:
        rows; beside `image` it gives `source` (the row of the image), `label` (ỹ), `first` (c_r)
        and `discrepant` (c_r ≠ ỹ).
    """
    count, num_steps = len(labels), len(alpha_bar) - 1
    if num_classes < 2:
        raise UserError(f'another class needs two classes or more; the ID set has {num_classes}.')
    if not 0 <= depth <= num_steps:
        raise UserError(
            f'depth={depth} is no time of this chain: it counts steps of the training, '
            f'config.diffusion.schedule.num_steps={num_steps}. Give one in 0..{num_steps}.'
        )
    if not 0.0 <= same <= 1.0:
        raise UserError(f'same={same} is a share and must lie between 0 and 1.')
    order = jnp.asarray(np.random.Generator(np.random.PCG64(0)).permutation(count), jnp.int32)
    labels = jnp.asarray(labels, jnp.int32)

    def rows(shared, index, key):
        source = order[index % count]
        label = labels[source]
        share = shared.get('same', same)
        wanted, discrepant = draw(key, index, label, num_classes=num_classes, same=share)
        x_0 = to_unit(shared['images'][source])
        keys = key_each(key_for(key, 'noise'), index)
        eps = jax.vmap(lambda k: jax.random.normal(k, x_0.shape[1:]))(keys)
        x_s = add_noise(x_0, eps, alpha_bar[depth])
        condition = jax.nn.one_hot(wanted, num_classes + 1)
        bind = lambda network, guidance: guided(network, condition, guidance)
        image = edit(shared, x_s, bind, key_for(key, 'steps'), index)
        return {
            'image': image,
            'source': source,
            'label': label,
            'first': wanted,
            'discrepant': discrepant,
        }

    return rows


def draw(key, index, label, *, num_classes: int, same: float = 0.0):
    """(c_r int32[B], c_r ≠ ỹ bool[B]): uniform over the other classes, ỹ itself with chance `same`.

    index int[B], label int32[B], each row's draw following (key, index).
    """

    def one(key, label):
        which, control = jax.random.split(key)
        another = (label + 1 + jax.random.randint(which, (), 0, num_classes - 1)) % num_classes
        discrepant = ~jax.random.bernoulli(control, same)
        return jnp.where(discrepant, another, label), discrepant

    return jax.vmap(one)(key_each(key_for(key, 'class'), index), label)
