"""What must hold of every backbone. Whoever adds one adds its smallest form to `TINY`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood.models.backbones import BACKBONES

TINY = {
    'wrn': {'depth': 10, 'width': 1, 'base': 4},
    'densenet': {'depth': 10, 'growth': 2},
    'resnet': {'blocks': (1, 1), 'width': 4},
    'cnn': {'widths': (4, 8)},
    'efficientnet': {'width': 0.25, 'depth': 0.2},
    'vit': {'size': 8, 'patch': 4, 'width': 16, 'depth': 2, 'heads': 2, 'mlp': 24},
}
TRANSFORMERS = ('vit',)
LOWEST = {'efficientnet': -0.2785}  # of an activation: SiLU's least value; ReLU's is 0
IMAGES = jax.random.normal(jax.random.key(0), (8, 8, 8, 1)) + 0.5


@pytest.fixture(scope='module', params=BACKBONES)
def name(request):
    return request.param


@pytest.fixture(scope='module')
def variables(name):
    net = BACKBONES[name](**TINY[name])
    return jax.jit(lambda: net.init(jax.random.key(1), IMAGES, train=False))()


def test_features_are_the_mean_of_the_last_map(name, variables):
    """In all but transformers, whose features are a token that is in no map."""
    features, maps = BACKBONES[name](**TINY[name]).apply(variables, IMAGES, train=False)
    if name not in TRANSFORMERS:
        np.testing.assert_allclose(features, maps[-1].mean((1, 2)), atol=1e-6)
        assert (features >= LOWEST.get(name, 0.0)).all()
    assert all(m.shape[0] == 8 and m.ndim == 4 for m in maps)


def test_evaluation_changes_no_statistics_and_sees_no_neighbours(name, variables):
    net = BACKBONES[name](**TINY[name])
    (together, _), after = net.apply(variables, IMAGES, train=False, mutable=['batch_stats'])
    statistics = {k: v for k, v in variables.items() if k != 'params'}  # a transformer has none
    jax.tree.map(np.testing.assert_array_equal, after, statistics)
    alone = [net.apply(variables, IMAGES[i : i + 1], train=False)[0][0] for i in range(3)]
    np.testing.assert_allclose(together[:3], alone, atol=1e-5)


def test_two_devices_with_axis_name_are_one(name, variables):
    """Under pmap, BatchNorm sees the global batch."""
    one = BACKBONES[name](**TINY[name])
    two = BACKBONES[name](**TINY[name], axis_name='devices')

    def apply(net, x):
        (features, _), after = net.apply(variables, x, train=True, mutable=['batch_stats'])
        return features, after

    want, want_after = apply(one, IMAGES)
    halves = IMAGES.reshape(2, 4, *IMAGES.shape[1:])
    got, got_after = jax.pmap(lambda x: apply(two, x), axis_name='devices')(halves)
    # EfficientNet's last BatchNorms see one pixel an image here: eight values, rounding counts.
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=5e-5)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, np.stack([w, w]), atol=5e-5),
        got_after,
        want_after,
    )


def test_bfloat16_computes_with_float32_parameters(name, variables):
    net = BACKBONES[name](**TINY[name], dtype=jnp.bfloat16)
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(1), IMAGES, train=False))
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}
    features, maps = net.apply(variables, IMAGES, train=False)
    assert maps[0].dtype == jnp.bfloat16
    assert features.dtype == jnp.float32
    want, _ = BACKBONES[name](**TINY[name]).apply(variables, IMAGES, train=False)
    np.testing.assert_allclose(features, want, atol=0.05 * np.abs(want).max())
