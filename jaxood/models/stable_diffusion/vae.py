"""The autoencoder of Stable Diffusion: images to latents an eighth of their size, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxood.errors import UserError
from jaxood.models.layers import GroupNorm
from jaxood.models.stable_diffusion.blocks import (
    Attention,
    ResnetBlock,
    conv,
    pointwise,
    settings,
    upsampled,
)

EPSILON = 1e-6  # of every group normalisation


class Half(nn.Module):
    """Encoder or decoder: x -> conv_in -> levels (and the middle before or after) -> conv_out.

    Attributes:
        channels: of each level, the finest first.
        layers: residual blocks of a level; the decoder has one more.
        groups: of the group normalisations.
        out_channels: of the result.
        up: decoder.
    """

    channels: Sequence[int]
    layers: int
    groups: int
    out_channels: int
    up: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        deepest = self.channels[-1]
        h = conv(deepest if self.up else self.channels[0], self.dtype, 'conv_in')(x)
        if self.up:
            h = self._middle(h, deepest)
        for i, channels in enumerate(self.channels[::-1] if self.up else self.channels):
            name = f'up_blocks_{i}' if self.up else f'down_blocks_{i}'
            for j in range(self.layers + self.up):
                h = self._resnet(f'{name}_resnets_{j}', h, channels)
            if i == len(self.channels) - 1:
                continue
            if self.up:
                h = upsampled(h, 2 * h.shape[1], 2 * h.shape[2])
                h = conv(channels, self.dtype, f'{name}_upsamplers_0_conv')(h)
            else:  # padded on one side only
                name = f'{name}_downsamplers_0_conv'
                h = conv(channels, self.dtype, name, strides=2, padding=((0, 1), (0, 1)))(h)
        if not self.up:
            h = self._middle(h, deepest)
        h = nn.silu(GroupNorm(self.groups, EPSILON, self.dtype, name='conv_norm_out')(h))
        return conv(self.out_channels, self.dtype, 'conv_out')(h)

    def _middle(self, h, channels):
        h = self._resnet('mid_block_resnets_0', h, channels)
        attend = Attention(1, True, self.dtype, self.groups, name='mid_block_attentions_0')
        h = h + attend(h.reshape(len(h), -1, channels)).reshape(h.shape)
        return self._resnet('mid_block_resnets_1', h, channels)

    def _resnet(self, name, h, channels):
        return ResnetBlock(channels, self.groups, EPSILON, self.dtype, name=name)(h)


class VAE(nn.Module):
    """AutoencoderKL. Rombach et al. 2022 (arXiv:2112.10752), Sec. 3.1; the defaults are SD's.

    Latents are those of the networks: multiplied by `scale` they have about unit variance, which is
    what the U-Net sees (`pipeline` does that).

    Attributes:
        channels: of each level; each but the last halves the size.
        layers: residual blocks of a level.
        groups: of every group normalisation.
        latent_channels: of the latents.
        image_channels: of images.
        scale: see above; 0.18215 for SD.
        dtype: compute type; results are float32.
    """

    channels: Sequence[int] = (128, 256, 512, 512)
    layers: int = 2
    groups: int = 32
    latent_channels: int = 4
    image_channels: int = 3
    scale: float = 0.18215
    dtype: Any = jnp.float32

    @property
    def factor(self) -> int:
        """Pixels for each pixel of the latents, along a side."""
        return 2 ** (len(self.channels) - 1)

    def setup(self):
        half = (self.channels, self.layers, self.groups)
        self.encoder = Half(*half, 2 * self.latent_channels, up=False, dtype=self.dtype)
        self.decoder = Half(*half, self.image_channels, up=True, dtype=self.dtype)
        self.quant_conv = pointwise(2 * self.latent_channels, self.dtype, None)
        self.post_quant_conv = pointwise(self.latent_channels, self.dtype, None)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """q(z | x): images in [-1, 1], [B, H, W, C] -> mean and log variance [B, H/8, W/8, 4].

        The log variance is bounded by -30 and 20.
        """
        moments = self.quant_conv(self.encoder(images)).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latents: jax.Array) -> jax.Array:
        """[B, h, w, 4] -> images [B, 8h, 8w, C], about in [-1, 1], not clipped."""
        return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)

    def __call__(self, images: jax.Array) -> jax.Array:
        """There and back, by the mean: what `init` needs, to see every parameter."""
        return self.decode(self.encode(images)[0])


def from_config(config: Mapping[str, Any], **keywords) -> VAE:
    """The autoencoder of a `vae/config.json`. Keywords: dtype.

    Raises:
        UserError: a network that we don't have.
    """
    c = settings(config, TAKES, FIXED, 'the autoencoder')
    levels = len(c['block_out_channels'])
    for key, kind in (('down', 'DownEncoderBlock2D'), ('up', 'UpDecoderBlock2D')):
        blocks = c[f'{key}_block_types']
        if blocks != (kind,) * levels:
            raise UserError(f'the autoencoder has {key}_block_types={blocks}. Supported: {kind}.')
    return VAE(
        channels=c['block_out_channels'],
        layers=c['layers_per_block'],
        groups=c['norm_num_groups'],
        latent_channels=c['latent_channels'],
        image_channels=c['in_channels'],
        scale=c['scaling_factor'],
        **keywords,
    )


TAKES = {  # diffusers' defaults
    'in_channels': 3,
    'out_channels': 3,
    'down_block_types': ('DownEncoderBlock2D',),
    'up_block_types': ('UpDecoderBlock2D',),
    'block_out_channels': (64,),
    'layers_per_block': 1,
    'latent_channels': 4,
    'norm_num_groups': 32,
    'scaling_factor': 0.18215,
}
FIXED = {
    'act_fn': 'silu',
    'mid_block_add_attention': True,
    'use_quant_conv': True,
    'use_post_quant_conv': True,
}
