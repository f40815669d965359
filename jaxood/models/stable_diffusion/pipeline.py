"""Stable Diffusion as pure functions: prompts and seeds in, images out.

`Networks` says what computes and is hashable; `params` are its arrays, {'text_encoder': {'params':
...}, 'unet': ..., 'vae': ...}. Prompts come in as token ids, images lie in [-1, 1], latents have
about unit variance (the autoencoder's times `vae.scale`). `render` does it all on many devices.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxood import parallel
from jaxood.diffusion import PREDICTIONS, SAMPLERS, SCHEDULES, process, samplers
from jaxood.errors import UserError, lookup
from jaxood.models.clip.text import Text
from jaxood.models.clip.tokenizer import Tokenizer
from jaxood.models.stable_diffusion.unet import UNet
from jaxood.models.stable_diffusion.vae import VAE
from jaxood.parallel import Devices
from jaxood.rng import key_for

Params = dict[str, Any]
GUIDANCE = 6.5  # w; the usual guidance_scale of 7.5 is 1 + w
GRIDS = {  # (num_steps, steps, **keywords) -> times, as diffusers' scheduler of that kind walks
    'ddim': samplers.leading,
    'pndm': lambda *args, **keywords: samplers.with_repeat(samplers.leading(*args, **keywords)),
    'dpmpp_2m': lambda *args, end, **keywords: samplers.spread(*args, **keywords),
}


class Schedule(NamedTuple):
    """What a `scheduler_config.json` says of the noise.

    Attributes:
        name: a key of `diffusion.SCHEDULES`.
        num_steps: T.
        options: the schedule's keywords, as (name, value) pairs.
        prediction: a key of `diffusion.PREDICTIONS`.
        end: where DDIM's and PNDM's chains end: 1, or 0 (`set_alpha_to_one`).
    """

    name: str = 'scaled_linear'
    num_steps: int = 1000
    options: tuple[tuple[str, float], ...] = ()
    prediction: str = 'eps'
    end: int = 1

    @property
    def alpha_bar(self) -> np.ndarray:
        return SCHEDULES[self.name](self.num_steps, **dict(self.options))


class Networks(NamedTuple):
    """What computes. Hashable, so that compiled functions can be memoised by it."""

    text: Text
    unet: UNet
    vae: VAE
    schedule: Schedule = Schedule()


class StableDiffusion(NamedTuple):
    """A pipeline that was loaded (`folder.load`)."""

    networks: Networks
    params: Params
    tokenizer: Tokenizer
    size: int  # pixels a side that it was trained on


def encode_prompts(
    networks: Networks, params: Params, ids: jax.Array, extra: jax.Array | None = None
) -> jax.Array:
    """int32[B, 77] -> the text encoder's last hidden states, float32[B, 77, D].

    Args:
        extra: float32[n, D], embeddings of pseudo-words; see `clip.text`.
    """
    return networks.text.apply(params['text_encoder'], ids, extra)['hidden']


def encode_images(
    networks: Networks, params: Params, images: jax.Array, keys: jax.Array | None = None
) -> jax.Array:
    """Images [B, H, W, C] in [-1, 1] -> latents float32[B, H/8, W/8, 4].

    Args:
        keys: keys[B], to draw from q(z | x); None for its mean.
    """
    check_size(networks, *images.shape[1:3])
    mean, log_variance = networks.vae.apply(params['vae'], images, method='encode')
    if keys is not None:
        noise = _normal(keys, mean.shape[1:])
        mean = mean + jnp.exp(0.5 * log_variance) * noise
    return networks.vae.scale * mean


def decode_latents(networks: Networks, params: Params, latents: jax.Array) -> jax.Array:
    """Latents [B, h, w, 4] -> images float32[B, 8h, 8w, C], about in [-1, 1], not clipped."""
    return networks.vae.apply(params['vae'], latents / networks.vae.scale, method='decode')


def noise(networks: Networks, seeds: jax.Array, height: int, width: int) -> jax.Array:
    """Latents of pure noise for images of height x width pixels, row i from seed i alone."""
    check_size(networks, height, width)
    factor = networks.vae.factor
    shape = (height // factor, width // factor, networks.vae.latent_channels)
    return _normal(_keys(seeds, 'noise'), shape)


def grid(schedule: Schedule, *, sampler: str, steps: int, start: int | None = None) -> np.ndarray:
    """The times of a chain, int32[S + 1]; see `samplers.leading`.

    Args:
        sampler: a key of `GRIDS`.
        steps: from the top down; PNDM calls the network once more.
        start: the depth at which it begins, if not at the top.
    """
    make = lookup(GRIDS, sampler, 'the sampler of Stable Diffusion')
    return make(schedule.num_steps, steps, end=schedule.end, start=start)


def denoise(
    networks: Networks,
    params: Params,
    latents: jax.Array,
    context: jax.Array,
    null: jax.Array | None,
    keys: jax.Array | None = None,
    *,
    guidance: jax.Array | float | None,
    timesteps: np.ndarray,
    sampler: str,
    **options,
) -> jax.Array:
    """Walks latents down `timesteps`, towards the prompts.

    Args:
        latents: float32[B, h, w, 4], standing at level timesteps[0].
        context: float32[B, M, D], of the prompts.
        null: float32[M, D] or [B, M, D], of the empty or a negative prompt.
        keys: keys[B], for samplers that draw.
        guidance: w, a scalar or [B], traced; see `samplers.guided`. None leaves out the null branch
            and halves the cost.
        sampler: a key of `GRIDS`.
        **options: the sampler's own keywords.

    Returns:
        Latents at level timesteps[-1].
    """
    alpha_bar = networks.schedule.alpha_bar
    network = lambda x, t, c: networks.unet.apply(params['unet'], x, t, c)
    null = None if guidance is None else jnp.broadcast_to(null, context.shape)
    return samplers.sample(
        process.denoiser(
            samplers.guided(network, context, guidance, null),
            alpha_bar=alpha_bar,
            prediction=PREDICTIONS[networks.schedule.prediction],
        ),
        latents,
        keys,
        alpha_bar=alpha_bar,
        timesteps=timesteps,
        sampler=SAMPLERS[sampler],
        **options,
    )


def text_to_image(
    networks: Networks,
    params: Params,
    ids: jax.Array,
    null_ids: jax.Array,
    seeds: jax.Array,
    *,
    height: int,
    width: int,
    guidance: jax.Array | float | None = GUIDANCE,
    steps: int = 50,
    sampler: str = 'ddim',
    extra: jax.Array | None = None,
    **options,
) -> jax.Array:
    """Images of prompts, float32[B, height, width, C] in [-1, 1], row i from seed i alone.

    Args:
        ids: int32[B, 77], the prompts.
        null_ids: int32[1, 77] or [B, 77], the empty or a negative prompt.
        seeds: uint32[B].
        guidance, sampler, options: see `denoise`.
        steps: see `grid`.
        extra: see `encode_prompts`.
    """
    context, null = _contexts(networks, params, ids, null_ids, guidance, extra)
    latents = denoise(
        networks,
        params,
        noise(networks, seeds, height, width),
        context,
        null,
        _keys(seeds, 'steps'),
        guidance=guidance,
        timesteps=grid(networks.schedule, sampler=sampler, steps=steps),
        sampler=sampler,
        **options,
    )
    return jnp.clip(decode_latents(networks, params, latents), -1.0, 1.0)


def image_to_image(
    networks: Networks,
    params: Params,
    images: jax.Array,
    ids: jax.Array,
    null_ids: jax.Array,
    seeds: jax.Array,
    *,
    start: int,
    guidance: jax.Array | float | None = GUIDANCE,
    steps: int = 50,
    sampler: str = 'ddim',
    extra: jax.Array | None = None,
    **options,
) -> jax.Array:
    """Noises images to depth `start` and brings them back towards prompts, float32 in [-1, 1].

    Meng et al. 2022 (arXiv:2108.01073). Arguments as in `text_to_image`, and

    Args:
        images: float32[B, H, W, C] in [-1, 1]; q(z | x) is drawn from.
        start: t in 0..T; at `schedule.end` or below nothing but the autoencoder happens.
        steps: of the whole chain, of which those below `start` are taken.
    """
    context, null = _contexts(networks, params, ids, null_ids, guidance, extra)
    latents = encode_images(networks, params, images, _keys(seeds, 'encode'))
    eps = _normal(_keys(seeds, 'noise'), latents.shape[1:])
    alpha_bar = networks.schedule.alpha_bar
    latents = denoise(
        networks,
        params,
        process.add_noise(latents, eps, alpha_bar[start]),
        context,
        null,
        _keys(seeds, 'steps'),
        guidance=guidance,
        timesteps=grid(networks.schedule, sampler=sampler, steps=steps, start=start),
        sampler=sampler,
        **options,
    )
    return jnp.clip(decode_latents(networks, params, latents), -1.0, 1.0)


def render(
    pipeline: StableDiffusion,
    devices: Devices,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    height: int | None = None,
    width: int | None = None,
    guidance: float | None = GUIDANCE,
    steps: int = 50,
    sampler: str = 'ddim',
    negative: str = '',
    batch_size: int = 8,
) -> Iterator[np.ndarray]:
    """Images of prompts as pixels, uint8[b, H, W, C], batch after batch, on all devices.

    Image i depends on prompt i and seed i only, not on the batch or the devices (up to rounding).
    Another guidance, prompt or seed compiles nothing.

    Args:
        seeds: one a prompt, in 0 .. 2³² - 1.
        height, width: in pixels; None for what the pipeline was trained on.
        guidance: w; None for no guidance, at half the cost.
        batch_size: images at once, over all devices.

    Raises:
        UserError: prompts and seeds differ in number, or a size that the networks can't make.
    """
    if len(prompts) != len(seeds):
        raise UserError(f'{len(prompts)} prompts and {len(seeds)} seeds: give one a prompt.')
    size = (height or pipeline.size, width or pipeline.size)
    check_size(pipeline.networks, *size)
    guided = guidance is not None
    compiled = _compiled(pipeline.networks, devices, size, steps, sampler, guided)
    shared = {'params': pipeline.params, 'null': pipeline.tokenizer([negative])}
    shared['guidance'] = np.float32(guidance if guided else 0.0)
    rows = {'ids': pipeline.tokenizer(prompts), 'seed': np.asarray(seeds, np.uint32)}
    batch_size = devices.batch_size(min(batch_size, max(len(prompts), 1)))
    chunks = (
        parallel.pad_rows(jax.tree.map(lambda x, i=i: x[i : i + batch_size], rows), batch_size)
        for i in range(0, len(prompts), batch_size)
    )
    return parallel.map_rows(devices, compiled, devices.replicate(shared), chunks)


@functools.lru_cache(maxsize=8)
def _compiled(networks, devices, size, steps, sampler, guided):
    def rows_to_images(shared, rows):
        images = text_to_image(
            networks,
            shared['params'],
            rows['ids'],
            shared['null'],
            rows['seed'],
            height=size[0],
            width=size[1],
            guidance=shared['guidance'] if guided else None,
            steps=steps,
            sampler=sampler,
        )
        return jnp.round((images + 1.0) * 127.5).astype(jnp.uint8)

    return devices.compile_rows(rows_to_images)


def check_size(networks: Networks, height: int, width: int) -> None:
    """Raises a UserError for a size that is no multiple of the autoencoder's factor (8)."""
    factor = networks.vae.factor
    for side in (height, width):
        if side < 1 or side % factor:
            near = max(round(side / factor), 1) * factor
            raise UserError(
                f'images of {height} x {width} pixels: the autoencoder halves them '
                f'{factor.bit_length() - 1} times, so both must be multiples of {factor}, such as '
                f'{near}.'
            )


def _contexts(networks, params, ids, null_ids, guidance, extra):
    context = encode_prompts(networks, params, ids, extra)
    null = None if guidance is None else encode_prompts(networks, params, null_ids, extra)
    return context, null


def _keys(seeds, purpose):
    return jax.vmap(lambda seed: key_for(jax.random.key(seed), 'stable diffusion', purpose))(seeds)


def _normal(keys, shape):
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
