"""MSE, likelihood regret and multi-layer similarity: numbers by hand, limits, signs."""

import numpy as np
import pytest

from jaxood.errors import UserError
from jaxood.scores import SCORES
from jaxood.scores import reconstruction as r

Z_0 = np.float32([[1, -1, 1, 0, -1]])
Z_TILDE = np.float32([[1, -1, 1, 0, 0]])
EDGES = (0, 2, 5)


def outputs(*snapshots, z_0=Z_0, edges=EDGES, depth=3):
    both = [r.compare(z_0, z_tilde, edges) for z_tilde in snapshots]
    return {'restored': {depth: {k: np.stack([b[k] for b in both], axis=1) for k in both[0]}}}


def score(name, outputs, **keywords):
    entry = SCORES[name]
    return np.asarray(entry.score(entry.fit({}, {}, **keywords), outputs, {}))


def test_numbers_by_hand():
    """Blocks (1, -1), (1, 0, -1) against (1, -1), (1, 0, 0): cosines 1 and 1/√2, one error of 1."""
    out = outputs(Z_0, Z_TILDE)
    np.testing.assert_allclose(score('mse', out), [0.2], rtol=1e-6)
    np.testing.assert_allclose(score('mfsim', out), [-0.85355], atol=1e-5)
    np.testing.assert_allclose(score('mfsim', out, skip_first=True), [-(0.5**0.5)], atol=1e-6)
    np.testing.assert_allclose(score('mse', out, snapshot='initial'), [0.0], atol=1e-7)
    np.testing.assert_allclose(score('mfsim', outputs(Z_TILDE, Z_0)), [-1.0], atol=1e-6)


def test_a_blocks_scale_matters_to_the_error_alone():
    rng = np.random.default_rng(0)
    z_0, z_tilde = rng.normal(size=(2, 7, 5)).astype(np.float32)
    scaled = z_tilde * np.float32([3, 3, 0.2, 0.2, 0.2])
    a, b = (outputs(z_0, z, z_0=z_0) for z in (z_tilde, scaled))
    np.testing.assert_allclose(score('mfsim', a), score('mfsim', b), atol=1e-6)
    assert (np.abs(score('mse', a) - score('mse', b)) > 1e-2).all()
    assert (np.abs(score('mfsim', a)) <= 1).all()
    np.testing.assert_allclose(score('mfsim', outputs(z_0, -z_0, z_0=z_0)), 1.0, atol=1e-6)


def test_nothing_restored_is_no_similarity_and_no_nan():
    out = outputs(0 * Z_0, 0 * Z_0)
    assert score('mfsim', out) == 0.0
    np.testing.assert_allclose(score('mse', out), np.mean(Z_0**2), rtol=1e-6)


def test_likelihood_regret_is_larger_for_what_training_did_not_improve():
    """ID falls from 0.9 to 0.1, OOD from 0.9 to 0.8: -0.8 and -0.1."""
    z = np.ones((2, 5), np.float32)
    to = lambda *errors: z - np.sqrt(np.float32(errors))[:, None]
    s = score('lr', outputs(to(0.9, 0.9), to(0.1, 0.8), z_0=z))
    np.testing.assert_allclose(s, [-0.8, -0.1], atol=1e-6)


def test_depth_picks_its_own_restoration():
    out = {'restored': outputs(Z_0, Z_TILDE)['restored'] | outputs(Z_0, Z_0, depth=7)['restored']}
    assert score('mse', out, depth=7) == 0.0
    assert score('mse', out, depth=3) > 0.1


def test_an_unknown_snapshot_is_refused():
    with pytest.raises(UserError, match=r"snapshot='last' must be one of"):
        r.fit_mse({}, {}, snapshot='last')
