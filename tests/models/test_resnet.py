import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood.errors import UserError
from jaxood.models import Classifier
from jaxood.models.backbones import ResNet, resnet
from jaxood.models.heads import Linear

CIFAR = dict(width=16, shortcut='pad')
IMAGENET = dict(stem='imagenet')


@pytest.mark.parametrize(
    ('keywords', 'classes', 'parameters', 'maps'),
    [
        # akamaster's README: 0.27 M and 0.85 M; the other CIFAR one is OpenOOD's
        (CIFAR | dict(blocks=(3, 3, 3)), 10, 269_722, [(32, 16), (16, 32), (8, 64)]),
        (CIFAR | dict(blocks=(9, 9, 9)), 10, 853_018, [(32, 16), (16, 32), (8, 64)]),
        ({}, 10, 11_173_962, [(32, 64), (16, 128), (8, 256), (4, 512)]),
        # torchvision's documentation
        (IMAGENET, 1000, 11_689_512, [(56, 64), (28, 128), (14, 256), (7, 512)]),
        (
            IMAGENET | dict(blocks=(3, 4, 6, 3)),
            1000,
            21_797_672,
            [(56, 64), (28, 128), (14, 256), (7, 512)],
        ),
        (
            IMAGENET | dict(blocks=(3, 4, 6, 3), bottleneck=True),
            1000,
            25_557_032,
            [(56, 256), (28, 512), (14, 1024), (7, 2048)],
        ),
    ],
)
def test_published_sizes(keywords, classes, parameters, maps):
    model = Classifier(ResNet(**keywords), Linear(classes))
    size = 224 if keywords.get('stem') == 'imagenet' else 32
    images = jnp.zeros((2, size, size, 3))

    def run(key):
        variables = model.init(key, images, train=False)
        return variables, model.apply(variables, images, train=False)

    variables, outputs = jax.eval_shape(run, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(variables['params'])) == parameters
    assert [m.shape for m in outputs['maps']] == [(2, side, side, c) for side, c in maps]
    assert outputs['features'].shape == (2, maps[-1][1])


def test_a_padded_shortcut_is_every_other_pixel_between_zeros():
    """With the second convolution at zero a block is the ReLU of its shortcut. Option A."""
    block = resnet.Block(
        channels=8, stride=2, bottleneck=False, shortcut='pad', dtype=jnp.float32, axis_name=None
    )
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
    variables = block.init(jax.random.key(1), x, train=False)
    params = variables['params'] | {'conv2': {'kernel': jnp.zeros((3, 3, 8, 8))}}
    y = block.apply(variables | {'params': params}, x, train=False)
    want = np.zeros((2, 3, 3, 8), np.float32)
    want[..., 2:6] = np.maximum(x[:, ::2, ::2], 0.0)
    np.testing.assert_array_equal(y, want)


TINY = {
    'padded': dict(blocks=(1, 1, 1), width=4, shortcut='pad'),
    'imagenet': dict(blocks=(1, 1, 1), width=4, stem='imagenet', bottleneck=True),
}


@pytest.mark.parametrize('name', TINY)
def test_it_goes_on_from_a_stages_map(name):
    net = ResNet(**TINY[name])
    x = jax.random.normal(jax.random.key(0), (2, 17, 17, 3))
    variables = jax.jit(lambda: net.init(jax.random.key(1), x, train=False))()
    features, maps = net.apply(variables, x, train=False)
    assert len(maps) == 3
    for stage in range(3):
        resumed, later = net.apply(variables, maps[stage], train=False, after=stage)
        np.testing.assert_allclose(resumed, features, atol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, later, maps[stage + 1 :])


@pytest.mark.parametrize('keywords', [dict(stem='7x7'), dict(shortcut='A')])
def test_a_stem_or_shortcut_that_is_none(keywords):
    with pytest.raises(UserError, match='must be one of'):
        ResNet(**keywords)
