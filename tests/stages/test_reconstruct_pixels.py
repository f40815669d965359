"""Pixel-level reconstruction: perfect networks, whole chains, and the score's scale."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from jaxood import diffusion, parallel
from jaxood.data import augment
from jaxood.diffusion import PREDICTIONS, process, samplers
from jaxood.rng import key_each, key_for
from jaxood.stages import reconstruct_pixels as stage

ALPHA_BAR = diffusion.SCHEDULES['scaled_linear'](50, beta_start=0.0015, beta_end=0.0195)
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), np.uint8)
GRID = samplers.strided(50, 10)


@dataclasses.dataclass(frozen=True)
class Network:
    """In place of the U-Net: its parameters are what it says, or a gain on what it sees."""

    num_classes: int = 0

    def apply(self, variables, x, t, condition):
        assert condition.shape == (len(x), 1)
        params = variables['params']
        return params['x_0'] if 'x_0' in params else params['gain'] * jnp.tanh(x)


def missed(params, images, number, rows=5, devices=None):
    devices = devices or parallel.setup(num_devices=1)
    compiled = stage.functions(devices, Network(), tuple(ALPHA_BAR.tolist()), 'x_0')
    levels = GRID[len(GRID) - 1 - number :]
    key = key_for(0, 'pixels')
    params = devices.replicate(params)
    return stage.errors(devices, compiled, params, key, images, levels, every=4, rows=rows)


@pytest.mark.parametrize('number', [2, 6, 10])
def test_a_perfect_network_makes_no_error(number):
    x_0 = {'x_0': augment.to_unit(IMAGES)}
    np.testing.assert_allclose(missed(x_0, IMAGES, number), 0.0, atol=1e-10)


def test_a_chain_in_parts_is_the_whole_chain():
    gain = {'gain': jnp.float32(0.9)}
    network = lambda x, t: 0.9 * jnp.tanh(x)
    denoise = process.denoiser(network, alpha_bar=ALPHA_BAR, prediction=PREDICTIONS['x_0'])
    key, x_0 = key_for(0, 'pixels'), augment.to_unit(IMAGES)
    draw = lambda key: jax.random.normal(key, x_0.shape[1:])
    eps = jax.vmap(draw)(key_each(key, augment.mark(IMAGES)))
    x_t = process.add_noise(x_0, eps, ALPHA_BAR[GRID[0]])
    how = dict(alpha_bar=ALPHA_BAR, sampler=samplers.ddim, clip=(-1.0, 1.0))
    whole = samplers.sample(denoise, x_t, None, timesteps=GRID, **how)
    want = np.square(whole - x_0).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(missed(gain, IMAGES, 10), want, rtol=1e-5)
    np.testing.assert_allclose(missed(gain, IMAGES[2:3], 10, rows=2), want[2:3], rtol=1e-5)
    two = missed(gain, IMAGES, 10, rows=6, devices=parallel.setup('pmap', 2))
    np.testing.assert_allclose(two, want, rtol=1e-5)


def test_the_published_chains():
    """Graham et al.'s official code: 25 depths, 1,250 calls of the network."""
    config = ml_collections.ConfigDict(dict(pixels=dict(steps=100, every=4)))
    calls = stage.calls(config)
    assert (len(calls), sum(calls), calls[0], calls[-1]) == (25, 1250, 2, 98)


def test_held_out_images_score_0_in_the_mean():
    errors = np.random.default_rng(1).gamma(2.0, size=(200, 25)) * np.linspace(0.1, 9, 25)
    np.testing.assert_allclose(stage.scores(errors, errors).mean(), 0.0, atol=1e-12)
    assert (stage.scores(errors + errors.std(axis=0), errors) > stage.scores(errors, errors)).all()


def test_rows_are_spread_over_the_set():
    np.testing.assert_array_equal(stage.chosen(10, 4), [0, 3, 6, 9])
    np.testing.assert_array_equal(stage.chosen(3, 4), [0, 1, 2])
