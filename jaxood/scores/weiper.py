"""WeiPer+KLD: how an image's activations are spread, in the features and in perturbed logits.

Granz, Heurich & Landgraf 2024 (arXiv:2405.17164). Where the paper leaves details open, the official
code is followed, but for its perturbations: it draws new ones at each call.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxood.errors import UserError
from jaxood.rng import key_for
from jaxood.scores import gaussian, streaming

_ROWS = 128  # images at a time
_EPSILON = 0.01, 0.025  # added to histograms of features and of logits (official code)
_HIGHEST = jax.lax.Precision.HIGHEST


@struct.dataclass
class Spread:
    """Perturbed heads; for features and perturbed logits each: range, smoothing, mean histogram."""

    kernel: jax.Array  # float32[D, R K]
    bias: jax.Array  # float32[R K]
    ranges: jax.Array  # float32[2, 2], low and high
    smooth: jax.Array  # float32[2, bins, bins], a histogram times it is smoothed
    means: jax.Array  # float32[2, bins], each sums to 1
    weights: jax.Array  # λ_1, λ_2


def fit_weiper(
    bank,
    head,
    *,
    repeats: int = 100,
    delta: float = 1.8,
    bins: int = 100,
    smoothing: int = 4,
    smoothing_perturbed: int = 15,
    lambda_1: float = 2.5,
    lambda_2: float = 0.1,
    seed: int = 0,
) -> Spread:
    """Ranges and mean histograms over the training set, in two passes over its features.

    Args:
        repeats: r, copies of the head. Defaults are the official code's for CIFAR.
        delta: length of the noise on each w_c, in units of ‖w_c‖.
        bins: of both histograms, from the training set's minimum to its maximum.
        smoothing: s_1, width of the box that smooths an image's histogram of features.
        smoothing_perturbed: s_2, the same for perturbed logits.
        lambda_1: weight of the divergence of perturbed logits.
        lambda_2: weight of their mean softmax maximum.
        seed: of the perturbations; the same heads at every call.
    """
    counts = {'repeats': repeats, 'bins': bins, 'smoothing': smoothing}
    for name, value in (counts | {'smoothing_perturbed': smoothing_perturbed}).items():
        if value < 1:
            raise UserError(f'{name}={value} must be at least 1.')
    gaussian.check_head(bank, head)
    perturbed = _perturbed(head, repeats, delta, seed)

    @jax.jit
    def ends(h):
        each = lambda h: [jnp.stack([x.min(), x.max()]) for x in _activations(perturbed, h)]
        return jax.lax.map(each, h, batch_size=_ROWS)

    def over_training(f):
        for (h,) in streaming.chunks(bank['features']):
            yield [np.asarray(x) for x in f(h)]

    found = [np.concatenate(x) for x in zip(*over_training(ends))]
    ranges = np.stack([(x[:, 0].min(), x[:, 1].max()) for x in found])
    histograms = jax.jit(lambda h: _histograms(perturbed, ranges, bins, h))
    sums = sum(
        np.sum(h, axis=1, dtype=np.float64) for h in map(np.stack, over_training(histograms))
    )
    smooth = np.stack([_box(bins, width) for width in (smoothing, smoothing_perturbed)])
    arrays = ranges, smooth, sums / len(bank['features']), (lambda_1, lambda_2)
    return Spread(*perturbed, *(jnp.asarray(x, jnp.float32) for x in arrays))


def weiper(params: Spread, outputs, head):
    """KL(h) + λ_1 KL(z̃) - λ_2 · mean over copies of max softmax(z̃), z̃ of the perturbed heads.

    KL is the symmetric divergence of an image's histogram of the entries of h, or of all z̃, from
    the training images' mean; the image's is smoothed by a box, and ε is added to both. Entries
    outside the training range are in no bin.
    """
    perturbed = params.kernel, params.bias
    h = outputs['features'].astype(jnp.float32)
    found = _histograms(perturbed, params.ranges, params.means.shape[1], h)
    kl = [
        _symmetric_kl(p, jnp.dot(q, smooth, precision=_HIGHEST), epsilon)
        for p, q, smooth, epsilon in zip(params.means, found, params.smooth, _EPSILON)
    ]

    def confidence(h):
        z = _activations(perturbed, h)[1].reshape(-1, len(head['bias']))
        return jnp.mean(jnp.max(jax.nn.softmax(z), axis=1))

    msp = jax.lax.map(confidence, h, batch_size=_ROWS)
    return kl[0] + params.weights[0] * kl[1] - params.weights[1] * msp


def _perturbed(head, repeats, delta, seed):
    """(kernel float32[D, R K], bias [R K]): each w_c plus noise of length δ ‖w_c‖, R times."""
    W = jnp.asarray(head['kernel'], jnp.float32).T
    noise = jax.random.normal(key_for(seed, 'weiper'), (repeats, *W.shape))
    noise /= jnp.linalg.norm(noise, axis=-1, keepdims=True)
    copies = W + delta * jnp.linalg.norm(W, axis=1, keepdims=True) * noise
    return copies.reshape(-1, W.shape[1]).T, jnp.tile(jnp.asarray(head['bias']), repeats)


def _activations(perturbed, h):
    """One image's features [D] and perturbed logits [R K]."""
    kernel, bias = perturbed
    return h, jnp.dot(h, kernel, precision=_HIGHEST) + bias


def _histograms(perturbed, ranges, bins, h):
    """Shares of the entries in equal bins over the range, for both: two float32[B, bins]."""

    def histogram(x, low, high):
        at = jnp.clip(jnp.floor((x - low) / (high - low) * bins), 0, bins - 1)
        at = jnp.where((x >= low) & (x <= high), at, bins).astype(jnp.int32)  # `bins`: outside
        return jnp.zeros(bins + 1).at[at].add(1.0)[:bins] / len(x)

    def both(h):
        return [histogram(x, *ends) for x, ends in zip(_activations(perturbed, h), ranges)]

    return jax.lax.map(both, h, batch_size=_ROWS)


def _box(bins, width):
    """The matrix of a running mean over `width` bins, ends repeated: float64[bins, bins]."""
    left = (width - 1) // 2
    padded = np.pad(np.eye(bins), ((0, 0), (left, width - 1 - left)), mode='edge')
    return np.stack([padded[:, i : i + width].mean(axis=1) for i in range(bins)], axis=1)


def _symmetric_kl(p, q, epsilon):
    """KL(p ‖ q) + KL(q ‖ p) of float32[..., bins] after adding ε and dividing by the sum."""
    p, q = (x + epsilon for x in (p, q))
    p, q = (x / jnp.sum(x, axis=-1, keepdims=True) for x in (p, q))
    return jnp.sum((p - q) * (jnp.log(p) - jnp.log(q)), axis=-1)
