"""The Mahalanobis ensemble and CombOOD, on a network of two stages, against NumPy and sklearn."""

import jax
import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis
from scipy.stats import yeojohnson
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import PowerTransformer, StandardScaler
from toy import bank_of, outputs_through, rows_of, run

from jaxood.errors import UserError
from jaxood.scores import SCORES, multilayer


@pytest.fixture(scope='module')
def held_out(network):
    """Validation images, and a validation OOD set: brighter ones."""
    rng = np.random.default_rng(7)
    sets = (rng.normal(size=(60, 4, 6, 3)), 1.5 * rng.normal(size=(50, 4, 6, 3)) + 0.5)
    return [bank_of(outputs_through(x, network), network) for x in sets]


def everything(bank, f):
    """f(outputs, head) over the bank's images, in one piece."""
    return jax.tree.map(lambda *x: np.concatenate(x), *bank['map'](f))


def stage_distances(bank, maps, ridge=1e-6):
    """min_c M_c^l of every stage from float64 inverses: [B, L]."""
    found = []
    y = bank['labels']
    for train, test in zip(everything(bank, lambda outputs, head: outputs['maps']), maps):
        H, X = (np.asarray(m, np.float64).mean(axis=(1, 2)) for m in (train, test))
        means = np.stack([H[y == c].mean(axis=0) for c in np.unique(y)])
        S = np.cov(H - means[np.searchsorted(np.unique(y), y)], rowvar=False, bias=True)
        P = np.linalg.inv(S + ridge * np.trace(S) / len(S) * np.eye(len(S)))
        found.append([min(mahalanobis(x, mu, P) ** 2 for mu in means) for x in X])
    return np.stack(found, axis=1)


# ---- ensemble -----------------------------------------------------------------------------------


def test_layers_weigh_the_same_without_validation_outliers(small):
    bank, outputs, head = small
    train = everything(bank, lambda outputs, head: outputs['maps'])
    z = StandardScaler().fit(stage_distances(bank, train))
    want = z.transform(stage_distances(bank, outputs['maps'])).sum(axis=1)
    got = run('mds_ensemble', bank, outputs, head)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_layers_are_weighed_by_a_logistic_regression_on_validation_sets(small, held_out):
    bank, outputs, head = small
    validation, ood = held_out
    M_id, M_ood = (
        stage_distances(bank, everything(x, lambda outputs, head: outputs['maps']))
        for x in held_out
    )
    z = StandardScaler().fit(M_id)
    line = LogisticRegression(class_weight='balanced', tol=1e-8)
    line.fit(z.transform(np.concatenate([M_id, M_ood])), np.repeat([0, 1], [60, 50]))
    want = z.transform(stage_distances(bank, outputs['maps'])) @ line.coef_[0]
    both = bank | {'validation': validation, 'validation_ood': ood}
    got = run('mds_ensemble', both, outputs, head)
    np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-2)
    alone = run('mds_ensemble', bank | {'validation': validation}, outputs, head)
    equal = z.transform(stage_distances(bank, outputs['maps'])).sum(axis=1)
    np.testing.assert_allclose(alone, equal, rtol=1e-3, atol=1e-3)


def test_the_step_is_towards_each_layers_own_confidence(small):
    """Against finite differences of the float64 distance, at the pixels where they are sure."""
    bank, outputs, head = small
    epsilon = 1e-2
    params = SCORES['mds_ensemble'].fit(bank, head, epsilon=epsilon)
    still = SCORES['mds_ensemble'].fit(bank, head)
    image = rows_of(outputs, slice(0, 1))
    forward = jax.jit(head['network'].forward)

    def distances(images):
        return stage_distances(bank, forward(np.float32(images))['maps'])

    pixels = np.eye(72).reshape(72, 4, 6, 3)
    slope = distances(image['images'] + 1e-2 * pixels) - distances(image['images'] - 1e-2 * pixels)
    for l in range(2):
        signs = np.sign(slope[:, l]).reshape(4, 6, 3)
        moved = image['images'] - epsilon * signs / head['network'].std
        want = distances(moved)[:, l]
        got = multilayer._distances(params, image, head)[:, l]
        before = multilayer._distances(still, image, head)[:, l]
        assert got < before
        np.testing.assert_allclose(got - before, want - before, rtol=0.1)


def test_without_a_step_no_network_is_run(small):
    bank, outputs, head = small
    params = SCORES['mds_ensemble'].fit(bank, head)
    assert np.isfinite(SCORES['mds_ensemble'].score(params, outputs, {})).all()


# ---- CombOOD ------------------------------------------------------------------------------------


def extremes(outputs, head):
    entering = head['network'].forward(outputs['images'])['relus']
    columns = []
    for x in (*entering, outputs['logits']):
        x = np.asarray(x, np.float64).reshape(len(x), -1)
        columns += [-x.min(axis=1), x.max(axis=1)]  # the official code's sign of minima
    return np.stack(columns, axis=1)


@pytest.mark.parametrize(('k', 'ridge'), [(50, 1.0), (3, 0.1)])
def test_combood_is_its_formula(small, k, ridge):
    bank, outputs, head = small
    images = everything(bank, lambda outputs, head: outputs['images'])
    scaler, power = StandardScaler(), PowerTransformer()
    train = extremes(bank | {'images': images}, head)
    x = power.fit_transform(scaler.fit_transform(train))
    P = np.linalg.inv(np.cov(x, rowvar=False) + ridge * np.eye(6))
    tested = power.transform(scaler.transform(extremes(outputs, head)))
    M = [mahalanobis(row, np.zeros(6), P) ** 2 for row in tested]
    unit = [
        x / np.linalg.norm(x, axis=1, keepdims=True)
        for x in (bank['features'], outputs['features'])
    ]
    r = np.sort(np.linalg.norm(unit[1][:, None] - unit[0], axis=-1), axis=1)[:, k - 1]
    got = run('combood', bank, outputs, head, k=k, ridge=ridge)
    np.testing.assert_allclose(got, 6 * np.log(r) + M, rtol=1e-3, atol=1e-2)


def test_yeo_johnson_is_scipys():
    x = np.linspace(-4, 4, 33)
    for power in (-2.0, 0.0, 1e-8, 0.7, 1.0, 2.0, 3.5):
        got = multilayer._yeo_johnson(np.float32(x), np.float32(power))
        np.testing.assert_allclose(got, yeojohnson(x, power), rtol=1e-4, atol=1e-5)


def test_a_training_image_itself_is_finite(small):
    bank, _, head = small
    images = everything(bank, lambda outputs, head: outputs['images'])
    s = run('combood', bank, outputs_through(images, head), head, k=1)
    assert np.isfinite(s).all()
    assert (s < run('combood', bank, outputs_through(images, head), head, k=2)).all()


def test_combood_refuses(small):
    bank, _, head = small
    with pytest.raises(UserError, match='1 to 120'):
        SCORES['combood'].fit(bank, head, k=121)
    with pytest.raises(UserError, match='ridge=-1'):
        SCORES['combood'].fit(bank, head, ridge=-1.0)
