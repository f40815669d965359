"""Candidates and anchors: what must hold whatever the words and images are."""

import numpy as np
import pytest

from jaxood.synthesis import anchors


def unit(*shape, seed=0):
    x = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


WORDS, CLASSES, IMAGES = unit(60, 5), unit(3, 5, seed=1), unit(40, 5, seed=2)
LABELS = np.arange(40) % 3
HOW = dict(eta=0.05, rule='near')


def values(words=WORDS, images=IMAGES, labels=LABELS, **how):
    return anchors.values(words, images, labels, **HOW | how)


def test_more_candidates_are_the_same_and_others():
    allowed = np.arange(60) % 7 > 0
    for similarity in anchors.similarities(CLASSES, WORDS):
        lists = [anchors.candidates(similarity, allowed, k) for k in range(1, 70)]
        for fewer, more in zip(lists, lists[1:]):
            np.testing.assert_array_equal(more[: len(fewer)], fewer)
        assert set(lists[-1]) == set(np.flatnonzero(allowed))  # K larger than the vocabulary
        assert np.all(np.diff(similarity[lists[-1]]) <= 0)


def test_similarities_are_those_of_every_class_however_many(monkeypatch):
    monkeypatch.setattr(anchors, 'BLOCK', 2)
    found = np.stack(list(anchors.similarities(CLASSES, WORDS)))
    np.testing.assert_allclose(found, CLASSES @ WORDS.T, atol=1e-6)


def test_ties_go_by_the_alphabet():
    similarity = np.array([0.5, 0.9, 0.5, 0.9, 0.5], np.float32)
    places = anchors.candidates(similarity, np.ones(5, bool), 4)
    assert places.tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize('rule', anchors.RULES)
def test_values_are_the_smallest_percentile_of_a_class(rule, monkeypatch):
    monkeypatch.setattr(anchors, 'LIMIT', 100)  # a few words at a time
    cosine = WORDS @ IMAGES.T
    distance = 1.0 - cosine if rule == 'near' else cosine
    want = [min(np.percentile(row[y == LABELS], 30.0) for y in range(3)) for row in distance]
    np.testing.assert_allclose(values(eta=0.3, rule=rule), want, atol=1e-6)


@pytest.mark.parametrize('rule', anchors.RULES)
def test_the_percentile_0_is_the_plain_minimum(rule):
    cosine = WORDS @ IMAGES.T
    least = (1.0 - cosine if rule == 'near' else cosine).min(axis=1)
    np.testing.assert_allclose(values(eta=0.0, rule=rule), least, atol=1e-6)
    np.testing.assert_allclose(values(eta=1e-6, rule=rule), least, atol=1e-4)


def test_the_order_of_images_makes_no_difference():
    order = np.random.RandomState(3).permutation(40)
    again = values(images=IMAGES[order], labels=LABELS[order])
    np.testing.assert_allclose(again, values(), atol=1e-6)


def test_a_larger_threshold_keeps_the_same_and_more():
    found = values()
    shares = np.linspace(0.0, 1.0, 21)
    levels = [anchors.threshold(found, keep=share) for share in shares]
    assert np.all(np.diff(levels) >= 0)
    kept = [set(np.flatnonzero(found <= level)) for level in levels]
    for fewer, more in zip(kept, kept[1:]):
        assert fewer <= more
    assert [len(k) for k in kept] == [max(1, int(np.ceil(share * 60))) for share in shares]


def test_near_keeps_what_literal_drops_first():
    """A word at the images of one class, and a word far from all."""
    words = np.stack([IMAGES[LABELS == 0].mean(0), -IMAGES.mean(0)])
    words /= np.linalg.norm(words, axis=-1, keepdims=True)
    near, far = values(words)
    assert near < far
    near, far = values(words, rule='literal')
    assert near > far
