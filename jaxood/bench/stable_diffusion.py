"""Sampling of Stable Diffusion, random weights, with guidance, beside diffusers' networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxood import parallel
from jaxood.bench import measure
from jaxood.models.components import COMPONENTS
from jaxood.models.initial import compile_init
from jaxood.models.stable_diffusion import fresh, pipeline

SIZES = {
    'small': {  # 64 pixels, latents 8 x 8, a hundredth of the weights
        'text_encoder': fresh.text_config(
            vocab_size=1000, positions=77, width=64, layers=2, heads=4, projection=64
        ),
        'unet': fresh.unet_config(
            size=8, channels=(32, 64, 64), layers=1, heads=4, groups=8, width=64
        ),
        'vae': fresh.vae_config(
            size=64, image_channels=3, channels=(16, 32, 32, 32), layers=1, groups=8
        ),
    },
    'full': fresh.STABLE_DIFFUSION_1_5,
}
BATCH, GUIDANCE = {'small': 4, 'full': 8}, 7.5


def rows(flags):
    described, devices = SIZES[flags.size], parallel.setup()
    batch = devices.batch_size(flags.batch or BATCH[flags.size])
    built = {n: COMPONENTS[n].build(c, dtype=jnp.dtype(flags.dtype)) for n, c in described.items()}
    (text,), (unet,), (vae,) = (built[n].values() for n in ('text_encoder', 'unet', 'vae'))
    networks, side = pipeline.Networks(text, unet, vae), described['vae']['sample_size']
    width, length = described['unet']['cross_attention_dim'], 77
    latent = described['unet']['sample_size']
    ids = jnp.zeros((batch, length), jnp.int32)
    inputs = lambda n: (
        jnp.zeros((n, latent, latent, 4)),
        jnp.ones(n, jnp.int32),
        jnp.zeros((n, length, width)),
    )
    given = {'text_encoder': (text, ids[:1]), 'unet': (unet, *inputs(1))}
    given['vae'] = (vae, jnp.zeros((1, side, side, 3)))
    params = {
        name: jax.tree.map(
            lambda x: x.astype(flags.dtype), compile_init(module.init)(jax.random.key(0), *args)
        )
        for name, (module, *args) in given.items()
    }
    sample = functools.partial(
        pipeline.text_to_image, networks, height=side, width=side, steps=flags.steps
    )
    compiled = devices.compile_rows(
        lambda shared, rows: sample(
            shared, rows['ids'], jnp.zeros((1, length), jnp.int32), rows['seed']
        )
    )
    placed = devices.shard({'ids': np.asarray(ids), 'seed': np.arange(batch, dtype=np.uint32)})
    shared = devices.replicate(params)
    step = jax.jit(lambda params, *a: unet.apply(params, *a))
    decode = jax.jit(lambda params, z: vae.apply(params, z, method='decode'))
    work = flags.steps * measure.flops(step, params['unet'], *inputs(2 * batch))
    work += measure.flops(decode, params['vae'], jnp.zeros((batch, latent, latent, 4)))
    both = measure.has('torch', 'diffusers')
    yield measure.speed(
        f'DDIM of {flags.steps} steps, {side} pixels, {flags.size}, batch {batch}',
        batch,
        measure.call(compiled, shared, placed),
        _diffusers(flags, described, batch) if both else None,
        flags.rounds,
        peer='diffusers U-Net and VAE',
        flops=work,
        dtype=flags.dtype,
    )


def _diffusers(flags, described, batch):
    """() -> a batch of images: guided DDIM, the prompt encoded already."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    device, compiled, wait = measure.torch_device(flags)
    kind = dict(device=device, dtype=getattr(torch, flags.dtype))
    make = lambda c, name: c.from_config(described[name]).eval().to(**kind)
    unet = make(UNet2DConditionModel, 'unet').to(memory_format=torch.channels_last)
    vae, scheduler = make(AutoencoderKL, 'vae'), DDIMScheduler.from_config(fresh.SCHEDULER)
    scheduler.set_timesteps(flags.steps)
    latent, width = described['unet']['sample_size'], described['unet']['cross_attention_dim']
    context = torch.zeros(2 * batch, 77, width, **kind)
    run = compiled(unet)

    def theirs():
        with torch.inference_mode():
            x = torch.randn(batch, 4, latent, latent, **kind)
            for t in scheduler.timesteps:
                null, eps = run(torch.cat([x, x]), t, context).sample.chunk(2)
                x = scheduler.step(null + (1.0 + GUIDANCE) * (eps - null), t, x).prev_sample
            vae.decode(x / described['vae']['scaling_factor'])
        wait()

    return theirs
