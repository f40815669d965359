"""DLSR's network of feature vectors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood.models.denoisers import LFDN, RESTORERS

T = jnp.ones(2, jnp.int32)


def shapes(channels, **keywords):
    net = LFDN(**keywords)
    return jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((2, channels)), T))


@pytest.mark.parametrize(('channels', 'count'), [(720, 86_740_560), (1792, 118_766_560)])
def test_parameters_of_the_published_sizes(channels, count):
    """EfficientNet-B4 (official code); ResNet-50 with the time width of its input (our choice)."""
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes(channels))) == count


@pytest.fixture(scope='module')
def net():
    model = RESTORERS['lfdn'](width=8, num_blocks=2)
    z = jax.random.normal(jax.random.key(1), (2, 6))
    return model, model.init(jax.random.key(0), z, T), z


def test_it_starts_at_zero_and_then_reads_time(net):
    model, variables, z = net
    np.testing.assert_array_equal(model.apply(variables, z, T), 0.0)
    trained = jax.tree.map(
        lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), variables
    )
    one, two = (model.apply(trained, z, t * T) for t in (1, 50))
    assert np.abs(one - two).max() > 1e-3
    alone = model.apply(trained, z[1:], T[1:])
    np.testing.assert_allclose(alone, one[1:], atol=1e-5)


def test_bfloat16_computes_with_float32_parameters(net):
    _, variables, z = net
    model = LFDN(width=8, num_blocks=2, dtype=jnp.bfloat16)
    made = jax.eval_shape(lambda: model.init(jax.random.key(0), z, T))
    assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype('float32')}
    assert model.apply(variables, z, T).dtype == jnp.float32
