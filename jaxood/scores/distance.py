"""Scores that measure a distance in feature space: larger = more outlying."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxood.errors import UserError

_QUERIES = 64  # rows scored at a time: the table of similarities is never more than 64 x N
_BLOCK = 32  # columns; `lax.top_k` over a whole row of 50,000 is 20 times slower on a CPU


@struct.dataclass
class Neighbours:
    """The normalised bank, and which neighbour counts."""

    bank: jax.Array  # float32[N, D]
    k: int = struct.field(pytree_node=False)


def fit_knn(bank, head, *, k: int = 50) -> Neighbours:
    """Keeps the normalised ID features; the order of the bank does not matter.

    Args:
        k: which neighbour. The paper has 50 for CIFAR-10, 200 for CIFAR-100, 1000 for ImageNet. To
            score the bank's own images take one more: each is its own first neighbour.
    """
    features = np.asarray(bank['features'], np.float32)
    if 'is_outlier' in bank:
        features = features[~np.asarray(bank['is_outlier'], bool)]
    if not 1 <= k <= len(features):
        raise UserError(
            f'k={k} asks for neighbour number {k} of a bank of {len(features)} training images. '
            f'Set k from 1 to {len(features)}.'
        )
    return Neighbours(_normalised(jnp.asarray(features)), k)


def knn(params: Neighbours, outputs, head):
    """‖ĥ - ĥ_(k)‖₂, the distance to the k-th nearest training feature, in [0, 2].

    Sun et al. 2022 (arXiv:2204.06507), Sec. 3; ĥ = h / max(‖h‖, 1e-12). Exact: the k nearest lie in
    the k blocks of columns with the nearest bests, so two short selections replace a long one. The
    distance is taken from the neighbour itself, not as √(2 - 2 cos), which is off by up to 5e-4
    near 0.
    """
    bank, k = params.bank, params.k
    blocks = -(-len(bank) // _BLOCK)
    padding = (0, blocks * _BLOCK - len(bank))

    def distance(h):
        cosine = jnp.dot(bank, h, precision=jax.lax.Precision.HIGHEST)
        table = jnp.pad(cosine, padding, constant_values=-jnp.inf).reshape(blocks, _BLOCK)
        _, near = jax.lax.top_k(jnp.max(table, axis=1), min(k, blocks))
        best, places = jax.lax.top_k(table[near].ravel(), k)
        place = places[jnp.argmin(best)]  # places[-1], for which XLA would sort the whole row
        kth = near[place // _BLOCK] * _BLOCK + place % _BLOCK
        return jnp.linalg.norm(h - bank[kth])

    h = _normalised(outputs['features'].astype(jnp.float32))
    return jax.lax.map(distance, h, batch_size=_QUERIES)


def _normalised(h):
    return h / jnp.maximum(jnp.linalg.norm(h, axis=-1, keepdims=True), 1e-12)
