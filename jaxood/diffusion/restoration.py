"""Restoring what is almost clean: noise to a level t, then DDIM from t down to 0.

DLSR (Yang et al. 2024, arXiv:2411.10701) restores feature vectors like this from a small
t; the pixel-level baseline that it is compared with (Graham et al. 2023, arXiv:2211.07740), images
from many levels. What cannot be restored was not in the training set.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxood.diffusion import samplers
from jaxood.diffusion.process import add_noise
from jaxood.errors import UserError
from jaxood.rng import key_for


def grid(depth: int, num_steps: int, stride: int = 1) -> np.ndarray:
    """Times depth, depth - stride, ..., 0: int32[S + 1], the last step perhaps a shorter one.

    Args:
        depth: t, where the chain begins.
        num_steps: T.
        stride: of DLSR 1 in the official code; the paper draws it from {1..t}.

    Raises:
        UserError: a depth outside 1..T, or a stride outside 1..depth.
    """
    if not 1 <= depth <= num_steps:
        raise UserError(f'depth={depth} is no time of this chain. Give one in 1..{num_steps}.')
    if not 1 <= stride <= depth:
        raise UserError(f'stride={stride} must lie in 1..{depth}, the depth it starts from.')
    return np.append(np.arange(depth, 0, -stride), 0).astype(np.int32)


def restore(
    denoise: Callable,
    x_0: jax.Array,
    keys: jax.Array,
    *,
    alpha_bar: np.ndarray,
    timesteps: Sequence[int],
    eta: float = 0.0,
    clip: tuple[float, float] | None = None,
) -> jax.Array:
    """x̃_0: x_0 noised to timesteps[0] and brought down to the last one by DDIM.

    The last step, to ᾱ_0 = 1, gives x_0_hat itself. (DLSR's official code ends on ᾱ_1, a sample
    that still carries noise, and is off by one in the time it tells the network.)

    Args:
        denoise: (x_t, t int32[B]) -> (x_0_hat, eps_hat); see `process.denoiser`.
        x_0: float32[B, ...]
        keys: keys [B]: the noise of a row is its own, at all depths the same ε.
        timesteps: int32[S + 1], descending to 0; `grid` or `samplers.strided`.
        eta: η of DDIM; 1 in DLSR's official code.

    Returns:
        float32, like x_0.
    """
    ours = lambda purpose: jax.vmap(lambda key: key_for(key, purpose))(keys)
    eps = jax.vmap(lambda key: jax.random.normal(key, x_0.shape[1:]))(ours('noise'))
    x_t = add_noise(x_0, eps, alpha_bar[timesteps[0]])
    return samplers.sample(
        denoise,
        x_t,
        ours('chain'),
        alpha_bar=alpha_bar,
        timesteps=timesteps,
        sampler=samplers.ddim,
        clip=clip,
        eta=eta,
    )
