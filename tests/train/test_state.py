"""Optimisers, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxood.errors import UserError
from jaxood.train import state


def descend(tx, grads, start=1.0):
    """The parameter after each of some given gradients."""
    params, found = jnp.float32(start), []
    opt_state = tx.init(params)
    for grad in grads:
        updates, opt_state = tx.update(jnp.float32(grad), opt_state, params)
        params = optax.apply_updates(params, updates)
        found.append(float(params))
    return found


def test_sgd_is_nesterov_with_coupled_decay_and_a_cosine():
    steps, rate, final, mu, decay = 4, 0.2, 0.05, 0.9, 0.1
    w, m, expected = 1.0, 0.0, []
    for n, grad in enumerate([1.0, -2.0, 0.5, 0.0]):
        g = grad + decay * w  # before the momentum
        m = mu * m + g
        share = 0.5 * (1.0 + np.cos(np.pi * n / steps))
        w -= (final + (rate - final) * share) * (g + mu * m)
        expected.append(w)
    tx = state.sgd(
        steps=steps,
        learning_rate=rate,
        final_learning_rate=final,
        momentum=mu,
        weight_decay=decay,
    )
    np.testing.assert_allclose(descend(tx, [1.0, -2.0, 0.5, 0.0]), expected, rtol=1e-6)


def test_adams_first_steps_have_the_learning_rates_size():
    """Under one and the same gradient every step is the rate, whatever the gradient."""
    for grad in (1e-3, 5.0):
        moved = -np.diff([1.0, *descend(state.adam(steps=10, learning_rate=0.01), [grad] * 3)])
        np.testing.assert_allclose(moved, 0.01, rtol=1e-3)


def test_adam_warms_up_and_cools_down():
    """Steps of 0, 1/2 of the rate, the rate, then half a cosine to the final one."""
    tx = state.adam(steps=6, learning_rate=0.1, warmup=2, final_learning_rate=0.02)
    moved = -np.diff([5.0, *descend(tx, [1.0] * 7, start=5.0)])
    cosine = 0.02 + 0.08 * 0.5 * (1.0 + np.cos(np.pi * np.arange(5) / 4))
    np.testing.assert_allclose(moved, [0.0, 0.05, *cosine], rtol=1e-3, atol=1e-7)


def test_clipping_bounds_the_global_norm():
    grads = {'a': jnp.array([3.0]), 'b': jnp.array([4.0])}
    tx = state.adam(steps=10, learning_rate=1.0, clip=1.0)
    _, after = tx.update(grads, tx.init(grads), grads)
    first_moments = jax.tree.leaves(optax.tree.get(after, 'mu'))
    np.testing.assert_allclose(np.concatenate(first_moments), [0.06, 0.08], rtol=1e-5)  # x 0.1


def test_the_average_forgets_its_start():
    decay = [float(state.ema_decay(n, limit=0.9999)) for n in (0, 10, 90, 10**6)]
    np.testing.assert_allclose(decay, [0.1, 11 / 20, 91 / 100, 0.9999], rtol=1e-6)


def test_the_first_state():
    params = {'w': jnp.ones(2)}
    first = state.create(params, state.sgd(steps=3), {'mean': 1}, ema=True)
    assert int(first.step) == 0
    np.testing.assert_array_equal(first.ema['w'], params['w'])
    assert first.ema['w'] is not params['w']  # a step gives both buffers away
    assert first.extra == {'mean': 1}
    assert state.create(params, state.sgd(steps=3), {}, ema=False).ema is None


@pytest.mark.parametrize('name', state.OPTIMIZERS)
@pytest.mark.parametrize('rate', [0.0, -1.0, float('nan')])
def test_rates_are_positive(name, rate):
    with pytest.raises(UserError, match=r'learning_rate=.* must be above 0'):
        state.OPTIMIZERS[name](steps=5, learning_rate=rate)


def test_what_adam_refuses():
    for warmup in (5, -1):
        with pytest.raises(UserError, match=f'warmup={warmup} must be less than the 5 steps'):
            state.adam(steps=5, warmup=warmup)
    with pytest.raises(UserError, match='clip=0.0 must be above 0'):
        state.adam(steps=5, clip=0.0)
