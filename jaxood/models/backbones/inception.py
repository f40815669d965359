"""Inception-v3: torchvision's, and the one by whose features FID is defined."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from jaxood.errors import UserError
from jaxood.models import layouts
from jaxood.models.layers import ReLU, batch_norm, conv1x1, conv3x3
from jaxood.models.layouts import Layout, Preprocessing, kernel

SMALLEST = 75  # pixels a side, of which the last group leaves one
CLASSES = 1008  # of the TensorFlow graph: ImageNet's and eight that are never used


class Conv(NamedTuple):
    """Convolution without bias, BatchNorm, ReLU.

    Attributes:
        name: as checkpoints have it.
    """

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = 'SAME'


# 3x3 windows. 'mean' is for `average` to say.
POOLS = {
    'halve': partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding='VALID'),
    'max': partial(nn.max_pool, window_shape=(3, 3), strides=(1, 1), padding='SAME'),
    'mean': partial(nn.avg_pool, window_shape=(3, 3), strides=(1, 1), padding='SAME'),
}

# A step is a convolution, a pooling by its name, a tuple of steps one after the other, or a list of
# steps side by side, whose results are concatenated.
Step = Conv | str | tuple | list


def plan(variant: str) -> tuple[Step, ...]:
    """The groups of one resolution: strides 4, 8, 16, 32. Szegedy et al. 2016, Table 1."""
    stem = (
        Conv('Conv2d_1a_3x3', 32, (3, 3), 2, 'VALID'),
        Conv('Conv2d_2a_3x3', 32, (3, 3), 1, 'VALID'),
        Conv('Conv2d_2b_3x3', 64, (3, 3)),
        'halve',
        Conv('Conv2d_3b_1x1', 80),
        Conv('Conv2d_4a_3x3', 192, (3, 3), 1, 'VALID'),
    )
    last = 'max' if variant == 'fid' else 'mean'
    return (
        stem,
        ('halve', _a('Mixed_5b', 32), _a('Mixed_5c', 64), _a('Mixed_5d', 64)),
        (
            _b('Mixed_6a'),
            _c('Mixed_6b', 128),
            _c('Mixed_6c', 160),
            _c('Mixed_6d', 160),
            _c('Mixed_6e', 192),
        ),
        (_d('Mixed_7a'), _e('Mixed_7b', 'mean'), _e('Mixed_7c', last)),
    )


def _a(block, pooled):
    """Figure 5 of the paper, with a 5x5 convolution."""
    conv = partial(_conv, block)
    return [
        conv('branch1x1', 64),
        (conv('branch5x5_1', 48), conv('branch5x5_2', 64, (5, 5))),
        (
            conv('branch3x3dbl_1', 64),
            conv('branch3x3dbl_2', 96, (3, 3)),
            conv('branch3x3dbl_3', 96, (3, 3)),
        ),
        ('mean', conv('branch_pool', pooled)),
    ]


def _b(block):
    """Figure 10: half the resolution."""
    conv = partial(_conv, block)
    return [
        conv('branch3x3', 384, (3, 3), 2, 'VALID'),
        (
            conv('branch3x3dbl_1', 64),
            conv('branch3x3dbl_2', 96, (3, 3)),
            conv('branch3x3dbl_3', 96, (3, 3), 2, 'VALID'),
        ),
        'halve',
    ]


def _c(block, inner):
    """Figure 6, n = 7."""
    conv = partial(_conv, block)
    return [
        conv('branch1x1', 192),
        (
            conv('branch7x7_1', inner),
            conv('branch7x7_2', inner, (1, 7)),
            conv('branch7x7_3', 192, (7, 1)),
        ),
        (
            conv('branch7x7dbl_1', inner),
            conv('branch7x7dbl_2', inner, (7, 1)),
            conv('branch7x7dbl_3', inner, (1, 7)),
            conv('branch7x7dbl_4', inner, (7, 1)),
            conv('branch7x7dbl_5', 192, (1, 7)),
        ),
        ('mean', conv('branch_pool', 192)),
    ]


def _d(block):
    """Half the resolution again."""
    conv = partial(_conv, block)
    return [
        (conv('branch3x3_1', 192), conv('branch3x3_2', 320, (3, 3), 2, 'VALID')),
        (
            conv('branch7x7x3_1', 192),
            conv('branch7x7x3_2', 192, (1, 7)),
            conv('branch7x7x3_3', 192, (7, 1)),
            conv('branch7x7x3_4', 192, (3, 3), 2, 'VALID'),
        ),
        'halve',
    ]


def _e(block, pool):
    """Figure 7."""
    conv = partial(_conv, block)
    return [
        conv('branch1x1', 320),
        (
            conv('branch3x3_1', 384),
            [conv('branch3x3_2a', 384, (1, 3)), conv('branch3x3_2b', 384, (3, 1))],
        ),
        (
            conv('branch3x3dbl_1', 448),
            conv('branch3x3dbl_2', 384, (3, 3)),
            [conv('branch3x3dbl_3a', 384, (1, 3)), conv('branch3x3dbl_3b', 384, (3, 1))],
        ),
        (pool, conv('branch_pool', 192)),
    ]


def _conv(block, name, *more):
    return Conv(f'{block}.{name}', *more)


def convolutions(step: Step) -> Iterator[Conv]:
    """All those in a step."""
    if isinstance(step, Conv):
        yield step
    elif not isinstance(step, str):
        for inner in step:
            yield from convolutions(inner)


class Inception(nn.Module):
    """Inception-v3. Szegedy et al. 2016 (arXiv:1512.00567), Table 1; without the auxiliary head.

    `maps` are what the groups of one resolution end with: Conv2d_4a, Mixed_5d, 6e and 7c at strides
    4, 8, 16 and 32 (of 299 x 299 pixels 71, 35, 17 and 8 a side; 192, 288, 768 and 2048 channels).
    D = 2048. `keys` is not used: dropout belongs to training an Inception from scratch, and here it
    is taken as trained (our choice).

    Attributes:
        variant: 'torchvision', or 'fid' for TensorFlow's graph of 2015-12-05, which FID is computed
            with: its average pooling does not count the padding, and in Mixed_7c it pools maxima
            instead (mseitzer/pytorch-fid, inception.py). The arrays have the same names and shapes.
        width: factor of all channels, a multiple of 1/16; 1 is the published network.
    """

    variant: str = 'torchvision'
    width: float = 1.0
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def __post_init__(self):
        if self.variant not in ('fid', 'torchvision'):
            raise UserError(
                f"variant={self.variant!r} is not known. Set 'fid' (the features that FID is "
                "defined by) or 'torchvision'."
            )
        if self.width <= 0 or (16 * self.width) % 1:
            raise UserError(
                f'width={self.width} leaves no whole numbers of channels. Set a multiple of 1/16, '
                'such as 1, 0.5 or 0.0625.'
            )
        super().__post_init__()

    @property
    def map_names(self) -> tuple[str, ...]:
        return ('Conv2d_4a', 'Mixed_5d', 'Mixed_6e', 'Mixed_7c')

    @nn.compact
    def __call__(self, images, *, train: bool, keys=None, after: int | None = None):
        if after is None and min(images.shape[1:3]) < SMALLEST:
            raise UserError(
                f'Inception needs images of at least {SMALLEST} x {SMALLEST} pixels, these have '
                f'{images.shape[1]} x {images.shape[2]}. Resize them: it was trained on 299 x 299.'
            )
        average = partial(POOLS['mean'], count_include_pad=self.variant == 'torchvision')
        pools = POOLS | {'mean': average}

        def convolve(conv, x):
            name = conv.name.replace('.', '_')
            layer = conv1x1
            if conv.kernel != (1, 1):
                layer = partial(conv3x3, kernel_size=conv.kernel, padding=conv.padding)
            channels = round(conv.channels * self.width)
            x = layer(channels, strides=conv.stride, dtype=self.dtype, name=f'{name}_conv')(x)
            norm = batch_norm(train, self.dtype, self.axis_name, f'{name}_bn', epsilon=1e-3)
            return ReLU()(norm(x))

        def follow(step, x):
            if isinstance(step, Conv):
                return convolve(step, x)
            if isinstance(step, str):
                return pools[step](x)
            if isinstance(step, list):
                return jnp.concatenate([follow(side, x) for side in step], axis=-1)
            for inner in step:
                x = follow(inner, x)
            return x

        x, maps = images, []
        for i, group in enumerate(plan(self.variant)):
            if after is None or i > after:
                x = follow(group, x)
                maps.append(x)
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32), tuple(maps)


def _recognise(variant, shapes):
    """Only the number of classes tells the variants apart."""
    first = shapes.get('Conv2d_1a_3x3.conv.weight', ())
    if len(first) != 4 or first[0] % 2 or 'Mixed_7c.branch_pool.conv.weight' not in shapes:
        return None
    if (shapes.get('fc.weight', ())[:1] == (CLASSES,)) != (variant == 'fid'):
        return None
    return dict(variant=variant, width=first[0] / 32)


def _targets(keywords, shapes):
    found = layouts.head('fc')
    for conv in convolutions(plan(keywords['variant'])):
        ours = conv.name.replace('.', '_')
        found[f'{conv.name}.conv.weight'] = kernel(f'{ours}_conv')
        found |= layouts.batch_norm(f'{conv.name}.bn', f'{ours}_bn')
    return found


def _preprocessing(resize):
    """Pixels to [-1, 1].

    torchvision's weights come with ImageNet's mean and standard deviation, and a network that takes
    these back and does the same (`transform_input`). pytorch-fid stretches pictures to 299 x 299 by
    bilinear interpolation without antialiasing or rounding; ours is antialiased, which makes a
    difference for pictures above 299 pixels, rounded to whole values of 255, and cuts the middle
    out of pictures that are not square.
    """
    return lambda num_classes: Preprocessing(
        299, resize, 'bilinear', mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )


LAYOUTS = (
    Layout(
        'torchvision',
        'inception',
        partial(_recognise, 'torchvision'),
        _targets,
        _preprocessing(342),
        ignored=(r'.*num_batches_tracked', r'AuxLogits\..*'),
    ),
    Layout(  # pt_inception-2015-12-05-6726825d.pth
        'mseitzer/pytorch-fid',
        'inception',
        partial(_recognise, 'fid'),
        _targets,
        _preprocessing(None),
    ),
)
