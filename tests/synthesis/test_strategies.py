"""What holds for every strategy: candidate i comes from (key, i) alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood.diffusion import schedules
from jaxood.rng import key_each
from jaxood.synthesis import STRATEGIES

SHAPE, CLASSES = (4, 6, 3), 4


def generate(shared, x_start, bind, key, index):
    """Stands in for a diffusion model: its output hangs on all it is given, each row on its own."""
    network = lambda x, t, condition: x + condition[:, None, None, :3]
    noise = jax.vmap(lambda k: jax.random.normal(k, SHAPE))(key_each(key, index))
    x = bind(network, shared['guidance'])(x_start, jnp.ones(len(x_start), jnp.int32))
    return jnp.tanh(x + noise)


OFFERS = {
    'shape': SHAPE,
    'num_classes': CLASSES,
    'generate': generate,
    'edit': generate,
    'alpha_bar': schedules.cosine(100),
    'labels': np.array([3, 1, 0, 2, 1, 3, 2, 0, 0]),
    'given': 9,
}
IMAGES = np.random.default_rng(0).integers(256, size=(9, *SHAPE), dtype=np.uint8)
# Settings that use all a strategy has, by its name; the defaults are always tried.
MORE = {
    'label_mixup': [dict(mix='score'), dict(renoise=0.5)],
    'semantic_discrepant': [dict(depth=30, same=0.5)],
}
CASES = [(name, keywords) for name in STRATEGIES for keywords in ({}, *MORE.get(name, []))]
every_strategy = pytest.mark.parametrize(('name', 'keywords'), CASES)


@functools.cache
def program(name, keywords):
    strategy = STRATEGIES[name]
    return jax.jit(strategy.build(**{k: OFFERS[k] for k in strategy.needs}, **dict(keywords)))


def rows(name, keywords, index, seed=0):
    make = program(name, tuple(keywords.items()))
    made = make(
        {'guidance': 1.0, 'images': IMAGES, 'given': IMAGES},
        np.array(index, np.int32),
        jax.random.key(seed),
    )
    return jax.device_get(made)


@every_strategy
def test_a_candidate_is_its_number(name, keywords):
    """Other batches, other places in them, and numbers far on: the same candidate."""
    everyone = rows(name, keywords, range(12))
    for index in ([7, 3, 5, 0], [11, 11, 1, 2]):
        some = rows(name, keywords, index)
        assert some.keys() == everyone.keys()
        for fact, values in some.items():
            np.testing.assert_allclose(values, everyone[fact][index], atol=1e-6, err_msg=fact)


@every_strategy
def test_candidates_differ(name, keywords):
    images = rows(name, keywords, [0, 1, 2, 50_000])['image']
    for i in range(4):
        for j in range(i):
            assert np.abs(images[i] - images[j]).mean() > 0.05
    assert np.abs(images - rows(name, keywords, [0, 1, 2, 50_000], seed=1)['image']).mean() > 0.05


@every_strategy
def test_images_have_the_id_images_shape_and_range(name, keywords):
    image = rows(name, keywords, range(12))['image']
    assert image.dtype == np.float32
    assert image.shape == (12, *SHAPE)
    assert image.min() >= -1.0
    assert image.max() <= 1.0
    assert np.ptp(image) > 0.5
