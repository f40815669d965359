"""A denoiser as a function that strategies call: the chain, its noise, and traced guidance."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood import diffusion
from jaxood.diffusion import samplers, schedules
from jaxood.rng import key_each, key_for
from jaxood.synthesis.generator import generator

SHAPE, CLASSES, ALPHA_BAR = (4, 4, 1), 3, schedules.cosine(50)
INDEX = np.arange(6, dtype=np.int32)


class Toy(nn.Module):
    """eps_hat = (a + c . condition) x_t / (1 + t): something of everything."""

    @nn.compact
    def __call__(self, x, t, condition):
        c = self.param('c', nn.initializers.normal(1.0), (CLASSES + 1,))
        gain = (0.5 + condition @ c) / (1.0 + 0.01 * t)
        return gain[:, None, None, None] * x


@functools.cache
def made(sampler='ddim', guided=True, **options):
    return generator(
        Toy(),
        alpha_bar=ALPHA_BAR,
        timesteps=samplers.strided(50, 5),
        prediction=diffusion.PREDICTIONS['eps'],
        sampler=diffusion.SAMPLERS[sampler],
        guided=guided,
        **options,
    )


@pytest.fixture
def shared():
    params = {'c': jnp.array([0.1, -0.2, 0.3, 0.4])}
    return {'params': params, 'guidance': jnp.float32(1.5)}


def condition(index):
    return jax.nn.one_hot(index % CLASSES, CLASSES + 1)


@functools.partial(jax.jit, static_argnums=0)
def render(generate, shared, index=INDEX):
    keys = key_each(key_for(0, 'start'), index)
    x_start = jax.vmap(lambda k: jax.random.normal(k, SHAPE))(keys)
    bind = lambda network, guidance: samplers.guided(network, condition(index), guidance)
    return generate(shared, x_start, bind, key_for(0, 'steps'), index)


def test_one_step_of_ddim_by_hand(shared):
    """Two times on the way, T and 0: x_0_hat of the guided noise estimate, clipped."""
    generate = generator(
        Toy(),
        alpha_bar=ALPHA_BAR,
        timesteps=samplers.strided(50, 1),
        prediction=diffusion.PREDICTIONS['eps'],
        sampler=diffusion.SAMPLERS['ddim'],
        guided=True,
    )
    index = jnp.asarray(INDEX)
    keys = key_each(key_for(0, 'start'), index)
    x = np.asarray(jax.vmap(lambda k: jax.random.normal(k, SHAPE))(keys))
    c = np.asarray(shared['params']['c'])
    gain = lambda null: (0.5 + (c[-1] if null else c[INDEX % CLASSES])) / 1.5
    eps = (2.5 * gain(False) - 1.5 * gain(True))[:, None, None, None] * x
    a = ALPHA_BAR[50]
    expected = np.clip((x - np.sqrt(1 - a) * eps) / np.sqrt(a), -1.0, 1.0)
    np.testing.assert_allclose(render(generate, shared), expected, rtol=1e-4, atol=1e-5)


def test_unguided_is_guidance_zero(shared):
    zero = shared | {'guidance': jnp.float32(0.0)}
    unguided = render(made(guided=False), shared)
    np.testing.assert_allclose(render(made(), zero), unguided, atol=1e-6)
    assert np.abs(render(made(), shared) - unguided).max() > 0.05


@pytest.mark.parametrize(
    ('sampler', 'options'), [('ddim', {}), ('ddim', {'eta': 1.0}), ('ddpm', {}), ('dpmpp_2m', {})]
)
def test_a_row_does_not_know_the_others(shared, sampler, options):
    generate = made(sampler, **options)
    everyone = np.asarray(render(generate, shared))
    assert np.abs(everyone).max() <= 1.0
    for index in ([4, 4, 1], [5, 2, 0]):
        np.testing.assert_allclose(
            render(generate, shared, np.array(index)), everyone[index], atol=1e-6
        )


def test_another_weight_compiles_nothing(shared, compiled):
    weights = [shared | {'guidance': np.float32(w)} for w in (0.0, 1.5, 3.0)]
    first = render(made(), weights[0])
    compiled.clear()
    others = [render(made(), w) for w in weights[1:]]
    assert compiled == []
    assert all(np.abs(np.asarray(x) - np.asarray(first)).max() > 0.01 for x in others)
