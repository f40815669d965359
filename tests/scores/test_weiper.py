"""WeiPer+KLD against NumPy's histograms and sums, given the same perturbed heads."""

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy
from toy import outputs_of, run

from jaxood.errors import UserError
from jaxood.scores import SCORES, weiper

FEW = dict(repeats=7, bins=20, smoothing=4, smoothing_perturbed=5)


@pytest.fixture(scope='module')
def random():
    rng = np.random.default_rng(5)
    head = {'kernel': np.float32(rng.normal(size=(30, 4))), 'bias': np.float32([0, 1, -1, 2])}
    features = np.maximum(rng.normal(size=(300, 30)) + 0.3, 0)
    return outputs_of(features, head), outputs_of(rng.normal(size=(40, 30)), head), head


def shares(x, edges):
    return np.stack([np.histogram(row, edges)[0] / len(row) for row in x])


def smoothed(q, width):
    left = (width - 1) // 2
    padded = np.pad(q, ((0, 0), (left, width - 1 - left)), mode='edge')
    return np.stack([np.convolve(row, np.ones(width) / width, 'valid') for row in padded])


def test_weiper_is_its_formula(random):
    bank, outputs, head = random
    params = SCORES['weiper'].fit(bank, head, **FEW, lambda_1=2.0, lambda_2=0.5)
    z_train, z = (x['features'] @ params.kernel + params.bias for x in (bank, outputs))
    want = -0.5 * softmax(z.reshape(40, 7, 4), axis=2).max(axis=2).mean(axis=1)
    for weight, epsilon, width, train, test in (
        (1.0, 0.01, 4, bank['features'], outputs['features']),
        (2.0, 0.025, 5, z_train, z),
    ):
        edges = np.linspace(train.min(), train.max(), 21)
        p = shares(train, edges).mean(axis=0) + epsilon
        q = smoothed(shares(test, edges), width) + epsilon
        want += weight * np.array([entropy(p, row) + entropy(row, p) for row in q])
    s = SCORES['weiper'].score(params, outputs, head)
    np.testing.assert_allclose(s, want, rtol=2e-3, atol=2e-3)  # an entry on an edge moves 1e-3
    assert np.mean(np.abs(s - want) < 1e-4) > 0.9


def test_perturbations_have_their_length_and_are_those_of_the_seed(random):
    bank, outputs, head = random
    kernel = np.asarray(SCORES['weiper'].fit(bank, head, **FEW).kernel)
    noise = kernel.reshape(30, 7, 4) - head['kernel'][:, None]
    lengths = np.linalg.norm(noise, axis=0) / np.linalg.norm(head['kernel'], axis=0)
    np.testing.assert_allclose(lengths, 1.8, rtol=1e-5)
    assert np.linalg.matrix_rank(noise.reshape(30, -1)) == 28  # each copy has its own
    s = run('weiper', bank, outputs, head, **FEW)
    np.testing.assert_array_equal(run('weiper', bank, outputs, head, **FEW), s)
    assert np.abs(run('weiper', bank, outputs, head, **FEW, seed=1) - s).max() > 1e-3


def test_without_noise_the_copies_are_the_head(random):
    bank, outputs, head = random
    params = SCORES['weiper'].fit(bank, head, **FEW, delta=0.0)
    z = outputs['features'] @ params.kernel + params.bias
    np.testing.assert_allclose(z, np.tile(outputs['logits'], 7), atol=1e-5)


def test_histograms_of_the_training_set_hold_every_entry(random):
    bank, _, head = random
    params = SCORES['weiper'].fit(bank, head, **FEW)
    np.testing.assert_allclose(np.sum(params.means, axis=1), 1.0, atol=1e-6)
    np.testing.assert_array_equal(params.ranges[0], [0.0, bank['features'].max()])


def test_an_image_like_the_mean_histogram_has_no_divergence():
    p = np.float32([0.5, 0.3, 0.2])
    assert weiper._symmetric_kl(p, p, 0.01) == 0
    q = np.float32([0.2, 0.2, 0.6])
    want = entropy(p, q) + entropy(q, p)
    assert weiper._symmetric_kl(p, q, 0.0) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize('width', [1, 4, 5, 99])
def test_smoothing_is_a_running_mean_that_keeps_constants(width):
    S = weiper._box(20, width)
    np.testing.assert_allclose(S.sum(axis=0), 1.0)
    q = np.random.default_rng(0).random((1, 20))
    np.testing.assert_allclose(q @ S, smoothed(q, width))


@pytest.mark.parametrize('keyword', ['repeats', 'bins', 'smoothing', 'smoothing_perturbed'])
def test_counts_below_one_are_refused(keyword, random):
    with pytest.raises(UserError, match=f'{keyword}=0'):
        SCORES['weiper'].fit(*random[::2], **{keyword: 0})
