"""Scores that compare features with stored ones, with means or with the head's weights."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxood import console
from jaxood.errors import UserError
from jaxood.neighbours import BLOCK, QUERIES, largest, products
from jaxood.rng import key_each, key_for
from jaxood.scores import gaussian, logit, streaming

# ---- neighbours in a bank ---------------------------------------------------------------------


@struct.dataclass
class Neighbours:
    """Rows to compare with, padded with zeros to full blocks; how many are real; and k."""

    bank: jax.Array  # float32[N', D]
    count: int = struct.field(pytree_node=False)
    k: int = struct.field(pytree_node=False)


def fit_knn(bank, head, *, k: int = 50) -> Neighbours:
    """Keeps the normalised ID features; the order of the bank does not matter.

    Args:
        k: which neighbour. The paper has 50 for CIFAR-10, 200 for CIFAR-100, 1000 for ImageNet. To
            score the bank's own images take one more: each is its own first neighbour.
    """
    rows = _id_rows(bank)
    _check_k(k, len(rows))
    return Neighbours(jnp.asarray(_unit_rows(bank['features'], rows)), len(rows), k)


def knn(params: Neighbours, outputs, head):
    """‖ĥ - ĥ_(k)‖₂, the distance to the k-th nearest training feature, in [0, 2].

    Sun et al. 2022 (arXiv:2204.06507), Sec. 3; ĥ = h / max(‖h‖, 1e-12). Exact. The distance is
    taken from the neighbour itself, not as √(2 - 2 cos), which is off by up to 5e-4 near 0.
    """

    def distance(h):
        best, places = largest(products(params.bank, h), params.k, params.count)
        kth = places[jnp.argmin(best)]  # places[-1], for which XLA would sort the whole row
        return jnp.linalg.norm(h - params.bank[kth])

    return jax.lax.map(distance, _unit(outputs), batch_size=QUERIES)


def fit_nnguide(bank, head, *, k: int = 100, fraction: float = 1.0) -> Neighbours:
    """Keeps b_i = ĥ_i LSE(z_i) of the ID training images.

    Args:
        k: how many neighbours. OpenOOD has 100 with 1 % of the bank, the authors 10 with 1 % or
            all of it.
        fraction: of the training images, drawn by image number, so always the same ones.
    """
    if not 0 < fraction <= 1:
        raise UserError(f'fraction={fraction} must be above 0 and at most 1.')
    rows = _id_rows(bank)
    if fraction < 1:
        draw = jax.vmap(jax.random.uniform)(
            key_each(key_for(0, 'nnguide'), np.asarray(bank['index'])[rows])
        )
        rows = rows[np.argsort(np.asarray(draw))[: max(round(fraction * len(rows)), 1)]]
    _check_k(k, len(rows))
    guides = _unit_rows(bank['features'], rows)
    confidence = np.logaddexp.reduce(np.asarray(bank['logits'])[rows], axis=1)
    guides[: len(rows)] *= confidence[:, None]
    if (confidence < 0).any():
        console.say(
            f'NNGuide: LSE(z) is negative for {np.mean(confidence < 0):.1%} of the bank, which '
            'turns the sign of their similarity.'
        )
    return Neighbours(jnp.asarray(guides), len(rows), k)


def nnguide(params: Neighbours, outputs, head):
    """-LSE(z) · mean of the k largest ⟨ĥ, b_i⟩. Park, Jung & Teoh 2023 (arXiv:2309.14888), Eq. 4-6.

    Where LSE(z) < 0 the product changes its sign, as in the paper.
    """

    def guide(h):
        return jnp.mean(largest(products(params.bank, h), params.k, params.count)[0])

    guidance = jax.lax.map(guide, _unit(outputs), batch_size=QUERIES)
    return logit.energy(outputs['logits']) * guidance


@struct.dataclass
class Relations:
    """The whole bank: normalised features and probabilities."""

    bank: jax.Array  # float32[N', D]
    p: jax.Array  # float32[N', K]
    cut: float
    power: int = struct.field(pytree_node=False)


def fit_relation(bank, head, *, cut: float = 0.03, power: int = 1) -> Relations:
    """Keeps the ID training images' normalised features and probabilities.

    Args:
        cut: relations up to this are dropped (0.03 in OpenOOD's code).
        power: of a relation, 1 to 8 in OpenOOD's search.
    """
    if not cut >= 0 or power < 1:
        raise UserError(f'cut={cut} must not be negative, and power={power} not below 1.')
    rows = _id_rows(bank)
    units = _unit_rows(bank['features'], rows)
    p = np.zeros((len(units), bank['logits'].shape[1]), np.float32)
    p[: len(rows)] = jax.nn.softmax(np.asarray(bank['logits'])[rows])
    return Relations(jnp.asarray(units), jnp.asarray(p), cut, power)


def relation(params: Relations, outputs, head):
    """-Σ_i e_i^power over the e_i above the cut, e_i = relu(ĥ·ĥ_i) (p·p_i), over the whole bank.

    Kim et al. 2023 (arXiv:2301.12321) in OpenOOD's form. In [-N, 0].
    """

    def kernel(query):
        h, p = query
        e = jax.nn.relu(products(params.bank, h)) * products(params.p, p)
        return -jnp.sum(jnp.where(e > params.cut, e**params.power, 0.0))

    p = jax.nn.softmax(outputs['logits'].astype(jnp.float32))
    return jax.lax.map(kernel, (_unit(outputs), p), batch_size=QUERIES)


def _unit(outputs):
    h = outputs['features'].astype(jnp.float32)
    return h / jnp.maximum(jnp.linalg.norm(h, axis=-1, keepdims=True), 1e-12)


def _id_rows(bank):
    if 'is_outlier' in bank:
        return np.flatnonzero(~np.asarray(bank['is_outlier'], bool))
    return np.arange(len(bank['features']))


def _unit_rows(features, rows):
    """Those rows over their lengths, then zeros up to full blocks: float32[N', D]."""
    unit = np.zeros((len(rows) + -len(rows) % BLOCK, features.shape[1]), np.float32)
    for at in range(0, len(rows), streaming.ROWS):
        h = features[rows[at : at + streaming.ROWS]]
        lengths = np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-12)
        unit[at : at + len(h)] = h / lengths
    return unit


def _check_k(k, count):
    if not 1 <= k <= count:
        raise UserError(
            f'k={k} asks for neighbour number {k} of a bank of {count} training images. '
            f'Set k from 1 to {count}.'
        )


# ---- means and weights ------------------------------------------------------------------------


def fit_fdbd(bank, head):
    """The mean feature, and ‖w_c - w_c'‖ of each pair of classes, ∞ where there is no boundary."""
    W = np.asarray(head['kernel'], np.float64).T
    squares = np.sum(W**2, axis=1)
    apart = np.stack([np.linalg.norm(w - W, axis=1) for w in W])
    near = apart <= 1e-7 * np.sqrt(squares.max())  # the class itself, or one with the same weights
    return {
        'mean': _mean(bank, head),
        'apart': np.where(near, np.inf, apart).astype(np.float32),
    }


def fdbd(params, outputs, head):
    """-Σ_{c≠ŷ} (z_ŷ - z_c) / ‖w_ŷ - w_c‖ / ‖h - μ‖, μ the mean training feature. In (-∞, 0].

    Liu & Qin 2024 (arXiv:2312.11536), Eq. 5-6, times K - 1 (the paper averages over c): distances
    to the decision boundaries, relative to that from the training mean.
    """
    z = outputs['logits'].astype(jnp.float32)
    predicted = jnp.argmax(z, axis=1)
    margins = jnp.max(z, axis=1, keepdims=True) - z
    boundaries = jnp.sum(margins / params['apart'][predicted], axis=1)
    return -boundaries / _length(outputs['features'] - params['mean'])


def fit_nci(bank, head, *, alpha: float = 1e-4):
    """The mean training feature.

    Args:
        alpha: weight of ‖h‖₁: 1e-4 in OpenOOD, which tries up to 0.1 on validation data.
    """
    return {'mean': _mean(bank, head), 'alpha': alpha}


def nci(params, outputs, head):
    """-(w_ŷ·(h - μ) / ‖h - μ‖ + α ‖h‖₁). Liu & Qin 2025 (arXiv:2311.01479), Sec. 4."""
    h = outputs['features'].astype(jnp.float32)
    w = head['kernel'].T[jnp.argmax(outputs['logits'], axis=1)]
    off = h - params['mean']
    nearness = jnp.sum(w * off, axis=1) / _length(off)
    return -(nearness + params['alpha'] * jnp.sum(jnp.abs(h), axis=1))


def fit_she(bank, head):
    """S_c, the mean feature of the correctly classified training images of each class.

    A class that is never right gets the mean of all its images.
    """
    gaussian.check_labels(bank)
    gaussian.check_head(bank, head)
    D, K = head['kernel'].shape
    counts, sums = (
        np.zeros((2, K), np.int64),
        np.zeros((2, K, D)),
    )  # of all, of those that are right
    for h, z, labels in streaming.chunks(bank['features'], bank['logits'], bank['labels']):
        h, right = np.asarray(h, np.float64), z.argmax(axis=1) == labels
        gaussian.add_by_class(counts[0], sums[0], h, labels)
        gaussian.add_by_class(counts[1], sums[1], h[right], labels[right])
    gaussian.check_classes(counts[0], 'SHE has 0 for their mean')
    stored = np.where(counts[1] > 0, 1, 0), np.arange(K)
    return {'means': np.float32(sums[stored] / np.maximum(counts[stored], 1)[:, None])}


def she(params, outputs, head):
    """-⟨h, S_ŷ⟩. Zhang et al. 2023 (Simplified Hopfield Energy, ICLR), Eq. 7. Not normalised."""
    h = outputs['features'].astype(jnp.float32)
    return -jnp.sum(h * params['means'][jnp.argmax(outputs['logits'], axis=1)], axis=1)


def _mean(bank, head):
    gaussian.check_head(bank, head)
    total = sum(np.sum(h, axis=0, dtype=np.float64) for (h,) in streaming.chunks(bank['features']))
    return np.float32(total / len(bank['features']))


def _length(h):
    return jnp.maximum(jnp.linalg.norm(h, axis=1), 1e-12)
