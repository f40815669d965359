"""A plain small convolutional network, for judges and laptops."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxood.models.layers import ReLU, batch_norm, conv3x3


class CNN(nn.Module):
    """3x3 convolution, BN, ReLU for each width, all but the first with stride 2; average pooling.

    Our choice. No dropout: `keys` is accepted, as by every backbone, and not used.

    Attributes:
        widths: channels of each layer; D is the last.
    """

    widths: Sequence[int] = (16, 32, 64)
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @property
    def map_names(self) -> tuple[str, ...]:
        return tuple(f'conv{i}' for i in range(len(self.widths)))

    @nn.compact
    def __call__(self, images, *, train: bool, keys=None, after: int | None = None):
        x, maps = images, []
        for i, width in enumerate(self.widths):
            if after is not None and i <= after:
                continue
            stride = 1 if i == 0 else 2
            x = conv3x3(width, strides=stride, dtype=self.dtype, name=f'conv{i}')(x)
            x = ReLU()(batch_norm(train, self.dtype, self.axis_name, f'bn{i}')(x))
            maps.append(x)
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32), tuple(maps)
