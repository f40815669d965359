"""What detectors are trained with: float32[B, C] logits -> float32[B], natural logarithms.

p = softmax(z), U = the uniform distribution over the C classes.
"""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log p_y. `labels` int32[B]."""
    log_p = _log_softmax(logits)
    return -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]


def outlier_exposure(logits: jax.Array) -> jax.Array:
    """Cross-entropy of the uniform target: log Σ_c e^{z_c} - (1/C) Σ_c z_c >= log C.

    Hendrycks et al. 2019 (arXiv:1812.04606), Sec. 3, and its official code. Gradient p - 1/C.
    """
    return -jnp.mean(_log_softmax(logits), axis=-1)


def kl_uniform_p(logits: jax.Array) -> jax.Array:
    """KL(U ‖ p) = `outlier_exposure` - log C. Zero iff all logits are equal. Gradient p - 1/C.

    Metric-mixup (arXiv:2405.00631), "KL between output and uniform": the direction is our choice,
    the one that outlier exposure has.
    """
    return outlier_exposure(logits) - jnp.log(logits.shape[-1])


def kl_p_uniform(logits: jax.Array) -> jax.Array:
    """KL(p ‖ U) = log C - H(p), in [0, log C]. Gradient p_k (log p_k + H(p)).

    The other reading of metric-mixup's abstract. Its gradient dies on confident outliers, where
    that of `kl_uniform_p` is largest.
    """
    log_p = _log_softmax(logits)
    return jnp.log(logits.shape[-1]) + jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def energy_hinge(logits: jax.Array, outlier: jax.Array, *, m_in: float, m_out: float) -> jax.Array:
    """max(0, E - m_in)² of ID rows, max(0, m_out - E)² of outliers; E = -log Σ_c e^{z_c}.

    Liu et al. 2020 (arXiv:2010.03759), Eq. 8: ID energies below m_in and outliers' above m_out cost
    nothing.

    Args:
        outlier: bool[B].
    """
    energy = -jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    beyond = jnp.where(outlier, m_out - energy, energy - m_in)
    return jnp.maximum(beyond, 0.0) ** 2


def three_head(
    g_bin: jax.Array,
    g_in: jax.Array | None,
    g_out: jax.Array | None,
    labels: jax.Array,
    outlier: jax.Array,
) -> dict[str, jax.Array]:
    """The terms CE(g_bin, I), (1 - I) CE(g_in, ỹ) and I CE(g_out, ỹ) of each row. SD-outliers.

    Outlier rows send no gradient into g_in, ID rows none into g_out.

    Args:
        g_bin: float[B, 2], class 1 is "outlier"; g_in, g_out: float[B, C], or None for that term
            to be left out.
        labels: ỹ int32[B], of an outlier that of its source; -1 for one without a source.
        outlier: I, bool[B].

    Returns:
        'bin', 'in', 'out': float32[B] each. At zero logits log 2, log C, log C.
    """
    terms = {'bin': cross_entropy(g_bin, outlier.astype(jnp.int32))}
    classes = jnp.maximum(labels, 0)
    for name, logits, counts in (('in', g_in, ~outlier), ('out', g_out, outlier & (labels >= 0))):
        if logits is not None:
            terms[name] = jnp.where(counts, cross_entropy(logits, classes), 0.0)
    return terms


UNIFORMITY = {'u_p': kl_uniform_p, 'p_u': kl_p_uniform}


def _log_softmax(logits):
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
