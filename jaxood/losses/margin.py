"""Angular margins: what heads put in place of cos θ_y, the target's cosine. All in float32.

    z_k = s cos θ_k for k ≠ y,    z_y = s · formula(cos θ_y),    cos θ_k = w_kᵀh / (‖w_k‖ ‖h‖)

A formula takes cosines in [-1, 1] of any shape and keeps it. arccos has an infinite slope at ±1;
here angles come from sin θ = √(1 - cos² θ) with a floor below the root, so that values and
gradients are finite everywhere, ±1 included, and exact as far as float32 goes.
"""

import math

import jax
import jax.numpy as jnp

from jaxood.errors import UserError

_SHORT = 1e-6  # a vector of less than this length has no direction (our choice)
_FLOOR = 1e-12  # of sin²; the smallest that float32 has beside 0 is 6e-8


# ---- cosines ----------------------------------------------------------------------------------


def cosines(features: jax.Array, kernel: jax.Array) -> jax.Array:
    """cos θ_k of features [B, D] and the columns of [D, K]: float32[B, K] in [-1, 1].

    A vector shorter than 1e-6 has cosine 0 with everything, and gradient 0.
    """
    cos = jnp.dot(unit(features, 1), unit(kernel, 0), precision=jax.lax.Precision.HIGHEST)
    return jnp.clip(cos, -1.0, 1.0)  # rounding leads out of it


def unit(x: jax.Array, axis: int) -> jax.Array:
    """x / ‖x‖ along an axis, 0 where ‖x‖ < 1e-6: float32 like x."""
    x = x.astype(jnp.float32)
    return jnp.where(_square(x, axis) > _SHORT**2, x / length(x, axis), 0.0)


def length(x: jax.Array, axis: int) -> jax.Array:
    """‖x‖ along an axis, kept with size 1: float32, at least 1e-6, with gradient 0 there."""
    return jnp.sqrt(jnp.maximum(_square(x.astype(jnp.float32), axis), _SHORT**2))


def on_target(cos: jax.Array, labels: jax.Array | None, formula) -> jax.Array:
    """float32[B, K] with formula(cos θ_y) in place of cos θ_y.

    Args:
        labels: int32[B], -1 for a row without a target, which stays as it is; None: so do all.
    """
    return cos if labels is None else jnp.where(_is_target(cos, labels), formula(cos), cos)


def _square(x, axis):
    return jnp.sum(x * x, axis=axis, keepdims=True)


def _is_target(cos, labels):
    return jnp.arange(cos.shape[1]) == labels[:, None]


def _sine(cos):
    return jnp.sqrt(jnp.maximum((1.0 - cos) * (1.0 + cos), _FLOOR))


def _angle(cos):
    return jnp.arctan2(_sine(cos), cos)


# ---- margins ----------------------------------------------------------------------------------


def cosface(cos: jax.Array, *, margin: float) -> jax.Array:
    """cos θ - m, 0 <= m < 2. Wang et al. 2018 (CosFace, arXiv:1801.09414), Eq. 4."""
    return cos - margin


def arcface(cos: jax.Array, *, margin: float) -> jax.Array:
    """cos(θ + m) if cos θ > -cos m, else cos θ - m sin m. 0 <= m < π/2, in radians.

    Deng et al. 2019 (ArcFace, arXiv:1801.07698), Eq. 3; the second form, for θ + m >= π where the
    first would turn back up, is in the official code alone (deepinsight/insightface). There the
    value drops from -1 to -cos m - m sin m, -1.1173 for m = .5: kept as published.
    """
    fallback = cos - margin * math.sin(margin)
    return jnp.where(cos > -math.cos(margin), _shifted(cos, margin), fallback)


def arcface_easy(cos: jax.Array, *, margin: float) -> jax.Array:
    """cos(θ + m) if cos θ > 0, else cos θ: ArcFace's `easy_margin` (official code).

    Jumps up from -sin m to 0 at θ = π/2: kept as published.
    """
    return jnp.where(cos > 0.0, _shifted(cos, margin), cos)


def _shifted(cos, margin):
    return cos * math.cos(margin) - _sine(cos) * math.sin(margin)


def psi(cos: jax.Array, *, margin: int) -> jax.Array:
    """ψ(θ) = (-1)^q cos(mθ) - 2q, where qπ/m <= θ <= (q+1)π/m and q <= m - 1; a whole m >= 1.

    Liu et al. 2017 (SphereFace, arXiv:1704.08063), Eq. 7. Continuous, and falls strictly from 1 at
    θ = 0 to 1 - 2m at π. Without arccos: cos(mθ) is the Chebyshev polynomial T_m(cos θ), and q the
    number of the m - 1 inner bounds cos(jπ/m) that cos θ does not exceed; it has no gradient.
    """
    before, power = jnp.ones_like(cos), cos  # T_0, T_1
    for _ in range(margin - 1):
        before, power = power, 2.0 * cos * power - before
    q = sum((cos <= math.cos(j * math.pi / margin) for j in range(1, margin)), jnp.zeros_like(cos))
    return jnp.where(q % 2 == 0, power, -power) - 2.0 * q


def annealed_psi(cos: jax.Array, *, margin: int, weight: jax.Array | float) -> jax.Array:
    """(λ cos θ + ψ(θ)) / (1 + λ): A-Softmax on its way in. λ → ∞: no margin. λ = `annealing`.

    Official code of SphereFace (wy1iu/sphereface).
    """
    return (weight * cos + psi(cos, margin=margin)) / (1.0 + weight)


def annealing(step: jax.Array | int) -> jax.Array:
    """λ(t) = max(5, 1000 / (1 + 0.12 t)), t = updates done. Reaches 5 at t = 1659.

    Official code of SphereFace, its settings for CASIA-WebFace.
    """
    return jnp.maximum(5.0, 1000.0 / (1.0 + 0.12 * step))


def sphereface_norm(cos: jax.Array, *, margin: float) -> jax.Array:
    """cos(mθ) with a real m in [1, 2).

    SphereFace with normalised features, as ArcFace's experiments have it (arXiv:1801.07698, Eq. 4
    with m_1 alone). Turns back up for θ > π/m, where `psi` does not. The bound of 2 is our choice:
    from there on that happens at θ < π/2, where training begins.
    """
    return jnp.cos(margin * _angle(cos))


# ---- AdaCos -----------------------------------------------------------------------------------


def adacos_fixed(num_classes: int) -> float:
    """s_0 = √2 log(C - 1). Zhang et al. 2019 (AdaCos, arXiv:1905.00292), Sec. 4.1.

    3.107 for C = 10: the loss cannot fall below .2507 there, and the largest probability is .778.

    Raises:
        UserError: C < 3. With 2 classes s_0 = 0, and all logits are 0 for ever.
    """
    if num_classes < 3:
        raise UserError(
            f'adacos with {num_classes} classes: its scale √2 log(C - 1) is 0 for 2, so are all '
            "logits, and it takes 3 or more. Set config.head.name='normface', which is given its "
            'scale, or another head.'
        )
    return math.sqrt(2.0) * math.log(num_classes - 1)


def adacos_dynamic(cos: jax.Array, labels: jax.Array, scale: jax.Array) -> jax.Array:
    """s_t = log B_t / cos(min(π/4, θ_med)), kept within [1, 64] (our choice). No gradient.

        B_t = 1/n Σ_i Σ_{k≠y_i} exp(s_{t-1} cos θ_ik),    θ_med = median_i θ_{i,y_i}

    Zhang et al. 2019 (AdaCos, arXiv:1905.00292), Sec. 4.2. Over the n rows that have a target; if
    there is none, s_{t-1}. Of an even n the two middle angles are averaged (our choice: taking the
    lower one makes another scale).

    Args:
        cos: float32[B, K] of the whole batch.
        labels: int32[B], -1 for a row without a target.
        scale: s_{t-1}, float32[].

    Returns:
        s_t, float32[].
    """
    cos = jax.lax.stop_gradient(cos)
    has_target, is_target = labels >= 0, _is_target(cos, labels)
    n = jnp.sum(has_target)
    others = has_target[:, None] & ~is_target
    log_b = jax.nn.logsumexp(scale * cos, where=others) - jnp.log(n)
    theta = _angle(jnp.sum(jnp.where(is_target, cos, 0.0), axis=1))
    theta = jnp.sort(jnp.where(has_target, theta, jnp.inf))
    median = 0.5 * (theta[(n - 1) // 2] + theta[n // 2])
    updated = log_b / jnp.cos(jnp.minimum(jnp.pi / 4, median))
    return jnp.where(n > 0, jnp.clip(updated, 1.0, 64.0), scale)
