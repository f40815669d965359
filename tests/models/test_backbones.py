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
    'inception': {'width': 1 / 16},
}
TRANSFORMERS = ('vit',)
LOWEST = {'efficientnet': -0.2785}  # of an activation: SiLU's least value; ReLU's is 0
SIDE = {'inception': 75}  # of the smallest images it takes, where 8 pixels are too few
# Two devices' rounding differs. Of Inception's 94 BatchNorms the last see eight values as well, and
# each magnifies it; had they not seen the other half, it would be of order 1.
ROUNDING = {'inception': 2e-2}


@pytest.fixture(scope='module', params=BACKBONES)
def name(request):
    return request.param


@pytest.fixture(scope='module')
def images(name):
    side = SIDE.get(name, 8)
    return jax.random.normal(jax.random.key(0), (8, side, side, 1)) + 0.5


@pytest.fixture(scope='module')
def variables(name, images):
    net = BACKBONES[name](**TINY[name])
    key = jax.random.key(1, impl='unsafe_rbg')  # compiles in a third of the time
    return jax.jit(lambda: net.init(key, images, train=False))()


def test_features_are_the_mean_of_the_last_map(name, images, variables):
    """In all but transformers, whose features are a token that is in no map."""
    features, maps = BACKBONES[name](**TINY[name]).apply(variables, images, train=False)
    if name not in TRANSFORMERS:
        np.testing.assert_allclose(features, maps[-1].mean((1, 2)), atol=1e-6)
        assert (features >= LOWEST.get(name, 0.0)).all()
    assert all(m.shape[0] == 8 and m.ndim == 4 for m in maps)
    names = BACKBONES[name](**TINY[name]).map_names
    assert len({*names}) == len(maps)


def test_evaluation_changes_no_statistics_and_sees_no_neighbours(name, images, variables):
    net = BACKBONES[name](**TINY[name])
    (together, _), after = net.apply(variables, images, train=False, mutable=['batch_stats'])
    statistics = {k: v for k, v in variables.items() if k != 'params'}  # a transformer has none
    jax.tree.map(np.testing.assert_array_equal, after, statistics)
    alone = [net.apply(variables, images[i : i + 1], train=False)[0][0] for i in range(3)]
    np.testing.assert_allclose(together[:3], alone, atol=1e-5, rtol=1e-5)


def test_two_devices_with_axis_name_are_one(name, images, variables):
    """Under pmap, BatchNorm sees the global batch."""
    one = BACKBONES[name](**TINY[name])
    two = BACKBONES[name](**TINY[name], axis_name='devices')

    def apply(net, x):
        (features, _), after = net.apply(variables, x, train=True, mutable=['batch_stats'])
        return features, after

    want, want_after = apply(one, images)
    halves = images.reshape(2, 4, *images.shape[1:])
    got, got_after = jax.pmap(lambda x: apply(two, x), axis_name='devices')(halves)
    # EfficientNet's last BatchNorms see one pixel an image here: eight values, rounding counts.
    atol = ROUNDING.get(name, 5e-5)
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=atol)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, np.stack([w, w]), atol=atol),
        got_after,
        want_after,
    )


def test_bfloat16_computes_with_float32_parameters(name, images, variables):
    net = BACKBONES[name](**TINY[name], dtype=jnp.bfloat16)
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(1), images, train=False))
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}
    features, maps = net.apply(variables, images, train=False)
    assert maps[0].dtype == jnp.bfloat16
    assert features.dtype == jnp.float32
    want, _ = BACKBONES[name](**TINY[name]).apply(variables, images, train=False)
    np.testing.assert_allclose(features, want, atol=0.05 * np.abs(want).max())
