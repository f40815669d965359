from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxood.errors import UserError
from jaxood.models import Classifier, layers
from jaxood.models.backbones import WRN, wrn
from jaxood.models.heads import Linear
from jaxood.rng import key_each


def shapes(backbone, image, classes=10):
    model = Classifier(backbone, Linear(classes))

    def run(key, images):
        variables = model.init(key, images, train=False)
        return variables, model.apply(variables, images, train=False)

    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(run, key, jax.ShapeDtypeStruct((2, *image), jnp.float32))


def test_wrn_40_2_is_that_of_outlier_exposure():
    variables, outputs = shapes(WRN(), (32, 32, 3))
    assert sum(x.size for x in jax.tree.leaves(variables['params'])) == 2_243_546
    assert outputs['features'].shape == (2, 128)
    assert outputs['logits'].shape == (2, 10)
    assert [m.shape for m in outputs['maps']] == [(2, 32, 32, 32), (2, 16, 16, 64), (2, 8, 8, 128)]
    blocks = [name for name in variables['params']['backbone'] if name.startswith('block')]
    assert len(blocks) == 18
    shortcuts = [b for b in blocks if 'shortcut' in variables['params']['backbone'][b]]
    assert shortcuts == ['block1_layer0', 'block2_layer0', 'block3_layer0']


@pytest.mark.parametrize('image', [(8, 8, 1), (28, 20, 1), (9, 7, 5)])
def test_any_image_will_do(image):
    _, outputs = shapes(WRN(depth=10, width=1), image)
    assert outputs['features'].shape == (2, 64)


@pytest.mark.parametrize('depth', [4, 12, 41])
def test_a_depth_that_is_none(depth):
    with pytest.raises(UserError, match='6 n \\+ 4'):
        WRN(depth=depth)


def test_strided_convolutions_are_centred_as_in_pytorch():
    """Padding 1 on both sides: with a kernel that picks its centre, output i reads input 2i."""
    kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    x = jnp.arange(64.0).reshape(1, 8, 8, 1)
    y = layers.conv3x3(1, strides=2).apply({'params': {'kernel': kernel}}, x)
    np.testing.assert_array_equal(y, x[:, ::2, ::2])


def test_a_block_adds_to_its_input():
    """With the second convolution at zero a block is its shortcut: the input, untouched."""
    block = wrn.Block(channels=4, stride=1, dropout=0.0, dtype=jnp.float32, axis_name=None)
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
    variables = block.init(jax.random.key(1), x, train=False, keys=None)
    params = variables['params'] | {'conv2': {'kernel': jnp.zeros((3, 3, 4, 4))}}
    y = block.apply(variables | {'params': params}, x, train=False, keys=None)
    np.testing.assert_array_equal(y, x)


def test_initial_weights_are_he_by_fan_out():
    variables = layers.conv3x3(64, strides=2).init(jax.random.key(0), jnp.zeros((1, 4, 4, 32)))
    assert np.std(variables['params']['kernel']) == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.02)


def test_batch_norm_has_the_constants_of_pytorch():
    """eps 1e-5; running statistics .9 · old + .1 · batch, from mean 0 and variance 1."""
    x = 0.01 * jax.random.normal(jax.random.key(0), (64, 2, 2, 3)) + 0.1
    norm = layers.batch_norm(True, jnp.float32, None, 'bn')
    y, after = norm.apply(norm.init(jax.random.key(1), x), x, mutable=['batch_stats'])
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), atol=1e-3)
    np.testing.assert_allclose(after['batch_stats']['mean'], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(after['batch_stats']['var'], 0.9 + 0.1 * var, rtol=1e-5)


def test_dropout_belongs_to_the_row():
    """Rows carry their masks along when the batch is permuted; eval mode has none."""
    net = WRN(depth=10, width=1, base=4, dropout=0.5)
    x = jax.random.normal(jax.random.key(0), (6, 8, 8, 1))
    variables = jax.jit(lambda: net.init(jax.random.key(1), x, train=False))()
    keys = key_each(jax.random.key(2), jnp.arange(6))

    @partial(jax.jit, static_argnames='train')
    def features(x, keys, train=True):
        out = net.apply(variables, x, train=train, keys=keys, mutable=['batch_stats'])
        return out[0][0]

    h, order = features(x, keys), jnp.array([3, 0, 5, 1, 2, 4])
    np.testing.assert_allclose(features(x[order], keys[order]), h[order], atol=1e-5)
    assert np.abs(features(x, None) - h).max() > 1e-3
    assert np.abs(features(x, key_each(jax.random.key(3), jnp.arange(6))) - h).max() > 1e-3
    np.testing.assert_array_equal(features(x, keys, train=False), features(x, None, train=False))


def test_it_goes_on_from_a_stages_map():
    net = WRN(depth=10, width=1, base=4)
    x = jax.random.normal(jax.random.key(0), (2, 9, 9, 3))
    variables = jax.jit(lambda: net.init(jax.random.key(1), x, train=False))()
    features, maps = net.apply(variables, x, train=False)
    for stage in range(3):
        resumed, later = net.apply(variables, maps[stage], train=False, after=stage)
        np.testing.assert_allclose(resumed, features, atol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, later, maps[stage + 1 :])


@pytest.mark.parametrize(('depth', 'width', 'base'), [(40, 2, 16), (28, 10, 16), (10, 1, 4)])
def test_its_keywords_are_read_from_shapes(depth, width, base):
    """Layout and network agree on every array, also where a block needs no shortcut."""
    layout, keywords = wrn.LAYOUTS[0], dict(depth=depth, width=width, base=base)
    names = layout.targets(keywords, {})
    theirs = dict.fromkeys(names, ()) | {'conv1.weight': (base, 3, 3, 3)}
    theirs['block1.layer.0.conv1.weight'] = (base * width, base, 3, 3)
    assert layout.recognise(theirs) == keywords
    variables, _ = shapes(WRN(**keywords), (32, 32, 3))
    assert {t.path for t in names.values()} == flatten_dict(variables, sep='/').keys()
