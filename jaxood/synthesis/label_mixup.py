"""Label mixup: images of a class-conditional diffusion model asked for two classes at once.

Wahd 2024 (arXiv:2405.00631), from its abstract; no code is public. Label pi = w e_i + (1 - w) e_j
enters the network as one soft label (`mix='label'`), or the two classes' noise predictions are
averaged at every step (`mix='score'`, our choice), which at every noise level is the score of the
geometric mixture p_i^w p_j^(1-w) of the noised class densities.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxood.diffusion.samplers import label_mixed, score_mixed
from jaxood.errors import UserError, lookup
from jaxood.rng import key_each, key_for
from jaxood.synthesis.renoise import renoise as noise_again

MIXES = {'label': label_mixed, 'score': score_mixed}


def build(
    shape,
    num_classes,
    generate,
    alpha_bar,
    *,
    mix: str = 'label',
    low: float = 0.3,
    high: float = 0.7,
    renoise: float = 0.0,
):
    """Candidates from pure noise, equally many for every unordered pair of classes.

    Args:
        generate: renders x_start under a bound condition, see `synthesis.generator`.
        mix: `'label'` or `'score'`.
        low, high: the range of w ~ U[low, high]. 0.3 to 0.7 is our choice: the DOG paper reports
            that values near 0 or 1 fall back to an ID class.
        renoise: share of candidates that are noised again (`synthesis.renoise`); none in the
            paper.

    Returns:
        rows; beside `image` it gives `first`, `second` (classes i, j), `weight` (w of class i) and,
        with renoise, `level` (t, 0 for candidates as rendered).
    """
    mixed = lookup(MIXES, mix, 'mix')
    check(num_classes, low=low, high=high)
    if not 0.0 <= renoise <= 1.0:
        raise UserError(f'renoise={renoise} is a share and must lie between 0 and 1.')

    def rows(shared, index, key):
        first, second, weight = draw(key, index, num_classes=num_classes, low=low, high=high)
        keys = key_each(key_for(key, 'start'), index)
        x_start = jax.vmap(lambda k: jax.random.normal(k, shape))(keys)
        one_hot = jax.nn.one_hot(jnp.stack([first, second]), num_classes + 1)
        bind = lambda network, guidance: mixed(network, *one_hot, weight, guidance)
        image = generate(shared, x_start, bind, key_for(key, 'steps'), index)
        facts = {'first': first, 'second': second, 'weight': weight}
        if renoise:
            image, facts['level'] = noise_again(
                image, key, index, share=renoise, alpha_bar=alpha_bar
            )
        return {'image': image} | facts

    return rows


def check(num_classes: int, *, low: float, high: float) -> None:
    """Raises UserError for what `draw` cannot draw from."""
    if not 0.0 <= low <= high <= 1.0:
        raise UserError(f'low={low} and high={high} must satisfy 0 <= low <= high <= 1.')
    if num_classes < 2:
        raise UserError(f'mixing labels needs two classes or more; the ID set has {num_classes}.')


def draw(key, index, *, num_classes: int, low: float, high: float):
    """Classes i < j and weight w of candidates `index` int[B]: pairs in turn, w ~ U[low, high]."""
    pairs = np.stack(np.triu_indices(num_classes, 1))
    first, second = jnp.asarray(pairs, jnp.int32)[:, index % pairs.shape[1]]
    keys = key_each(key_for(key, 'weight'), index)
    weight = jax.vmap(lambda k: jax.random.uniform(k, minval=low, maxval=high))(keys)
    return first, second, weight
