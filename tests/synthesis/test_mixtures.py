"""The controls of label mixup: pure classes, and averages of real images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood.data.augment import to_unit
from jaxood.diffusion.samplers import guided
from jaxood.errors import UserError
from jaxood.rng import key_each, key_for
from jaxood.synthesis import label_mixup, pure, real_mixup

LABELS = np.array([2, 0, 1, 1, 0, 2, 2, 1])
IMAGES = np.random.default_rng(0).integers(256, size=(8, 2, 2, 1), dtype=np.uint8)


def generate(shared, x_start, bind, key, index):
    """One step of a network that adds the expected class number."""
    classes = lambda x, t, condition: (
        x + (condition @ jnp.arange(condition.shape[1] * 1.0))[:, None, None, None]
    )
    return bind(classes, 0.0)(x_start, jnp.ones(len(x_start), jnp.int32))


def test_pure_classes_are_label_mixup_with_all_weight_on_one():
    """Same key, same candidate: label mixup at w = 1 shows class i of its pair."""
    key, index = jax.random.key(0), jnp.arange(9)
    ours = pure.build((2, 2, 1), 3, generate)({}, index, key)
    np.testing.assert_array_equal(ours['first'], [0, 1, 2] * 3)
    x_start = jax.vmap(lambda k: jax.random.normal(k, (2, 2, 1)))(
        key_each(key_for(key, 'start'), index)
    )
    condition = jax.nn.one_hot(ours['first'], 4)
    bind = lambda network, guidance: guided(network, condition, guidance)
    want = generate({}, x_start, bind, key_for(key, 'steps'), index)
    np.testing.assert_allclose(ours['image'], want, atol=1e-6)
    mixed = label_mixup.build((2, 2, 1), 3, generate, None, low=1.0, high=1.0)({}, index, key)
    same = np.asarray(mixed['first'] == ours['first'])
    assert same.any()
    np.testing.assert_allclose(mixed['image'][same], ours['image'][same], atol=1e-6)


def test_real_mixtures_are_averages_of_two_training_images():
    rows = real_mixup.build(LABELS, 3, low=0.2, high=0.9)
    made = jax.device_get(rows({'images': IMAGES}, jnp.arange(300), jax.random.key(1)))
    np.testing.assert_array_equal(LABELS[made['of_first']], made['first'])
    np.testing.assert_array_equal(LABELS[made['of_second']], made['second'])
    assert (made['first'] < made['second']).all()
    assert {(i, j) for i, j in zip(made['first'], made['second'])} == {(0, 1), (0, 2), (1, 2)}
    w = made['weight'][:, None, None, None]
    assert w.min() >= 0.2
    assert w.max() <= 0.9
    x = np.asarray(to_unit(IMAGES))
    want = w * x[made['of_first']] + (1 - w) * x[made['of_second']]
    np.testing.assert_allclose(made['image'], want, atol=1e-6)
    for k in (0, 1):  # every image of a class has its turn
        assert set(made['of_first'][made['first'] == k]) == {*np.flatnonzero(k == LABELS)}


def test_a_range_that_cannot_be():
    with pytest.raises(UserError, match='0 <= low <= high <= 1'):
        real_mixup.build(LABELS, 3, low=0.8, high=0.3)
