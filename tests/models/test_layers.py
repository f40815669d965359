import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood.models.layers import GroupNorm, dropout, sinusoidal_embedding
from jaxood.rng import key_each


def test_embedding_has_ddpms_frequencies_and_order():
    """Official code: frequencies 10^4^(-k / (half - 1)), sines then cosines."""
    got = sinusoidal_embedding(jnp.array([0, 3, 1000]), 6)
    angle = np.array([[0], [3], [1000]]) * [1.0, 1e-2, 1e-4]
    np.testing.assert_allclose(got, np.hstack([np.sin(angle), np.cos(angle)]), atol=1e-4)


def test_embedding_has_latent_diffusions_frequencies_and_order():
    """Latent diffusion and DLSR: 10^4^(-k / half), cosines then sines."""
    got = sinusoidal_embedding(jnp.array([3]), 8, endpoint=False, cos_first=True)
    angle = np.array([[3]]) * [1.0, 1e-1, 1e-2, 1e-3]
    np.testing.assert_allclose(got, np.hstack([np.cos(angle), np.sin(angle)]), atol=1e-6)


def test_embedding_of_odd_size_is_refused():
    with pytest.raises(ValueError, match='must be even'):
        sinusoidal_embedding(jnp.array([3]), 7)


def test_dropout_keeps_the_mean_and_drops_at_its_rate():
    x = jnp.ones((200, 20, 10))
    got = np.asarray(dropout(x, 0.3, jax.random.split(jax.random.key(0), 200)))
    assert set(np.unique(got)) == {np.float32(0.0), np.float32(1.0 / 0.7)}
    assert abs((got == 0.0).mean() - 0.3) < 0.007
    assert abs(got.mean() - 1.0) < 0.01


def test_dropout_masks_belong_to_rows_keys_and_differ():
    x = jnp.ones((6, 50))
    keys = key_each(jax.random.key(1), jnp.arange(6))
    got = dropout(x, 0.5, keys)
    order = np.array([5, 2])
    np.testing.assert_array_equal(dropout(x[order], 0.5, keys[order]), got[order])
    assert len(np.unique(got, axis=0)) == 6


def test_dropout_without_keys_or_rate_is_the_identity():
    x = jnp.arange(6.0).reshape(2, 3)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.split(jax.random.key(0), 2)) is x


@pytest.mark.parametrize('shape', [(3, 64), (3, 7, 24), (3, 5, 4, 64)])
@pytest.mark.parametrize('groups', [1, 4])
def test_group_norm_is_flax_group_norm(shape, groups):
    x = 2.0 + 3.0 * jax.random.normal(jax.random.key(0), shape)
    draw = lambda n: 1.0 + jax.random.normal(jax.random.key(n), shape[-1:])
    variables = {'params': {'scale': draw(1), 'bias': draw(2)}}
    ours, theirs = (
        lambda x, layer=layer: layer.apply(variables, x)
        for layer in (GroupNorm(groups, 1e-5), nn.GroupNorm(groups, epsilon=1e-5))
    )
    np.testing.assert_allclose(jax.jit(ours)(x), jax.jit(theirs)(x), atol=2e-5)
    gradient = lambda f: jax.jit(jax.grad(lambda x: jnp.sum(f(x) ** 3)))(x)
    np.testing.assert_allclose(gradient(ours), gradient(theirs), atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize(
    ('channels', 'groups'),
    [(256, 32), (128, 32), (64, 16), (48, 12), (18, 3), (8, 2), (7, 1), (3, 1)],
)
def test_group_norm_leaves_each_group_four_channels_at_least(channels, groups):
    """Each group has mean 0 and variance 1, no finer part of it has."""
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, channels)) + jnp.arange(channels) % 2
    layer = GroupNorm()
    y, _ = jax.jit(layer.init_with_output)(jax.random.key(0), x)
    y = np.asarray(y).reshape(2, 25, groups, -1)
    np.testing.assert_allclose(y.mean((1, 3)), np.zeros((2, groups)), atol=1e-5)
    np.testing.assert_allclose(y.var((1, 3)), np.ones((2, groups)), atol=1e-4)
    assert np.abs(y.mean(1)).max() > 0.1


def test_group_norm_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match='24 channels do not divide into 32 groups'):
        GroupNorm(32).init(jax.random.key(0), jnp.ones((1, 24)))


def test_group_norm_of_a_constant_is_its_bias_and_of_bfloat16_is_computed_in_float32():
    layer = GroupNorm(dtype=jnp.bfloat16)
    x = jnp.full((1, 4, 4, 32), 300.0, jnp.bfloat16)
    variables = {'params': {'scale': jnp.ones(32), 'bias': jnp.full(32, 0.5)}}
    got = layer.apply(variables, x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), 0.5, atol=2e-2)
