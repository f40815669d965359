"""SD-outliers' score: the distance to ID images and the votes of whoever is nearest."""

import jax
import numpy as np
import pytest

from jaxood.errors import UserError
from jaxood.scores import SCORES


def score(query, id_bank, outliers=None, **keywords):
    column = lambda x: np.atleast_2d(np.float32(x)).reshape(len(x), -1)
    bank = {'features': column(id_bank)}
    if outliers is not None:
        bank['outliers'] = {'features': column(outliers)}
    entry = SCORES['votes']
    params = entry.fit(bank, {}, **keywords)
    return np.asarray(jax.jit(entry.score)(params, {'features': column(query)}, {}))


def plain(h, bank, outliers, k, alpha, distance=1.0):
    """The formula, by sorts of all distances."""
    near = ((h[:, None] - bank) ** 2).sum(-1)
    all_ = np.concatenate([near, ((h[:, None] - outliers) ** 2).sum(-1)], axis=1)
    votes = (np.argsort(all_, axis=1, kind='stable')[:, :k] >= len(bank)).sum(1)
    return distance * np.sort(near, axis=1)[:, :k].sum(1) + alpha * votes


@pytest.fixture(scope='module')
def random():
    rng = np.random.default_rng(0)
    return rng.normal(size=(50, 5)), rng.normal(size=(203, 5)), 0.3 + rng.normal(size=(77, 5))


def test_by_hand():
    """ID {0, 1.9}, outliers {1.2, 5}, query 1, k = 2: 0.81 + 1, and the outlier at 1.2 votes."""
    for alpha in (0.0, 0.5, 3.0):
        got = score([1.0], [0.0, 1.9], [1.2, 5.0], k=2, alpha=alpha, normalise=False)
        np.testing.assert_allclose(got, 1.81 + alpha, rtol=1e-6)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize(('k', 'alpha', 'distance'), [(1, 0.5, 1.0), (7, 2.0, 1.0), (40, 1.0, 0.0)])
def test_the_formula(random, k, alpha, distance):
    keywords = dict(k=k, alpha=alpha, distance=distance)
    want = plain(*random, **keywords)
    np.testing.assert_allclose(score(*random, normalise=False, **keywords), want, rtol=1e-4)
    want = plain(*(unit(x) for x in random), **keywords)
    scaled = 3.0 * random[0], 0.5 * random[1], random[2]  # lengths do not matter
    np.testing.assert_allclose(score(*scaled, **keywords), want, rtol=1e-4, atol=1e-5)


def test_without_votes_it_is_knn_and_outliers_never_change_the_distance(random):
    query, bank, outliers = random
    alone = score(query, bank, k=3, alpha=0.0)
    np.testing.assert_array_equal(score(query, bank, outliers, k=3, alpha=0.0), alone)
    np.testing.assert_array_equal(score(query, bank, k=3, alpha=5.0), alone)  # nobody votes
    knn = SCORES['knn']
    h = {'features': np.float32(query)}
    first = knn.score(knn.fit({'features': np.float32(bank)}, {}, k=1), h, {})
    np.testing.assert_allclose(score(query, bank, k=1, alpha=0.0), first**2, rtol=1e-4)


def test_votes_alone_are_counts(random):
    found = score(*random, k=5, alpha=1.0, distance=0.0)
    assert set(found) <= set(range(6))
    assert 0 < found.mean() < 5


def test_an_image_of_the_bank_is_at_distance_zero(random):
    _, bank, outliers = random
    assert score(bank, bank, outliers, k=1, alpha=0.0, normalise=False).max() == 0.0
    # an ID image and an outlier at the same place: the ID image comes first
    both = score(bank[:1], bank, bank[:1], k=1, alpha=1.0, distance=0.0)
    assert both == 0.0


def test_the_order_of_both_banks_does_not_matter(random):
    query, bank, outliers = random
    want = score(query, bank, outliers, k=5)
    np.testing.assert_allclose(score(query, bank[::-1], outliers[::-1], k=5), want, rtol=1e-5)


def test_outliers_may_be_marked_in_one_bank(random):
    query, bank, outliers = random
    rows = np.concatenate([outliers, bank])
    marked = {'features': np.float32(rows), 'is_outlier': np.arange(len(rows)) < len(outliers)}
    entry = SCORES['votes']
    got = entry.score(entry.fit(marked, {}, k=5), {'features': np.float32(query)}, {})
    np.testing.assert_allclose(got, score(query, bank, outliers, k=5), rtol=1e-5)


def test_memory_is_bounded():
    """6,000 queries against 20,000 features: no table of all pairs."""
    rng = np.random.default_rng(0)
    bank = {'features': np.float32(rng.normal(size=(20_000, 8)))}
    query = {'features': np.float32(rng.normal(size=(6_000, 8)))}
    entry = SCORES['votes']
    params = entry.fit(bank, {}, k=2)
    program = jax.jit(entry.score).lower(params, query, {}).compile()
    assert program.memory_analysis().temp_size_in_bytes < 6_000 * 20_000 * 4 / 10


@pytest.mark.parametrize(
    ('keywords', 'message'),
    [
        (dict(k=0), 'k=0 neighbours of a bank of 203 training images and 77 outliers'),
        (dict(k=78), 'k=78 neighbours'),
        (dict(alpha=-1.0), r'alpha=-1\.0 .* must not be negative'),
        (dict(alpha=0.0, distance=0.0), 'one above 0'),
        (dict(alpha=float('nan')), 'alpha=nan'),
    ],
)
def test_what_it_refuses(random, keywords, message):
    with pytest.raises(UserError, match=message):
        score(*random, **keywords)
