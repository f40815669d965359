"""Residual networks: those of ImageNet and those of CIFAR."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxood.errors import UserError
from jaxood.models import layouts
from jaxood.models.layers import ReLU, batch_norm, conv1x1, conv3x3
from jaxood.models.layouts import Layout, Preprocessing, cifar, count, kernel, openood


class Block(nn.Module):
    """ReLU(F(x) + x): F is two 3x3 convolutions, or 1x1, 3x3 and 1x1 (`bottleneck`), BN after each.

    The stride is the (first) 3x3 convolution's, as in torchvision ("v1.5"); the paper's bottleneck
    has it in the first 1x1.
    """

    channels: int
    stride: int
    bottleneck: bool
    shortcut: str
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x, *, train):
        norm = partial(batch_norm, train, self.dtype, self.axis_name)
        conv = partial(conv3x3, self.channels, dtype=self.dtype)
        h = x
        if self.bottleneck:
            h = conv1x1(self.channels, dtype=self.dtype, name='conv1')(h)
            h = ReLU()(norm('bn1')(h))
            h = conv(strides=self.stride, name='conv2')(h)
            h = ReLU()(norm('bn2')(h))
            h = conv1x1(4 * self.channels, dtype=self.dtype, name='conv3')(h)
            h = norm('bn3')(h)
        else:
            h = conv(strides=self.stride, name='conv1')(h)
            h = ReLU()(norm('bn1')(h))
            h = conv(name='conv2')(h)
            h = norm('bn2')(h)
        more = h.shape[-1] - x.shape[-1]
        changes = self.stride > 1 or more > 0
        if changes and self.shortcut == 'conv':
            x = conv1x1(h.shape[-1], strides=self.stride, dtype=self.dtype, name='shortcut')(x)
            x = norm('shortcut_bn')(x)
        elif changes:
            x = x[:, :: self.stride, :: self.stride]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (more // 2, more - more // 2)))
        return ReLU()(h + x)


class ResNet(nn.Module):
    """He et al. 2016 (arXiv:1512.03385), Table 1 and Sec. 4.2.

    A stem, then stages of residual blocks with width·(1, 2, 4, ...) channels (four times as many
    come out of a bottleneck); every stage but the first halves the image. `maps` are the stages'
    outputs. No dropout: `keys` is not used. The default is ResNet-18 with a 3x3 stem for small
    images (OpenOOD, kuangliu/pytorch-cifar): D = 512.

        ResNet-18, 34 of ImageNet    stem='imagenet', blocks=(2, 2, 2, 2), (3, 4, 6, 3)
        ResNet-50                    the same as 34 with bottleneck=True: D = 2048
        ResNet-20, 56 of CIFAR       width=16, shortcut='pad', blocks=(3, 3, 3), (9, 9, 9): D = 64

    Attributes:
        blocks: how many in each stage.
        width: channels of the stem and of the first stage.
        bottleneck: blocks of three convolutions rather than two.
        stem: 'cifar', a 3x3 convolution; 'imagenet', 7x7 with stride 2, then 3x3 maxima likewise.
        shortcut: where the shape changes, 'conv', 1x1 and BN (the paper's option B), or 'pad',
            every other pixel and zeros for the new channels, half of them in front (option A).
    """

    blocks: Sequence[int] = (2, 2, 2, 2)
    width: int = 64
    bottleneck: bool = False
    stem: str = 'cifar'
    shortcut: str = 'conv'
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def __post_init__(self):
        for name, known in (('stem', ('cifar', 'imagenet')), ('shortcut', ('conv', 'pad'))):
            if getattr(self, name) not in known:
                raise UserError(f'{name}={getattr(self, name)!r} must be one of {known}.')
        super().__post_init__()

    @property
    def map_names(self) -> tuple[str, ...]:
        return tuple(f'layer{stage + 1}' for stage in range(len(self.blocks)))

    @nn.compact
    def __call__(self, images, *, train: bool, keys=None, after: int | None = None):
        x, maps = images, []
        if after is None:
            if self.stem == 'imagenet':
                conv = partial(conv3x3, kernel_size=(7, 7), strides=2, padding=((3, 3), (3, 3)))
            else:
                conv = conv3x3
            x = conv(self.width, dtype=self.dtype, name='conv1')(x)
            x = ReLU()(batch_norm(train, self.dtype, self.axis_name, 'bn1')(x))
            if self.stem == 'imagenet':
                x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, number in enumerate(self.blocks):
            if after is not None and stage <= after:
                continue
            for i in range(number):
                x = Block(
                    channels=self.width * 2**stage,
                    stride=2 if stage > 0 and i == 0 else 1,
                    bottleneck=self.bottleneck,
                    shortcut=self.shortcut,
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    name=f'layer{stage + 1}_{i}',
                )(x, train=train)
            maps.append(x)
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32), tuple(maps)


def _layout(source: str, *, head: str, shortcut: str, stem: str, stages: int, preprocessing):
    """Public ResNets name their blocks alike, but not the last layer and the shortcuts.

    Args:
        head: name of the last layer.
        shortcut: name of a shortcut; its convolution is 0, its BatchNorm 1.
    """

    def recognise(shapes):
        first = shapes.get('conv1.weight', ())
        size = (7, 7) if stem == 'imagenet' else (3, 3)
        counts = (count(shapes, f'layer{stage}.{{}}.conv1.weight') for stage in itertools.count(1))
        blocks = tuple(itertools.takewhile(bool, counts))
        if first[2:] != size or len(blocks) != stages:
            return None
        if stages == 4 and ('linear.weight' in shapes) != (head == 'linear'):
            return None
        pads = stages == 3 and not any(f'.{shortcut}.' in name for name in shapes)
        return dict(
            blocks=blocks,
            width=first[0],
            bottleneck='layer1.0.conv3.weight' in shapes,
            stem=stem,
            shortcut='pad' if pads else 'conv',
        )

    def targets(keywords, shapes):
        net = ResNet(**keywords)
        found = {'conv1.weight': kernel('conv1')} | layouts.batch_norm('bn1', 'bn1')
        for stage, number in enumerate(net.blocks, 1):
            for i in range(number):
                theirs, ours = f'layer{stage}.{i}', f'layer{stage}_{i}'
                for n in range(1, 4 if net.bottleneck else 3):
                    found[f'{theirs}.conv{n}.weight'] = kernel(f'{ours}/conv{n}')
                    found |= layouts.batch_norm(f'{theirs}.bn{n}', f'{ours}/bn{n}')
                changes = i == 0 and (stage > 1 or net.bottleneck)
                if changes and net.shortcut == 'conv':
                    found[f'{theirs}.{shortcut}.0.weight'] = kernel(f'{ours}/shortcut')
                    found |= layouts.batch_norm(f'{theirs}.{shortcut}.1', f'{ours}/shortcut_bn')
        return found | layouts.head(head)

    return Layout(source, 'resnet', recognise, targets, preprocessing)


def _kuangliu(num_classes):
    """main.py. The standard deviations are means over images, not over all pixels."""
    return cifar((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

SMALL = dict(shortcut='shortcut', stem='cifar')
LARGE = dict(head='fc', shortcut='downsample', stem='imagenet', stages=4)
LAYOUTS = (
    _layout(  # ImageNet's constants on CIFAR-10: trainer.py
        'akamaster/pytorch_resnet_cifar10',
        head='linear',
        stages=3,
        preprocessing=lambda num_classes: cifar(**IMAGENET),
        **SMALL,
    ),
    _layout('OpenOOD', head='fc', stages=4, preprocessing=openood, **SMALL),
    _layout('kuangliu/pytorch-cifar', head='linear', stages=4, preprocessing=_kuangliu, **SMALL),
    _layout(  # the IMAGENET1K_V1 weights; OpenOOD's and pytorch-ood's for ImageNet have these names
        'torchvision',
        preprocessing=lambda num_classes: Preprocessing(224, 256, 'bilinear', **IMAGENET),
        **LARGE,
    ),
    _layout(  # the "a1" weights, which a name without a tag gets, at the size of their training
        'timm',
        preprocessing=lambda num_classes: Preprocessing(224, 235, 'bicubic', **IMAGENET),
        **LARGE,
    ),
)
