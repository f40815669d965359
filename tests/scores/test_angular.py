"""Scores of directions, against NumPy and against the logits of angular heads."""

import jax.numpy as jnp
import numpy as np
import pytest
from toy import run

from jaxood.models.heads import HEADS, last_layer

RNG = np.random.default_rng(0)
H, W = np.float32(RNG.normal(size=(9, 6))), np.float32(RNG.normal(size=(6, 4)))
HEAD = {'kernel': W, 'bias': np.float32([1, 2, 3, 4])}


def of(name, features, head=HEAD):
    return run(name, {}, {'features': np.float32(features)}, head)


def cosines(features, W):
    return np.array(
        [[h @ w / np.linalg.norm(h) / np.linalg.norm(w) for w in W.T] for h in features]
    )


def test_on_paper():
    head = {'kernel': np.float32([[2, 0], [0, 0.5]])}
    np.testing.assert_allclose(of('maxcos', [[3, 4], [-3, -4]], head), [-0.8, 0.6], atol=1e-6)
    np.testing.assert_allclose(of('normcos', [[3, 4], [-3, -4]], head), [-4, 3], atol=1e-6)


def test_plainly():
    best = cosines(H.astype(float), W.astype(float)).max(axis=1)
    np.testing.assert_allclose(of('maxcos', H), -best, atol=1e-6)
    np.testing.assert_allclose(of('normcos', H), -best * np.linalg.norm(H, axis=1), atol=1e-5)


def test_maxcos_is_within_1_and_0_without_a_direction():
    along = np.concatenate([W.T * a for a in np.logspace(-3, 3, 50)])
    assert of('maxcos', along).min() == -1.0
    np.testing.assert_allclose(of('maxcos', along), -1.0, atol=1e-6)
    assert of('maxcos', -W[:, :1].T, {'kernel': W[:, :1]}) == 1.0
    np.testing.assert_array_equal(of('maxcos', np.zeros((1, 6))), 0.0)
    np.testing.assert_array_equal(of('normcos', np.zeros((1, 6))), 0.0)


def test_lengths_of_features_and_weights():
    longer = HEAD | {'kernel': W * np.float32([1, 2, 3, 4])}
    np.testing.assert_allclose(of('maxcos', 7 * H, longer), of('maxcos', H), atol=1e-6)
    np.testing.assert_allclose(of('normcos', 7 * H, longer), 7 * of('normcos', H), rtol=1e-5)


@pytest.mark.parametrize(('name', 'score'), [('normface', 'maxcos'), ('sphereface', 'normcos')])
def test_they_are_the_largest_logit_of_angular_heads(name, score):
    params = {'kernel': jnp.asarray(W)}
    logits = HEADS[name](num_classes=4).apply({'params': params}, H)
    scale = 30.0 if name == 'normface' else 1.0
    got = of(score, H, last_layer(params))
    np.testing.assert_allclose(scale * got, -np.max(logits, axis=1), rtol=1e-5, atol=1e-5)
