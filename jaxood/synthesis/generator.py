"""A trained diffusion model as a function that strategies call."""

from collections.abc import Callable

from jaxood.diffusion import samplers
from jaxood.diffusion.process import Prediction, denoiser
from jaxood.rng import key_each


def generator(
    model,
    *,
    alpha_bar,
    timesteps,
    prediction: Prediction,
    sampler: Callable,
    guided: bool,
    **options,
) -> Callable:
    """Makes `generate(shared, x_start, bind, key, index) -> images` for a pixel model.

    Args:
        model: a Flax denoiser, `model.apply({'params': ...}, x, t, condition)`.
        alpha_bar: float32[T + 1].
        timesteps: int32[S + 1]; x_start stands at the first.
        guided: whether the null branch is computed. The weight itself, `shared['guidance']`, is
            traced: another one compiles nothing.
        **options: the sampler's own keywords.

    Returns:
        `generate`. `shared` holds `params` and `guidance`; x_start is float32[B, H, W, C];
        `bind(network, guidance)` returns (x, t) -> raw output, e.g. `samplers.guided` with its
        condition; row i's noise comes from (key, index[i]). The result lies in [-1, 1].
    """

    def generate(shared, x_start, bind, key, index):
        network = lambda x, t, condition: model.apply({'params': shared['params']}, x, t, condition)
        bound = bind(network, shared['guidance'] if guided else None)
        return samplers.sample(
            denoiser(bound, alpha_bar=alpha_bar, prediction=prediction),
            x_start,
            key_each(key, index),
            alpha_bar=alpha_bar,
            timesteps=timesteps,
            sampler=sampler,
            clip=(-1.0, 1.0),
            **options,
        )

    return generate
