import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import make_classifiers, make_inception
from reference.make_inception import NETWORKS, inception
from reference.make_vision import arrays

from jaxood.errors import UserError
from jaxood.models import Classifier, pretrained
from jaxood.models.backbones import LAYOUTS, Inception
from jaxood.models.heads import Linear

FID = 'mseitzer/pytorch-fid'
TINY = Inception(width=1 / 16)


@pytest.fixture(scope='module', params=NETWORKS)
def network(request):
    """A source, and the conversion of its checkpoint."""
    return request.param, pretrained.convert(arrays(NETWORKS[request.param][0]))


@pytest.fixture(scope='module')
def logits(network):
    _, found = network
    apply = jax.jit(lambda v, x: found.build().apply(v, x, train=False)['logits'])
    return apply(found.variables, make_inception.images())


def test_names_tell_the_network(network):
    source, found = network
    assert found.source == source
    assert found.backbone == {'name': 'inception', **NETWORKS[source][1]}
    assert found.num_classes == {'torchvision': 5, FID: 1008}[source]


def test_logits_are_those_of_pytorch(network, logits):
    """Golden logits of the restatement in PyTorch."""
    want = np.load(make_inception.LOGITS)[network[0]]
    np.testing.assert_allclose(logits, want, atol=1e-4 * np.abs(want).max())


if importlib.util.find_spec('torch'):

    def test_logits_are_those_of_pytorch_now(network, logits):
        want = make_inception.logits(network[0])
        np.testing.assert_allclose(logits, want, atol=1e-4 * np.abs(want).max())


def shapes(variant, classes):
    model = Classifier(Inception(variant=variant), Linear(classes))

    def run(key, images):
        variables = model.init(key, images, train=False)
        return variables, model.apply(variables, images, train=False)

    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(run, key, jax.ShapeDtypeStruct((2, 299, 299, 3), jnp.float32))


@pytest.mark.parametrize(('variant', 'classes'), [('torchvision', 1000), ('fid', 1008)])
def test_published_sizes(variant, classes):
    """27,161,264 parameters in torchvision's documentation, the auxiliary head's among them."""
    auxiliary = 768 * 128 + 2 * 128 + 25 * 128 * 768 + 2 * 768 + 769 * 1000
    variables, outputs = shapes(variant, classes)
    count = sum(x.size for x in jax.tree.leaves(variables['params']))
    assert count == 27_161_264 - auxiliary + 2049 * (classes - 1000)
    want = [(71, 192), (35, 288), (17, 768), (8, 2048)]
    assert [m.shape for m in outputs['maps']] == [(2, side, side, c) for side, c in want]
    assert outputs['features'].shape == (2, 2048)


def sources(theirs):
    return [layout.source for layout in LAYOUTS if layout.recognise(theirs) is not None]


def test_the_variants_and_other_networks_are_told_apart():
    assert sources(inception(classes=1008)) == [FID]
    for classes in (10, 1000):
        for auxiliary in (False, True):
            assert sources(inception(classes=classes, auxiliary=auxiliary)) == ['torchvision']
    for _, theirs, _ in make_classifiers.NETWORKS.values():
        assert not {'inception'} & {
            layout.backbone for layout in LAYOUTS if layout.recognise(theirs) is not None
        }


def test_the_whole_published_network_has_its_names():
    """Full-size names and shapes of both sources, one by one, less what is not used."""
    for source, theirs in (
        ('torchvision', inception(classes=1000, auxiliary=True)),
        (FID, inception(classes=1008)),
    ):
        layout = next(p for p in LAYOUTS if (p.backbone, p.source) == ('inception', source))
        unused = ('AuxLogits.', 'num_batches_tracked')
        used = {name for name in theirs if not any(part in name for part in unused)}
        keywords = layout.recognise(theirs)
        assert keywords['width'] == 1.0
        assert layout.targets(keywords, theirs).keys() == used


def test_what_is_missing_is_told():
    given = arrays(NETWORKS['torchvision'][0])
    del given['Mixed_6c.branch7x7_2.conv.weight']
    with pytest.raises(UserError, match=r'Mixed_6c\.branch7x7_2\.conv\.weight +missing'):
        pretrained.convert(given)


def test_preparation_of_images():
    """torchvision's network turns ImageNet's constants back: ((x - m)/s)(s/½) + (m - ½)/½."""
    found = {p.source: p.preprocessing(1000) for p in LAYOUTS if p.backbone == 'inception'}
    assert {k: (p.size, p.resize, p.interpolation) for k, p in found.items()} == {
        'torchvision': (299, 342, 'bilinear'),
        FID: (299, None, 'bilinear'),
    }
    pixels = np.linspace(0.0, 1.0, 5)
    for p in found.values():
        for c, (m, s) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
            theirs = (pixels - m) / s * (s / 0.5) + (m - 0.5) / 0.5
            np.testing.assert_allclose((pixels - p.mean[c]) / p.std[c], theirs, atol=1e-12)


@pytest.fixture(scope='module')
def variables():
    """Of `TINY`: `init` would take half a minute to compile."""
    found = pretrained.convert(arrays(NETWORKS['torchvision'][0]))
    return {kind: found.variables[kind]['backbone'] for kind in found.variables}


def test_it_goes_on_from_a_groups_map(variables):
    x = jax.random.normal(jax.random.key(0), (2, 75, 80, 3))
    features, maps = TINY.apply(variables, x, train=False)
    assert len(maps) == 4
    for i in range(4):
        resumed, later = TINY.apply(variables, maps[i], train=False, after=i)
        np.testing.assert_allclose(resumed, features, atol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, later, maps[i + 1 :])


def test_the_variants_differ_only_at_edges_and_in_the_last_pool(variables):
    """Before the first mean they are one; after three blocks the padding has come 1 + 2 + 2 in."""
    x = jax.random.normal(jax.random.key(0), (1, 139, 139, 3))
    _, ours = TINY.apply(variables, x, train=False)
    _, fid = TINY.clone(variant='fid').apply(variables, x, train=False)
    np.testing.assert_array_equal(ours[0], fid[0])
    assert ours[1].shape[1:3] == (15, 15)
    np.testing.assert_allclose(ours[1][:, 5:-5, 5:-5], fid[1][:, 5:-5, 5:-5], atol=1e-5)
    assert np.abs(ours[1] - fid[1])[:, 4].max() > 1e-3
    assert np.abs(ours[3] - fid[3]).max() > 1e-3


@pytest.mark.parametrize(
    ('keywords', 'message'),
    [
        (dict(variant='tf'), "Set 'fid'"),
        (dict(width=0.1), 'multiple of 1/16'),
        (dict(width=0), 'multiple of 1/16'),
    ],
)
def test_keywords_that_are_none(keywords, message):
    with pytest.raises(UserError, match=message):
        Inception(**keywords)


def test_images_that_are_too_small():
    for shape in ((1, 32, 32, 3), (1, 75, 74, 3)):
        with pytest.raises(UserError, match='at least 75 x 75 pixels.*299 x 299'):
            jax.eval_shape(lambda x: TINY.init(jax.random.key(0), x, train=False), jnp.ones(shape))
