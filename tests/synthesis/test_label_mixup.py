"""Two classes at once: which, in what shares, and what the network is asked."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood.diffusion import schedules
from jaxood.errors import UserError
from jaxood.synthesis import label_mixup

CLASSES = 5


def build(generate=None, num_classes=CLASSES, **keywords):
    shape, alpha_bar = (1, 1, num_classes + 1), schedules.cosine(10)
    return label_mixup.build(
        shape=shape, num_classes=num_classes, generate=generate, alpha_bar=alpha_bar, **keywords
    )


def draw(count, **options):
    settings = dict(num_classes=CLASSES, low=0.3, high=0.7) | options
    drawn = label_mixup.draw(jax.random.key(0), jnp.arange(count), **settings)
    return [np.asarray(x) for x in drawn]


def test_every_pair_of_classes_comes_equally_often():
    first, second, _ = draw(40)
    pairs = Counter(zip(first.tolist(), second.tolist()))
    assert pairs == {(i, j): 4 for i in range(CLASSES) for j in range(i + 1, CLASSES)}


def test_weights_are_uniform_between_their_bounds():
    _, _, weight = draw(4000, low=0.2, high=0.6)
    share, _ = np.histogram(weight, bins=8, range=(0.2, 0.6))
    assert weight.min() >= 0.2
    assert weight.max() <= 0.6
    np.testing.assert_allclose(share / 4000, 1 / 8, atol=5 * np.sqrt(1 / 8 / 4000))
    _, _, fixed = draw(10, low=0.5, high=0.5)
    np.testing.assert_allclose(fixed, 0.5)


def asked(mix, guidance=None):
    """Runs `rows` on a network whose output is its condition squared: (output, facts)."""

    def generate(shared, x_start, bind, key, index):
        network = lambda x, t, condition: jnp.square(condition)[:, None, None]
        return bind(network, guidance)(x_start, jnp.ones(len(x_start), jnp.int32))

    made = build(generate, mix=mix)({}, jnp.arange(30), jax.random.key(3))
    made = jax.device_get(made)
    one_hot = np.eye(CLASSES + 1, dtype=np.float32)
    w = made['weight'][:, None]
    return made['image'][:, 0, 0], w, one_hot[made['first']], one_hot[made['second']]


def test_one_label_holds_both_classes():
    """pi = w e_i + (1 - w) e_j goes in, and nothing of the null token."""
    output, w, e_i, e_j = asked('label')
    np.testing.assert_allclose(output, (w * e_i + (1 - w) * e_j) ** 2, rtol=1e-6)


def test_or_two_scores_are_averaged():
    output, w, e_i, e_j = asked('score')
    np.testing.assert_allclose(output, w * e_i + (1 - w) * e_j, rtol=1e-6)


@pytest.mark.parametrize('mix', label_mixup.MIXES)
def test_guidance_moves_away_from_the_null_token(mix):
    plain, *_ = asked(mix)
    guided, *_ = asked(mix, guidance=2.0)
    null = np.eye(CLASSES + 1, dtype=np.float32)[-1]
    np.testing.assert_allclose(guided, 3.0 * plain - 2.0 * null, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(mix='labels'), "mix 'labels' is not known. Did you mean 'label'"),
        (dict(low=0.7, high=0.3), 'low=0.7 and high=0.3 must satisfy'),
        (dict(low=-0.1), 'low=-0.1'),
        (dict(high=1.1), 'high=1.1'),
        (dict(num_classes=1), 'needs two classes or more; the ID set has 1'),
    ],
)
def test_what_it_refuses(settings, message):
    with pytest.raises(UserError, match=message):
        build(**settings)
