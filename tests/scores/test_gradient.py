"""Scores that follow a gradient, against finite differences, and numbers worked on paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from toy import (
    Network,
    bank_rows,
    outputs_through,
    plain_energy,
    plain_forward,
    plain_gradient,
    plain_shaped,
    run,
)

from jaxood.errors import UserError
from jaxood.scores import SCORES, gradient

# ---- the formulas, plainly, in float64 ------------------------------------------------------


def plain_gradnorm(bank, outputs, head, temperature=1.0):
    p = special.softmax(outputs['logits'].astype(float) / temperature, axis=1)
    uneven = np.abs(p.shape[1] * p - 1).sum(axis=1)
    return -np.abs(outputs['features']).sum(axis=1) * uneven / temperature


def plain_odin(bank, outputs, head, temperature=1000.0, epsilon=0.0014, single=False):
    forward = lambda x: plain_forward(head['network'], x)['logits'] / temperature
    predicted = outputs['logits'].argmax(axis=1)
    loss = lambda x: -special.log_softmax(forward(x), axis=1)[np.arange(len(x)), predicted]
    g = plain_gradient(loss, outputs['images'])
    step = np.sign(np.where(np.abs(g) > 1e-9 / temperature, g, 0))
    if single:
        size = np.abs(g).reshape(len(g), -1)
        step *= (np.arange(size.shape[1]) == size.argmax(1)[:, None]).reshape(g.shape)
    z = forward(outputs['images'] - epsilon * step / head['network'].std)
    return -special.log_softmax(z, axis=1).max(axis=1) - np.log(z.shape[1])


def plain_shift(outputs, head):
    network, x = head['network'], outputs['images'].astype(float)
    predicted = outputs['logits'].argmax(axis=1)
    g = plain_gradient(
        lambda x: plain_forward(network, x)['logits'][np.arange(len(x)), predicted], x
    )
    for i in range(len(x)):
        size = np.abs(g[i]).ravel()
        smallest = np.argsort(size)[: int(0.05 * size.size)]
        x[i].flat[smallest] += 0.5 * np.sign(g[i].flat[smallest]) * (size[smallest] > 1e-9)
    h, moved = outputs['features'], plain_forward(network, x)['features']
    found = []
    for a, b in zip(h, moved):
        top = np.argsort(-a)
        five, one = top[: max(1, int(0.05 * len(a)))], top[: max(1, int(0.01 * len(a)))]
        found.append(np.maximum(b, 0)[five].sum() + 10 * np.abs(a - b)[one].sum())
    return np.array(found)


def plain_adascale(bank, outputs, head, variant='a', low=80.0, high=85.0):
    """`bank` has images here."""
    known = plain_shift(bank, head)
    shaped = []
    for h, z, q in zip(outputs['features'], outputs['logits'], plain_shift(outputs, head)):
        p = low + (1 - np.mean(known <= q)) * (high - low)
        active = np.maximum(h, 0)[None]
        r = np.log(plain_shaped(active, 'scale', p).sum() / active.sum())
        shaped.append(
            plain_energy(h[None] * np.exp(r), head)
            if variant == 'a'
            else -special.logsumexp(z * r**2, keepdims=True)
        )
    return np.concatenate(shaped)


def plain_states(outputs, head, alpha):
    """Before the sigmoid, of the pooled features and the maps before the last, backwards."""
    network, maps = head['network'], outputs['maps']

    def L(stage):
        z = lambda F: plain_forward(network, F, stage)['logits']
        return lambda F: -special.log_softmax(z(F), axis=1).mean(axis=1)

    loss_of = lambda h: -special.log_softmax(h @ head['kernel'] + head['bias'], axis=1).mean(axis=1)
    states = [alpha[0] * outputs['features'] * plain_gradient(loss_of, outputs['features'])]
    for stage, a in zip(range(len(maps) - 2, -1, -1), alpha[1:]):
        pooled = plain_gradient(L(stage), maps[stage]).mean(axis=(1, 2))
        states.append(a * maps[stage].mean(axis=(1, 2)) * pooled)
    return states


def plain_nac(bank, outputs, head, least=(50, 100), bins=(50, 500), alpha=(100.0, 1000.0)):
    layers = []
    known, seen = (plain_states(x, head, alpha) for x in (bank, outputs))
    for a, b, O, M in zip(known, seen, least, bins):
        half = np.log(np.linspace(1, np.sqrt(1000), M // 2)) / np.log(1000)
        edges = np.concatenate([half[:-1], [0.5], 1 - half[-2::-1]])
        covered = np.zeros(b.shape)
        for j in range(a.shape[1]):
            counts, _ = np.histogram(special.expit(a[:, j]), edges)
            place = np.digitize(special.expit(b[:, j]), edges) - 1
            covered[:, j] = np.minimum(counts[np.clip(place, 0, len(counts) - 1)] / O, 1)
        layers.append(covered.mean(axis=1))
    return -np.mean(layers, axis=0)


@pytest.fixture(scope='module')
def images_of(small):
    """The outputs of the bank's images, which a bank itself keeps behind `map`."""
    (chunk,) = small[0]['map'](lambda outputs, head: outputs)
    return chunk


# ---- gradnorm -------------------------------------------------------------------------------


@pytest.mark.parametrize('temperature', [1.0, 0.5, 1000.0])
def test_gradnorm_is_the_l1_norm_of_the_gradient_in_the_weights(temperature, small):
    bank, outputs, head = small

    def length(h):
        loss = lambda W: -jnp.sum(jax.nn.log_softmax((h @ W + head['bias']) / temperature))
        return jnp.sum(jnp.abs(jax.grad(loss)(head['kernel'])))

    got = run('gradnorm', *small, temperature=temperature)
    np.testing.assert_allclose(-got, [length(h) for h in outputs['features']], rtol=2e-4)
    np.testing.assert_allclose(got, plain_gradnorm(*small, temperature=temperature), rtol=1e-5)


def test_gradnorm_hand_numbers():
    outputs = {'features': np.float32([[1, 2]]), 'logits': np.log(np.float32([[0.7, 0.2, 0.1]]))}
    assert run('gradnorm', {}, outputs, {}) == pytest.approx(-6.6, abs=1e-5)
    outputs['logits'] = np.full((1, 3), 5.0, np.float32)
    assert run('gradnorm', {}, outputs, {}) == 0.0


# ---- odin -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'keywords', [{}, dict(temperature=1.0, epsilon=0.05), dict(epsilon=0.1, single=True)]
)
def test_odin_computed_plainly(keywords, small):
    got, want = run('odin', *small, **keywords), plain_odin(*small, **keywords)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-8)


def test_odin_at_temperature_one_without_a_step_is_msp(small):
    got = run('odin', *small, temperature=1.0, epsilon=0.0)
    np.testing.assert_allclose(got, run('msp', *small) - np.log(4), atol=1e-6)


def one_pixel(kernel, std):
    """z = kernel · x of a single pixel x = .5, and its outputs."""
    head = {'kernel': np.float32([kernel]), 'bias': np.zeros(len(kernel), np.float32)}
    head |= {'network': Network((), dict(head), np.float32([std]))}
    return {}, outputs_through(np.full((1, 1, 1, 1), 0.5), head), head


@pytest.mark.parametrize(('std', 'p'), [(1.0, 0.768525), (0.5, 0.802184)])
def test_odin_hand_numbers(std, p):
    """z = (x, -x), ε = .1: x goes from .5 to .5 + .1 / σ, max p from .731059 to 1/(1 + e^-2x)."""
    got = run('odin', *one_pixel([1.0, -1.0], std), temperature=1.0, epsilon=0.1)
    assert got == pytest.approx(-np.log(p) - np.log(2), abs=1e-6)


def test_odin_takes_no_step_where_the_gradient_is_zero():
    world = one_pixel([1.0, 1.0], 1.0)
    assert run('odin', *world, epsilon=3.0) == run('odin', *world, epsilon=0.0)


def test_odin_still_moves_a_sure_prediction():
    """A margin of 30: p is 1 in float32, so a loss from 1 - p would have no gradient."""
    world = one_pixel([60.0, 0.0], 1.0)
    step = [
        run('odin', *world, temperature=1.0, epsilon=e, single=s)[0] + np.log(2)
        for e, s in ((0.0, False), (0.1, False), (0.1, True))
    ]
    np.testing.assert_allclose(step, np.exp([-30.0, -36.0, -36.0]), atol=1e-7)


# ---- adascale -------------------------------------------------------------------------------


@pytest.mark.parametrize('variant', 'al')
def test_adascale_computed_plainly(variant, small, images_of):
    keywords = dict(variant=variant, low=20.0, high=80.0)
    want = plain_adascale(images_of, *small[1:], **keywords)
    np.testing.assert_allclose(run('adascale', *small, **keywords), want, rtol=1e-4)


def test_adascale_with_equal_bounds_is_scale(small):
    for percentile in (20.0, 60.0):
        got = run('adascale', *small, low=percentile, high=percentile)
        np.testing.assert_allclose(got, run('scale', *small, percentile=percentile), rtol=1e-6)


def test_adascale_is_fitted_on_held_out_images(small):
    bank, outputs, head = small
    other = bank | {'validation': bank_rows(bank, np.arange(10))}
    shifts = SCORES['adascale'].fit(other, head).shifts
    assert len(shifts) == 10
    assert (np.diff(shifts) >= 0).all()


# ---- nac ------------------------------------------------------------------------------------

NAC = dict(least=(5.0, 3.0), bins=(20, 51), alpha=(8.0, 30.0))


def test_nac_computed_plainly(small, images_of):
    want = plain_nac(images_of, *small[1:], **NAC)
    assert want.std() > 0.02
    np.testing.assert_allclose(run('nac', *small, **NAC), want, atol=1e-4)


def test_nac_covers_what_it_was_fitted_on(small, images_of):
    """With O = 1 every state of a fitting image has been seen; nothing else is above that."""
    bank, outputs, head = small
    one = NAC | dict(least=(1.0, 1.0))
    np.testing.assert_allclose(run('nac', bank, images_of, head, **one), -1.0, atol=0.02)
    assert run('nac', bank, outputs, head, **one).max() > -0.95


def test_nac_takes_as_many_images_of_each_class():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), (900, 400, 300, 250, 10)))
    rows = gradient._balanced(labels)
    assert (np.bincount(labels[rows]) == [200, 200, 200, 200, 10]).all()
    assert (np.diff(rows) > 0).all()


def test_nac_takes_the_layers_that_there_are(small):
    """Two maps: the pooled features and the first map, with the first two settings of four."""
    bank, _, head = small
    assert [c.shape for c in SCORES['nac'].fit(bank, head).coverage] == [(6, 48), (5, 498)]
    alone = SCORES['nac'].fit(bank, head, least=(1.0,), bins=(10,), alpha=(1.0,))
    assert len(alone.coverage) == 1


@pytest.mark.parametrize(
    ('name', 'keywords', 'says'),
    [
        ('gradnorm', dict(temperature=0.0), 'above 0'),
        ('odin', dict(temperature=-1.0), 'above 0'),
        ('adascale', dict(variant='b'), "variant 'b' is not known"),
        ('adascale', dict(low=90.0, high=80.0), 'must not be above high=80'),
        ('adascale', dict(low=0.0, high=100.0), 'leaves none of 6'),
        ('nac', dict(least=(1.0,)), 'same number of entries'),
        ('nac', dict(bins=(50, 500, 50, 3)), 'at least 4'),
    ],
)
def test_bad_settings(name, keywords, says, small):
    bank, _, head = small
    with pytest.raises(UserError, match=says):
        SCORES[name].fit(bank, head, **keywords)
