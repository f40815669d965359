"""What holds for every strategy: candidate i comes from (key, i) alone."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood.diffusion import schedules
from jaxood.models.stable_diffusion.pipeline import Networks
from jaxood.rng import key_each
from jaxood.synthesis import STRATEGIES, wordnet_prompts

SHAPE, CLASSES = (4, 6, 3), 4


def generate(shared, x_start, bind, key, index):
    """Stands in for a diffusion model: its output hangs on all it is given, each row on its own."""
    network = lambda x, t, condition: x + condition[:, None, None, :3]
    noise = jax.vmap(lambda k: jax.random.normal(k, SHAPE))(key_each(key, index))
    x = bind(network, shared['guidance'])(x_start, jnp.ones(len(x_start), jnp.int32))
    return jnp.tanh(x + noise)


class Painter(NamedTuple):
    """Stands in for a text-to-image model likewise; its latents are the images."""

    networks: Networks = Networks(None, None, None)

    def noise(self, key, index):
        return jax.vmap(lambda k: jax.random.normal(k, SHAPE))(key_each(key, index))

    def encode(self, shared, images):
        return images

    def decode(self, shared, latents):
        return jnp.tanh(2.0 * latents)

    def paint(self, shared, latents, context, key, index, *, depth=None):
        towards = jnp.mean(context, axis=1)[:, None, None, :]
        return self.decode(shared, latents + shared['guidance'] * towards)


OFFERS = {
    'shape': SHAPE,
    'num_classes': CLASSES,
    'generate': generate,
    'edit': generate,
    'alpha_bar': schedules.cosine(100),
    'labels': np.array([3, 1, 0, 2, 1, 3, 2, 0, 0]),
    'painter': Painter(),
    'given': 9,
}
ANCHORS = ([('cat', 0.9), ('lynx', 0.8)], [('truck', 0.7)], [], [('cat', 0.5), ('mug', 0.4)] * 2)
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
    shared = {'guidance': 1.0, 'images': IMAGES, 'given': IMAGES}
    shared['anchors'], words = wordnet_prompts.arrange(ANCHORS)
    shared['contexts'] = np.random.default_rng(2).normal(size=(4, 5, 3)).astype(np.float32)
    assert len(words) <= len(shared['contexts'])
    return jax.device_get(make(shared, np.array(index, np.int32), jax.random.key(seed)))


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
