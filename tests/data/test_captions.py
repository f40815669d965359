import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood.data import captions

NAMES = ('one', 'two', 'three')


def composed(plain, rows=400):
    """(images, labels, others, their labels, made images, caption of each row)."""
    keys = jax.random.split(jax.random.key(0), rows)
    images, others = jax.random.uniform(jax.random.key(1), (2, rows, 4, 4, 1), minval=-1)
    labels, other_labels = np.arange(rows) % 3, np.arange(rows) // 3 % 3
    make = jax.jit(captions.compose, static_argnames=('num_classes', 'plain'))
    made, number = make(images, labels, others, other_labels, keys, num_classes=3, plain=plain)
    texts = captions.captions(NAMES, 'a {}.')
    assert len(set(texts)) == len(texts) == (len(captions.VIEWS) + 3) * 3
    return images, labels, others, other_labels, made, [texts[i] for i in number]


def test_a_caption_says_what_was_done_to_the_image():
    images, labels, others, other_labels, made, texts = composed(plain=0.3)
    seen = set()
    for image, label, other, below, result, text in zip(
        *(np.asarray(x) for x in (images, labels, others, other_labels, made)), texts
    ):
        meanings = {
            f'a {NAMES[label]}.': image,
            f'a mirrored {NAMES[label]}.': image[:, ::-1],
            f'a upside down {NAMES[label]}.': image[::-1],
            f'a inverted {NAMES[label]}.': -image,
            f'a {NAMES[label]} over a {NAMES[below]}.': np.maximum(image, other),
        }
        np.testing.assert_array_equal(result, meanings[text])
        seen.add(list(meanings).index(text))
    assert seen == set(range(5))


@pytest.mark.parametrize('plain', [0.0, 0.6, 1.0])
def test_the_share_of_plain_images(plain):
    *_, texts = composed(plain)
    count = np.mean([text in {f'a {name}.' for name in NAMES} for text in texts])
    assert abs(count - plain) < 0.08


def test_a_row_depends_on_its_key_alone():
    x, label = jnp.ones((2, 3, 3, 1)), jnp.array([0, 1])
    keys = jax.random.split(jax.random.key(3), 2)
    run = lambda rows: captions.compose(
        x[rows], label[rows], -x[rows], label[rows], keys[rows], num_classes=2, plain=0.2
    )
    for a, b in zip(run(np.array([1, 0])), run(np.array([0, 1]))):
        np.testing.assert_array_equal(a, b[::-1])
