"""The U-Net of DDPM: pixels and a time in, an image of the same size out.

Ho, Jain & Abbeel 2020 (arXiv:2006.11239), App. B, and the official code: GroupNorm with eps 1e-6
(TensorFlow's default), SiLU, residual blocks that end in a convolution of zeros, nearest-neighbour
upsampling, stride-2 convolutions down. The class condition is our addition.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxood.models.layers import GroupNorm, dropout, sinusoidal_embedding

fan_avg = nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform')  # official code
zeros = nn.initializers.zeros  # official code: the same, times 1e-10


class ResidualBlock(nn.Module):
    """x + conv(drop(silu(norm(conv(silu(norm(x))) + linear(silu(embedding))))))."""

    channels: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x, embedding, keys):
        conv = functools.partial(nn.Conv, self.channels, (3, 3), dtype=self.dtype)
        dense = functools.partial(nn.Dense, self.channels, kernel_init=fan_avg, dtype=self.dtype)
        norm = functools.partial(GroupNorm, dtype=self.dtype)
        h = conv(kernel_init=fan_avg, name='conv_1')(nn.silu(norm(name='norm_1')(x)))
        h = h + dense(name='embedding')(nn.silu(embedding))[:, None, None]
        h = nn.silu(norm(name='norm_2')(h))
        h = conv(kernel_init=zeros, name='conv_2')(dropout(h, self.dropout, keys))
        if x.shape[-1] != self.channels:
            x = dense(name='shortcut')(x)
        return x + h


class AttentionBlock(nn.Module):
    """x + linear(attention(q, k, v)), each pixel a token. DDPM has one head."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        _, height, width, channels = x.shape
        dense = functools.partial(nn.Dense, channels, kernel_init=fan_avg, dtype=self.dtype)
        h = GroupNorm(dtype=self.dtype, name='norm')(x)
        h = einops.rearrange(h, 'b h w c -> b (h w) c')
        q, k, v = (
            einops.rearrange(dense(name=name)(h), 'b n (heads c) -> b n heads c', heads=self.heads)
            for name in 'qkv'
        )
        h = jax.nn.dot_product_attention(q, k, v)
        h = einops.rearrange(h, 'b (h w) heads c -> b h w (heads c)', h=height, w=width)
        return x + dense(kernel_init=zeros, name='out')(h)


class UNet(nn.Module):
    """DDPM's U-Net. The defaults are the paper's for 32x32 (35.7 M parameters).

    Attributes:
        num_classes: K; None for a network without condition.
        channels: of the first level, an even number (128 and more have 32 normalisation groups).
        multipliers: channels of each level, in units of `channels`; each level halves the size.
        num_blocks: residual blocks of a level on the way down (one more on the way up).
        attention_sizes: heights of the maps that get attention; the middle of the U always does.
        heads: attention heads.
        dropout: rate, applied when keys are given.
        out_channels: None for as many as the input has.
        dtype: compute type; parameters, the time and class embedding and the result are float32.
        remat: recompute blocks in the backward pass: less memory, about a third more time.
    """

    num_classes: int | None = None
    channels: int = 128
    multipliers: Sequence[int] = (1, 2, 2, 2)
    num_blocks: int = 2
    attention_sizes: Sequence[int] = (16,)
    heads: int = 1
    dropout: float = 0.1
    out_channels: int | None = None
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        condition: jax.Array | None = None,
        *,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Predicts whatever it was trained to predict about x_t.

        Args:
            x: float [B, H, W, C]. Any size works: a map of odd size is halved rounding up, and its
                enlargement cropped.
            t: int32[B], the paper's t in 1..T. (The official code counts from 0: subtracted here.)
            condition: float32[B, K + 1]; rows sum to 1, the last column is the null token. One-hot
                for a label, anything between for a mixture.
            keys: keys [B], one a row; they turn dropout on.

        Returns:
            float32[B, H, W, out_channels].
        """
        # Explicit names throughout, so that `remat` doesn't rename parameters.
        make_block = nn.remat(ResidualBlock) if self.remat else ResidualBlock
        number = itertools.count()

        def block(name, x, width):
            n = next(number)
            own = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, n)
            return make_block(width, self.dropout, self.dtype, name=name)(x, embedding, own)

        def attend(name, x):
            return AttentionBlock(self.heads, self.dtype, name=name)(x)

        def conv(name, x, width, init=fan_avg, strides=1):
            layer = nn.Conv(width, (3, 3), strides, kernel_init=init, dtype=self.dtype, name=name)
            return layer(x)

        out_channels = self.out_channels or x.shape[-1]
        embedding = self._embed(t, condition)
        h = conv('conv_in', x, self.channels)
        skips = [h]
        for level, multiplier in enumerate(self.multipliers):
            if level > 0:
                h = conv(f'down_{level}', h, h.shape[-1], strides=2)
                skips.append(h)
            for i in range(self.num_blocks):
                h = block(f'down_{level}_{i}', h, self.channels * multiplier)
                if h.shape[1] in self.attention_sizes:
                    h = attend(f'down_{level}_{i}_attention', h)
                skips.append(h)

        h = block('middle_0', h, h.shape[-1])
        h = attend('middle_attention', h)
        h = block('middle_1', h, h.shape[-1])

        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            for i in range(self.num_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(f'up_{level}_{i}', h, self.channels * multiplier)
                if h.shape[1] in self.attention_sizes:
                    h = attend(f'up_{level}_{i}_attention', h)
            if level > 0:
                _, height, width, _ = skips[-1].shape
                h = einops.repeat(h, 'b h w c -> b (h 2) (w 2) c')[:, :height, :width]
                h = conv(f'up_{level}', h, h.shape[-1])

        h = nn.silu(GroupNorm(dtype=self.dtype, name='norm_out')(h))
        return conv('conv_out', h, out_channels, init=zeros).astype(jnp.float32)

    def _embed(self, t, condition):
        """τ(t) + π E, float32[B, 4 channels]: the label enters linearly, before any non-linearity.

        So a mixed label is the same thing as a mixed embedding (metric-mixup, arXiv:2405.00631).
        """
        if (condition is None) != (self.num_classes is None):
            raise ValueError(
                f'This U-Net has num_classes={self.num_classes}, and condition is '
                f'{"missing" if condition is None else "given"}.'
            )
        size = 4 * self.channels
        dense = functools.partial(nn.Dense, size, kernel_init=fan_avg)
        h = sinusoidal_embedding(t - 1, self.channels)
        h = dense(name='time_2')(nn.silu(dense(name='time_1')(h)))
        if condition is None:
            return h
        classes = self.num_classes + 1
        if condition.shape != (t.shape[0], classes):
            raise ValueError(
                f'condition has shape {condition.shape}; {self.num_classes} classes and the null '
                f'token need ({t.shape[0]}, {classes}).'
            )
        table = self.param('class_embedding', fan_avg, (classes, size))
        return h + jnp.matmul(condition, table, precision=jax.lax.Precision.HIGHEST)
