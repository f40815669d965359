"""DLSR's latent feature diffusion network: a feature vector and a time in, a vector out."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxood.models.layers import GroupNorm, sinusoidal_embedding

# PyTorch's default for a linear layer's kernel, U(-1/√n, 1/√n) of n inputs; our biases start at 0.
uniform = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
zeros = nn.initializers.zeros


class ResidualBlock(nn.Module):
    """x + Lin_0(silu(norm(Lin(silu(norm(x))) + Lin(silu(τ))))), Lin_0 of zeros at the start."""

    dtype: Any

    @nn.compact
    def __call__(self, x, embedding):
        dense = partial(nn.Dense, x.shape[-1], dtype=self.dtype)
        h = dense(kernel_init=uniform, name='linear_1')(nn.silu(_norm(self.dtype, 'norm_1')(x)))
        h = h + dense(kernel_init=uniform, name='embedding')(nn.silu(embedding))
        return x + dense(kernel_init=zeros, name='linear_2')(
            nn.silu(_norm(self.dtype, 'norm_2')(h))
        )


class LFDN(nn.Module):
    """D_θ(z_t, t), an estimate of z_0. Yang et al. 2024 (arXiv:2411.10701), official code.

    Dense layers throughout, no condition, no dropout; SiLU also on the raw input. The defaults are
    the paper's: with the 720 channels of EfficientNet-B4 86,740,560 parameters. At the start the
    output is 0.

    Attributes:
        width: h, of the residual blocks; an even number.
        num_blocks: residual blocks.
        time_width: e, of the time embedding; None for as many as the input has (720 of 720 in the
            official code; of ResNet-50's 1792 our choice).
        dtype: compute type; parameters, the time embedding and the result are float32.
    """

    width: int = 1440
    num_blocks: int = 16
    time_width: int | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array, t: jax.Array) -> jax.Array:
        """z_t float[B, c] and the paper's t, int32[B] in 1..T (the code counts from 0: subtracted
        here) -> float32[B, c]."""
        channels = z.shape[-1]
        dense = partial(nn.Dense, kernel_init=uniform)
        time_width = self.time_width or channels
        tau = sinusoidal_embedding(t - 1, self.width, endpoint=False, cos_first=True)
        tau = dense(time_width, name='time_2')(nn.silu(dense(time_width, name='time_1')(tau)))
        h = dense(self.width, dtype=self.dtype, name='linear_in')(nn.silu(z))
        for i in range(self.num_blocks):
            h = ResidualBlock(self.dtype, name=f'block_{i}')(h, tau)
        h = nn.silu(_norm(self.dtype, 'norm_out')(h))
        h = nn.Dense(channels, kernel_init=zeros, dtype=self.dtype, name='linear_out')(h)
        return h.astype(jnp.float32)


def _norm(dtype, name):
    """GroupNorm with one group, a layer norm."""
    return GroupNorm(groups=1, epsilon=1e-5, dtype=dtype, name=name)
