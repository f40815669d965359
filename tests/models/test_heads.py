import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood.models import Classifier
from jaxood.models.backbones import CNN
from jaxood.models.heads import HEADS

FEATURES = jax.random.normal(jax.random.key(0), (5, 16))


def init(name):
    head = HEADS[name](num_classes=3)
    return head, head.init(jax.random.key(1), FEATURES)


def test_linear_is_an_affine_map():
    head, variables = init('linear')
    kernel, bias = variables['params']['kernel'], jnp.array([1.0, 2.0, 3.0])
    assert np.abs(kernel).max() <= 1 / np.sqrt(16)  # PyTorch's default
    assert np.std(kernel) == pytest.approx(1 / np.sqrt(3 * 16), rel=0.3)
    got = head.apply({'params': {'kernel': kernel, 'bias': bias}}, FEATURES)
    np.testing.assert_allclose(got, FEATURES @ kernel + bias, atol=1e-5)


@pytest.mark.parametrize('name', HEADS)
def test_a_row_without_target_has_the_logits_of_inference(name):
    head, variables = init(name)
    inference = head.apply(variables, FEATURES)
    assert inference.shape == (5, 3)
    assert inference.dtype == jnp.float32
    no_target = head.apply(variables, FEATURES, jnp.full(5, -1), 7)
    np.testing.assert_allclose(no_target, inference, atol=1e-6)


@pytest.mark.parametrize('name', HEADS)
def test_classifier_applies_its_head_to_its_features(name):
    model = Classifier(CNN(widths=(4, 16)), HEADS[name](num_classes=3))
    images = jax.random.normal(jax.random.key(2), (5, 8, 8, 1))
    variables = model.init(jax.random.key(3), images, train=False)
    outputs = model.apply(variables, images, train=False)
    assert variables['params'].keys() == {'backbone', 'head'}
    own = {c: tree['head'] for c, tree in variables.items() if 'head' in tree}
    logits = HEADS[name](num_classes=3).apply(own, outputs['features'])
    np.testing.assert_allclose(outputs['logits'], logits, atol=1e-6)
