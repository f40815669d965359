"""The U-Net of Stable Diffusion: latents, a time and a prompt in, the noise in the latents out."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxood.errors import UserError
from jaxood.models.layers import GroupNorm, sinusoidal_embedding
from jaxood.models.stable_diffusion.blocks import (
    Attention,
    ResnetBlock,
    conv,
    pointwise,
    settings,
    upsampled,
    zeros,
)


class GEGLU(nn.Module):
    """a · gelu(b), with a, b = linear(x), and GELU by the erf. Shazeer 2020 (arXiv:2002.05202)."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        h, gate = jnp.split(nn.Dense(2 * self.width, dtype=self.dtype, name='proj')(x), 2, axis=-1)
        return h * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """Linear after GEGLU, four times as wide inside."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        h = GEGLU(4 * width, self.dtype, name='net_0')(x)
        return nn.Dense(width, dtype=self.dtype, name='net_2')(h)


class TransformerBlock(nn.Module):
    """Attention among the pixels, then to the prompt, then an MLP; each x + f(LN(x))."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x, context):
        norm = partial(nn.LayerNorm, 1e-5, self.dtype)
        attend = partial(Attention, self.heads, False, self.dtype)
        x = x + attend(name='attn1')(norm(name='norm1')(x))
        x = x + attend(name='attn2')(norm(name='norm2')(x), context)
        return x + FeedForward(self.dtype, name='ff')(norm(name='norm3')(x))


class Transformer(nn.Module):
    """x + linear(blocks(linear(norm(x)))), each pixel a token. Its GroupNorm has eps 1e-6."""

    heads: int
    layers: int
    groups: int
    linear: bool  # projections as matrices (Stable Diffusion 2) or as 1x1 convolutions
    dtype: Any

    @nn.compact
    def __call__(self, x, context):
        shape = x.shape
        project = partial(nn.Dense if self.linear else pointwise, shape[-1], dtype=self.dtype)
        h = GroupNorm(self.groups, 1e-6, self.dtype, name='norm')(x)
        h = project(name='proj_in')(h).reshape(shape[0], -1, shape[-1])
        for i in range(self.layers):
            block = TransformerBlock(self.heads, self.dtype, name=f'transformer_blocks_{i}')
            h = block(h, context)
        return x + project(name='proj_out', kernel_init=zeros)(h.reshape(shape))


class UNet(nn.Module):
    """UNet2DCondition. Rombach et al. 2022 (arXiv:2112.10752); the defaults are those of SD 1.x.

    Attributes:
        channels: of each level; each halves the size of the one before.
        attends: whether the level's blocks look at the prompt; the middle of the U always does.
        layers: residual blocks of a level on the way down (one more on the way up).
        heads: attention heads of each level. (diffusers calls this number `attention_head_dim`.)
        transformer_layers: of each attention.
        groups: of every group normalisation.
        epsilon: of those in residual blocks and before the last convolution.
        linear_projection: see `Transformer`.
        cos_first, endpoint: of the time embedding.
        out_channels: of the result.
        context_width: of the prompt's tokens. Flax reads it off the prompt; it is here for messages
            and example inputs.
        in_channels: likewise.
        dtype: compute type; the time embedding and the result are float32.
        remat: recompute blocks in the backward pass: less memory, about a third more time.
    """

    channels: Sequence[int] = (320, 640, 1280, 1280)
    attends: Sequence[bool] = (True, True, True, False)
    layers: int = 2
    heads: Sequence[int] = (8, 8, 8, 8)
    transformer_layers: int = 1
    groups: int = 32
    epsilon: float = 1e-5
    linear_projection: bool = False
    cos_first: bool = True
    endpoint: bool = False
    out_channels: int = 4
    context_width: int = 768
    in_channels: int = 4
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, context: jax.Array) -> jax.Array:
        """Predicts the noise in x_t (or v, as trained).

        Args:
            x: float [B, h, w, in_channels], latents. Any size works: a map of odd size is halved
                rounding up, and its enlargement cropped.
            t: int32[B], the paper's t in 1..T. (The original counts from 0: subtracted here.)
            context: float [B, M, context_width], the prompt's tokens.

        Returns:
            float32[B, h, w, out_channels].
        """
        make_resnet = nn.remat(ResnetBlock) if self.remat else ResnetBlock
        make_transformer = nn.remat(Transformer) if self.remat else Transformer
        embedding = self._embed(t)
        context = context.astype(self.dtype)

        def resnet(name, x, level):
            block = make_resnet(
                self.channels[level], self.groups, self.epsilon, self.dtype, name=name
            )
            return block(x, embedding)

        def attend(name, x, level):
            block = make_transformer(
                self.heads[level],
                self.transformer_layers,
                self.groups,
                self.linear_projection,
                self.dtype,
                name=name,
            )
            return block(x, context)

        h = conv(self.channels[0], self.dtype, 'conv_in')(x)
        skips = [h]
        last = len(self.channels) - 1
        for level in range(last + 1):
            name = f'down_blocks_{level}'
            for i in range(self.layers):
                h = resnet(f'{name}_resnets_{i}', h, level)
                if self.attends[level]:
                    h = attend(f'{name}_attentions_{i}', h, level)
                skips.append(h)
            if level < last:
                h = conv(h.shape[-1], self.dtype, f'{name}_downsamplers_0_conv', strides=2)(h)
                skips.append(h)

        h = resnet('mid_block_resnets_0', h, last)
        h = attend('mid_block_attentions_0', h, last)
        h = resnet('mid_block_resnets_1', h, last)

        for level in range(last, -1, -1):
            name = f'up_blocks_{last - level}'
            for i in range(self.layers + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = resnet(f'{name}_resnets_{i}', h, level)
                if self.attends[level]:
                    h = attend(f'{name}_attentions_{i}', h, level)
            if level > 0:
                h = upsampled(h, *skips[-1].shape[1:3])
                h = conv(h.shape[-1], self.dtype, f'{name}_upsamplers_0_conv')(h)

        h = nn.silu(GroupNorm(self.groups, self.epsilon, self.dtype, name='conv_norm_out')(h))
        h = conv(self.out_channels, self.dtype, 'conv_out', kernel_init=zeros)(h)
        return h.astype(jnp.float32)

    def _embed(self, t):
        """float32[B, 4 channels]."""
        h = sinusoidal_embedding(
            t - 1, self.channels[0], endpoint=self.endpoint, cos_first=self.cos_first
        )
        return TimeEmbedding(4 * self.channels[0], name='time_embedding')(h)


class TimeEmbedding(nn.Module):
    """linear(silu(linear(t)))."""

    width: int

    @nn.compact
    def __call__(self, t):
        h = nn.silu(nn.Dense(self.width, name='linear_1')(t))
        return nn.Dense(self.width, name='linear_2')(h)


def from_config(config: Mapping[str, Any], **keywords) -> UNet:
    """The U-Net of a `unet/config.json`. Keywords: dtype and remat.

    Raises:
        UserError: a network that we don't have, such as SDXL's.
    """
    if config.get('addition_embed_type') == 'text_time':
        raise UserError(
            'this is the U-Net of SDXL, which takes two prompts and an image size. Supported are '
            'Stable Diffusion 1.x and 2.x.'
        )
    c = settings(config, TAKES, FIXED, 'the U-Net')
    levels = len(c['block_out_channels'])
    attends = _attends(c['down_block_types'], 'CrossAttnDownBlock2D', 'DownBlock2D')
    if attends != _attends(c['up_block_types'], 'CrossAttnUpBlock2D', 'UpBlock2D')[::-1]:
        raise UserError(
            f'the U-Net goes up through {c["up_block_types"]}, which does not mirror its way down '
            f'through {c["down_block_types"]}.'
        )
    heads = c['attention_head_dim']
    heads = (heads,) * levels if isinstance(heads, int) else heads
    for key in ('layers_per_block', 'transformer_layers_per_block', 'cross_attention_dim'):
        if not isinstance(c[key], int):
            raise UserError(f'the U-Net has {key}={c[key]!r}, and we have one number for all.')
    if not levels == len(attends) == len(heads) or c['freq_shift'] not in (0, 1):
        raise UserError('the settings of the U-Net contradict each other, or are damaged.')
    return UNet(
        channels=c['block_out_channels'],
        attends=attends,
        layers=c['layers_per_block'],
        heads=heads,
        transformer_layers=c['transformer_layers_per_block'],
        groups=c['norm_num_groups'],
        epsilon=c['norm_eps'],
        linear_projection=c['use_linear_projection'],
        cos_first=c['flip_sin_to_cos'],
        endpoint=c['freq_shift'] == 1,
        out_channels=c['out_channels'],
        context_width=c['cross_attention_dim'],
        in_channels=c['in_channels'],
        **keywords,
    )


def _attends(types, yes, no):
    for name in types:
        if name not in (yes, no):
            raise UserError(f'the U-Net has a {name}. Supported are {yes} and {no}.')
    return tuple(name == yes for name in types)


TAKES = {  # diffusers' defaults
    'in_channels': 4,
    'out_channels': 4,
    'flip_sin_to_cos': True,
    'freq_shift': 0,
    'down_block_types': (*['CrossAttnDownBlock2D'] * 3, 'DownBlock2D'),
    'up_block_types': ('UpBlock2D', *['CrossAttnUpBlock2D'] * 3),
    'block_out_channels': (320, 640, 1280, 1280),
    'layers_per_block': 2,
    'norm_num_groups': 32,
    'norm_eps': 1e-5,
    'cross_attention_dim': 1280,
    'transformer_layers_per_block': 1,
    'attention_head_dim': 8,
    'use_linear_projection': False,
}
FIXED = {
    'center_input_sample': False,
    'mid_block_type': 'UNetMidBlock2DCrossAttn',
    'only_cross_attention': False,
    'downsample_padding': 1,
    'mid_block_scale_factor': 1,
    'act_fn': 'silu',
    'dual_cross_attention': False,
    'resnet_time_scale_shift': 'default',
    'resnet_skip_time_act': False,
    'resnet_out_scale_factor': 1.0,
    'time_embedding_type': 'positional',
    'conv_in_kernel': 3,
    'conv_out_kernel': 3,
    'attention_type': 'default',
}
