"""How near the ID images are, and who the nearest are: SD-outliers' score and its two parts."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxood.errors import UserError
from jaxood.neighbours import QUERIES, largest, padded, products


@struct.dataclass
class Banks:
    """Features of ID images and of outliers, zeros up to full blocks; and what weighs what."""

    id: jax.Array  # float32[N', D]
    outliers: jax.Array  # float32[M', D]
    distance: jax.Array
    alpha: jax.Array
    counts: tuple[int, int] = struct.field(pytree_node=False)  # N, M
    k: int = struct.field(pytree_node=False)
    normalise: bool = struct.field(pytree_node=False)


def fit_votes(
    bank, head, *, k: int = 2, alpha: float = 0.5, distance: float = 1.0, normalise: bool = True
) -> Banks:
    """Keeps the features of the ID training images, and of the outliers that training saw.

    Args:
        bank: `bank['outliers']` are those, or the rows with `is_outlier`; without any, as after
            training without, nobody votes.
        k: neighbours, 2 in Fake-it's official code (the poster has no number).
        alpha: weight of the votes; .5 is our choice: with normalised features the terms lie in
            [0, 4 k] and [0, k]. 0 leaves the distance alone, which is DN2's score.
        distance: weight of the distance, 1 in the poster; 0 leaves the votes alone.
        normalise: divide features by their lengths (our choice).
    """
    if not alpha >= 0.0 or not distance >= 0.0 or alpha + distance == 0.0:
        raise UserError(
            f'alpha={alpha} and distance={distance} must not be negative, and one above 0.'
        )
    features = np.asarray(bank['features'], np.float32)
    voting = np.asarray(bank.get('is_outlier', np.zeros(len(features))), bool)
    others = [np.asarray(bank['outliers']['features'], np.float32)] if 'outliers' in bank else []
    rows = features[~voting], np.concatenate([features[voting], *others])
    rows = [_unit(x, np) for x in rows] if normalise else rows
    counts = tuple(map(len, rows))
    if not 1 <= k <= counts[0] or 0 < counts[1] < k:
        raise UserError(
            f'k={k} neighbours of a bank of {counts[0]} training images and {counts[1]} outliers. '
            'Set k from 1 to the smaller number.'
        )
    banks = (jnp.asarray(padded(x)) for x in rows)
    return Banks(*banks, jnp.float32(distance), jnp.float32(alpha), counts, k, normalise)


def votes(params: Banks, outputs, head):
    """s(x) = Σ_{i<=k} ‖f(x) - f(x_d^i)‖² + α Σ_{i<=k} [x_v^i is an outlier].

    Yoon et al., SD-outliers (poster): x_d^i is the i-th nearest ID training image, x_v^i the i-th
    nearest of ID images and outliers together. Exact. Squares are taken of the differences
    themselves, not from products, so that a feature of the bank has distance 0; of an ID image and
    an outlier that are as near, the ID image comes first.
    """

    nearest = _search(params.id, params.k, params.counts[0])
    nearest_outliers = _search(params.outliers, params.k, params.counts[1])

    def score(h):
        near = nearest(h)
        distance = params.distance * jnp.sum(near)
        if params.counts[1] == 0:
            return distance
        _, order = jax.lax.top_k(-jnp.concatenate([near, nearest_outliers(h)]), params.k)
        return distance + params.alpha * jnp.sum(order >= params.k)

    h = outputs['features'].astype(jnp.float32)
    return jax.lax.map(score, _unit(h, jnp) if params.normalise else h, batch_size=QUERIES)


def _search(bank, k, count):
    """h -> squared distances to the k nearest rows of bank[:count], in no order: float32[k]."""
    half = 0.5 * jnp.sum(jnp.square(bank), axis=1)  # ⟨h, b⟩ - ‖b‖²/2 falls with the distance

    def nearest(h):
        _, places = largest(products(bank, h) - half, k, count)
        return jnp.sum(jnp.square(h - bank[places]), axis=1)

    return nearest


def _unit(h, np):
    return h / np.maximum(np.linalg.norm(h, axis=-1, keepdims=True), 1e-12)
