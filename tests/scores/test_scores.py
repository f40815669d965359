"""What must hold of every score in the table; each module's own numbers are in its own file.

Whoever adds a score adds its row to `BLIND_SPOTS`, and its name to the invariances it has.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import bank_rows, rows_of, run, seen_by

from jaxood.metrics import auroc
from jaxood.scores import SCORES

# AUROC on the four toy sets of conftest.py, one draw: what theory and independent code gave, or was
# measured with plain NumPy where the methods' description has no row.
BLIND_SPOTS = {
    'msp': {'mid': 0.97, 'orth': 0.50, 'origin': 0.99, 'double': 0.07},
    'maxlogit': {'mid': 0.93, 'orth': 0.50, 'origin': 0.99, 'double': 0.01},
    'energy': {'mid': 0.93, 'orth': 0.50, 'origin': 1.00, 'double': 0.01},
    'tempscale': {'mid': 0.97, 'orth': 0.50, 'origin': 0.99, 'double': 0.07},
    'entropy': {'mid': 0.97, 'orth': 0.50, 'origin': 0.99, 'double': 0.07},
    'gen': {'mid': 0.97, 'orth': 0.50, 'origin': 1.00, 'double': 0.05},
    'klm': {'mid': 0.82, 'orth': 0.50, 'origin': 0.94, 'double': 0.57},
    'maxcos': {'mid': 0.94, 'orth': 0.94, 'origin': 1.00, 'double': 0.50},
    'normcos': {'mid': 0.93, 'orth': 0.50, 'origin': 1.00, 'double': 0.01},
    # Features are no post-ReLU ones here, and a tenth of their entries is all that tells classes.
    'react': {'mid': 0.19, 'orth': 0.50, 'origin': 0.89, 'double': 0.29},
    'vra': {'mid': 0.19, 'orth': 0.50, 'origin': 0.89, 'double': 0.29},
    'dice': {'mid': 0.93, 'orth': 0.50, 'origin': 1.00, 'double': 0.01},
    'ash': {'mid': 0.60, 'orth': 0.37, 'origin': 0.95, 'double': 0.23},
    'scale': {'mid': 0.66, 'orth': 0.36, 'origin': 0.95, 'double': 0.19},
    'gradnorm': {'mid': 0.69, 'orth': 0.09, 'origin': 0.93, 'double': 0.00},
    'odin': {'mid': 0.96, 'orth': 0.49, 'origin': 1.00, 'double': 0.02},
    'adascale': {'mid': 0.68, 'orth': 0.68, 'origin': 0.96, 'double': 0.04},
    # CIFAR's steepness saturates every sigmoid on logits as large as these.
    'nac': {'mid': 0.49, 'orth': 0.50, 'origin': 0.53, 'double': 0.48},
    'rankfeat': {'mid': 0.45, 'orth': 0.55, 'origin': 0.41, 'double': 0.59},
    'gram': {'mid': 0.55, 'orth': 0.99, 'origin': 0.91, 'double': 1.00},
    'knn': {'mid': 0.92, 'orth': 0.94, 'origin': 1.00, 'double': 0.50},
    'votes': {'mid': 0.91, 'orth': 0.92, 'origin': 0.99, 'double': 0.50},
    'nnguide': {'mid': 0.93, 'orth': 0.63, 'origin': 1.00, 'double': 0.03},
    'relation': {'mid': 0.94, 'orth': 0.94, 'origin': 1.00, 'double': 0.50},
    'fdbd': {'mid': 0.95, 'orth': 0.92, 'origin': 1.00, 'double': 0.53},
    'nci': {'mid': 0.91, 'orth': 0.88, 'origin': 1.00, 'double': 0.32},
    'she': {'mid': 0.93, 'orth': 0.50, 'origin': 1.00, 'double': 0.01},
    'mds': {'mid': 0.77, 'orth': 1.00, 'origin': 0.91, 'double': 1.00},
    'rmds': {'mid': 0.96, 'orth': 0.50, 'origin': 0.99, 'double': 0.96},
    'vim': {'mid': 0.91, 'orth': 0.92, 'origin': 1.00, 'double': 0.16},
    'residual': {'mid': 0.49, 'orth': 1.00, 'origin': 0.50, 'double': 0.99},
    'mds_ensemble': {
        'mid': 0.77,
        'orth': 1.00,
        'origin': 0.91,
        'double': 1.00,
    },  # both stages are h
    'combood': {'mid': 0.91, 'orth': 0.90, 'origin': 1.00, 'double': 1.00},
    # Of a restorer that knows the classes' directions alone: see toy.py.
    'mse': {'mid': 0.50, 'orth': 1.00, 'origin': 0.50, 'double': 0.99},
    'lr': {'mid': 0.84, 'orth': 0.50, 'origin': 1.00, 'double': 0.01},
    'mfsim': {'mid': 0.70, 'orth': 0.50, 'origin': 0.94, 'double': 0.50},
    'weiper': {'mid': 0.61, 'orth': 0.68, 'origin': 0.68, 'double': 0.99},
}
# z -> z + a
SHIFT_INVARIANT = {'msp', 'tempscale', 'entropy', 'gen', 'klm', 'gradnorm', 'relation', 'fdbd'}
SHIFTED = {'maxlogit', 'energy', 'vim'}  # ... moves these by -a
SCALE_INVARIANT = {'maxcos', 'knn', 'votes', 'nnguide', 'relation'}  # h -> a h, bank included
# h -> Q h with W -> W Qᵀ
ROTATION_INVARIANT = {
    'msp',
    'maxlogit',
    'energy',
    'tempscale',
    'entropy',
    'gen',
    'klm',
    'maxcos',
    'normcos',
    'knn',
    'votes',
    'nnguide',
    'relation',
    'fdbd',
    'she',
    'mds',
    'rmds',
    'vim',
    'residual',
}
# ... changes these
COORDINATE_WISE = {'react', 'vra', 'dice', 'ash', 'scale', 'gradnorm', 'weiper'}
# Every image of the bank twice.
DUPLICATE_INVARIANT = {
    'tempscale',
    'klm',
    'dice',
    'adascale',
    'gram',
    'fdbd',
    'nci',
    'she',
    'mds',
    'rmds',
    'vim',
    'residual',
    'mds_ensemble',
    'weiper',
}


# ---- every score ----------------------------------------------------------------------------


@pytest.mark.parametrize('name', SCORES)
def test_scores_see_what_theory_says_they_see(name, gaussians):
    bank, sets, head = gaussians
    s = scores_of(name, bank, sets, head)
    for kind, expected in BLIND_SPOTS[name].items():
        assert auroc(s['id'], s[kind]) == pytest.approx(expected, abs=0.03), kind


@pytest.mark.parametrize('name', SCORES)
def test_one_float32_a_row_and_inputs_untouched(name, small):
    bank, outputs, head = seen_by(name, *small)
    arrays = {k: v for k, v in bank.items() if k != 'map'}, outputs, head
    before = jax.tree.map(np.copy, arrays)
    s = jax.jit(SCORES[name].score)(SCORES[name].fit(bank, head), outputs, head)
    assert s.shape == (9,)
    assert s.dtype == jnp.float32
    assert np.isfinite(s).all()
    jax.tree.map(np.testing.assert_array_equal, before, arrays)


@pytest.mark.parametrize('name', SCORES)
def test_an_image_alone_scores_as_in_a_batch(name, small):
    bank, outputs, head = small
    sets = {i: rows_of(outputs, slice(i, i + 1)) for i in range(9)}
    alone = scores_of(name, bank, sets, head)
    together = scores_of(name, bank, {'all': outputs}, head)['all']
    for i in range(9):
        np.testing.assert_allclose(alone[i], together[i : i + 1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('name', SCORES)
def test_the_order_of_the_bank_does_not_matter(name, small):
    bank, outputs, head = small
    shuffled = bank_rows(bank, np.random.default_rng(0).permutation(120))
    got, want = run(name, shuffled, outputs, head), run(name, bank, outputs, head)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', sorted(DUPLICATE_INVARIANT))
def test_a_bank_with_every_image_twice_says_the_same(name, small):
    bank, outputs, head = small
    twice = bank_rows(bank, np.tile(np.arange(120), 2))
    got, want = run(name, twice, outputs, head), run(name, bank, outputs, head)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', SCORES)
def test_jit_equals_no_jit_and_the_second_call_compiles_nothing(name, small):
    bank, outputs, head = seen_by(name, *small)
    traces = []

    @jax.jit
    def score(*args):
        traces.append(name)
        return SCORES[name].score(*args)

    params = SCORES[name].fit(bank, head)
    s = score(params, outputs, head)
    backwards = seen_by(name, bank_rows(small[0], np.arange(120)[::-1]), outputs, head)[0]
    score(SCORES[name].fit(backwards, head), outputs, head)
    assert len(traces) == 1
    plain = SCORES[name].score(params, outputs, head)
    np.testing.assert_allclose(s, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', sorted(SHIFT_INVARIANT | SHIFTED))
def test_a_constant_added_to_the_logits(name, small):
    bank, outputs, head = small
    moved = outputs | {'logits': outputs['logits'] + 3.0}
    by = -3.0 if name in SHIFTED else 0.0
    got, want = run(name, bank, moved, head), run(name, bank, outputs, head)
    np.testing.assert_allclose(got, want + by, atol=1e-5)


@pytest.mark.parametrize('name', sorted(SCALE_INVARIANT))
def test_the_length_of_features_does_not_matter(name, small):
    bank, outputs, head = small
    longer = outputs | {'features': outputs['features'] * 7.0}
    got, want = run(name, bank, longer, head), run(name, bank, outputs, head)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize('name', sorted(ROTATION_INVARIANT | COORDINATE_WISE))
def test_a_rotation_of_feature_space(name, small):
    """Distances and whatever reads logits don't see it; what looks at single units must."""
    bank, outputs, head = small
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0].astype(np.float32)
    turned = head | {'kernel': Q @ head['kernel']}
    got = run(
        name,
        bank | {'features': bank['features'] @ Q.T},
        outputs | {'features': outputs['features'] @ Q.T},
        turned,
    )
    want = run(name, bank, outputs, head)
    if name in ROTATION_INVARIANT:
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    else:
        assert np.abs(got - want).max() > 0.05


def scores_of(name, bank, sets, head):
    """One fit, one program, `{set: scores}`."""
    params = SCORES[name].fit(seen_by(name, bank, {}, head)[0], head)
    score = jax.jit(SCORES[name].score)
    return {kind: score(params, *seen_by(name, {}, x, head)[1:]) for kind, x in sets.items()}
