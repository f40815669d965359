import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import make_vision

from jaxood.errors import UserError
from jaxood.models import Classifier
from jaxood.models.backbones import EfficientNet, efficientnet
from jaxood.models.backbones.efficientnet import LAYOUTS, VARIANTS
from jaxood.models.heads import Linear

NETWORKS = {k: v for k, v in make_vision.NETWORKS.items() if v[0] == 'efficientnet'}
MAKE = {
    'torchvision': make_vision.torchvision_efficientnet,
    'timm': make_vision.timm_efficientnet,
    'timm tf_efficientnet': make_vision.timm_efficientnet,
}
LAYOUT = {layout.source: layout for layout in LAYOUTS}  # names are those of any size


def shapes(width, depth, size):
    model = Classifier(EfficientNet(width=width, depth=depth), Linear(1000))

    def run(key, images):
        variables = model.init(key, images, train=False)
        return variables, model.apply(variables, images, train=False)

    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(run, key, jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32))


def converted(name):
    """(network, variables) of one of make_vision's."""
    _, theirs, keywords = NETWORKS[name]
    keywords = make_vision.SMALL | keywords
    source = name.split()[0]
    targets = LAYOUT[source].targets(keywords, theirs)
    state = make_vision.arrays(theirs)
    assert targets.keys() == state.keys()
    variables = {}
    for key, target in targets.items():
        *parents, leaf = target.path.split('/')
        inner = variables
        for parent in parents:
            inner = inner.setdefault(parent, {})
        assert leaf not in inner
        inner[leaf] = target.convert(state[key])
    return Classifier(EfficientNet(**keywords), Linear(make_vision.CLASSES)), variables


@pytest.fixture(scope='module', params=NETWORKS)
def name(request):
    return request.param


@pytest.fixture(scope='module')
def logits(name):
    model, variables = converted(name)
    images = make_vision.images('efficientnet')
    fresh = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, variables)
    return jax.jit(lambda v, x: model.apply(v, x, train=False)['logits'])(variables, images)


def test_logits_are_those_of_pytorch(name, logits):
    """Each naming converted; golden logits of the restatement in PyTorch."""
    want = np.load(make_vision.LOGITS)[name]
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


if importlib.util.find_spec('torch'):

    def test_logits_are_those_of_pytorch_now(name, logits):
        want = make_vision.logits(name)
        np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


# Parameters with 1000 classes as torchvision documents them.
SIZES = [
    5_288_548,
    7_794_184,
    9_109_994,
    12_233_232,
    19_341_616,
    30_389_784,
    43_040_704,
    66_347_960,
]


@pytest.mark.parametrize('number', [0, 4, 7])
def test_sizes_are_those_of_torchvision(number):
    variant = VARIANTS[number]
    variables, _ = shapes(variant.width, variant.depth, 32)
    assert sum(x.size for x in jax.tree.leaves(variables['params'])) == SIZES[number]


def test_b4_has_the_taps_of_dlsr():
    """Channels 24, 32, 56, 160, 448 at strides 2 to 32: blocks 1, 5, 9, 21, 31 of 32."""
    variables, outputs = shapes(1.4, 1.8, 224)
    channels, sides = (24, 32, 56, 160, 448, 1792), (112, 56, 28, 14, 7, 7)
    assert [m.shape for m in outputs['maps']] == [(2, s, s, c) for s, c in zip(sides, channels)]
    assert outputs['features'].shape == (2, 1792)
    ends = np.cumsum([len(group) for group in efficientnet.plan(1.4, 1.8)]) - 1
    assert ends.tolist() == [1, 5, 9, 21, 31]
    blocks = [n for n in variables['params']['backbone'] if n.startswith('stage')]
    assert len(blocks) == 32


def test_every_map_can_be_gone_on_from():
    net = EfficientNet(width=0.25, depth=0.2)
    images = jax.random.normal(jax.random.key(0), (2, 40, 40, 1))
    variables = jax.jit(lambda: net.init(jax.random.key(1), images, train=False))()
    features, maps = net.apply(variables, images, train=False)
    assert len(maps) == 6
    for i in range(6):
        again, later = net.apply(variables, maps[i], train=False, after=i)
        np.testing.assert_allclose(again, features, atol=1e-5)
        assert len(later) == 5 - i


def recognised(theirs):
    """(source, keywords) of all layouts that know these names."""
    found = [(layout.source, layout.recognise(theirs)) for layout in LAYOUTS]
    return [(source, keywords) for source, keywords in found if keywords is not None]


@pytest.mark.parametrize('number', range(8))
def test_each_variant_is_recognised_and_no_other(number):
    factors = dict(width=VARIANTS[number].width, depth=VARIANTS[number].depth)
    torch, tf = dict(padding='torch', epsilon=1e-5), dict(padding='tf', epsilon=1e-3)
    # torchvision's B5 to B7 have the constant of the paper's code: they come from another port.
    torchvision = torch | dict(epsilon=1e-3) if number >= 5 else torch
    theirs = make_vision.torchvision_efficientnet(**factors, classes=10)
    assert recognised(theirs) == [('torchvision', factors | torchvision)]
    theirs = make_vision.timm_efficientnet(**factors, classes=10)
    want = [('timm', factors | torch), ('timm tf_efficientnet', factors | tf)]
    assert recognised(theirs) == want
    for layout in LAYOUTS:
        known = MAKE[layout.source](**factors, classes=10)
        if (keywords := layout.recognise(known)) is not None:
            assert layout.targets(keywords, known).keys() == known.keys()


def test_what_is_no_efficientnet_is_not_recognised():
    vit = dict(size=224, width=768, depth=12, mlp=3072, patch=16)
    assert not recognised(make_vision.timm_vit(**vit))
    assert not recognised(make_vision.transformers_5_vit(**vit))
    theirs = make_vision.timm_efficientnet(width=1.0, depth=1.0)
    assert not recognised({k: v for k, v in theirs.items() if not k.startswith('blocks.6')})
    assert not recognised(theirs | {'conv_stem.weight': (40, 3, 3, 3)})


def test_preprocessing_of_b4_is_that_of_the_source():
    b4 = [p for p in LAYOUTS if p.recognise(MAKE[p.source](width=1.4, depth=1.8))]
    found = {layout.source: layout.preprocessing(1000) for layout in b4}
    assert {k: (p.size, p.resize) for k, p in found.items()} == {
        'torchvision': (380, 384),
        'timm': (320, 365),
        'timm tf_efficientnet': (380, 412),
    }
    for preprocessing in found.values():
        assert preprocessing.interpolation == 'bicubic'
        assert preprocessing.mean == (0.485, 0.456, 0.406)
        assert preprocessing.std == (0.229, 0.224, 0.225)


def test_padding_is_on_both_sides_or_as_in_tensorflow():
    """A kernel that picks its centre, stride 2, even size: output i reads input 2i, or 2i + 1."""
    kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    x = jnp.arange(64.0).reshape(1, 8, 8, 1)
    for padding, start in (('torch', 0), ('tf', 1)):
        layer = efficientnet.ConvNorm(1, 3, 2, padding=padding, epsilon=0.0)
        variables = layer.init(jax.random.key(0), x, train=False)
        variables['params']['conv']['kernel'] = kernel
        y = layer.apply(variables, x, train=False)
        np.testing.assert_array_equal(y, x[:, start::2, start::2])
    with pytest.raises(UserError, match="'tf'"):
        EfficientNet(padding='same')


def test_excitation_multiplies_and_the_shortcut_adds():
    """A block whose projection is the identity adds to its input what the gate lets through."""
    shape = efficientnet.Shape(stage=1, layer=1, expansion=1, kernel=3, stride=1, channels=8)
    block = efficientnet.MBConv(shape, efficientnet.ConvNorm, jnp.float32)
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 8))
    variables = block.init(jax.random.key(1), x, train=False)
    params = dict(variables['params'])
    assert params['squeeze']['kernel'].shape == (1, 1, 8, 2)  # a quarter of the block's input
    centre = jnp.zeros((3, 3, 1, 8)).at[1, 1].set(1.0)
    params['depthwise'] = params['depthwise'] | {'conv': {'kernel': centre}}
    params['project'] = params['project'] | {'conv': {'kernel': jnp.eye(8)[None, None]}}
    bias = jnp.arange(8.0) - 4.0
    params['excite'] = {'kernel': jnp.zeros((1, 1, 2, 8)), 'bias': bias}
    y = block.apply(variables | {'params': params}, x, train=False)
    np.testing.assert_allclose(y, x + jax.nn.silu(x) * jax.nn.sigmoid(bias), atol=1e-3)
