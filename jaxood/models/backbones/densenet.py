"""Densely connected networks."""

import math
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxood.errors import UserError
from jaxood.models import layouts
from jaxood.models.layers import ReLU, batch_norm, conv1x1, conv3x3
from jaxood.models.layouts import Layout, cifar, count, kernel, openood


class Layer(nn.Module):
    """BN-ReLU-conv 1x1 (4·growth), BN-ReLU-conv 3x3 (growth): what is appended to the input."""

    growth: int
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x, *, train):
        norm = partial(batch_norm, train, self.dtype, self.axis_name)
        h = ReLU()(norm('bn1')(x))
        h = conv1x1(4 * self.growth, dtype=self.dtype, name='conv1')(h)
        h = ReLU()(norm('bn2')(h))
        return conv3x3(self.growth, dtype=self.dtype, name='conv2')(h)


class Transition(nn.Module):
    """BN-ReLU-conv 1x1, then the mean of each 2x2 pixels."""

    channels: int
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x, *, train):
        h = ReLU()(batch_norm(train, self.dtype, self.axis_name, 'bn1')(x))
        h = conv1x1(self.channels, dtype=self.dtype, name='conv1')(h)
        return nn.avg_pool(h, (2, 2), strides=(2, 2))


class DenseNet(nn.Module):
    """DenseNet-BC-depth-growth for small images. Huang et al. 2017 (arXiv:1608.06993), Sec. 4.2.

    A 3x3 stem of 2·growth channels; three dense blocks of (depth - 4)/6 layers, between them
    transitions that keep a share `reduction` of the channels and halve the image; BN, ReLU, global
    average pooling. `maps` are what the blocks give, before the transitions; the last one after BN
    and ReLU. The defaults are DenseNet-BC-100-12 of deeplearning-wisc/dice: D = 342. No dropout:
    `keys` is not used.

    Attributes:
        reduction: the paper's θ.
    """

    depth: int = 100
    growth: int = 12
    reduction: float = 0.5
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def __post_init__(self):
        if (self.depth - 4) % 6 or self.depth < 10:
            raise UserError(
                f'depth={self.depth} is no DenseNet-BC: three blocks of n layers, two convolutions '
                'each, make 6 n + 4. Set depth to 10, 16, 22, 28, 34, 40, ... 100, ...'
            )
        super().__post_init__()

    @property
    def map_names(self) -> tuple[str, ...]:
        return ('block1', 'block2', 'block3')

    @nn.compact
    def __call__(self, images, *, train: bool, keys=None, after: int | None = None):
        x, maps = images, []
        if after is None:
            x = conv3x3(2 * self.growth, dtype=self.dtype, name='conv1')(x)
        for block in range(3):
            if after is not None and block <= after:
                continue
            if block > 0:
                x = Transition(
                    channels=math.floor(x.shape[-1] * self.reduction),
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    name=f'trans{block}',
                )(x, train=train)
            for i in range((self.depth - 4) // 6):
                layer = Layer(
                    growth=self.growth,
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    name=f'block{block + 1}_layer{i}',
                )
                x = jnp.concatenate([x, layer(x, train=train)], axis=-1)
            maps.append(x)
        if maps:
            x = ReLU()(batch_norm(train, self.dtype, self.axis_name, 'bn1')(x))
            maps[-1] = x  # the map that is pooled
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32), tuple(maps)


def _recognise(shapes):
    transition = shapes.get('trans1.conv1.weight', ())
    appended = shapes.get('block1.layer.0.conv2.weight', ())
    n = count(shapes, 'block1.layer.{}.conv2.weight')
    if not len(transition) == len(appended) == 4:
        return None
    kept, channels = transition[:2]
    reduction = 0.5 if kept == channels // 2 else kept / channels
    return dict(depth=6 * n + 4, growth=appended[0], reduction=reduction)


def _targets(keywords, shapes):
    net = DenseNet(**keywords)
    found = {'conv1.weight': kernel('conv1')} | layouts.batch_norm('bn1', 'bn1')
    for block in (1, 2, 3):
        for layer in range((net.depth - 4) // 6):
            theirs, ours = f'block{block}.layer.{layer}', f'block{block}_layer{layer}'
            for n in (1, 2):
                found[f'{theirs}.conv{n}.weight'] = kernel(f'{ours}/conv{n}')
                found |= layouts.batch_norm(f'{theirs}.bn{n}', f'{ours}/bn{n}')
    for i in (1, 2):
        found[f'trans{i}.conv1.weight'] = kernel(f'trans{i}/conv1')
        found |= layouts.batch_norm(f'trans{i}.bn1', f'trans{i}/bn1')
    return found | layouts.head('fc')


def _dice(num_classes):
    """ood_eval.py. The standard deviations are means over images, not over all pixels."""
    return cifar((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


LAYOUTS = (  # one naming: both took over andreasveit/densenet-pytorch
    Layout('deeplearning-wisc/dice', 'densenet', _recognise, _targets, _dice),
    Layout('OpenOOD', 'densenet', _recognise, _targets, openood),
)
