import numpy as np
import pytest
from scipy import linalg, stats

from jaxood import frechet
from jaxood.errors import UserError


def between(a, b):
    return frechet.distance(frechet.moments(a), frechet.moments(b))


def rows(n, dim, seed=0):
    """float32[n, dim], correlated, with a mean."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim)
    return x.astype(np.float32)


def exactly(n, mean, covariance):
    """float64[n, D] whose mean and covariance (1/(N - 1)) are these to rounding."""
    x = np.random.default_rng(n).normal(size=(n, len(mean)))
    x -= x.mean(axis=0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return white @ linalg.sqrtm(np.asarray(covariance, float)).real + mean


def test_moments_are_numpys_whatever_the_chunks(tmp_path, monkeypatch):
    """Also of a memory map, of chosen rows, and with a mean that is huge beside the spread."""
    x = rows(101, 5)
    np.save(tmp_path / 'x.npy', x)
    mapped = np.load(tmp_path / 'x.npy', mmap_mode='r')
    chosen = np.array([3, 50, 51, 100])
    for size in (1, 7, 4096):
        monkeypatch.setattr(frechet, 'ROWS', size)
        for rows_ in (None, chosen):
            got = frechet.moments(mapped, rows=rows_)
            want = x.astype(np.float64) if rows_ is None else x[rows_].astype(np.float64)
            np.testing.assert_allclose(got.mean, want.mean(axis=0), rtol=1e-12)
            np.testing.assert_allclose(got.covariance, np.cov(want, rowvar=False), rtol=1e-10)
            assert got.count == len(want)
    far = x.astype(np.float64) + 1e6
    np.testing.assert_allclose(
        frechet.moments(far).covariance, frechet.moments(x).covariance, rtol=1e-7
    )


@pytest.mark.parametrize('n', [2, 5, 20, 200])  # of 20 features: without full rank up to 20
def test_a_set_is_at_no_distance_from_itself(n):
    x = rows(n, 20)
    scale = np.trace(np.cov(x, rowvar=False))
    assert 0.0 <= between(x, x) < 1e-12 * scale
    assert 0.0 <= between(x, x[np.random.default_rng(1).permutation(n)]) < 1e-12 * scale


def test_constant_sets_are_as_far_as_their_means():
    assert between(np.zeros((3, 2)), np.full((4, 2), 3.0)) == 18.0
    a, b = np.zeros((3, 2)), exactly(50, [1.0, 0.0], [[2.0, 0.5], [0.5, 1.0]])
    assert between(a, b) == pytest.approx(1.0 + 3.0)  # all of the spread


def test_one_dimension():
    """(μ_a - μ_b)² + (σ_a - σ_b)²."""
    a, b = rows(30, 1), 3.0 * rows(40, 1, seed=1) + 2.0
    means, spreads = ([f(x) for x in (a, b)] for f in (np.mean, lambda x: np.std(x, ddof=1)))
    want = np.diff(means)[0] ** 2 + np.diff(spreads)[0] ** 2
    assert between(a, b) == pytest.approx(want, rel=1e-6)


def test_covariances_that_commute():
    """|Δμ|² + Σ_i (√λ_i - √κ_i)² for eigenvalues λ, κ along the same axes, some of them zero."""
    axes = stats.ortho_group.rvs(4, random_state=0)
    first, second = np.array([4.0, 1.0, 0.25, 0.0]), np.array([1.0, 9.0, 0.0, 0.0])
    mean = np.array([1.0, -2.0, 0.0, 2.0])
    a = exactly(60, np.zeros(4), axes * first @ axes.T)
    b = exactly(80, mean, axes * second @ axes.T)
    want = 9.0 + 1.0 + 4.0 + 0.25
    assert between(a, b) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize('seed', range(3))
def test_it_is_the_form_with_a_matrix_root(seed):
    """Eq. 6 as it stands, S_a S_b not symmetric, on covariances of full rank."""
    a, b = rows(50, 6, seed), rows(70, 6, seed + 10)
    S_a, S_b = (np.cov(x.astype(np.float64), rowvar=False) for x in (a, b))
    apart = a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)
    want = apart @ apart + np.trace(S_a + S_b - 2 * linalg.sqrtm(S_a @ S_b).real)
    assert between(a, b) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize('n', [5, 50])
def test_symmetry_rotation_shift_scale_and_order(n):
    a, b = (rows(n, 8, seed).astype(np.float64) for seed in (0, 1))
    want = between(a, b)
    assert want > 1.0
    turn = stats.ortho_group.rvs(8, random_state=2)
    shift = np.random.default_rng(3).normal(size=8)
    for got in (
        between(b, a),
        between(a @ turn + shift, b @ turn + shift),
        between(-3.0 * a, -3.0 * b) / 9.0,
        between(a[::-1], b[np.random.default_rng(4).permutation(n)]),
    ):
        assert got == pytest.approx(want, rel=1e-9)


def test_without_full_rank_it_is_the_limit_of_full_rank():
    """Seven and nine rows of twelve features, beside a little of everything added."""
    a, b = (frechet.moments(rows(n, 12, n)) for n in (7, 9))
    want = frechet.distance(a, b)
    assert np.isfinite(want)
    for ridge in (1e-6, 1e-10):
        more = (m._replace(covariance=m.covariance + ridge * np.eye(12)) for m in (a, b))
        assert abs(frechet.distance(*more) - want) < 200 * np.sqrt(ridge)


def test_the_floor_is_the_bias_that_its_docstring_says():
    """D = 4, σ = 3, halves of 250: σ² (D + D(D + 1)/4) · 2/n, here 9 · 9 · 2/250."""
    rng = np.random.default_rng(0)
    floors = [frechet.floor(3.0 * rng.normal(size=(500, 4)), seed) for seed in range(100)]
    assert np.mean(floors) == pytest.approx(9 * 9 * 2 / 250, rel=0.1)


def test_the_floor_is_of_disjoint_rows_and_falls_with_their_number():
    x = rows(400, 3)
    assert frechet.floor(x, 1) == frechet.floor(x, 1)
    assert frechet.floor(x, 1) != frechet.floor(x, 2)
    few, many = (np.mean([frechet.floor(x, s, count=n) for s in range(20)]) for n in (20, 200))
    assert few > 3 * many
    pair = np.array([[0.0], [1.0], [10.0], [11.0]])
    # {0, 1} | {10, 11}: 100; {0, 10} | {1, 11}: 1; {0, 11} | {1, 10}: (11 - 9)² / 2 = 2
    assert {round(frechet.floor(pair, seed), 6) for seed in range(30)} == {100.0, 1.0, 2.0}
    with pytest.raises(UserError, match='Set count to 200 at most'):
        frechet.floor(x, count=201)


def test_few_rows_are_said_to_be_few():
    few, enough = frechet.moments(rows(20, 20)), frechet.moments(rows(21, 20))
    assert not frechet.caution(enough, enough)
    for pair in ((few, enough), (enough, few)):
        assert '20 rows of 20 features' in frechet.caution(*pair)
        assert 'rank 19 at most' in frechet.caution(*pair)


def test_what_has_no_distance():
    x = rows(10, 3)
    with pytest.raises(UserError, match='the outliers: a covariance needs at least 2 rows, got 1'):
        frechet.moments(x[:1], 'the outliers')
    with pytest.raises(UserError, match=r'got shape \(10,\)'):
        frechet.moments(x[:, 0])
    with pytest.raises(UserError, match='3 features an image, the other 2.*same extractor'):
        between(x, x[:, :2])
    for bad in (np.nan, np.inf):
        spoilt = x.copy()
        spoilt[[2, 7], 1] = bad
        with pytest.raises(UserError, match='ID: 2 of 10 rows have features that are NaN'):
            frechet.moments(spoilt, 'ID')
