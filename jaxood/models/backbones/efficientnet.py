"""EfficientNets."""

import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from jaxood.errors import UserError
from jaxood.models import layers
from jaxood.models.layers import conv1x1, he
from jaxood.models.layouts import (
    Layout,
    Preprocessing,
    Shapes,
    Target,
    batch_norm,
    conv,
    head,
    same,
)

# He et al. 2015 by fan-out; a depthwise kernel's output sees one channel, as its input does.
he_depthwise = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')

# Expansion, kernel, stride, channels, blocks of stages 2-8 of B0: Tan & Le 2019, Table 1.
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


class Shape(NamedTuple):
    """One MBConv block; `stage` (from 1) and `layer` (from 0) are its place."""

    stage: int
    layer: int
    expansion: int
    kernel: int
    stride: int
    channels: int


def scaled(channels: int, width: float) -> int:
    """channels · width, to the nearest multiple of 8 that is at most 10 % below it."""
    goal = channels * width
    rounded = max(8, int(goal + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * goal else rounded + 8


def plan(width: float, depth: float) -> tuple[tuple[Shape, ...], ...]:
    """The blocks, in groups of one resolution: strides 2, 4, 8, 16, 32."""
    groups = []
    for stage, (expansion, kernel, stride, channels, number) in enumerate(STAGES, start=1):
        blocks = tuple(
            Shape(
                stage=stage,
                layer=layer,
                expansion=expansion,
                kernel=kernel,
                stride=stride if layer == 0 else 1,
                channels=scaled(channels, width),
            )
            for layer in range(math.ceil(depth * number))
        )
        if stride == 1 and groups:
            groups[-1] += blocks
        else:
            groups.append(blocks)
    return tuple(groups)


class ConvNorm(nn.Module):
    """Convolution without bias, then BatchNorm; depthwise where `depthwise` is set."""

    channels: int
    kernel: int = 1
    stride: int = 1
    depthwise: bool = False
    padding: str = 'torch'
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train):
        pad = self.kernel // 2
        if self.kernel == 1:
            x = conv1x1(self.channels, dtype=self.dtype, name='conv')(x)
        else:
            x = nn.Conv(
                self.channels,
                (self.kernel, self.kernel),
                self.stride,
                padding=((pad, pad), (pad, pad)) if self.padding == 'torch' else 'SAME',
                feature_group_count=self.channels if self.depthwise else 1,
                use_bias=False,
                kernel_init=he_depthwise if self.depthwise else he,
                dtype=self.dtype,
                name='conv',
            )(x)
        norm = layers.batch_norm(train, self.dtype, self.axis_name, 'bn', epsilon=self.epsilon)
        return norm(x)


class MBConv(nn.Module):
    """Expand 1x1, depthwise, squeeze and excite, project 1x1, plus the input where shapes agree.

    The squeeze has a quarter of the block's *input* channels.
    """

    shape: Shape
    layer: Callable[..., ConvNorm]  # all but its channels is set
    dtype: Any

    @nn.compact
    def __call__(self, x, *, train):
        pointwise = partial(nn.Conv, kernel_size=(1, 1), kernel_init=he, dtype=self.dtype)
        wide = self.shape.expansion * x.shape[-1]
        h = x
        if self.shape.expansion > 1:
            h = nn.silu(self.layer(wide, name='expand')(h, train=train))
        depthwise = self.layer(
            wide, self.shape.kernel, self.shape.stride, depthwise=True, name='depthwise'
        )
        h = nn.silu(depthwise(h, train=train))
        gate = jnp.mean(h, axis=(1, 2), keepdims=True)
        gate = nn.silu(pointwise(max(1, x.shape[-1] // 4), name='squeeze')(gate))
        h = h * nn.sigmoid(pointwise(wide, name='excite')(gate))
        h = self.layer(self.shape.channels, name='project')(h, train=train)
        return x + h if h.shape == x.shape else h


class EfficientNet(nn.Module):
    """EfficientNet. Tan & Le 2019 (arXiv:1905.11946), Table 1; the defaults are B4.

    A 3x3 stem with stride 2, seven stages of MBConv blocks, a 1x1 head convolution to four times
    the last stage's channels, global average pooling; every BatchNorm but the blocks' last is
    followed by SiLU. `maps`: the last block's output at each of strides 2, 4, 8, 16, 32 (of B4 the
    blocks 1, 5, 9, 21, 31 of 32, counted from 0: DLSR's taps), then the head convolution's, which
    is pooled into `features`. `keys` is not used: drop path and dropout belong to training an
    EfficientNet from scratch, and here it is taken as trained (our choice).

    Attributes:
        width: factor of the channels, which are then rounded to multiples of 8.
        depth: factor of the layers a stage has, rounded up. (width, depth) of B0 to B7: `VARIANTS`.
        padding: 'torch' pads strided convolutions alike on both sides: torchvision's, and timm's
            `efficientnet_*`. 'tf' pads as TensorFlow's 'SAME': timm's `tf_efficientnet_*`, whose
            arrays have the same names and shapes.
        epsilon: of all BatchNorms; 1e-5 in torchvision's B0-B4 and timm's `efficientnet_*`, 1e-3 in
            torchvision's B5-B7 and timm's `tf_efficientnet_*`, as in the paper's code.
    """

    width: float = 1.4
    depth: float = 1.8
    padding: str = 'torch'
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def __post_init__(self):
        if self.padding not in ('torch', 'tf'):
            raise UserError(
                f"padding={self.padding!r} is not known. Set 'torch' (torchvision's networks, and "
                "timm's efficientnet_*) or 'tf' (timm's tf_efficientnet_*)."
            )
        super().__post_init__()

    @property
    def map_names(self) -> tuple[str, ...]:
        """'block1', 'block5', ...: the blocks by their number among all, from 0; then 'head'."""
        last = itertools.accumulate(map(len, plan(self.width, self.depth)))
        return (*(f'block{number - 1}' for number in last), 'head')

    @nn.compact
    def __call__(self, images, *, train: bool, keys=None, after: int | None = None):
        layer = partial(
            ConvNorm,
            padding=self.padding,
            epsilon=self.epsilon,
            dtype=self.dtype,
            axis_name=self.axis_name,
        )
        groups = plan(self.width, self.depth)
        x, maps = images, []
        if after is None:
            stem = layer(scaled(32, self.width), 3, 2, name='stem')
            x = nn.silu(stem(x, train=train))
        for i, group in enumerate(groups):
            if after is not None and i <= after:
                continue
            for shape in group:
                x = MBConv(shape, layer, self.dtype, name=name_of(shape))(x, train=train)
            maps.append(x)
        if after is None or after < len(groups):
            x = nn.silu(layer(4 * groups[-1][-1].channels, name='head')(x, train=train))
            maps.append(x)
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32), tuple(maps)


def name_of(shape: Shape) -> str:
    return f'stage{shape.stage}_layer{shape.layer}'


def _imagenet(size: int, resize: int | None, interpolation: str = 'bicubic') -> Preprocessing:
    return Preprocessing(
        size, resize, interpolation, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )


class Variant(NamedTuple):
    """A published network's factors, and how each source prepares its images."""

    width: float
    depth: float
    torchvision: Preprocessing
    timm: Preprocessing
    tf: Preprocessing


# Factors: the paper's code. torchvision: the default weights' `transforms`. timm: default settings
# of the weights that a name without a tag gets, `efficientnet_b*` and `tf_efficientnet_b*`, at the
# size of their training; B5's stretches the picture rather than cut out its middle.
VARIANTS = (
    Variant(1.0, 1.0, _imagenet(224, 256), _imagenet(224, 256), _imagenet(224, 256)),
    Variant(
        *(1.0, 1.1, _imagenet(240, 255, 'bilinear')),
        _imagenet(240, 266)._replace(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        _imagenet(240, 272),
    ),
    Variant(1.1, 1.2, _imagenet(288, None), _imagenet(256, 292), _imagenet(260, 292)),
    Variant(1.2, 1.4, _imagenet(300, 320), _imagenet(288, 329), _imagenet(300, 331)),
    Variant(1.4, 1.8, _imagenet(380, 384), _imagenet(320, 365), _imagenet(380, 412)),
    Variant(1.6, 2.2, _imagenet(456, None), _imagenet(448, None), _imagenet(456, 488)),
    Variant(1.8, 2.6, _imagenet(528, None), _imagenet(528, 560), _imagenet(528, 560)),
    Variant(2.0, 3.1, _imagenet(600, None), _imagenet(600, 632), _imagenet(600, 632)),
)


class Naming(NamedTuple):
    """One code base's names: ours -> theirs.

    Attributes:
        outer: convolution and BatchNorm of stem and head, and the classifier.
        block: prefix of a block's names, from its `Shape`.
        expanding, plain: a block's layers, with expansion and without; `_bn` is the BatchNorm.
    """

    outer: dict[str, str]
    block: Callable[[Shape], str]
    expanding: dict[str, str]
    plain: dict[str, str]


TORCHVISION = Naming(
    outer={
        'stem': 'features.0.0',
        'stem_bn': 'features.0.1',
        'head': 'features.8.0',
        'head_bn': 'features.8.1',
        'classifier': 'classifier.1',
    },
    block=lambda shape: f'features.{shape.stage}.{shape.layer}.block.',
    expanding={
        'expand': '0.0',
        'expand_bn': '0.1',
        'depthwise': '1.0',
        'depthwise_bn': '1.1',
        'squeeze': '2.fc1',
        'excite': '2.fc2',
        'project': '3.0',
        'project_bn': '3.1',
    },
    plain={
        'depthwise': '0.0',
        'depthwise_bn': '0.1',
        'squeeze': '1.fc1',
        'excite': '1.fc2',
        'project': '2.0',
        'project_bn': '2.1',
    },
)

TIMM = Naming(
    outer={
        'stem': 'conv_stem',
        'stem_bn': 'bn1',
        'head': 'conv_head',
        'head_bn': 'bn2',
        'classifier': 'classifier',
    },
    block=lambda shape: f'blocks.{shape.stage - 1}.{shape.layer}.',
    expanding={
        'expand': 'conv_pw',
        'expand_bn': 'bn1',
        'depthwise': 'conv_dw',
        'depthwise_bn': 'bn2',
        'squeeze': 'se.conv_reduce',
        'excite': 'se.conv_expand',
        'project': 'conv_pwl',
        'project_bn': 'bn3',
    },
    plain={
        'depthwise': 'conv_dw',
        'depthwise_bn': 'bn1',
        'squeeze': 'se.conv_reduce',
        'excite': 'se.conv_expand',
        'project': 'conv_pw',
        'project_bn': 'bn2',
    },
)


def recognise(naming: Naming, keywords: Mapping[str, Any], shapes: Shapes) -> dict[str, Any] | None:
    """`keywords`, if the blocks in this naming are theirs, and the first and last channels."""
    blocks = [block for group in plan(keywords['width'], keywords['depth']) for block in group]
    squeezes = {naming.block(b) + _inner(naming, b)['squeeze'] + '.weight' for b in blocks}
    ending = naming.plain['squeeze'].rpartition('.')[2] + '.weight'
    if squeezes != {name for name in shapes if name.endswith(ending)}:
        return None
    for layer, channels in (
        ('stem', scaled(32, keywords['width'])),
        ('head', 4 * blocks[-1].channels),
    ):
        kernel = shapes.get(f'{naming.outer[layer]}.weight', ())
        if len(kernel) != 4 or kernel[0] != channels:
            return None
    return dict(keywords)


def targets(naming: Naming, keywords: Mapping[str, Any], shapes: Shapes) -> dict[str, Target]:
    """Every array of an EfficientNet in this naming."""
    names = {ours: theirs for ours, theirs in naming.outer.items() if ours != 'classifier'}
    for group in plan(keywords['width'], keywords['depth']):
        for block in group:
            prefix, path = naming.block(block), name_of(block)
            names |= {f'{path}/{o}': prefix + t for o, t in _inner(naming, block).items()}
    found = head(naming.outer['classifier'])
    for ours, theirs in names.items():
        if ours.endswith('_bn'):
            found |= batch_norm(theirs, ours.removesuffix('_bn') + '/bn')
        elif ours.endswith(('squeeze', 'excite')):
            found[f'{theirs}.weight'] = Target(f'params/backbone/{ours}/kernel', conv)
            found[f'{theirs}.bias'] = Target(f'params/backbone/{ours}/bias', same)
        else:
            found[f'{theirs}.weight'] = Target(f'params/backbone/{ours}/conv/kernel', conv)
    return found


def _inner(naming: Naming, block: Shape) -> dict[str, str]:
    return naming.expanding if block.expansion > 1 else naming.plain


def _layout(source: str, naming: Naming, variant: Variant) -> Layout:
    """Padding and epsilon show in no array; they are known by the source."""
    tf = source == TF
    large = source == 'torchvision' and variant.width > 1.4
    keywords = {
        'width': variant.width,
        'depth': variant.depth,
        'padding': 'tf' if tf else 'torch',
        'epsilon': 1e-3 if tf or large else 1e-5,
    }
    prepared = {'torchvision': variant.torchvision, 'timm': variant.timm, TF: variant.tf}[source]
    return Layout(
        source=source,
        backbone='efficientnet',
        recognise=partial(recognise, naming, keywords),
        targets=partial(targets, naming),
        preprocessing=lambda num_classes: prepared,
    )


TF = 'timm tf_efficientnet'
# Of the last two, with the same names, the first is taken for granted.
LAYOUTS = tuple(
    _layout(source, naming, variant)
    for source, naming in (('torchvision', TORCHVISION), ('timm', TIMM), (TF, TIMM))
    for variant in VARIANTS
)
