"""Wide residual networks."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxood.errors import UserError
from jaxood.models import layouts
from jaxood.models.layers import ReLU, batch_norm, conv1x1, conv3x3, dropout
from jaxood.models.layouts import Layout, cifar, count, kernel, openood
from jaxood.rng import key_for


class Block(nn.Module):
    """BN-ReLU-conv, BN-ReLU-dropout-conv, plus the input: pre-activation, basic, "wide-dropout".

    Where the number of channels changes, the shortcut is a 1x1 convolution of the activated input.
    """

    channels: int
    stride: int
    dropout: float
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x, *, train, keys):
        norm = partial(batch_norm, train, self.dtype, self.axis_name)
        conv = partial(conv3x3, self.channels, dtype=self.dtype)
        h = ReLU()(norm('bn1')(x))
        if x.shape[-1] != self.channels:
            shortcut = conv1x1(
                self.channels, strides=self.stride, dtype=self.dtype, name='shortcut'
            )
            x = shortcut(h)
        h = conv(strides=self.stride, name='conv1')(h)
        h = ReLU()(norm('bn2')(h))
        if train:
            h = dropout(h, self.dropout, keys)
        return x + conv(name='conv2')(h)


class WRN(nn.Module):
    """WRN-depth-width. Zagoruyko & Komodakis 2016 (arXiv:1605.07146), Table 1.

    A 3x3 stem of `base` channels, three groups of (depth - 4)/6 blocks with base·width·(1, 2, 4)
    channels and strides 1, 2, 2, BN, ReLU, global average pooling. The defaults are WRN-40-2 of
    hendrycks/outlier-exposure (official code): D = 128, dropout .3. Images of any size.

    Attributes:
        base: the paper has 16; less makes a toy for a CPU.
    """

    depth: int = 40
    width: int = 2
    dropout: float = 0.3
    base: int = 16
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def __post_init__(self):
        if (self.depth - 4) % 6 or self.depth < 10:
            raise UserError(
                f'depth={self.depth} is no Wide ResNet: three groups of n blocks make 6 n + 4 '
                'layers. Set depth to 10, 16, 22, 28, 34, 40, ...'
            )
        super().__post_init__()

    @property
    def map_names(self) -> tuple[str, ...]:
        return ('block1', 'block2', 'block3')

    @nn.compact
    def __call__(self, images, *, train: bool, keys=None, after: int | None = None):
        x, maps = images, []
        if after is None:
            x = conv3x3(self.base, dtype=self.dtype, name='conv1')(x)
        for group, stride in enumerate((1, 2, 2)):
            if after is not None and group <= after:
                continue
            for layer in range((self.depth - 4) // 6):
                name = f'block{group + 1}_layer{layer}'
                x = Block(
                    channels=self.base * self.width * 2**group,
                    stride=stride if layer == 0 else 1,
                    dropout=self.dropout,
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    name=name,
                )(x, train=train, keys=_keys_for(keys, name))
            maps.append(x)
        if maps:
            x = ReLU()(batch_norm(train, self.dtype, self.axis_name, 'bn1')(x))
            maps[-1] = x  # the map that is pooled
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32), tuple(maps)


def _keys_for(keys, name):
    """Each row's key for one layer."""
    return None if keys is None else jax.vmap(lambda key: key_for(key, name))(keys)


def _recognise(shapes):
    first, second = (shapes.get(f'{k}.weight', ()) for k in ('conv1', 'block1.layer.0.conv1'))
    n = count(shapes, 'block1.layer.{}.conv2.weight')
    if not (len(first) == len(second) == 4 and n and 'block3.layer.0.bn2.weight' in shapes):
        return None
    if 'trans1.conv1.weight' in shapes or second[0] < first[0]:  # a DenseNet
        return None
    return dict(depth=6 * n + 4, width=second[0] // first[0], base=first[0])


def _targets(keywords, shapes):
    net = WRN(**keywords)
    found = {'conv1.weight': kernel('conv1')} | layouts.batch_norm('bn1', 'bn1')
    for block in (1, 2, 3):
        for layer in range((net.depth - 4) // 6):
            theirs, ours = f'block{block}.layer.{layer}', f'block{block}_layer{layer}'
            for n in (1, 2):
                found[f'{theirs}.conv{n}.weight'] = kernel(f'{ours}/conv{n}')
                found |= layouts.batch_norm(f'{theirs}.bn{n}', f'{ours}/bn{n}')
            if layer == 0 and (block > 1 or net.width > 1):
                found[f'{theirs}.convShortcut.weight'] = kernel(f'{ours}/shortcut')
    return found | layouts.head('fc')


def _outlier_exposure(num_classes):
    """CIFAR/test.py. With 1000 classes: hendrycks/pre-training, where all are 0.5."""
    if num_classes == 1000:
        return cifar((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    mean, std = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
    return cifar(tuple(m / 255 for m in mean), tuple(s / 255 for s in std))


LAYOUTS = (  # one naming: wetliu/energy_ood, pytorch-ood and OpenOOD took over the first one's code
    Layout('hendrycks/outlier-exposure', 'wrn', _recognise, _targets, _outlier_exposure),
    Layout('wetliu/energy_ood', 'wrn', _recognise, _targets, _outlier_exposure),
    Layout('pytorch-ood', 'wrn', _recognise, _targets, _outlier_exposure),
    Layout('OpenOOD', 'wrn', _recognise, _targets, openood),
)
