"""Scores that compare a feature's direction with those of the classes' weights."""

import jax
import jax.numpy as jnp


def maxcos(params, outputs, head):
    """-max_k cos θ_k, in [-1, 1], θ_k between h and w_k; 0 where h = 0.

    Metric-mixup (arXiv:2405.00631), "the head's angular output". It reads directions alone, so a
    head's scale and margin do not matter, nor does a bias.
    """
    h = outputs['features'].astype(jnp.float32)
    length = jnp.maximum(jnp.linalg.norm(h, axis=1), 1e-12)
    return jnp.clip(normcos(params, outputs, head) / length, -1.0, 1.0)  # rounding leads out of it


def normcos(params, outputs, head):
    """-‖h‖ max_k cos θ_k = -max_k ŵ_kᵀh, ŵ_k = w_k / ‖w_k‖: SphereFace's `maxlogit`."""
    h = outputs['features'].astype(jnp.float32)
    w = head['kernel']
    unit = w / jnp.maximum(jnp.linalg.norm(w, axis=0), 1e-12)
    return -jnp.max(jnp.dot(h, unit, precision=jax.lax.Precision.HIGHEST), axis=1)
