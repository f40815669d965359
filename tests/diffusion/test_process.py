import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood.diffusion import PREDICTIONS, process, schedules
from jaxood.rng import key_each

alpha_bar = schedules.linear(1000)
SHAPES = [(5, 7), (5, 4, 4, 3), (5, 2, 2, 2, 2)]  # vectors, images, anything


def pair(shape):
    key = jax.random.key(0)
    return jax.random.normal(jax.random.fold_in(key, 0), shape), jax.random.normal(key, shape)


@pytest.mark.parametrize('shape', SHAPES)
def test_noise_is_added_to_each_row_at_its_own_level(shape):
    x_0, eps = pair(shape)
    t = np.array([0, 1, 100, 500, 1000])
    x_t = process.add_noise(x_0, eps, alpha_bar[t])
    np.testing.assert_array_equal(x_t[0], x_0[0])  # t = 0 is clean, bit for bit
    for row in range(1, 5):
        a = np.float64(alpha_bar[t[row]])
        expected = np.sqrt(a) * x_0[row] + np.sqrt(1 - a) * eps[row]
        np.testing.assert_allclose(x_t[row], expected, atol=1e-5)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('name', PREDICTIONS)
def test_estimates_from_the_target_are_the_truth(name, shape):
    x_0, eps = pair(shape)
    a = alpha_bar[np.array([1, 10, 100, 500, 800])]
    output = PREDICTIONS[name].target(x_0, eps, a)
    x_0_hat, eps_hat = PREDICTIONS[name].estimate(output, process.add_noise(x_0, eps, a), a)
    np.testing.assert_allclose(x_0_hat, x_0, atol=1e-4)
    np.testing.assert_allclose(eps_hat, eps, atol=1e-4)


@pytest.mark.parametrize('name', PREDICTIONS)
def test_any_output_gives_a_pair_that_explains_x_t(name):
    """√ᾱ x_0_hat + √(1 - ᾱ) eps_hat = x_t, whatever the network says."""
    x_t, output = pair((5, 6))
    a = alpha_bar[np.array([1, 10, 100, 500, 800])]
    x_0_hat, eps_hat = PREDICTIONS[name].estimate(output, x_t, a)
    np.testing.assert_allclose(process.add_noise(x_0_hat, eps_hat, a), x_t, atol=1e-5)


def test_v_at_the_ends_is_noise_then_minus_data():
    x_0, eps = pair((2, 3))
    v = process.v_target(x_0, eps, jnp.array([1.0, 0.0]))
    np.testing.assert_array_equal(v[0], eps[0])
    np.testing.assert_array_equal(v[1], -x_0[1])


@pytest.mark.parametrize('name', PREDICTIONS)
def test_loss_is_each_rows_mean_square_and_zero_at_the_target(name):
    x_0, eps = pair((4, 3, 2))
    t = jnp.array([1, 50, 400, 1000])
    settings = {'alpha_bar': alpha_bar, 'prediction': PREDICTIONS[name]}
    target = PREDICTIONS[name].target(x_0, eps, alpha_bar[t])
    perfect = lambda x_t, t: target
    np.testing.assert_array_equal(process.loss(perfect, x_0, t, eps, **settings), np.zeros(4))
    off = jnp.arange(4.0).reshape(4, 1, 1)
    loss = process.loss(lambda x_t, t: target + off, x_0, t, eps, **settings)
    np.testing.assert_allclose(loss, [0.0, 1.0, 4.0, 9.0], rtol=1e-5)


def test_the_network_sees_the_noised_rows_at_their_times():
    x_0, eps = pair((3, 2))
    t = jnp.array([1, 500, 1000])

    def network(x_t, times):
        np.testing.assert_array_equal(times, t)
        np.testing.assert_array_equal(x_t, process.add_noise(x_0, eps, alpha_bar[t]))
        return eps

    process.loss(network, x_0, t, eps, alpha_bar=alpha_bar, prediction=PREDICTIONS['eps'])


def test_times_are_uniform_over_1_to_T_and_noise_is_standard():
    t, eps = process.draw_noise(jax.random.split(jax.random.key(0), 40_000), (3,), 5)
    share = np.bincount(t, minlength=7) / 40_000
    np.testing.assert_allclose(share, [0.0, 0.2, 0.2, 0.2, 0.2, 0.2, 0.0], atol=0.01)
    assert abs(float(eps.mean())) < 0.01
    assert abs(float(eps.var()) - 1.0) < 0.02
    correlation = np.corrcoef(np.c_[t, eps].T)  # time and the entries of noise are independent
    np.testing.assert_allclose(correlation, np.eye(4), atol=0.02)


def test_a_rows_draw_belongs_to_its_key():
    keys = key_each(jax.random.key(3), jnp.arange(6))
    t, eps = process.draw_noise(keys, (2, 2), 1000)
    t_alone, eps_alone = process.draw_noise(keys[4:5], (2, 2), 1000)
    assert t[4] == t_alone[0]
    np.testing.assert_array_equal(eps[4], eps_alone[0])
    assert len(set(np.asarray(t).tolist())) > 3


def test_dropped_conditions_are_null_at_the_given_rate_and_others_untouched():
    keys = jax.random.split(jax.random.key(0), 20_000)
    condition = jnp.tile(jnp.array([[0.25, 0.75, 0.0]]), (20_000, 1))
    got = np.asarray(process.drop_condition(condition, keys, 0.1))
    is_null = (got == [0.0, 0.0, 1.0]).all(1)
    is_kept = (got == [0.25, 0.75, 0.0]).all(1)
    assert (is_null | is_kept).all()
    assert abs(is_null.mean() - 0.1) < 0.007  # three standard deviations
    np.testing.assert_array_equal(process.drop_condition(condition, keys, 0.0), condition)
    assert (process.drop_condition(condition, keys, 1.0)[:, -1] == 1.0).all()
