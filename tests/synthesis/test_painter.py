"""A text-to-image model as strategies see it, and DOG's ways of using one, on a tiny pipeline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pipelines import folder, relative

from jaxood.errors import UserError
from jaxood.models.stable_diffusion import folder as folders
from jaxood.models.stable_diffusion import pipeline
from jaxood.synthesis import (
    latent_mix,
    latent_noise,
    painter,
    text_mix,
    text_noise,
    wordnet_prompts,
)

SHAPE = (8, 8, 3)  # of the ID images; the tiny pipeline paints 16 x 16
LABELS = np.array([0, 1, 1, 0, 1, 2], np.int32)
PROMPTS = ('', 'a photo of a three', 'a cat', 'of the')


@pytest.fixture(scope='module')
def sd():
    return folders.load(folder('sd1'))


@pytest.fixture(scope='module')
def shared(sd):
    images = np.random.default_rng(0).integers(256, size=(len(LABELS), *SHAPE), dtype=np.uint8)
    contexts = pipeline.encode_prompts(sd.networks, sd.params, sd.tokenizer(PROMPTS))
    found = {'params': sd.params, 'guidance': np.float32(2.0), 'images': images}
    return found | {'null': contexts[0], 'contexts': contexts[1:]}


@pytest.fixture(scope='module')
def paints(sd):
    return painter.Painter(sd.networks, sd.size, SHAPE, 'dpmpp_2m', 2, True)


def rows(build, shared, count=6, seed=0):
    make = jax.jit(lambda shared, index: build(shared, index, jax.random.key(seed)))
    return jax.device_get(make(shared, np.arange(count, dtype=np.int32)))


def test_noised_to_no_depth_is_the_autoencoders_round_trip(sd, shared, paints):
    made = rows(latent_noise.build(paints, LABELS, depth=0), shared)
    assert sorted(made['source']) == list(range(6))  # each image once
    np.testing.assert_array_equal(made['first'], LABELS[made['source']])
    images = shared['images'][made['source']] / 127.5 - 1.0
    latents = paints.encode(shared, jnp.asarray(images, jnp.float32))
    assert relative(made['image'], np.asarray(paints.decode(shared, latents))) < 1e-4


def test_noised_deeper_an_image_is_painted_towards_its_class(sd, shared):
    """From √ᾱ z + √(1 - ᾱ) ε; the chain itself is the pipeline's."""
    paints = Asked(sd.networks)
    made = rows(latent_noise.build(paints, LABELS, depth=500), shared, count=600)
    latents, context, depth = made['image']['latents'], made['image']['context'], 500
    assert (made['image']['depth'] == depth).all()
    np.testing.assert_array_equal(context, shared['contexts'][LABELS[made['source']]])
    images = shared['images'][made['source']] / 127.5 - 1.0
    a = sd.networks.schedule.alpha_bar[depth]
    noise = (latents - np.sqrt(a) * images) / np.sqrt(1.0 - a)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1.0) < 0.02


class Asked(painter.Painter):
    """Tells what it is to paint, and paints nothing; its latents are the images."""

    def __new__(cls, networks=None):
        return super().__new__(cls, networks, 8, SHAPE, 'dpmpp_2m', 2, True)

    def noise(self, key, index):
        return jnp.zeros((len(index), *SHAPE))

    def encode(self, shared, images):
        return images

    def paint(self, shared, latents, context, key, index, *, depth=0):
        told = {'latents': latents, 'context': context}
        return told | {'depth': jnp.full(len(index), depth)}


@pytest.mark.parametrize(('weight', 'which'), [(0.0, 'second'), (1.0, 'first')])
def test_all_weight_on_one_prompt_is_that_prompt(weight, which, shared):
    made = rows(text_mix.build(Asked(), 3, low=weight, high=weight), shared)
    np.testing.assert_array_equal(made['image']['context'], shared['contexts'][made[which]])


def test_mixed_prompts_are_weighed(shared):
    made = rows(text_mix.build(Asked(), 3), shared)
    w, c = made['weight'][:, None, None], np.asarray(shared['contexts'])
    wanted = w * c[made['first']] + (1.0 - w) * c[made['second']]
    np.testing.assert_allclose(made['image']['context'], wanted, atol=1e-6)


def test_noise_on_the_text_has_the_size_asked_for(shared):
    for scale in (0.0, 0.3):
        made = rows(text_noise.build(Asked(), 3, scale=scale), shared, count=60)
        np.testing.assert_array_equal(made['first'], np.arange(60) % 3)
        noise = made['image']['context'] - np.asarray(shared['contexts'])[made['first']]
        assert noise.std() == pytest.approx(scale, rel=0.02, abs=1e-6)


def test_what_is_painted_is_the_pipelines_image(sd, shared, paints):
    """Reduced to the ID size, and the same alone or among others."""
    index = np.arange(3, dtype=np.int32)
    key, context = jax.random.key(0), shared['contexts']
    grid = pipeline.grid(sd.networks.schedule, sampler='dpmpp_2m', steps=2)

    @jax.jit
    def whole(shared):
        latents = paints.noise(key, index)
        found = pipeline.denoise(
            *(sd.networks, shared['params'], latents, context, shared['null']),
            **dict(guidance=shared['guidance'], timesteps=grid, sampler='dpmpp_2m'),
        )
        image = pipeline.decode_latents(sd.networks, shared['params'], found)
        return image, paints.paint(shared, latents, context, key, index)

    large, small = whole(shared)
    assert large.shape == (3, 16, 16, 3)
    expected = jax.image.resize(jnp.clip(large, -1, 1), (3, *SHAPE), 'cubic', antialias=True)
    np.testing.assert_allclose(small, jnp.clip(expected, -1, 1), atol=1e-4)


def test_mixed_latents_lie_between_those_of_two_classes(shared, paints):
    made = rows(latent_mix.build(paints, LABELS, 3), shared, count=300)
    for which in ('first', 'second'):
        np.testing.assert_array_equal(LABELS[made[f'of_{which}']], made[which])
    assert (made['first'] != made['second']).all()
    assert 0.3 <= made['weight'].min() < 0.32
    assert 0.68 < made['weight'].max() <= 0.7
    alone = rows(latent_mix.build(paints, LABELS, 3, low=1.0, high=1.0), shared)
    images = shared['images'][alone['of_first']] / 127.5 - 1.0
    latents = paints.encode(shared, jnp.asarray(images, jnp.float32))
    assert relative(alone['image'], np.asarray(paints.decode(shared, latents))) < 1e-4


# ---- words ------------------------------------------------------------------------------------

ANCHORS = ([('cat', 0.9), ('lynx', 0.8), ('mug', 0.1)], [], [('mug', 0.7)])


def asked(count):
    arrays, words = wordnet_prompts.arrange(ANCHORS)
    shared = {'anchors': arrays, 'contexts': np.arange(len(words))}
    return rows(wordnet_prompts.build(Asked()), shared, count), words


def test_words_take_turns_within_their_class():
    made, words = asked(24)
    assert words == ('cat', 'lynx', 'mug')
    spelt = np.array(words)[made['word']]
    np.testing.assert_array_equal(made['class'], [0, 2] * 12)  # class 1 has no word
    assert list(spelt[made['class'] == 0]) == ['cat', 'lynx', 'mug'] * 4
    assert list(spelt[made['class'] == 2]) == ['mug'] * 12
    similar = {(y, w): s for y, pairs in enumerate(ANCHORS) for w, s in pairs}
    wanted = [similar[y, w] for y, w in zip(made['class'], spelt)]
    np.testing.assert_allclose(made['similarity'], wanted)
    np.testing.assert_array_equal(made['seed'], np.arange(24))
    np.testing.assert_array_equal(made['image']['context'], made['word'])  # its own prompt


def test_more_of_them_begin_with_the_same():
    few, many = asked(6)[0], asked(24)[0]
    for name in ('class', 'word', 'seed'):
        np.testing.assert_array_equal(many[name][:6], few[name])


def test_no_word_at_all_is_said():
    with pytest.raises(UserError, match='no class has an anchor'):
        wordnet_prompts.arrange(([], []))


# ---- size, bad input ----------------------------------------------------------------


def test_images_are_resized_with_care():
    """One grey stays grey; what is shrunk is averaged and not sampled; within the range."""
    grey = np.full((1, 16, 16, 3), 0.25, np.float32)
    np.testing.assert_allclose(painter.resize(grey, 8, 8), grey[:, :8, :8], atol=1e-6)
    board = np.indices((16, 16)).sum(0) % 2 * 2.0 - 1.0
    board = np.broadcast_to(board[None, :, :, None], (1, 16, 16, 3)).astype(np.float32)
    assert np.abs(painter.resize(board, 4, 4)).max() < 0.2
    assert painter.resize(board, 16, 16) is board
    assert np.abs(painter.resize(board, 40, 40)).max() <= 1.0


@pytest.mark.parametrize(
    ('build', 'message'),
    [
        (lambda p: latent_noise.build(p, LABELS, depth=1001), r'depth=1001 is no time.*0\.\.1000'),
        (lambda p: latent_mix.build(p, LABELS, 3, low=0.8), r'low=0\.8 and high=0\.7'),
        (lambda p: text_mix.build(p, 1), 'needs two classes or more; the ID set has 1'),
        (lambda p: text_noise.build(p, 3, scale=-1.0), r'scale=-1\.0 is a standard deviation'),
    ],
)
def test_what_they_refuse(build, message, paints):
    with pytest.raises(UserError, match=message):
        build(paints)
