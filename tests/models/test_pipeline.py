"""Whole samplings: diffusers' images; seeds, guidance and devices; a size that can't be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pipelines import folder, golden, relative
from reference import make_stable_diffusion as reference

from jaxood import parallel
from jaxood.errors import UserError
from jaxood.models.stable_diffusion import folder as folders
from jaxood.models.stable_diffusion import pipeline

CASES = [*(('sd1', sampler) for sampler in pipeline.GRIDS), ('sd2', 'ddim'), ('deep', 'pndm')]
SIZE = dict(height=8, width=8)


@pytest.fixture(scope='module')
def sd():
    return folders.load(folder('sd1'))


def ids(sd, prompts=reference.PROMPTS):
    return sd.tokenizer(prompts), sd.tokenizer([''])


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'sampler'), CASES)
def test_a_sampling_of_20_steps_is_that_of_diffusers(name, sampler):
    """To the last pixel. (With v prediction diffusers' PNDM mixes other things: see `pndm`.)"""
    sd = folders.load(folder(name))

    @jax.jit
    def images(params, latents):
        context, null = (pipeline.encode_prompts(sd.networks, params, i) for i in ids(sd))
        found = pipeline.denoise(
            *(sd.networks, params, latents, context, null),
            guidance=reference.GUIDANCE_SCALE - 1.0,
            timesteps=pipeline.grid(sd.networks.schedule, sampler=sampler, steps=reference.STEPS),
            sampler=sampler,
        )
        return pipeline.decode_latents(sd.networks, params, found)

    got = images(sd.params, reference.latents(name))
    assert relative(got, golden()[f'{name}/{sampler}']) < 1e-3


def rendered(sd, prompts, seeds, mode='jit', count=1, **keywords):
    devices = parallel.setup(mode, count)
    chain = SIZE | dict(steps=2, batch_size=4) | keywords
    return np.concatenate(list(pipeline.render(sd, devices, prompts, seeds, **chain)))


def test_image_i_is_that_of_prompt_and_seed_i(sd):
    prompts, seeds = ['a cat', 'a photo of a three', 'a cat', 'of', 'a cat'], [3, 4, 5, 6, 3]
    whole = rendered(sd, prompts, seeds).astype(int)
    assert whole.shape == (5, 8, 8, 3)
    part = rendered(sd, prompts[1:], seeds[1:]).astype(int)
    assert np.abs(part - whole[1:]).max() <= 1  # rounding
    assert np.abs(whole[0] - whole[4]).max() <= 1
    assert np.abs(whole[0] - whole[2]).max() > 20


@pytest.mark.slow
@pytest.mark.parametrize('mode', parallel.MODES)
def test_devices_change_nothing(mode, sd):
    prompts, seeds = ['a cat'] * 5, range(5)
    one = rendered(sd, prompts, seeds).astype(int)
    many = rendered(sd, prompts, seeds, mode, 4).astype(int)
    assert np.abs(many - one).max() <= 1


def test_guidance_and_seeds_are_traced(sd, compiled):
    first = rendered(sd, ['a cat'] * 4, range(4), guidance=2.0)
    compiled.clear()
    second = rendered(sd, ['a photo'] * 4, range(4, 8), guidance=5.0)
    assert not compiled
    assert np.abs(first.astype(int) - second).max() > 20


def test_guidance_of_nothing_is_the_prompt_alone(sd):
    """w = 0 and no null branch are the same; w = -1 is the negative prompt."""
    prompt, seeds = ['a photo of a three'] * 4, range(4)
    alone = rendered(sd, prompt, seeds, guidance=None).astype(int)
    assert np.abs(rendered(sd, prompt, seeds, guidance=0.0) - alone).max() <= 1
    only = rendered(sd, ['a cat'] * 4, seeds, guidance=-1.0, negative=prompt[0]).astype(int)
    assert np.abs(only - alone).max() <= 1


def test_an_image_comes_back_from_no_depth_and_is_gone_from_the_deepest(sd):
    images = jnp.asarray(reference.images(8))
    prompts, null = ids(sd)
    seeds = jnp.arange(2, dtype=jnp.uint32)

    edited = jax.jit(
        lambda images, start: pipeline.image_to_image(
            *(sd.networks, sd.params, images, prompts, null, seeds), start=start, steps=4
        ),
        static_argnames='start',
    )
    keys = pipeline._keys(seeds, 'encode')
    latents = pipeline.encode_images(sd.networks, sd.params, images, keys)
    there_and_back = jnp.clip(pipeline.decode_latents(sd.networks, sd.params, latents), -1, 1)
    assert relative(edited(images, start=0), there_and_back) < 1e-4
    a, b = edited(images, start=1000), edited(-images, start=1000)  # nothing is left of them
    assert (
        np.abs(a - b).mean()
        < 0.3 * np.abs(edited(images, start=0) - edited(-images, start=0)).mean()
    )


def test_latents_of_an_image_have_the_mean_and_the_variance_of_the_encoder(sd):
    image = jnp.asarray(reference.images(8))[:1]
    mean = pipeline.encode_images(sd.networks, sd.params, image)
    _, log_variance = sd.networks.vae.apply(sd.params['vae'], image, method='encode')
    keys = jax.random.split(jax.random.key(0), 2_000)
    draw = lambda key: pipeline.encode_images(sd.networks, sd.params, image, key[None])[0]
    drawn = jax.jit(jax.vmap(draw))(keys)
    std = sd.networks.vae.scale * jnp.exp(0.5 * log_variance[0])
    assert np.abs((drawn.mean(0) - mean[0]) / std).max() < 0.1
    np.testing.assert_allclose(drawn.std(0), std, rtol=0.08)


@pytest.mark.parametrize(
    ('changed', 'message'),
    [
        (dict(height=9), r'9 x 8 pixels: .* 1 times, so both must be multiples of 2, such as 8'),
        (dict(steps=0), r'steps=0 must be in 1\.\.500'),
        (dict(sampler='dim'), "the sampler of Stable Diffusion 'dim' is not known. Did you mean"),
        (dict(seeds=[1, 2]), '1 prompts and 2 seeds'),
    ],
)
def test_what_cannot_be_rendered(changed, message, sd):
    with pytest.raises(UserError, match=message):
        rendered(sd, ['a cat'], **dict(seeds=[1]) | changed)
