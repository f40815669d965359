"""What DLSR diffuses: pooled, normalised maps of several layers."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxood.errors import UserError
from jaxood.models import taps
from jaxood.models.backbones import BACKBONES

B4 = ('block1', 'block5', 'block9', 'block21', 'block31', 'head')
RNG = np.random.default_rng(0)
MAPS = [RNG.normal(2.0, 3.0, size=(4, s, s, c)).astype(np.float32) for s, c in ((8, 3), (4, 16))]


def test_a_block_by_hand():
    got = taps.normalised(jnp.array([[1.0, 2.0, 3.0, 6.0]]))
    np.testing.assert_allclose(got, [[-0.9258, -0.4629, 0.0, 1.3887]], atol=1e-4)


def test_every_block_has_mean_0_and_unbiased_deviation_1():
    z_0 = np.asarray(taps.semantics(MAPS, (0, 1), 'avg', (8, 8)), np.float64)
    assert z_0.shape == (4, 19)
    for block in (z_0[:, :3], z_0[:, 3:]):
        np.testing.assert_allclose(block.mean(axis=1), 0.0, atol=1e-4)
        np.testing.assert_allclose(block.std(axis=1, ddof=1), 1.0, atol=1e-4)
        np.testing.assert_allclose((block**2).sum(axis=1), block.shape[1] - 1, rtol=1e-4)


def test_a_layers_scale_and_offset_change_nothing():
    z_0 = taps.semantics(MAPS, (0, 1), 'avg', (8, 8))
    other = taps.semantics([3.0 * MAPS[0] + 5.0, 0.2 * MAPS[1] - 1.0], (0, 1), 'avg', (8, 8))
    np.testing.assert_allclose(z_0, other, atol=2e-4)


@pytest.mark.parametrize(('size', 'image'), [(56, 224), (28, 224), (14, 224), (7, 224), (8, 40)])
def test_grid16_is_the_mean_of_the_map_resized_with_corners_aligned(size, image):
    """SciPy's bilinear samples at 0, ..., size - 1, evenly spaced."""
    at = np.linspace(0, size - 1, image // 16)
    F = RNG.normal(size=(size, size))
    points = np.meshgrid(at, at, indexing='ij')
    want = ndimage.map_coordinates(F, points, order=1, mode='nearest').mean()
    got = taps.pooled(np.float32(F)[None, ..., None], 'grid16', (image, image))
    np.testing.assert_allclose(got, [[want]], atol=1e-5)


def test_poolings_agree_on_maps_of_the_grids_size():
    F = RNG.normal(size=(2, 14, 14, 5)).astype(np.float32)
    a, b = (taps.pooled(F, pool, (224, 224)) for pool in ('avg', 'grid16'))
    np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_allclose(a, F.mean(axis=(1, 2)), atol=1e-6)


def test_the_official_taps_are_the_default():
    names = BACKBONES['efficientnet']().map_names
    assert names == B4
    assert taps.choose('efficientnet', names, None) == (0, 1, 2, 3, 4)
    resnet_50 = BACKBONES['resnet'](blocks=(3, 4, 6, 3), bottleneck=True, stem='imagenet')
    assert taps.choose('resnet', resnet_50.map_names, None) == (0, 1, 2)
    assert taps.choose('vit', BACKBONES['vit']().map_names, None) == (2, 5, 8, 11)
    assert taps.choose('wrn', BACKBONES['wrn']().map_names, ('block3', 'block1')) == (0, 2)


def test_a_backbone_lists_its_taps():
    with pytest.raises(UserError, match=r"'layr3' of 'resnet'.*'layer3'.*Known: layer1, layer2"):
        taps.choose('resnet', ('layer1', 'layer2', 'layer3'), ('layr3',))
    with pytest.raises(UserError, match='one or more different names'):
        taps.choose('resnet', ('layer1',), ('layer1', 'layer1'))
