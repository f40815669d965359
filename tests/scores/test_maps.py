"""Scores of whole maps, against plain matrices in NumPy and numbers worked on paper."""

import jax
import numpy as np
import pytest
from scipy import special
from toy import Network, bank_of, bank_rows, outputs_through, plain_forward, rows_of, run

from jaxood.errors import UserError
from jaxood.scores import SCORES

# ---- the formulas, plainly, in float64 ------------------------------------------------------


def plain_rankfeat(bank, outputs, head):
    maps, z = outputs['maps'], 0
    for stage in range(len(maps))[-2:]:
        less = []
        for F in maps[stage].astype(float):
            U, s, Vt = np.linalg.svd(F.reshape(-1, F.shape[-1]), full_matrices=False)
            less.append(((U[:, 1:] * s[1:]) @ Vt[1:]).reshape(F.shape))
        z += plain_forward(head['network'], np.stack(less), stage)['logits'] / min(2, len(maps))
    return -special.logsumexp(z, axis=1)


def plain_gram_sums(F, p):
    F = F.reshape(-1, F.shape[-1]).T.astype(float) ** p
    v = np.sum(F @ F.T, axis=1)
    return np.sign(v) * np.abs(v) ** (1 / p)


def plain_gram(bank, outputs, head, held_out=None, powers=5):
    """`bank` has maps here."""
    held_out = held_out or bank
    total = 0
    for layer in range(len(outputs['maps'])):
        deviations = {}
        for name, x in (('held out', held_out), ('query', outputs)):
            deviations[name] = np.zeros(len(x['logits']))
            for p in range(1, powers + 1):
                known = np.array([plain_gram_sums(F, p) for F in bank['maps'][layer]])
                for i, F in enumerate(x['maps'][layer]):
                    of_class = known[bank['labels'] == x['logits'][i].argmax()]
                    low, high, v = of_class.min(0), of_class.max(0), plain_gram_sums(F, p)
                    below = np.maximum(low - v, 0) / np.abs(low + 1e-6)
                    above = np.maximum(v - high, 0) / np.abs(high + 1e-6)
                    deviations[name][i] += np.sum(below + above)
        total = total + deviations['query'] / deviations['held out'].mean()
    return total / special.softmax(outputs['logits'].astype(float), axis=1).max(axis=1)


@pytest.fixture(scope='module')
def images_of(small):
    """The outputs of the bank's images, which a bank itself keeps behind `map`."""
    (chunk,) = small[0]['map'](lambda outputs, head: outputs)
    return chunk | {'labels': small[0]['labels']}


def identity_world(images, std=1.0):
    """Two stages that change nothing: the maps are the image, and may be negative."""
    channels = images.shape[-1]
    rng = np.random.default_rng(5)
    head = {'kernel': rng.normal(size=(channels, 3)), 'bias': rng.normal(size=3)}
    head = {k: np.float32(v) for k, v in head.items()}
    eye = np.eye(channels, dtype=np.float32)[None, None]
    head |= {'network': Network((eye, eye), dict(head), np.float32([std]), activation=_same)}
    return outputs_through(images, head), head


def _same(x):
    return x


# ---- rankfeat -------------------------------------------------------------------------------


def test_rankfeat_computed_plainly(small):
    want = plain_rankfeat(*small)
    np.testing.assert_allclose(run('rankfeat', *small, iterations=0), want, rtol=1e-4)
    np.testing.assert_allclose(run('rankfeat', *small, iterations=300), want, rtol=1e-3)


def test_rankfeat_leaves_nothing_of_a_map_of_rank_one():
    rng = np.random.default_rng(0)
    shape, channels = rng.normal(size=(4, 3, 5, 1)), rng.normal(size=(4, 1, 1, 6))
    images = np.concatenate([shape * channels, np.zeros((1, 3, 5, 6))])
    outputs, head = identity_world(images)
    for iterations in (0, 20):
        got = run('rankfeat', {}, outputs, head, iterations=iterations)
        np.testing.assert_allclose(got, np.full(5, -special.logsumexp(head['bias'])), atol=1e-5)


def test_rankfeat_finds_a_direction_that_no_constant_vector_meets():
    """v_1 = (1, -1) / √2: the power method must not start from ones."""
    images = np.zeros((1, 2, 1, 2))
    images[0, :, 0] = [[5, -5], [1, 1]]  # singular values √50 and √2
    outputs, head = identity_world(images)
    z = np.array([0.5, 0.5]) @ head['kernel'] + head['bias']  # what is left is (1, 1), averaged
    got = run('rankfeat', {}, outputs, head)
    np.testing.assert_allclose(got, [-special.logsumexp(z)], rtol=1e-5)


# ---- gram -----------------------------------------------------------------------------------


@pytest.mark.parametrize('powers', [5, 10])
def test_gram_computed_plainly(powers, small, images_of):
    got, want = run('gram', *small, powers=powers), plain_gram(images_of, *small[1:], powers=powers)
    assert np.count_nonzero(want) > 3
    np.testing.assert_allclose(got, want, rtol=1e-3)


def test_gram_of_a_fitting_image_is_zero(small, images_of):
    bank, _, head = small
    right = bank['logits'].argmax(1) == bank['labels']
    s = run('gram', bank, images_of, head)
    assert 60 < right.sum() < 120
    np.testing.assert_allclose(s[right], 0.0, atol=1e-4)
    assert np.count_nonzero(s[~right] > 0.1) > 3


def test_gram_unit_is_the_mean_deviation_of_held_out_images(small, images_of):
    bank, outputs, head = small
    fitted_on, rest = np.arange(50), np.arange(50, 120)
    part = bank_rows(bank, fitted_on) | {'validation': bank_rows(bank, rest)}
    got = run('gram', part, outputs, head)
    want = plain_gram(rows_of(images_of, fitted_on), outputs, head, rows_of(images_of, rest))
    np.testing.assert_allclose(got, want, rtol=1e-3)


def test_a_larger_fitting_set_never_raises_a_deviation(small):
    bank, outputs, head = small
    same_unit = bank_rows(bank, np.arange(120))
    score = jax.jit(SCORES['gram'].score)
    fits = [
        SCORES['gram'].fit(bank_rows(bank, np.arange(n)) | {'validation': same_unit}, head)
        for n in (40, 120)
    ]
    fewer, all_ = (score(p.replace(unit=fits[0].unit), outputs, head) for p in fits)
    assert (all_ <= fewer + 1e-5).all()
    assert (all_ < fewer - 1e-3).any()


def test_gram_sums_of_any_size_stay_in_float32():
    """Entries of 1e4 have a 20th power of 1e80, of 1e-4 one of 1e-80; the root brings both back."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(12, 3, 4, 5)) * np.array([1e4, 1.0, 1e-4, 1e2, 0.0])
    labels = np.arange(12) % 3
    outputs, head = identity_world(np.float32(images))
    fitted = rows_of(outputs, slice(0, 9)) | {'labels': labels[:9]}
    fit = SCORES['gram'].fit(bank_of(fitted, head), head, powers=10)
    for p in range(1, 11):
        sums = np.array([plain_gram_sums(F, p) for F in images[:9]])
        want = np.array([sums[labels[:9] == c].max(axis=0) for c in range(3)])
        got = fit.most[0][:, p - 1]
        close = np.abs(got - want) <= 1e-3 * np.abs(sums).max(axis=0)
        assert close.all(), p


def test_a_class_without_images_has_the_range_of_all(small):
    bank, _, head = small
    some = np.flatnonzero(bank['labels'] != 2)
    fit = SCORES['gram'].fit(bank_rows(bank, some), head)
    for low, high in zip(fit.least, fit.most):
        np.testing.assert_array_equal(low[2], low[[0, 1, 3]].min(axis=0))
        np.testing.assert_array_equal(high[2], high[[0, 1, 3]].max(axis=0))


@pytest.mark.parametrize(
    ('name', 'keywords', 'says'),
    [('rankfeat', dict(iterations=-1), 'the paper has 20'), ('gram', dict(powers=0), 'at least 1')],
)
def test_bad_settings(name, keywords, says, small):
    bank, _, head = small
    with pytest.raises(UserError, match=says):
        SCORES[name].fit(bank, head, **keywords)
