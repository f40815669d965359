"""Weights in whose neighbourhood a network is surest of outliers: DOE's perturbation P.

Wang et al. 2023 (DOE, arXiv:2303.05033) and its official code (QizhouWang/DOE). Pytrees of
parameters; P has their structure, with a scalar 0 in place of everything that is no kernel.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxood.rng import key_for

ALPHAS = (1e-1, 1e-2, 1e-3, 1e-4)  # official code
SIGNS = {'+': 1.0, '-': -1.0}
KEPT = 0.6  # of the old P, in each average (official code)


def excess(logits: jax.Array) -> jax.Array:
    """G = 1/m Σ_j [Σ_k p_jk z_jk - z̄_j] >= 0, with p = softmax(z). 0 iff all logits of a row agree.

    The derivative at σ = 1 of outlier exposure's loss of σz (`detection.outlier_exposure`): how
    fast it would fall if the outliers' logits were all scaled down together.

    Args:
        logits: float[m, C], of outliers.
    """
    z = logits.astype(jnp.float32)
    return jnp.mean(jnp.sum(jax.nn.softmax(z) * z, axis=-1) - jnp.mean(z, axis=-1))


def regret(logits: jax.Array) -> jax.Array:
    """R = G², the proxy of the OOD regret. Same source; float32[] of float[m, C]."""
    return excess(logits) ** 2


def direction(params: Any, slope: Any, *, sign: str = '+') -> Any:
    """P_new = ‖θ_l‖ / (‖Δ_l‖ + 1e-20) Δ_l with Δ_l = ±∇R, for each kernel l; norms are Frobenius'.

    So α P_new changes each kernel by exactly the share α of its length. Kernels have two or more
    axes; biases and normalisation layers are left alone (official code).

    Args:
        slope: ∇R, like `params`.
        sign: '+' climbs to the worst case, which is what the paper's equations ask for; '-' is what
            the official code does, whose proxy steps down R.
    """

    def scaled(path, theta, delta):
        if not _is_kernel(path, theta):
            return jnp.zeros(())
        delta = SIGNS[sign] * delta
        return jnp.linalg.norm(theta.ravel()) / (jnp.linalg.norm(delta.ravel()) + 1e-20) * delta

    return jax.tree_util.tree_map_with_path(scaled, params, slope)


def nothing(params: Any) -> Any:
    """P = 0."""
    zeros = lambda path, x: jnp.zeros(jnp.shape(x) if _is_kernel(path, x) else ())
    return jax.tree_util.tree_map_with_path(zeros, params)


def average(p: Any, p_new: Any, *, first: jax.Array | bool) -> Any:
    """.6 P + .4 P_new, and P_new itself the first time (official code)."""
    kept = jnp.where(first, 0.0, KEPT)
    return jax.tree.map(lambda old, new: kept * old + (1.0 - kept) * new, p, p_new)


def shifted(params: Any, p: Any, alpha: jax.Array | float) -> Any:
    """θ + α P: new arrays, θ stays as it is."""
    return jax.tree.map(lambda theta, shift: theta + alpha * shift, params, p)


def draw_alpha(key: jax.Array, alphas: Sequence[float] = ALPHAS) -> jax.Array:
    """One of the α, each as likely: float32[]."""
    at = jax.random.randint(key_for(key, 'alpha'), (), 0, len(alphas))
    return jnp.asarray(alphas, jnp.float32)[at]


def _is_kernel(path, x):
    return path[-1].key.endswith('kernel') and jnp.ndim(x) >= 2
