"""Learning from images alone: SimCLR's contrast, SCAN's clusters, labels a network gives itself.

float32 scalars of whole batches, natural logarithms: rows are compared with each other here.
"""

import jax
import jax.numpy as jnp

from jaxood.losses.detection import cross_entropy

_HIGHEST = jax.lax.Precision.HIGHEST


def nt_xent(z_a: jax.Array, z_b: jax.Array, *, temperature: float = 0.1) -> jax.Array:
    """-1/2B Σ_i log( e^{s_i·} / Σ_{k≠i} e^{s_ik} ), s = cos / τ, over the 2B views of B images.

    Chen et al. 2020 (arXiv:2002.05709), Eq. 1: each view's positive is the other view of its image,
    its negatives are the other 2B - 2 views. In [0, ∞); log(2B - 1) where all views are alike.

    Args:
        z_a, z_b: float[B, D], the projections of one view and of the other; normalised here.
        temperature: τ, .1 in SCAN's official code.
    """
    z = _unit(jnp.concatenate([z_a, z_b]))
    count = len(z)
    similarity = jnp.dot(z, z.T, precision=_HIGHEST) / temperature
    similarity = jnp.where(jnp.eye(count, dtype=bool), -jnp.inf, similarity)
    positive = (jnp.arange(count) + count // 2) % count
    return jnp.mean(cross_entropy(similarity, positive))


def scan(logits: jax.Array, neighbour_logits: jax.Array, *, entropy_weight: float = 5.0):
    """-1/B Σ_i log⟨p(x_i), p(x_i')⟩ - λ H(p̄), where p = softmax(z) and p̄ = 1/B Σ_i p(x_i).

    Van Gansbeke et al. 2020 (arXiv:2005.12320), Eq. 2: an image and its neighbour x_i' share a
    cluster, and all clusters are used. Smallest, -λ log C, for balanced one-hot outputs that agree.

    Args:
        logits, neighbour_logits: float[B, C].
        entropy_weight: λ, 5 in the paper.

    Returns:
        (the loss, {'consistency', 'entropy'}): its first term, and H(p̄) in [0, log C].
    """
    log_p, log_q = (_log_softmax(z) for z in (logits, neighbour_logits))
    consistency = -jnp.mean(jax.nn.logsumexp(log_p + log_q, axis=-1))
    mean = jnp.mean(jnp.exp(log_p), axis=0)
    entropy = -jnp.sum(jax.scipy.special.xlogy(mean, mean))
    return consistency - entropy_weight * entropy, {'consistency': consistency, 'entropy': entropy}


def self_label(weak_logits: jax.Array, strong_logits: jax.Array, *, threshold: float = 0.99):
    """Cross-entropy of the strong view against the weak view's class, where that is sure of it.

    Van Gansbeke et al. 2020, Sec. 2.3. A row takes part if max p(weak) > threshold; of the n that
    do, those of class c (n_c of them) weigh n / n_c, and the mean is weighted (official code), so
    every class that occurs counts alike. No gradient goes through the weak view.

    Args:
        weak_logits, strong_logits: float[B, C].

    Returns:
        (the loss, 0 if no row takes part; {'confident': the share that does}).
    """
    p = jax.lax.stop_gradient(jnp.exp(_log_softmax(weak_logits)))
    target = jnp.argmax(p, axis=-1)
    sure = (jnp.max(p, axis=-1) > threshold).astype(jnp.float32)
    counts = jnp.zeros(p.shape[-1]).at[target].add(sure)
    weight = sure / jnp.maximum(counts[target], 1.0)  # n cancels in the weighted mean
    losses = weight * cross_entropy(strong_logits, target)
    loss = jnp.sum(losses) / jnp.maximum(jnp.sum(weight), 1e-12)
    return loss, {'confident': jnp.mean(sure)}


def _unit(z):
    z = z.astype(jnp.float32)
    return z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1e-12)


def _log_softmax(logits):
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
