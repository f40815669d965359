"""Scores of what a restorer makes of an image's features. DLSR (Yang et al., arXiv:2411.10701).

z_0 are the features, z̃_0 their restoration from depth t, both of M blocks f̄^m. A pass over a set
keeps two numbers a block, for each depth and for each of the restorer's two snapshots (after the
first epoch and after the last), and that is all these scores read:

    outputs['restored'][t]['errors']    float32[B, 2, M], ‖f̄^m - f̃^m‖² / c
    outputs['restored'][t]['cosines']   float32[B, 2, M], cos(f̄^m, f̃^m)
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from jaxood.errors import UserError

SNAPSHOTS = ('initial', 'final')


@struct.dataclass
class Restored:
    """Which of the numbers are read; those of both snapshots, where `snapshot` is None."""

    depth: int = struct.field(pytree_node=False)
    snapshot: int | None = struct.field(pytree_node=False, default=1)
    first: int = struct.field(pytree_node=False, default=0)


def compare(z_0: jax.Array, z_tilde: jax.Array, edges: Sequence[int]) -> dict[str, jax.Array]:
    """What the scores read, of one snapshot: `errors` and `cosines`, float32[B, M].

    Args:
        z_0, z_tilde: float32[B, c].
        edges: where blocks begin and end, 0, c_1, c_1 + c_2, ..., c.
    """
    blocks = [slice(a, b) for a, b in zip(edges[:-1], edges[1:])]
    error = jnp.square(z_0 - z_tilde) / edges[-1]
    return {
        'errors': jnp.stack([jnp.sum(error[:, m], axis=-1) for m in blocks], axis=-1),
        'cosines': jnp.stack([_cosine(z_0[:, m], z_tilde[:, m]) for m in blocks], axis=-1),
    }


def _cosine(a, b):
    """0 where either is 0, as an untrained restorer's output is."""
    product = jnp.sum(a * b, axis=-1)
    length = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    cosine = jnp.where(length > 0, product / jnp.where(length > 0, length, 1.0), 0.0)
    return jnp.clip(cosine, -1.0, 1.0)


def fit_mse(bank, head, *, depth: int = 3, snapshot: str = 'final') -> Restored:
    """Nothing to fit.

    Args:
        depth: t, from which the features are restored (official code: 3; paper: 3 to 10 are good).
        snapshot: 'final', or 'initial' for the restorer after its first epoch (figure 3).
    """
    if snapshot not in SNAPSHOTS:
        raise UserError(f'snapshot={snapshot!r} must be one of {SNAPSHOTS}.')
    return Restored(depth, SNAPSHOTS.index(snapshot))


def mse(params: Restored, outputs, head):
    """1/c ‖z_0 - z̃_0‖², in [0, ∞): by how much the restoration misses."""
    errors = outputs['restored'][params.depth]['errors']
    return jnp.sum(errors[:, params.snapshot], axis=-1)


def fit_lr(bank, head, *, depth: int = 3) -> Restored:
    """Nothing to fit; depth as for `mse`."""
    return Restored(depth, snapshot=None)


def lr(params: Restored, outputs, head):
    """-(MSE_init - MSE_final): likelihood regret, by how much training improved the restoration.

    Only ID images gain from it. The paper prints the difference, which is larger for ID, and the
    official code hands it to the AUROC as it is; the sign here is that of a score.
    """
    errors = jnp.sum(outputs['restored'][params.depth]['errors'], axis=-1)
    return errors[:, 1] - errors[:, 0]


def fit_mfsim(bank, head, *, depth: int = 3, skip_first: bool = False) -> Restored:
    """Nothing to fit.

    Args:
        depth: as for `mse`.
        skip_first: without the first block, as in the official code; the paper averages all.
    """
    return Restored(depth, first=int(skip_first))


def mfsim(params: Restored, outputs, head):
    """-1/M Σ_m cos(f̄^m, f̃^m), in [-1, 1]: multi-layer feature similarity.

    A block's scale doesn't matter here, as it does to `mse`, and shallow blocks of few channels
    count as much as deep ones.
    """
    cosines = outputs['restored'][params.depth]['cosines'][:, 1, params.first :]
    return -jnp.mean(cosines, axis=-1)
