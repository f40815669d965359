"""Clusters against classes: what a matching and the two indices must say."""

import itertools

import numpy as np
import pytest

from jaxood import clustering
from jaxood.errors import UserError

LABELS = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])


def agreement(clusters, count=3):
    table = clustering.confusion(clusters, LABELS, (count, 3))
    return clustering.agreement(clusters, LABELS, clustering.matching(table))


def test_renamed_classes_agree_in_full():
    for order in itertools.permutations(range(3)):
        assert agreement(np.array(order)[LABELS]) == {'accuracy': 1.0, 'nmi': 1.0, 'ari': 1.0}


def test_the_matching_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(5):
        clusters = rng.integers(3, size=10)
        best = max(
            np.mean(np.array(order)[clusters] == LABELS)
            for order in itertools.permutations(range(3))
        )
        assert agreement(clusters)['accuracy'] == pytest.approx(best)


def test_more_clusters_than_classes_leave_some_without():
    clusters = np.array([0, 0, 3, 1, 1, 1, 2, 2, 2, 2])
    match = clustering.matching(clustering.confusion(clusters, LABELS, (4, 3)))
    assert match.tolist() == [0, 1, 2, -1]
    assert agreement(clusters, 4)['accuracy'] == 0.9


def test_one_cluster_for_all_tells_nothing():
    found = agreement(np.zeros(10, int))
    assert found == {'accuracy': 0.4, 'nmi': 0.0, 'ari': 0.0}


def test_a_collapse_is_refused_with_advice():
    assert clustering.check(LABELS, 3, smallest=0.5).tolist() == [3, 3, 4]
    with pytest.raises(UserError, match=r'1 of 4 clusters .*sizes: 4, 3, 3, 0.*entropy_weight'):
        clustering.check(LABELS, 4, smallest=0.1)
    assert clustering.check(LABELS, 4, smallest=0.0).tolist() == [3, 3, 4, 0]
