"""Outliers at every distance: some candidates are noised again."""

import jax
import jax.numpy as jnp

from jaxood.diffusion.process import add_noise
from jaxood.rng import key_each, key_for


def renoise(x_0, key, index, *, share: float, alpha_bar):
    """Returns a share of the rows at a random level of the forward process, and all levels.

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps with t ~ U{1..T} for a row with
    probability `share`, t = 0 (x_0 as it is) for the others. Our choice: what a generator renders
    lies near the ID images, pure noise far from them, and these lie between, so that one set of
    outliers teaches both.

    Args:
        x_0: float32[B, H, W, C] in [-1, 1].
        index: int[B], the candidates' numbers; row i draws from (key, index[i]).

    Returns:
        (float32[B, H, W, C] clipped to [-1, 1], level int32[B]).
    """
    num_steps = len(alpha_bar) - 1

    def draw(key):
        which, level, noise = jax.random.split(key, 3)
        t = jax.random.randint(level, (), 1, num_steps + 1)
        t = jnp.where(jax.random.bernoulli(which, share), t, 0)
        return t, jax.random.normal(noise, x_0.shape[1:])

    level, eps = jax.vmap(draw)(key_each(key_for(key, 'renoise'), index))
    return jnp.clip(add_noise(x_0, eps, jnp.asarray(alpha_bar)[level]), -1.0, 1.0), level
