"""Scores of whole feature maps F: [B, H, W, c], of each stage."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxood.errors import UserError
from jaxood.scores import logit


@struct.dataclass
class RankFeat:
    """How the largest singular value is found."""

    iterations: int = struct.field(pytree_node=False)


def fit_rankfeat(bank, head, *, iterations: int = 20) -> RankFeat:
    """Nothing to fit.

    Args:
        iterations: of the power method; 0 for a whole SVD. The paper has 20.
    """
    if iterations < 0:
        raise UserError(f'iterations={iterations} must be at least 0 (0: SVD; the paper has 20).')
    return RankFeat(iterations)


def rankfeat(params: RankFeat, outputs, head):
    """-LSE of logits from maps without their largest singular value.

    Song, Sebe & Wang 2022 (arXiv:2209.08590), Eq. 1-2 and Sec. 3.4: F as a matrix of positions and
    channels less σ_1 u_1 v_1ᵀ, in the last map, and again in the one before with the rest of the
    network behind it; the logits are averaged. Of a map of rank 1 nothing is left.
    """
    maps = outputs['maps']
    stages = range(len(maps))[-2:]
    z = [
        head['network'].resume(stage, _without_first(maps[stage], params.iterations))['logits']
        for stage in stages
    ]
    return logit.energy(sum(z) / len(z))


def _without_first(F, iterations):
    X = F.reshape(len(F), -1, F.shape[-1]).astype(jnp.float32)
    if iterations:
        v = _power_method(X, iterations)
        first = jnp.einsum('bxc,bc,bd->bxd', X, v, v, precision=jax.lax.Precision.HIGHEST)
    else:
        U, s, Vt = jnp.linalg.svd(X, full_matrices=False)
        first = s[:, :1, None] * U[:, :, :1] * Vt[:, :1, :]
    return (X - first).reshape(F.shape).astype(F.dtype)


def _power_method(X, iterations):
    """v_1 of each X [B, positions, channels], from its longest row, so never from nothing."""
    longest = jnp.argmax(jnp.sum(X**2, axis=2), axis=1)
    v = jnp.take_along_axis(X, longest[:, None, None], axis=1)[:, 0]

    def step(_, v):
        v = jnp.einsum('bxc,bx->bc', X, jnp.einsum('bxc,bc->bx', X, v))
        return _unit(v)

    return jax.lax.fori_loop(0, iterations, step, _unit(v))


def _unit(v):
    return v / jnp.maximum(jnp.linalg.norm(v, axis=1, keepdims=True), 1e-30)


@struct.dataclass
class Gram:
    """Of each layer: bounds of the Gram sums for each class, float32[K, powers, c], and a unit."""

    least: tuple
    most: tuple
    unit: tuple


def fit_gram(bank, head, *, powers: int = 5) -> Gram:
    """The range of Gram sums over each class's training images, and their usual excess over it.

    Each layer's unit is the mean deviation of held-out ID images (OpenOOD: 10 % of the training
    set; the paper: 10 % of the test set), 1 where that is 0. Classes are by label, as in OpenOOD; a
    class without images has the range of all.

    Args:
        powers: 1, ..., powers. OpenOOD has 5, the paper 10.
    """
    if powers < 1:
        raise UserError(f'powers={powers} must be at least 1 (OpenOOD has 5, the paper 10).')
    K = bank['logits'].shape[1]
    labels, at, least, most = np.asarray(bank['labels']), 0, None, None
    for sums in bank['map'](lambda outputs, head: _gram_sums(outputs, powers)):
        if least is None:
            least = [np.full((K, *v.shape[1:]), np.inf, np.float32) for v in sums]
            most = [np.full((K, *v.shape[1:]), -np.inf, np.float32) for v in sums]
        here = labels[at : at + len(sums[0])]
        at += len(here)
        for c in np.unique(here):
            for low, high, v in zip(least, most, sums):
                low[c] = np.minimum(low[c], v[here == c].min(axis=0))
                high[c] = np.maximum(high[c], v[here == c].max(axis=0))
    unseen = np.setdiff1d(np.arange(K), labels)
    for low, high in zip(least, most):
        low[unseen], high[unseen] = low.min(axis=0), high.max(axis=0)
    params = Gram(tuple(least), tuple(most), tuple(np.float32(1) for _ in least))
    held_out = bank.get('validation', bank)
    excess = np.concatenate(
        list(held_out['map'](lambda outputs, head: _deviations(params, outputs)))
    ).mean(axis=0, dtype=np.float64)
    return params.replace(unit=tuple(np.float32(e if e > 0 else 1.0) for e in excess))


def gram(params: Gram, outputs, head):
    """Σ_l δ_l / E[δ_l] / max p, in [0, ∞): how far Gram sums leave the predicted class's range.

    Sastry & Oore 2020 (arXiv:1912.12510), Sec. 3, over the stages' maps (the paper: every
    convolution and block). A training image of the predicted class has 0.
    """
    deviation = jnp.sum(_deviations(params, outputs) / jnp.stack(params.unit), axis=1)
    return deviation * jnp.exp(logit.msp(outputs['logits']))


def _deviations(params, outputs):
    """δ_l = Σ relu(min - v) / |min + 1e-6| + relu(v - max) / |max + 1e-6|: float32[B, layers]."""
    predicted = jnp.argmax(outputs['logits'], axis=1)
    layers = []
    for v, least, most in zip(
        _gram_sums(outputs, params.least[0].shape[1]), params.least, params.most
    ):
        low, high = jnp.asarray(least)[predicted], jnp.asarray(most)[predicted]
        below = jax.nn.relu(low - v) / jnp.abs(low + 1e-6)
        above = jax.nn.relu(v - high) / jnp.abs(high + 1e-6)
        layers.append(jnp.sum(below + above, axis=(1, 2)))
    return jnp.stack(layers, axis=1)


def _gram_sums(outputs, powers):
    """v = the signed p-th root of the row sums of F^p (F^p)ᵀ, p = 1..powers: float32[B, powers, c].

    Row sums need no c x c matrix: Σ_x F_ix^p Σ_j F_jx^p. Each channel is divided by its largest
    entry m_i and the sum over channels by the largest of all, m: the root of m_i^p m^p is m_i m,
    while F^20 itself would leave float32.
    """
    return tuple(_layer_sums(F.astype(jnp.float32), powers) for F in outputs['maps'])


def _layer_sums(F, powers):
    space = tuple(range(1, F.ndim - 1))
    m_i = jnp.max(jnp.abs(F), axis=space, keepdims=True)
    m = jnp.max(m_i, axis=-1, keepdims=True)
    channel, whole = (F / jnp.where(size > 0, size, 1.0) for size in (m_i, m))
    found = []
    for p in range(1, powers + 1):
        v = jnp.sum(channel**p * jnp.sum(whole**p, axis=-1, keepdims=True), axis=space)
        found.append(jnp.sign(v) * jnp.abs(v) ** (1.0 / p))
    size = (m_i * m).reshape(len(F), 1, -1)
    return jnp.stack(found, axis=1) * size
