"""Wide residual networks."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxood.errors import UserError
from jaxood.models.layers import ReLU, dropout
from jaxood.rng import key_for

# He et al. 2015 by fan-out, as the official code draws it.
he = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
# Padding 1 on both sides, as PyTorch: 'SAME' pads a strided convolution on one side only.
conv3x3 = partial(
    nn.Conv, kernel_size=(3, 3), padding=((1, 1), (1, 1)), use_bias=False, kernel_init=he
)


def batch_norm(train: bool, dtype: Any, axis_name: str | None, name: str) -> nn.BatchNorm:
    """BatchNorm with PyTorch's constants: eps 1e-5, and 0.9 of the old statistics kept.

    (Flax's running variance is the biased one, PyTorch's has n/(n - 1).)
    """
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
        axis_name=axis_name,
        name=name,
    )


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
            x = nn.Conv(
                self.channels,
                (1, 1),
                self.stride,
                padding='VALID',
                use_bias=False,
                kernel_init=he,
                dtype=self.dtype,
                name='shortcut',
            )(h)
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
