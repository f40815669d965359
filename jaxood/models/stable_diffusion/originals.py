"""Converted networks beside the originals in PyTorch: what `convert --verify` shows."""

import pathlib

import jax
import numpy as np

from jaxood.errors import UserError
from jaxood.models.stable_diffusion import folder, pipeline

PROMPTS = ('a photo of a cat', "an oil painting: it's raining, 1872")
SCALE, STEPS = 7.5, 20  # guidance_scale and DDIM steps of the sampling
SIDE = 8  # of its latents: small, for the networks are the same at any size
TIMES = (981, 20)  # as the originals count, from 0


def compare(
    kind: str, ours: pathlib.Path, theirs: pathlib.Path, variant: str | None = None
) -> dict[str, float] | None:
    """Name of an output -> the largest difference from the original's, over the largest value.

    In float32 on random images and latents. None without PyTorch, diffusers and transformers.

    Args:
        kind: a key of `folder.KINDS`.
        ours: any folder that `folder` loads.
        theirs: one that diffusers or transformers load, with the same weights; or a single file,
            for diffusers to rename by itself.
    """
    try:
        import diffusers  # noqa: F401
        import torch
        import transformers  # noqa: F401
    except ImportError:
        return None
    with torch.no_grad(), jax.default_matmul_precision('float32'):
        pairs = (_clip if kind == 'clip' else _pipeline)(ours, theirs, variant)
        return {
            name: float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max())
            for name, (a, b) in pairs.items()
        }


def check_finite(kind: str, place: pathlib.Path, variant: str | None = None) -> None:
    """Raises a UserError unless every network makes finite outputs of random inputs."""
    if kind == 'clip':
        outputs = _clip_outputs(folder.load_clip(place, variant=variant))
    else:
        outputs = _pipeline_outputs(folder.load(place, variant=variant), steps=2)
    for name, value in outputs.items():
        if not np.isfinite(value).all():
            raise UserError(f'{place}: {name} is not finite for random inputs: damaged weights.')


def _latents(channels):
    draw = np.random.RandomState(0).standard_normal((len(PROMPTS), SIDE, SIDE, channels))
    return draw.astype(np.float32)


def _images(size, channels, seed=0):
    draw = np.random.RandomState(seed).uniform(-1, 1, (len(PROMPTS), size, size, channels))
    return draw.astype(np.float32)


def _pipeline_outputs(sd, steps):
    """Every output of a pipeline of ours."""
    networks, params = sd.networks, sd.params
    latents = _latents(networks.vae.latent_channels)
    images = _images(SIDE * networks.vae.factor, networks.vae.image_channels)
    ids, null_ids = sd.tokenizer(PROMPTS), sd.tokenizer([''])
    context = jax.jit(lambda p: pipeline.encode_prompts(networks, p, ids))(params)
    null = jax.jit(lambda p: pipeline.encode_prompts(networks, p, null_ids))(params)
    unet = jax.jit(networks.unet.apply)
    walk = lambda p: pipeline.denoise(
        networks,
        p,
        latents,
        context,
        null,
        guidance=SCALE - 1.0,
        timesteps=pipeline.grid(networks.schedule, sampler='ddim', steps=steps),
        sampler='ddim',
    )
    decode = jax.jit(lambda p, z: pipeline.decode_latents(networks, p, z))
    return {
        'text_encoder': context,
        'unet': unet(params['unet'], latents, np.array(TIMES) + 1, context),
        'vae (encoder)': jax.jit(lambda p: pipeline.encode_images(networks, p, images))(params),
        'vae (decoder)': decode(params, latents),
        f'a sampling of {steps} steps': decode(params, jax.jit(walk)(params)),
    }


def _pipeline(ours, theirs, variant):
    """Name -> (ours, theirs)."""
    import diffusers
    import torch

    outputs = _pipeline_outputs(folder.load(ours, variant=variant), STEPS)
    options = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    options |= dict(variant=variant) if variant and ours == theirs else {}
    load = diffusers.StableDiffusionPipeline.from_pretrained
    if theirs.is_file():
        load = diffusers.StableDiffusionPipeline.from_single_file
        options |= dict(config=str(ours))
    pipe = load(str(theirs), local_files_only=True, **options).to(torch.float32)
    config = {key: pipe.scheduler.config.get(key) for key in ('prediction_type', 'beta_schedule')}
    config |= {key: pipe.scheduler.config[key] for key in ('beta_start', 'beta_end')}
    to_one = folder.schedule(dict(pipe.scheduler.config), str(theirs)).end == 0
    pipe.scheduler = diffusers.DDIMScheduler(
        **config,
        num_train_timesteps=pipe.scheduler.config.num_train_timesteps,
        set_alpha_to_one=to_one,
        steps_offset=1,
        clip_sample=False,
    )
    pipe.set_progress_bar_config(disable=True)
    options = _padding(pipe.text_encoder.config)
    hidden = pipe.text_encoder(pipe.tokenizer(list(PROMPTS), **options).input_ids)[0]
    latents = _torch(_latents(pipe.unet.config.in_channels))
    vae = pipe.vae.config
    side = SIDE * pipe.vae_scale_factor
    images = _torch(_images(side, vae.in_channels))
    pipe.check_inputs = lambda *args, **keywords: None  # it asks for multiples of 8
    sampled = pipe(
        list(PROMPTS),
        latents=latents,
        output_type='latent',
        height=side,
        width=side,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
    ).images
    decode = lambda z: _numpy(pipe.vae.decode(z / vae.scaling_factor).sample)
    mean = pipe.vae.encode(images).latent_dist.mean
    reference = (
        hidden.numpy(),
        _numpy(pipe.unet(latents, torch.tensor(TIMES), hidden).sample),
        _numpy(mean * vae.scaling_factor),
        decode(latents),
        decode(sampled),
    )
    return {name: (a, b) for (name, a), b in zip(outputs.items(), reference)}


def _clip_outputs(found):
    """Every output of a CLIP of ours."""
    images = _images(found.vision.size, found.vision.image_channels)
    texts = jax.jit(found.text.apply)(found.params['text'], found.tokenizer(PROMPTS))
    pictures = jax.jit(found.vision.apply)(found.params['vision'], images)
    return {'text': texts['projected'], 'vision': pictures['projected']}


def _clip(ours, theirs, variant):
    """Name -> (ours, theirs)."""
    import transformers

    outputs = _clip_outputs(folder.load_clip(ours, variant=variant))
    options = dict(variant=variant) if variant and ours == theirs else {}
    model = transformers.CLIPModel.from_pretrained(str(theirs), dtype='float32', **options).eval()
    words = transformers.CLIPTokenizer.from_pretrained(str(theirs))
    options = _padding(model.config.text_config)
    ids = words(list(PROMPTS), **options).input_ids
    size = model.config.vision_config.image_size
    images = _torch(_images(size, model.config.vision_config.num_channels))
    reference = (
        model.text_projection(model.text_model(ids).pooler_output).numpy(),
        model.visual_projection(model.vision_model(images).pooler_output).numpy(),
    )
    return {name: (a, b) for (name, a), b in zip(outputs.items(), reference)}


def _padding(config):
    """How transformers' tokenizer is to fill rows for a text encoder."""
    length = config.max_position_embeddings
    return dict(padding='max_length', max_length=length, truncation=True, return_tensors='pt')


def _torch(images):
    import torch

    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _numpy(images):
    return images.permute(0, 2, 3, 1).numpy()
