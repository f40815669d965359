"""What must hold of every score in the table, and each one's own numbers.

Whoever adds a score adds its row to `BLIND_SPOTS`, and its name to the invariances it has.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood.errors import UserError
from jaxood.metrics import auroc
from jaxood.scores import SCORES, distance

# AUROC on the four toy sets below, one draw: what theory and independent code gave, or was measured
# here (maxlogit).
BLIND_SPOTS = {
    'msp': {'mid': 0.97, 'orth': 0.50, 'origin': 0.99, 'double': 0.07},
    'maxlogit': {'mid': 0.93, 'orth': 0.50, 'origin': 0.99, 'double': 0.01},
    'energy': {'mid': 0.93, 'orth': 0.50, 'origin': 1.00, 'double': 0.01},
    'knn': {'mid': 0.92, 'orth': 0.94, 'origin': 1.00, 'double': 0.50},
}
SHIFT_INVARIANT = {'msp'}  # z -> z + a
SHIFTED = {'maxlogit', 'energy'}  # ... moves these by -a
SCALE_INVARIANT = {'knn'}  # h -> a h, bank included
ROTATION_INVARIANT = {'msp', 'maxlogit', 'energy', 'knn'}  # h -> Q h with W -> W Qᵀ

D, K = 20, 5
MEANS = 5.0 * np.eye(K, D)
HEAD = {
    'kernel': np.float32(MEANS.T),
    'bias': np.float32(-0.5 * np.sum(MEANS**2, axis=1)),  # the Bayes rule
}


def outputs_of(features, head=HEAD, labels=None):
    """What a network with this last layer hands to a score."""
    h = np.asarray(features, np.float32)
    outputs = {
        'logits': h @ head['kernel'] + head['bias'],
        'features': h,
        'maps': (h[:, None, None, :],),
        'index': np.arange(len(h), dtype=np.int32),
    }
    return outputs if labels is None else outputs | {'labels': labels}


def rows(outputs, at):
    return jax.tree.map(lambda x: x[at], outputs)


@pytest.fixture(scope='module')
def toy():
    """Unit Gaussians around 5 e_c, and four kinds of outliers."""
    rng = np.random.default_rng(0)
    n = 4000

    def near_a_class():
        labels = rng.integers(K, size=n)
        return MEANS[labels] + rng.normal(size=(n, D)), labels

    features, labels = near_a_class()
    orth, _ = near_a_class()
    orth[:, 10] += 6.0
    sets = {
        'id': near_a_class()[0],
        'mid': 0.5 * (MEANS[0] + MEANS[1]) + rng.normal(size=(n, D)),
        'orth': orth,
        'origin': rng.normal(size=(n, D)),
        'double': 2.0 * near_a_class()[0],
    }
    bank = outputs_of(features, labels=labels.astype(np.int32))
    return bank, {name: outputs_of(x) for name, x in sets.items()}


@pytest.fixture(scope='module')
def small():
    """(bank, outputs, head) with a few rows and no structure."""
    rng = np.random.default_rng(1)
    head = {
        'kernel': rng.normal(size=(6, 4)).astype(np.float32),
        'bias': rng.normal(size=4).astype(np.float32),
    }
    labels = rng.integers(4, size=70).astype(np.int32)
    bank = outputs_of(rng.normal(size=(70, 6)) ** 2, head, labels)
    return bank, outputs_of(rng.normal(size=(9, 6)) ** 2, head), head


def run(name, bank, outputs, head, **keywords):
    entry = SCORES[name]
    params = entry.fit(bank, head, **keywords)
    return np.asarray(jax.jit(entry.score)(params, outputs, head))


# ---- every score ----------------------------------------------------------------------------


@pytest.mark.parametrize('name', SCORES)
def test_scores_see_what_theory_says_they_see(name, toy):
    bank, sets = toy
    params = SCORES[name].fit(bank, HEAD)
    score = jax.jit(SCORES[name].score)
    s = {kind: score(params, outputs, HEAD) for kind, outputs in sets.items()}
    for kind, expected in BLIND_SPOTS[name].items():
        assert auroc(s['id'], s[kind]) == pytest.approx(expected, abs=0.03), kind


@pytest.mark.parametrize('name', SCORES)
def test_one_float32_a_row_and_inputs_untouched(name, small):
    before = jax.tree.map(np.copy, small)
    bank, outputs, head = small
    s = SCORES[name].score(SCORES[name].fit(bank, head), outputs, head)
    assert s.shape == (9,)
    assert s.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, before, small)


@pytest.mark.parametrize('name', SCORES)
def test_an_image_alone_scores_as_in_a_batch(name, small):
    bank, outputs, head = small
    together = run(name, bank, outputs, head)
    alone = [run(name, bank, rows(outputs, slice(i, i + 1)), head)[0] for i in range(9)]
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize('name', SCORES)
def test_the_order_of_the_bank_does_not_matter(name, small):
    bank, outputs, head = small
    shuffled = rows(bank, np.random.default_rng(0).permutation(70))
    got = run(name, shuffled, outputs, head)
    np.testing.assert_allclose(got, run(name, bank, outputs, head), atol=1e-5)


@pytest.mark.parametrize('name', SCORES)
def test_jit_equals_no_jit_and_the_second_call_compiles_nothing(name, small):
    bank, outputs, head = small
    traces = []

    @jax.jit
    def score(*args):
        traces.append(name)
        return SCORES[name].score(*args)

    params = SCORES[name].fit(bank, head)
    s = score(params, outputs, head)
    score(SCORES[name].fit(rows(bank, np.arange(70)[::-1]), head), outputs, head)
    assert len(traces) == 1
    np.testing.assert_allclose(s, SCORES[name].score(params, outputs, head), atol=1e-5)


@pytest.mark.parametrize('name', SHIFT_INVARIANT | SHIFTED)
def test_a_constant_added_to_the_logits(name, small):
    bank, outputs, head = small
    moved = outputs | {'logits': outputs['logits'] + 3.0}
    by = -3.0 if name in SHIFTED else 0.0
    got, want = run(name, bank, moved, head), run(name, bank, outputs, head)
    np.testing.assert_allclose(got, want + by, atol=1e-5)


@pytest.mark.parametrize('name', SCALE_INVARIANT)
def test_the_length_of_features_does_not_matter(name, small):
    bank, outputs, head = small
    longer = outputs | {'features': outputs['features'] * 7.0}
    got, want = run(name, bank, longer, head), run(name, bank, outputs, head)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize('name', ROTATION_INVARIANT)
def test_a_rotation_of_feature_space_does_not_matter(name, small):
    bank, outputs, head = small
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0].astype(np.float32)
    turned = {'kernel': Q @ head['kernel'], 'bias': head['bias']}
    got = run(
        name,
        outputs_of(bank['features'] @ Q.T, turned, bank['labels']),
        outputs_of(outputs['features'] @ Q.T, turned),
        turned,
    )
    np.testing.assert_allclose(got, run(name, bank, outputs, head), atol=1e-4)


# ---- logits ---------------------------------------------------------------------------------


def of(name, logits, **keywords):
    return run(name, {}, {'logits': np.float32(logits)}, {}, **keywords)


def test_hand_numbers():
    """z = (2, 0, 0), worked on paper."""
    z = [[2.0, 0.0, 0.0]]
    assert of('msp', z) == pytest.approx(0.239545, abs=1e-6)
    assert np.exp(-of('msp', z)) == pytest.approx(0.786986, abs=1e-6)
    assert of('maxlogit', z) == -2.0
    assert of('energy', z) == pytest.approx(-2.239545, abs=1e-6)
    assert of('energy', z, temperature=1000.0) == pytest.approx(-1099.27940, abs=2e-4)
    assert of('msp', np.zeros((1, 10))) == pytest.approx(np.log(10), abs=1e-6)


def test_msp_is_maxlogit_less_energy(small):
    _, outputs, _ = small
    msp, maxlogit, energy = (of(name, outputs['logits']) for name in ('msp', 'maxlogit', 'energy'))
    np.testing.assert_allclose(msp, maxlogit - energy, atol=1e-5)
    assert (maxlogit - np.log(4) <= energy + 1e-6).all()
    assert (energy <= maxlogit + 1e-6).all()


def test_msp_keeps_the_order_of_sure_predictions():
    """1 - max softmax is 0 for every margin above 17 in float32."""
    margins = np.array([5.0, 17.0, 20.0, 30.0, 60.0, 80.0])
    z = np.stack([margins + 11.0, np.full(6, 11.0), np.full(6, -40.0)], axis=1)
    assert (np.diff(of('msp', z)) < 0).all()
    assert of('msp', [[3.0, 3.0]]) == pytest.approx(np.log(2))


def test_another_temperature_compiles_nothing(small):
    _, outputs, head = small
    traces = []

    @jax.jit
    def score(*args):
        traces.append(1)
        return SCORES['energy'].score(*args)

    for temperature in (0.5, 1.0, 2.0):
        params = SCORES['energy'].fit({}, head, temperature=temperature)
        want = -temperature * np.log(np.exp(outputs['logits'] / temperature).sum(-1))
        np.testing.assert_allclose(score(params, outputs, head), want, rtol=1e-5)
    assert len(traces) == 1
    with pytest.raises(UserError, match='above 0'):
        SCORES['energy'].fit({}, head, temperature=0.0)


# ---- knn ------------------------------------------------------------------------------------


def knn(bank, features, k):
    return run('knn', {'features': bank}, {'features': np.float32(features)}, {}, k=k)


@pytest.mark.parametrize(('n', 'k'), [(200, 1), (200, 5), (193, 50), (193, 193), (3, 2), (31, 31)])
def test_knn_is_exact(n, k):
    """Rows that don't fill a block, more neighbours than blocks, more queries than a batch."""
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(n, 8)), rng.normal(size=(70, 8))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries)]
    table = np.linalg.norm(unit[1][:, None] - unit[0][None], axis=-1)
    want = np.sort(table, axis=1)[:, k - 1]
    np.testing.assert_allclose(knn(bank, queries, k), want, atol=1e-5)


def test_knn_hand_numbers():
    assert knn([[5.0, 0.0]], [[0.6, 0.8]], 1) == pytest.approx(np.sqrt(0.8))
    assert knn([[1.0, 0.0]], [[-3.0, 0.0]], 1) == pytest.approx(2.0)
    features = np.random.default_rng(0).normal(size=(40, 6))
    np.testing.assert_allclose(knn(features, features, 1), 0.0, atol=1e-6)
    assert (knn(features, features, 2) > 0.01).all()


def test_knn_leaves_outliers_out_of_the_bank():
    bank = {'features': np.eye(3), 'is_outlier': np.array([False, True, False])}
    s = run('knn', bank, {'features': np.float32(np.eye(3))}, {}, k=1)
    np.testing.assert_allclose(s, [0.0, np.sqrt(2), 0.0], atol=1e-6)


@pytest.mark.parametrize('k', [0, 4])
def test_knn_refuses_a_neighbour_that_is_not_there(k):
    with pytest.raises(UserError, match='Set k from 1 to 3'):
        SCORES['knn'].fit({'features': np.eye(3)}, {}, k=k)


def test_knn_never_holds_all_pairs():
    n = 4096
    params = distance.fit_knn({'features': np.ones((n, 2), np.float32)}, {}, k=3)
    outputs = {'features': jnp.ones((n, 2))}
    memory = jax.jit(distance.knn).lower(params, outputs, {}).compile().memory_analysis()
    assert memory.temp_size_in_bytes < n * n * 4 / 10
