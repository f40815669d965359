"""How well clusters found without labels agree with classes, where those are known."""

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from jaxood.errors import UserError


def confusion(clusters: np.ndarray, labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """int64[C, K]: how many images of cluster c are of class k."""
    table = np.zeros(shape, np.int64)
    np.add.at(table, (clusters, labels), 1)
    return table


def matching(table: np.ndarray) -> np.ndarray:
    """The class of each cluster, each class once, by which most images are right: int32[C].

    Hungarian method (Kuhn 1955). -1 for clusters without a class, where there are more of them.
    """
    found = np.full(len(table), -1, np.int32)
    rows, columns = linear_sum_assignment(-table)
    found[rows] = columns
    return found


def agreement(clusters: np.ndarray, labels: np.ndarray, match: np.ndarray) -> dict[str, Any]:
    """`accuracy` under a matching, `nmi` and `ari`, which need none.

    Normalised mutual information (arithmetic mean of the entropies) and the adjusted Rand index are
    scikit-learn's; 0 is chance for the latter.
    """
    from sklearn import metrics  # noqa: PLC0415 - takes a second

    return {
        'accuracy': float(np.mean(match[clusters] == labels)),
        'nmi': float(metrics.normalized_mutual_info_score(labels, clusters)),
        'ari': float(metrics.adjusted_rand_score(labels, clusters)),
    }


def check(clusters: np.ndarray, count: int, *, smallest: float) -> np.ndarray:
    """The clusters' sizes, int64[C], unless they have collapsed.

    Args:
        smallest: share of an even share, N / C, that every cluster must have; 0 asks for nothing.

    Raises:
        UserError: some are smaller; with all sizes and what helps.
    """
    sizes = np.bincount(clusters, minlength=count)
    few = sizes < smallest * len(clusters) / count
    if few.any():
        raise UserError(
            f'the clustering has collapsed: {few.sum()} of {count} clusters hold fewer than '
            f'{smallest:g} of an even share (sizes: {", ".join(map(str, np.sort(sizes)[::-1]))}). '
            'What helps: more steps of the pretext, larger batches, a larger entropy_weight, '
            'stronger views, fewer classes, another config.seed. If classes do differ so much in '
            'size, lower config.pseudo_label.smallest.'
        )
    return sizes
