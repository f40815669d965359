"""Losses that bring what belongs together closer than the rest of the batch."""

import jax
import jax.numpy as jnp
import optax


def clip(
    images: jax.Array, texts: jax.Array, log_scale: jax.Array, captions: jax.Array
) -> jax.Array:
    """Symmetric cross-entropy of similarities. Radford et al. 2021 (arXiv:2103.00020), Fig. 3.

    Rows with the same caption belong to each other, too (our choice): with few captions a batch has
    many of them. Without repetitions it is the paper's.

    Args:
        images, texts: float32[B, D], not normalised.
        log_scale: t, log of the similarities' scale.
        captions: int32[B], each row's caption.

    Returns:
        float32[B], the mean over both directions.
    """
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    logits = jnp.exp(log_scale) * unit(images) @ unit(texts).T
    same = (captions[:, None] == captions).astype(jnp.float32)
    targets = same / same.sum(axis=1, keepdims=True)
    across = optax.softmax_cross_entropy(logits, targets)
    return 0.5 * (across + optax.softmax_cross_entropy(logits.T, targets))
