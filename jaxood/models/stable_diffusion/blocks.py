"""What the U-Net and the autoencoder share, and how both read diffusers' `config.json`.

Modules have the names that diffusers gives theirs, with underscores for dots, so that one rule
(`convert.theirs`) tells the name of every array.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import einops
import jax.numpy as jnp
from flax import linen as nn

from jaxood.errors import UserError
from jaxood.models.attention import attention
from jaxood.models.layers import GroupNorm, conv1x1

zeros = nn.initializers.zeros  # latent diffusion's `zero_module`, for networks trained from scratch


class ResnetBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + time_emb_proj(silu(embedding)))))."""

    channels: int
    groups: int
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x, embedding=None):
        norm = partial(GroupNorm, self.groups, self.epsilon, self.dtype)
        h = conv(self.channels, self.dtype, 'conv1')(nn.silu(norm(name='norm1')(x)))
        if embedding is not None:
            project = nn.Dense(self.channels, dtype=self.dtype, name='time_emb_proj')
            h = h + project(nn.silu(embedding))[:, None, None]
        h = nn.silu(norm(name='norm2')(h))
        h = conv(self.channels, self.dtype, 'conv2', kernel_init=zeros)(h)
        if x.shape[-1] != self.channels:
            x = pointwise(self.channels, self.dtype, 'conv_shortcut')(x)
        return x + h


class Attention(nn.Module):
    """Tokens [B, N, C] look at `context` [B, M, D], or at each other.

    Attributes:
        bias: of queries, keys and values.
        groups: of a group normalisation before, as the autoencoder has it; None for none.
    """

    heads: int
    bias: bool
    dtype: Any
    groups: int | None = None

    @nn.compact
    def __call__(self, x, context=None):
        if self.groups is not None:
            x = GroupNorm(self.groups, 1e-6, self.dtype, name='group_norm')(x)
        context = x if context is None else context
        dense = partial(nn.Dense, x.shape[-1], dtype=self.dtype)
        q, k, v = (
            einops.rearrange(
                dense(use_bias=self.bias, name=f'to_{name}')(tokens),
                'b n (heads c) -> b n heads c',
                heads=self.heads,
            )
            for name, tokens in (('q', x), ('k', context), ('v', context))
        )
        h = einops.rearrange(attention(q, k, v), 'b n heads c -> b n (heads c)')
        return dense(name='to_out_0')(h)


def conv(channels, dtype, name, strides=1, padding=((1, 1), (1, 1)), **keywords):
    """3x3, padded as in PyTorch, with bias."""
    return nn.Conv(channels, (3, 3), strides, padding, dtype=dtype, name=name, **keywords)


def pointwise(channels, dtype, name, **keywords):
    """1x1, with bias."""
    return conv1x1(channels, use_bias=True, dtype=dtype, name=name, **keywords)


def upsampled(x: jnp.ndarray, height: int, width: int) -> jnp.ndarray:
    """[B, h, w, C], each pixel four times -> cut to [B, height, width, C], at most 2h and 2w."""
    return einops.repeat(x, 'b h w c -> b (h 2) (w 2) c')[:, :height, :width]


def settings(
    config: Mapping[str, Any], takes: Mapping[str, Any], fixed: Mapping[str, Any], what: str
) -> dict[str, Any]:
    """What a network is built from: entries of a `config.json`, or diffusers' defaults.

    Args:
        config: the file's content.
        takes: the keys that we read -> diffusers' default for each.
        fixed: keys of which we support one value only -> that value, which is also the default.
        what: the network, for messages.

    Returns:
        The entries of `takes`, lists as tuples.

    Raises:
        UserError: a setting that we don't have. A key that we don't know may only be unset.
    """
    for key, value in config.items():
        value = tuple(value) if isinstance(value, list) else value
        known = key.startswith('_') or key in takes or key in IGNORED
        if not known and value != fixed.get(key) and (key in fixed or value not in (None, False)):
            only = f'; {fixed[key]!r} is supported' if key in fixed else ''
            raise UserError(f"{what} has {key}={value!r}, which we don't have{only}.")
    found = {key: config.get(key, default) for key, default in takes.items()}
    return {key: tuple(v) if isinstance(v, list) else v for key, v in found.items()}


IGNORED = (  # how diffusers computes, not what
    *('upcast_attention', 'force_upcast', 'dropout', 'sample_size', 'latents_mean', 'latents_std'),
    'addition_embed_type_num_heads',
)
