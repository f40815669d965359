"""In memory or read lazily, a set of examples is the same set."""

import dataclasses
import logging

import numpy as np
import pytest

from jaxood.data.examples import Examples, Lazy
from jaxood.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 3, 4, 1), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2, 2, 1, 0, 2, 2, 2], np.int32)
FILES = tuple(f'{i}.png' for i in range(12))


def examples(kind, *, broken=(), on_error='stop'):
    def decode(i):
        if i in broken:
            raise UserError(f'{i}.png cannot be read')
        return IMAGES[i]

    marks = [f'{i}.png 100' for i in range(12)]
    lazy = Lazy(decode, marks, np.arange(12), IMAGES.shape[1:], on_error)
    store = {'memory': IMAGES, 'lazy': lazy}[kind]
    return Examples(store, LABELS, ('a', 'b', 'c'), FILES)


@pytest.mark.parametrize('kind', ['memory', 'lazy'])
def test_rows_come_in_any_order_and_subsets_compose(kind):
    data = examples(kind)
    assert (len(data), data.shape) == (12, (3, 4, 1))
    rows = np.array([5, 0, 11, 5])
    np.testing.assert_array_equal(data.take(rows), IMAGES[rows])
    inner = data.subset([9, 3, 7, 1]).subset([2, 0])
    np.testing.assert_array_equal(inner.take(np.arange(2)), IMAGES[[7, 9]])
    np.testing.assert_array_equal(inner.labels, LABELS[[7, 9]])
    assert inner.names == ('7.png', '9.png')
    assert inner.class_names == ('a', 'b', 'c')
    assert (inner.images is None) == (kind == 'lazy')
    assert data.take(np.array([], int)).shape == (0, 3, 4, 1)


@pytest.mark.parametrize('kind', ['memory', 'lazy'])
def test_some_classes_are_numbered_anew(kind):
    data = examples(kind).of_classes([2, 0])
    rows = np.flatnonzero(LABELS != 1)
    np.testing.assert_array_equal(data.take(np.arange(len(rows))), IMAGES[rows])
    np.testing.assert_array_equal(data.labels, np.where(LABELS[rows] == 2, 0, 1))
    assert data.class_names == ('c', 'a')
    assert data.labels.dtype == np.int32


@pytest.mark.parametrize('kind', ['memory', 'lazy'])
def test_the_digest_is_of_the_contents(kind):
    data = examples(kind)
    assert data.digest == examples(kind).digest == data.subset(np.arange(12)).digest
    others = [
        data.subset(np.arange(11)),
        data.subset(np.arange(12)[::-1]),
        dataclasses.replace(data, labels=np.roll(LABELS, 1)),
        dataclasses.replace(data, labels=None),
        dataclasses.replace(data, class_names=('a', 'b', 'd')),
    ]
    if kind == 'memory':
        others.append(
            dataclasses.replace(data, store=IMAGES ^ (np.arange(12) == 4)[:, None, None, None])
        )
    else:
        marks = [f'{i}.png {100 + (i == 4)}' for i in range(12)]
        others.append(dataclasses.replace(data, store=dataclasses.replace(data.store, marks=marks)))
    assert len({data.digest, *(other.digest for other in others)}) == 1 + len(others)


def test_an_unreadable_image_stops():
    with pytest.raises(UserError, match='4.png'):
        examples('lazy', broken={4}).take(np.arange(12))


def test_or_the_next_of_its_class_in_its_own_set_stands_in(caplog):
    data = examples('lazy', broken={3, 8}, on_error='skip')
    with caplog.at_level(logging.WARNING):
        got = data.take(np.array([3, 8, 1]))
    np.testing.assert_array_equal(got, IMAGES[[0, 0, 1]])  # class a is 0, 3, 8
    assert '3.png' in caplog.text
    part = data.subset([3, 1, 2])  # as another role's image never does
    with pytest.raises(UserError, match='3.png'):
        part.take(np.array([0]))
