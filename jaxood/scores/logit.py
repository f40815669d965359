"""Scores that read the logits alone: float32[B, C] -> float32[B], larger = more outlying."""

import jax
import jax.numpy as jnp

from jaxood.errors import UserError


def msp(logits):
    """log(1 + Σ_{c≠ŷ} e^{z_c - z_ŷ}) = LSE(z) - max z = -log max_c p_c, in [0, log C].

    Hendrycks & Gimpel 2017 (arXiv:1610.02136): the order of 1 - max p, in a form that never
    saturates. In float32, max p is exactly 1 from margins of 17 on, and LSE(z) - max z exactly 0:
    a quarter of the ID images would tie. Here the largest logit is left out of the sum, so margins
    up to 80 keep their order.
    """
    z = logits.astype(jnp.float32)
    top = jnp.argmax(z, axis=-1, keepdims=True)
    margin = z - jnp.take_along_axis(z, top, axis=-1)
    others = jnp.where(jnp.arange(z.shape[-1]) == top, 0.0, jnp.exp(margin))
    return jnp.log1p(jnp.sum(others, axis=-1))


def maxlogit(logits):
    """-max_c z_c. Hendrycks et al. 2022 (arXiv:1911.11132)."""
    return -jnp.max(logits.astype(jnp.float32), axis=-1)


def energy(logits, *, temperature=1.0):
    """E(x) = -T log Σ_c e^{z_c / T}. Liu et al. 2020 (arXiv:2010.03759), Eq. 4.

    The paper thresholds -E. Not invariant to a constant added to z: E(z + a) = E(z) - a.
    """
    z = logits.astype(jnp.float32)
    return -temperature * jax.nn.logsumexp(z / temperature, axis=-1)


def fit_energy(bank, head, *, temperature: float = 1.0):
    """Nothing to fit. The temperature is traced, so another one compiles nothing."""
    if not temperature > 0:
        raise UserError(f'temperature={temperature} must be above 0 (1 is usual).')
    return {'temperature': temperature}
