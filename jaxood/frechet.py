"""Fréchet distance between two sets of features: how far outliers lie from a reference set.

    d² = |μ_a - μ_b|² + tr(S_a + S_b - 2 (S_a S_b)^½)

Heusel et al. 2017 (arXiv:1706.08500), Eq. 6: the squared 2-Wasserstein distance between the
Gaussians with the sets' means and covariances, in squared units of the features. FID is d² over the
2048 features of the Inception of `backbones.inception`, variant 'fid'; over another extractor the
numbers are others. It is estimated from above, the more so the fewer the rows: compare numbers of
one extractor, one resize and one N alone, and each with its `floor`.

Everything is float64 on the host; features may be memory maps of any length.
"""

from typing import NamedTuple

import numpy as np

from jaxood.errors import UserError

ROWS = 4096  # in memory at a time


class Moments(NamedTuple):
    """What the distance sees of a set of features.

    Attributes:
        mean: μ, float64[D].
        covariance: S with 1/(N - 1), float64[D, D].
        count: N.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int


def moments(features, name: str = 'features', *, rows: np.ndarray | None = None) -> Moments:
    """Mean and covariance in two passes, the second one centred: large means cost no digits.

    Args:
        features: float[N, D].
        name: the set's, for messages.
        rows: int[n], which ones; None for all.

    Raises:
        UserError: fewer than 2 rows, or features that are NaN or infinite.
    """
    if features.ndim != 2 or not features.shape[1]:
        raise UserError(f'{name}: expected features [N, D], got shape {features.shape}.')
    rows = np.arange(len(features)) if rows is None else rows
    if len(rows) < 2:
        raise UserError(f'{name}: a covariance needs at least 2 rows, got {len(rows)}.')
    mean = sum(h.sum(axis=0) for h in _chunks(features, rows)) / len(rows)
    if not np.isfinite(mean).all():
        bad = sum(np.count_nonzero(~np.isfinite(h).all(axis=1)) for h in _chunks(features, rows))
        raise UserError(
            f'{name}: {bad} of {len(rows)} rows have features that are NaN or infinite. Look at '
            'the extractor (a diverged network) and at the images.'
        )
    second = np.zeros((len(mean), len(mean)))
    for h in _chunks(features, rows):
        h -= mean
        second += h.T @ h
    return Moments(mean, second / (len(rows) - 1), len(rows))


def distance(a: Moments, b: Moments) -> float:
    """d², in [0, ∞); symmetric, 0 for sets with the same moments. See the head of this file.

    tr (S_a S_b)^½ is the sum of the square roots of the eigenvalues of S_a^½ S_b S_a^½, i.e. of the
    singular values of S_b^½ S_a^½. We take the latter: there is no root of a rounding error, so
    that covariances without full rank (N <= D) lose no digits either. (The official code adds 1e-6
    to the diagonals where its root of S_a S_b fails.)

    Raises:
        UserError: the sets' features have different D.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f'One set has {len(a.mean)} features an image, the other {len(b.mean)}: take both from '
            'the same extractor.'
        )
    common = np.linalg.svd(_root(b.covariance).T @ _root(a.covariance), compute_uv=False).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * common
    return float(np.sum((a.mean - b.mean) ** 2) + max(spread, 0.0))  # below 0 only by rounding


def floor(features, seed: int = 0, *, count: int | None = None, name: str = 'features') -> float:
    """d² between two random halves of one set: what a distance of 0 looks like at this size.

    To first order in 1/N the bias of d² between n and N rows is c (1/n + 1/N); for Gaussians with
    covariance σ² I, c = σ² (D + D(D + 1)/4). The halves' is c · 4/N, hence at least that of any n
    outliers against all N rows while n >= N/3. For fewer outliers set `count` to their number:
    c · 2/n. (The comparison is our choice; the bias: Chong & Forsyth 2020, arXiv:1911.07023.)

    Args:
        features: float[N, D], the reference set's.
        seed: of the halves. Several show the spread.
        count: rows of each half; None for N/2.
        name: the set's, for messages.
    """
    half = len(features) // 2
    count = half if count is None else count
    if count > half:
        raise UserError(
            f'{name}: no two disjoint halves of {count} rows in {len(features)}. Set count to '
            f'{half} at most.'
        )
    order = np.random.default_rng(seed).permutation(len(features))
    halves = (order[:count], order[count : 2 * count])
    return distance(*(moments(features, name, rows=np.sort(rows)) for rows in halves))


def caution(a: Moments, b: Moments) -> str:
    """One sentence for whoever reads the number where N <= D, else ''."""
    count, dim = min(a.count, b.count), len(a.mean)
    if count > dim:
        return ''
    return (
        f'{count:,} rows of {dim:,} features give a covariance of rank {count - 1:,} at most: the '
        'Fréchet distance is far above that of the distributions, and says something only beside '
        'its floor and distances at the same N.'
    )


def _chunks(features, rows):
    """float64[<= ROWS, D] at a time."""
    for at in range(0, len(rows), ROWS):
        yield np.array(features[rows[at : at + ROWS]], np.float64)


def _root(covariance):
    """A with A Aᵀ = S, float64[D, rank]."""
    values, vectors = np.linalg.eigh(covariance)
    there = values > len(values) * np.finfo(values.dtype).eps * values[-1]  # the rest is rounding
    return vectors[:, there] * np.sqrt(values[there])
