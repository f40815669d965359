import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood.errors import UserError
from jaxood.models import Classifier
from jaxood.models.backbones import DenseNet
from jaxood.models.heads import Linear


def test_densenet_bc_100_12_is_the_published_one():
    """Huang et al., Table 2: 0.8 M parameters; 769,162 in deeplearning-wisc/dice's checkpoint."""
    model = Classifier(DenseNet(), Linear(10))
    images = jnp.zeros((2, 32, 32, 3))

    def run(key):
        variables = model.init(key, images, train=False)
        return variables, model.apply(variables, images, train=False)

    variables, outputs = jax.eval_shape(run, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(variables['params'])) == 769_162
    assert outputs['features'].shape == (2, 342)
    shapes = [m.shape for m in outputs['maps']]
    assert shapes == [(2, 32, 32, 216), (2, 16, 16, 300), (2, 8, 8, 342)]


@pytest.fixture(scope='module')
def tiny():
    """A network, its variables, images."""
    net = DenseNet(depth=16, growth=3)
    x = jax.random.normal(jax.random.key(0), (2, 12, 12, 3))
    return net, jax.jit(lambda: net.init(jax.random.key(1), x, train=False))(), x


def test_a_layer_appends_and_leaves_what_was_there(tiny):
    """The stem's channels come first in the first block's map, untouched."""
    net, variables, x = tiny
    _, maps = net.apply(variables, x, train=False)
    kernel = variables['params']['conv1']['kernel']
    stem = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    assert maps[0].shape[-1] == 6 + 2 * 3
    np.testing.assert_allclose(maps[0][..., :6], stem, atol=1e-5)


@pytest.mark.parametrize('stage', [0, 1, 2])
def test_it_goes_on_from_a_stages_map(tiny, stage):
    net, variables, x = tiny
    features, maps = net.apply(variables, x, train=False)
    resumed, later = net.apply(variables, maps[stage], train=False, after=stage)
    np.testing.assert_allclose(resumed, features, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, later, maps[stage + 1 :])


@pytest.mark.parametrize('depth', [4, 12, 99])
def test_a_depth_that_is_none(depth):
    with pytest.raises(UserError, match=r'6 n \+ 4'):
        DenseNet(depth=depth)
