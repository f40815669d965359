"""The noising process, what a network may predict about it, and the training loss.

Everything here takes arrays of any shape [B, ...]: images, latents, feature vectors. Two signatures
run through the folder:

    network(x_t, t)  -> raw output           what the network was trained to predict
    denoise(x_t, t)  -> (x_0_hat, eps_hat)   the same, converted (`denoiser`)

with t int32[B] in 1..T. A conditional network is `network(x_t, t, condition)`;
`samplers.guided` binds the condition.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


def per_row(a: jax.Array, x: jax.Array) -> jax.Array:
    """`a`, a scalar or [B], with trailing axes of length 1: it broadcasts against `x` [B, ...]."""
    a = jnp.asarray(a)
    return a.reshape(a.shape + (1,) * (jnp.ndim(x) - a.ndim))


def add_noise(x_0: jax.Array, eps: jax.Array, alpha_bar_t: jax.Array) -> jax.Array:
    """x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε. Ho et al. 2020 (arXiv:2006.11239), Eq. 4.

    Args:
        x_0: clean data [B, ...].
        eps: standard normal noise, same shape.
        alpha_bar_t: [B], a level for each row, or a scalar.
    """
    a = per_row(alpha_bar_t, x_0)
    return jnp.sqrt(a) * x_0 + jnp.sqrt(1.0 - a) * eps


class Prediction(NamedTuple):
    """What a network is trained to output, and what its output says about x_0 and ε.

    For a fixed x_t both conversions are affine in the output, so a combination of outputs with
    weights that sum to 1 (guidance, mixed scores) is the same combination of noise estimates.
    """

    target: Callable  # (x_0, eps, alpha_bar_t) -> the output that makes no error
    estimate: Callable  # (output, x_t, alpha_bar_t) -> (x_0_hat, eps_hat)


def eps_target(x_0, eps, alpha_bar_t):
    """ε itself. Ho et al. 2020, Eq. 14."""
    return eps


def eps_estimate(output, x_t, alpha_bar_t):
    """x_0_hat = (x_t - √(1 - ᾱ_t) ε_hat) / √ᾱ_t. Ho et al. 2020, Eq. 15."""
    a = per_row(alpha_bar_t, x_t)
    return (x_t - jnp.sqrt(1.0 - a) * output) / jnp.sqrt(a), output


def x_0_target(x_0, eps, alpha_bar_t):
    """x_0 itself, as DLSR's feature network predicts it (arXiv:2411.10701)."""
    return x_0


def x_0_estimate(output, x_t, alpha_bar_t):
    """ε_hat = (x_t - √ᾱ_t x_0_hat) / √(1 - ᾱ_t), for t > 0: clean data has no noise to estimate."""
    a = per_row(alpha_bar_t, x_t)
    return output, (x_t - jnp.sqrt(a) * output) / jnp.sqrt(1.0 - a)


def v_target(x_0, eps, alpha_bar_t):
    """v = √ᾱ_t ε - √(1 - ᾱ_t) x_0. Salimans & Ho 2022 (arXiv:2202.00512), App. D."""
    a = per_row(alpha_bar_t, x_0)
    return jnp.sqrt(a) * eps - jnp.sqrt(1.0 - a) * x_0


def v_estimate(output, x_t, alpha_bar_t):
    """x_0_hat = √ᾱ_t x_t - √(1 - ᾱ_t) v,  ε_hat = √(1 - ᾱ_t) x_t + √ᾱ_t v: the rotation undone."""
    a = per_row(alpha_bar_t, x_t)
    signal, noise = jnp.sqrt(a), jnp.sqrt(1.0 - a)
    return signal * x_t - noise * output, noise * x_t + signal * output


def denoiser(network: Callable, *, alpha_bar: jax.Array, prediction: Prediction) -> Callable:
    """network(x_t, t) -> raw output becomes denoise(x_t, t) -> (x_0_hat, eps_hat)."""
    alpha_bar = jnp.asarray(alpha_bar)
    return lambda x_t, t: prediction.estimate(network(x_t, t), x_t, alpha_bar[t])


def loss(
    network: Callable,
    x_0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    *,
    alpha_bar: jax.Array,
    prediction: Prediction,
) -> jax.Array:
    """L_simple of each row: mean over all other axes of (target - output)², all t weighted alike.

    Ho et al. 2020, Eq. 14, for ε; the same for the other targets (DLSR trains x_0 like this).

    Args:
        network: (x_t, t) -> raw output, with its condition and dropout keys bound.
        x_0: clean data [B, ...]; pixels lie in [-1, 1].
        t: int32[B] in 1..T.
        eps: standard normal noise, like x_0.
        alpha_bar: float32[T + 1].
        prediction: an entry of `PREDICTIONS`.

    Returns:
        float32[B]. The caller takes the mean over rows.
    """
    a = jnp.asarray(alpha_bar)[t]
    error = prediction.target(x_0, eps, a) - network(add_noise(x_0, eps, a), t)
    return jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))


def draw_noise(
    keys: jax.Array, row_shape: tuple[int, ...], num_steps: int
) -> tuple[jax.Array, jax.Array]:
    """t ~ U{1..T} and ε ~ N(0, I) for each row, from the row's own key.

    keys [B], the shape of one row, T -> int32[B], float32[B, *row_shape].
    """

    def draw(key):
        key_t, key_eps = jax.random.split(key)
        return (
            jax.random.randint(key_t, (), 1, num_steps + 1),
            jax.random.normal(key_eps, row_shape),
        )

    return jax.vmap(draw)(keys)


def null_condition(condition: jax.Array) -> jax.Array:
    """The null token (last column) in every row of a condition [B, K + 1]."""
    return jnp.zeros_like(condition).at[..., -1].set(1.0)


def drop_condition(condition: jax.Array, keys: jax.Array, rate: float) -> jax.Array:
    """Replaces each row by the null token with probability `rate`, p_∅.

    Ho & Salimans 2022 (arXiv:2207.12598), Alg. 1: it trains the unconditional branch that guidance
    needs (0.1 is usual). condition float32[B, K + 1], keys [B]; the keys must not be those of
    `draw_noise` or of dropout.
    """
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(keys)
    return jnp.where(dropped[:, None], null_condition(condition), condition)
