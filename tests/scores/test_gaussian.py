"""Mahalanobis, ViM and their kin against plain float64 NumPy, and what they refuse."""

import numpy as np
import pytest
from sklearn.covariance import EmpiricalCovariance
from toy import K, outputs_of, run

from jaxood.errors import UserError
from jaxood.metrics import auroc
from jaxood.scores import SCORES, gaussian

NAMES = ['mds', 'rmds', 'vim', 'residual']
FOUR = np.array(
    [[0, 1], [2, -1], [1, 1], [1, -1]], np.float32
)  # μ = (1, 0), Σ = [[.5, -.5], [-.5, 1]]


def head_of(W, b):
    return {'kernel': np.float32(W).T, 'bias': np.float32(b)}


def with_labels(features, labels, classes=2):
    head = head_of(np.zeros((classes, features.shape[1])), np.zeros(classes))
    return outputs_of(features, head, labels), head


def collapsed(n=600, dim=24):
    """Features whose variances span eight decades, as a well-trained network's do."""
    rng = np.random.default_rng(3)
    labels = rng.integers(4, size=n)
    turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    noise = rng.normal(size=(n, dim)) * np.logspace(0, -4, dim)
    head = head_of(rng.normal(size=(4, dim)), rng.normal(size=4))
    features = (3.0 * np.eye(4, dim)[labels] + noise) @ turn
    return outputs_of(features[:400], head, labels[:400]), outputs_of(features[400:], head), head


def distances(X, means, covariance):
    """float64[N, C], the formula as it stands."""
    off = X[:, None].astype(np.float64) - means
    return np.einsum('ncd,de,nce->nc', off, np.linalg.inv(covariance), off)


def mahalanobis(bank, outputs, ridge, normalise=False):
    """(min_c M_c, M_0) in float64, one matrix at a time."""
    H, X, y = bank['features'].astype(float), outputs['features'].astype(float), bank['labels']
    if normalise:
        H, X = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (H, X))
    means = np.stack([H[y == c].mean(axis=0) for c in np.unique(y)])
    tied = EmpiricalCovariance(assume_centered=True).fit(H - means[y]).covariance_
    every = np.cov(H, rowvar=False, bias=True)
    ridged = [S + ridge * np.trace(S) / len(S) * np.eye(len(S)) for S in (tied, every)]
    M = distances(X, means, ridged[0]).min(axis=1)
    return M, distances(X, H.mean(axis=0)[None], ridged[1])[:, 0]


# ---- Mahalanobis ------------------------------------------------------------------------------


def test_mds_hand_numbers():
    bank, head = with_labels(np.concatenate([FOUR, FOUR + [0, 6]]), np.repeat([0, 1], 4))
    outputs = {'features': np.float32([[1, 2]])}
    assert run('mds', bank, outputs, head, ridge=0.0) == pytest.approx(8.0, rel=1e-5)
    assert run('rmds', bank, outputs, head, ridge=0.0) == pytest.approx(7.894737, rel=1e-5)
    at_the_second = {'features': np.float32([[1, 6]])}
    assert run('mds', bank, at_the_second, head, ridge=0.0) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize('normalise', [False, True])
@pytest.mark.parametrize('ridge', [0.0, 1e-6, 0.1])
def test_mds_and_rmds_are_their_formulas(ridge, normalise):
    bank, outputs, head = collapsed()
    M, M_0 = mahalanobis(bank, outputs, ridge, normalise)
    keywords = dict(ridge=ridge, normalise=normalise)
    np.testing.assert_allclose(run('mds', bank, outputs, head, **keywords), M, rtol=2e-3)
    np.testing.assert_allclose(
        run('rmds', bank, outputs, head, **keywords), M - M_0, rtol=2e-3, atol=2e-3 * M.max()
    )


def test_the_normalised_forms_do_not_see_the_length_of_features():
    bank, outputs, head = collapsed()
    longer = outputs | {'features': 8.0 * outputs['features']}
    for name in ('mds', 'rmds'):
        got, want = (run(name, bank, x, head, normalise=True) for x in (longer, outputs))
        np.testing.assert_allclose(got, want, rtol=1e-5)
        assert np.abs(run(name, bank, longer, head) - run(name, bank, outputs, head)).mean() > 1


def test_the_mean_distance_of_the_training_set_is_its_dimension():
    bank, _, head = collapsed()  # classes far apart: the nearest mean is the image's own
    assert run('mds', bank, bank, head, ridge=0.0).mean() == pytest.approx(24, rel=1e-3)


def test_mds_is_the_same_in_all_linear_coordinates():
    rng = np.random.default_rng(0)
    bank, head = with_labels(rng.normal(size=(200, 5)), rng.integers(3, size=200), classes=3)
    queries, A = rng.normal(size=(20, 5)), rng.normal(size=(5, 5)) + 2 * np.eye(5)
    there = with_labels(bank['features'] @ A, bank['labels'], classes=3)[0]
    for name in ('mds', 'rmds'):
        got = run(name, there, {'features': np.float32(queries @ A)}, head, ridge=0.0)
        want = run(name, bank, {'features': np.float32(queries)}, head, ridge=0.0)
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_rmds_of_one_class_is_zero():
    rng = np.random.default_rng(0)
    bank, head = with_labels(rng.normal(size=(50, 6)), np.zeros(50, int), classes=1)
    outputs = {'features': 10 * rng.normal(size=(20, 6)).astype(np.float32)}
    np.testing.assert_allclose(run('rmds', bank, outputs, head), 0.0, atol=1e-2)
    assert run('mds', bank, outputs, head).min() > 10


def test_moments_are_float64_and_the_chunks_do_not_show(monkeypatch):
    """A large common offset costs float32 its digits: var 1 beside mean 1000."""
    rng = np.random.default_rng(0)
    bank, head = with_labels(1000 + rng.normal(size=(500, 4)), rng.integers(2, size=500))
    outputs = {'features': np.float32(1000 + rng.normal(size=(9, 4)))}
    whole = run('mds', bank, outputs, head)
    np.testing.assert_allclose(whole, mahalanobis(bank, outputs, 1e-6)[0], rtol=1e-3)
    monkeypatch.setattr(gaussian.streaming.chunks, '__kwdefaults__', {'rows': 7})
    np.testing.assert_allclose(run('mds', bank, outputs, head), whole, rtol=1e-5)


def test_a_singular_covariance_is_mended_and_said_so(capsys):
    bank, outputs, head = collapsed()
    for x in (bank, outputs):
        x['features'][:, -1] = x['features'][:, 0]  # two units that are always the same
    s = run('mds', bank, outputs, head, ridge=0.0)
    said = capsys.readouterr().err
    assert 'singular' in said
    assert '1e-06' in said
    np.testing.assert_allclose(s, run('mds', bank, outputs, head), rtol=1e-5)
    assert not capsys.readouterr().err  # the usual ridge needs no help
    np.testing.assert_allclose(s, mahalanobis(bank, outputs, 1e-6)[0], rtol=2e-3)


def test_features_that_are_all_the_same_are_refused():
    bank, head = with_labels(np.ones((20, 3)), np.zeros(20, int))
    with pytest.raises(UserError, match='is zero'):
        SCORES['mds'].fit(bank, head)


def test_a_class_without_examples_is_named_and_left_out(capsys):
    bank, outputs, head = collapsed()
    more = head_of(np.zeros((6, 24)), np.zeros(6))
    s = run('mds', bank, outputs, more)
    assert '2 classes (4, 5)' in capsys.readouterr().err
    np.testing.assert_array_equal(s, run('mds', bank, outputs, head))
    few = head_of(np.zeros((3, 24)), np.zeros(3))
    with pytest.raises(UserError, match='head has 3 classes'):
        SCORES['mds'].fit(bank, few)


@pytest.mark.parametrize('name', ['mds', 'rmds', 'she'])
def test_labels_are_needed(name):
    bank, _, head = collapsed()
    del bank['labels']
    with pytest.raises(UserError, match='labels'):
        SCORES[name].fit(bank, head)


def test_a_negative_ridge_is_refused():
    bank, _, head = collapsed()
    with pytest.raises(UserError, match='ridge=-1'):
        SCORES['mds'].fit(bank, head, ridge=-1.0)


@pytest.mark.parametrize('name', [*NAMES, 'fdbd', 'nci', 'she', 'weiper'])
def test_features_of_another_network_are_refused(name):
    bank, _, _ = collapsed()
    with pytest.raises(UserError, match=r'24 entries.*takes 7'):
        SCORES[name].fit(bank, head_of(np.zeros((4, 7)), np.zeros(4)))


# ---- ViM --------------------------------------------------------------------------------------


def residuals(bank, X, head, dim):
    """‖P^⊥ (h - u)‖ from an SVD, float64."""
    W, b = head['kernel'].T.astype(np.float64), head['bias'].astype(np.float64)
    u = -np.linalg.lstsq(W, b)[0]
    _, _, V = np.linalg.svd(bank['features'] - u, full_matrices=True)
    return np.linalg.norm((X - u) @ V[dim:].T, axis=1)


@pytest.mark.parametrize('dim', [None, 1, 20, 23])
def test_vim_and_residual_are_their_formulas(dim):
    bank, outputs, head = collapsed()
    keywords = {} if dim is None else {'dim': dim}
    want = residuals(bank, outputs['features'], head, dim or 12)
    got = run('residual', bank, outputs, head, **keywords)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)
    alpha = bank['logits'].max(1).mean() / residuals(bank, bank['features'], head, dim or 12).mean()
    energy = -np.logaddexp.reduce(outputs['logits'].astype(float), axis=1)
    got = run('vim', bank, outputs, head, **keywords)
    np.testing.assert_allclose(
        got, alpha * want + energy, rtol=1e-3, atol=2e-3 * alpha * want.mean()
    )


def test_vim_hand_numbers():
    """W = [I | 0], b = (1, -1): u = (-1, 1, 0). On the training set mean α ‖·‖ = mean max z."""
    head = head_of([[1, 0, 0], [0, 1, 0]], [1, -1])
    rng = np.random.default_rng(0)
    bank = outputs_of(rng.normal(size=(60, 3)) * [3, 2, 0.1] + [-1, 1, 0], head)
    params = SCORES['vim'].fit(bank, head, dim=2)
    np.testing.assert_allclose(params.origin, [-1, 1, 0], atol=1e-6)
    np.testing.assert_allclose(params.origin @ head['kernel'] + head['bias'], 0, atol=1e-6)
    virtual = params.alpha * SCORES['residual'].score(params, bank, head)
    assert virtual.mean() == pytest.approx(bank['logits'].max(axis=1).mean(), rel=1e-5)


def test_vim_in_the_principal_space_is_energy():
    head = head_of([[1, 0, 0], [0, 1, 0]], [1, -1])
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(60, 3)) * [3, 2, 0] + [-1, 1, 0]
    wide = np.concatenate([flat, [[-1, 1, 0.5], [-1, 1, -0.5]]])  # the third direction is e_3
    outputs = outputs_of(flat, head)
    got = run('vim', outputs_of(wide, head), outputs, head, dim=2)
    np.testing.assert_allclose(got, run('energy', {}, outputs, head), atol=1e-5)


def test_residual_is_not_centred_on_the_mean():
    """All features the same, off the origin: their direction is the principal one."""
    head = head_of(np.eye(3)[:2], [0, 0])
    bank = outputs_of(np.float32([[0, 0, 4]]).repeat(9, axis=0), head)
    outputs = outputs_of([[0, 0, 2], [3, 4, 9]], head)
    np.testing.assert_allclose(run('residual', bank, outputs, head, dim=1), [0, 5], atol=1e-6)


@pytest.mark.parametrize('dim', [0, 24, 99])
@pytest.mark.parametrize('name', ['vim', 'residual'])
def test_a_space_without_residual_is_refused(name, dim):
    bank, _, head = collapsed()
    with pytest.raises(UserError, match='from 1 to 23'):
        SCORES[name].fit(bank, head, dim=dim)


def test_vim_refuses_features_without_residual():
    head = head_of(np.eye(4)[:2], [0, 0])
    with pytest.raises(UserError, match='smaller dim'):
        SCORES['vim'].fit(outputs_of(np.eye(4)[:1].repeat(5, axis=0), head), head, dim=2)


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('residual', {'mid': 0.49, 'orth': 1.00, 'origin': 0.50, 'double': 0.99}),
        ('vim', {'mid': 0.91, 'orth': 0.92, 'origin': 1.00, 'double': 0.16}),
    ],
)
def test_blind_spots_with_as_many_dimensions_as_classes(name, expected, gaussians):
    bank, sets, head = gaussians
    s = {kind: run(name, bank, outputs, head, dim=K) for kind, outputs in sets.items()}
    for kind, value in expected.items():
        assert auroc(s['id'], s[kind]) == pytest.approx(value, abs=0.03), kind


def test_blind_spots_of_the_normalised_forms(gaussians):
    """They lose what is longer, as KNN does."""
    bank, sets, head = gaussians
    s = {kind: run('mds', bank, x, head, normalise=True) for kind, x in sets.items()}
    for kind, value in {'mid': 0.94, 'orth': 0.93, 'origin': 1.00, 'double': 0.50}.items():
        assert auroc(s['id'], s[kind]) == pytest.approx(value, abs=0.03), kind
