"""Noise to a level and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood.diffusion import PREDICTIONS, SCHEDULES, process, restoration
from jaxood.errors import UserError
from jaxood.rng import key_each

ALPHA_BAR = SCHEDULES['scaled_linear'](100, beta_start=0.0015, beta_end=0.0195)
Z_0 = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)
KEYS = key_each(jax.random.key(3), np.arange(5))


def restore(network, depth, *, stride=1, eta=1.0, z_0=Z_0, keys=KEYS):
    denoise = process.denoiser(network, alpha_bar=ALPHA_BAR, prediction=PREDICTIONS['x_0'])
    times = restoration.grid(depth, 100, stride)
    return restoration.restore(denoise, z_0, keys, alpha_bar=ALPHA_BAR, timesteps=times, eta=eta)


def test_the_schedule_is_that_of_the_official_code():
    """Linear in √β; linear in β would end at .3475."""
    after = {1: 0.99850, 2: 0.99692, 3: 0.99527, 4: 0.99353, 10: 0.98131, 25: 0.93578}
    after |= {50: 0.80713, 100: 0.41175}
    np.testing.assert_allclose(ALPHA_BAR[list(after)], list(after.values()), atol=1e-5)
    linear = SCHEDULES['linear'](100, beta_start=0.0015, beta_end=0.0195)
    assert linear[100] == pytest.approx(0.3475, abs=1e-4)


@pytest.mark.parametrize(('depth', 'stride'), [(1, 1), (3, 1), (3, 2), (10, 10), (100, 7)])
@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
def test_an_oracle_restores_exactly(depth, stride, eta):
    got = restore(lambda z, t: Z_0, depth, stride=stride, eta=eta)
    np.testing.assert_allclose(got, Z_0, atol=1e-5)


def test_noise_follows_the_row_alone():
    """The same key, the same restoration: whatever stands beside it, and padded or not."""
    network = lambda z, t: 0.9 * jnp.tanh(z)
    together = restore(network, 10)
    alone = restore(network, 10, z_0=Z_0[3:4], keys=KEYS[3:4])
    np.testing.assert_allclose(alone, together[3:4], atol=1e-6)
    np.testing.assert_array_equal(restore(network, 10), together)
    other = restore(network, 10, keys=key_each(jax.random.key(4), np.arange(5)))
    assert np.abs(other - together).max() > 1e-3


def test_a_chain_passes_every_level_down_to_the_clean_one():
    np.testing.assert_array_equal(restoration.grid(3, 100), [3, 2, 1, 0])
    np.testing.assert_array_equal(restoration.grid(5, 100, 2), [5, 3, 1, 0])
    np.testing.assert_array_equal(restoration.grid(4, 100, 4), [4, 0])
    called = []

    def network(z, t):
        jax.debug.callback(lambda t: called.append(int(t[0])), t)
        return z

    restore(network, 3)
    jax.effects_barrier()
    assert sorted(called, reverse=True) == [3, 2, 1]


@pytest.mark.parametrize(('depth', 'stride'), [(0, 1), (101, 1), (3, 0), (3, 4)])
def test_levels_that_are_not_there(depth, stride):
    with pytest.raises(UserError, match=r'in 1\.\.(100|3)'):
        restoration.grid(depth, 100, stride)
