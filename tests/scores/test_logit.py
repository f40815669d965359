"""Scores of the logits alone: numbers worked on paper, and the formulas computed plainly."""

import jax
import numpy as np
import pytest
from scipy import optimize, special
from toy import run

from jaxood.errors import UserError
from jaxood.scores import SCORES


def of(name, logits, bank=None, **keywords):
    return run(name, bank or {}, {'logits': np.float32(logits)}, {}, **keywords)


# ---- the formulas, plainly, in float64 ------------------------------------------------------


def plain_tempscale(bank, outputs, head):
    z, y = bank['validation']['logits'].astype(float), bank['validation']['labels']
    nll = lambda t: -np.mean(special.log_softmax(z / np.exp(t), axis=1)[np.arange(len(z)), y])
    best = optimize.minimize_scalar(nll, bounds=(-3, 3), method='bounded', options={'xatol': 1e-9})
    return -np.log(special.softmax(outputs['logits'] / np.exp(best.x), axis=1).max(axis=1))


def plain_entropy(bank, outputs, head):
    p = special.softmax(outputs['logits'].astype(float), axis=1)
    return special.entr(p).sum(axis=1)


def plain_gen(bank, outputs, head, gamma=0.1, top=10):
    p = np.sort(special.softmax(outputs['logits'].astype(float), axis=1), axis=1)[:, -top:]
    return np.sum(p**gamma * (1 - p) ** gamma, axis=1)


def plain_klm(bank, outputs, head):
    q = special.softmax(bank['validation']['logits'].astype(float), axis=1)
    p = special.softmax(outputs['logits'].astype(float), axis=1)
    rows = []
    for k in range(q.shape[1]):
        d = q[q.argmax(1) == k].mean(0) if (q.argmax(1) == k).any() else np.eye(q.shape[1])[k]
        rows.append(special.rel_entr(p, np.maximum(d, 1e-12)).sum(axis=1))
    return np.min(rows, axis=0)


PLAIN = {
    'tempscale': plain_tempscale,
    'entropy': plain_entropy,
    'gen': plain_gen,
    'klm': plain_klm,
}


@pytest.mark.parametrize('name', PLAIN)
def test_the_formula_computed_plainly(name, gaussians, small):
    bank, sets, head = gaussians
    got, want = run(name, bank, sets['mid'], head), PLAIN[name](bank, sets['mid'], head)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    bank, outputs, head = small
    want = PLAIN[name](bank | {'validation': bank}, outputs, head)
    np.testing.assert_allclose(run(name, bank, outputs, head), want, rtol=1e-4, atol=1e-5)


# ---- each its own ---------------------------------------------------------------------------


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


@pytest.mark.parametrize('name', ['msp', 'entropy', 'gen'])
def test_sure_predictions_keep_their_order(name):
    """1 - max softmax is 0 for every margin above 17 in float32."""
    margins = np.array([5.0, 17.0, 20.0, 30.0, 60.0, 80.0])
    z = np.stack([margins + 11.0, np.full(6, 11.0), np.full(6, -90.0)], axis=1)
    assert (np.diff(of(name, z)) < 0).all()


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


@pytest.mark.parametrize('scale', [0.25, 3.0])
def test_tempscale_finds_the_temperature_that_logits_were_made_with(scale):
    """Labels drawn from softmax(z): of scale · z the best T is `scale`, up to sampling."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(20_000, 5)) * 2
    labels = np.argmax(z + rng.gumbel(size=z.shape), axis=1)
    bank = {'logits': np.float32(z * scale), 'labels': labels}
    params = SCORES['tempscale'].fit({'logits': None, 'validation': bank}, {})
    assert params['temperature'] == pytest.approx(scale, rel=0.03)
    at_one = {'temperature': 1.0}
    got = SCORES['tempscale'].score(at_one, {'logits': np.float32(z)}, {})
    np.testing.assert_allclose(got, of('msp', z), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(('labels', 'T'), [('predicted', 0.05), ('least', 20.0)])
def test_tempscale_stays_within_bounds(labels, T):
    """All right: the smaller T, the better. All wrong: the larger."""
    z = np.float32(np.random.default_rng(0).normal(size=(50, 3)))
    labels = z.argmax(1) if labels == 'predicted' else z.argmin(1)
    params = SCORES['tempscale'].fit({'logits': z, 'labels': labels}, {})
    assert params['temperature'] == pytest.approx(T)


def test_gen_hand_numbers():
    uniform = np.zeros((1, 10))
    assert of('gen', uniform) == pytest.approx(7.860031, abs=1e-5)
    assert of('gen', uniform, top=3) == pytest.approx(3 * 0.7860031, abs=1e-5)
    assert of('gen', [[200.0, 0.0, 0.0]], gamma=0.5) == pytest.approx(0.0, abs=1e-6)
    z = np.random.default_rng(0).normal(size=(7, 4))
    p = special.softmax(z, axis=1)
    np.testing.assert_allclose(of('gen', z, gamma=1.0), 1 - np.sum(p**2, axis=1), rtol=1e-5)


def test_gen_at_small_gamma_keeps_float64s_numbers():
    """(1 - p_max)^.01 is far from 0 where 1 - p_max is 1e-20."""
    z = np.array([[50.0, 4.0, 0.0], [30.0, 1.0, 0.0]])
    p = special.softmax(z, axis=1)
    rest = np.stack([p[:, 1] + p[:, 2], 1 - p[:, 1], 1 - p[:, 2]], axis=1)
    want = np.sum(p**0.01 * rest**0.01, axis=1)
    np.testing.assert_allclose(of('gen', z, gamma=0.01), want, rtol=1e-5)


@pytest.mark.parametrize('keywords', [dict(gamma=0.0), dict(top=0)])
def test_gen_refuses_settings_without_meaning(keywords):
    with pytest.raises(UserError, match='the paper has'):
        of('gen', [[0.0, 1.0]], **keywords)


def test_klm_hand_numbers():
    bank = {'logits': np.log(np.float32([[0.8, 0.2], [0.3, 0.7]]))}
    s = of('klm', np.log([[0.6, 0.4], [0.8, 0.2], [0.3, 0.7]]), bank)
    np.testing.assert_allclose(s, [0.104650, 0.0, 0.0], atol=1e-6)
    other = of('klm', np.log([[0.6, 0.4]]), {'logits': np.log(np.float32([[0.3, 0.7]]))})
    one_hot = 0.6 * np.log(0.6) + 0.4 * np.log(0.4 / 1e-12)  # nobody was predicted as the first
    assert other == pytest.approx(min(0.192042, one_hot), abs=1e-6)


def test_klm_groups_by_prediction_not_by_label():
    z = np.float32([[2, 0], [3, 0], [0, 1], [0, 4]])
    banks = [{'logits': z, 'labels': np.array(y)} for y in ([0, 0, 1, 1], [1, 0, 1, 0])]
    query = np.random.default_rng(0).normal(size=(5, 2))
    np.testing.assert_array_equal(of('klm', query, banks[0]), of('klm', query, banks[1]))
