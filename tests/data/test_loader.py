"""Batch n is a pure function; streaming gives the same batches, from any n, in bounded memory."""

import itertools
import time

import numpy as np
import pytest

from jaxood.data import loader
from jaxood.data.examples import Examples, Lazy
from jaxood.errors import UserError


def examples(n, *, decode=None):
    images = np.random.default_rng(0).integers(0, 256, (n, 2, 2, 1), dtype=np.uint8)
    marks = [str(i) for i in range(n)]
    store = images if decode is None else Lazy(decode, marks, np.arange(n), (2, 2, 1))
    return Examples(store, np.arange(n, dtype=np.int32) % 3, ('a', 'b', 'c'))


@pytest.mark.parametrize(('size', 'batch_size'), [(12, 4), (13, 4), (5, 5)])
def test_an_epoch_takes_each_row_once(size, batch_size):
    steps = size // batch_size
    orders = []
    for epoch in range(3):
        batches = [
            loader.rows_of(n, size=size, batch_size=batch_size, seed=7)
            for n in range(epoch * steps, (epoch + 1) * steps)
        ]
        rows = np.concatenate(batches)
        assert {len(b) for b in batches} == {batch_size}
        assert len(np.unique(rows)) == steps * batch_size
        assert rows.min() >= 0
        assert rows.max() < size
        orders.append(tuple(rows))
    assert len(set(orders)) == 3  # another order each epoch


def test_rows_do_not_depend_on_what_was_asked_before():
    ask = dict(size=100, batch_size=10, seed=3)
    forward = [loader.rows_of(n, **ask) for n in range(40)]
    loader._permutation.cache_clear()
    for n in (39, 0, 17, 3):
        np.testing.assert_array_equal(loader.rows_of(n, **ask), forward[n])
    assert not np.array_equal(loader.rows_of(0, **ask), loader.rows_of(0, **ask | {'seed': 4}))


def test_more_rows_a_batch_than_there_are():
    with pytest.raises(UserError, match=r'batch_size=8 .* 5 images .*Set batch_size to 5'):
        loader.rows_of(0, size=5, batch_size=8, seed=0)
    with pytest.raises(UserError, match='batch_size=8'):
        loader.stream(examples(5), batch_size=8, seed=0)


@pytest.mark.parametrize('start', [0, 3, 10**9])
def test_a_stream_goes_on_from_any_batch(start):
    data = examples(10)
    batches = list(itertools.islice(loader.stream(data, batch_size=4, seed=5, start=start), 6))
    for n, batch in enumerate(batches, start):
        rows = loader.rows_of(n, size=10, batch_size=4, seed=5)
        np.testing.assert_array_equal(batch['index'], rows)
        np.testing.assert_array_equal(batch['image'], data.images[rows])
        np.testing.assert_array_equal(batch['label'], data.labels[rows])
        assert [batch[k].dtype for k in ('image', 'label', 'index')] == [np.uint8, *2 * [np.int32]]


def test_a_stream_without_labels_has_none():
    bare = Examples(examples(4).images)
    assert set(next(loader.stream(bare, batch_size=2, seed=0))) == {'image', 'index'}


def test_a_stream_reads_no_further_ahead_than_it_says():
    read = []

    def decode(i):
        read.append(i)
        return np.zeros((2, 2, 1), np.uint8)

    batches = loader.stream(examples(1000, decode=decode), batch_size=10, seed=0, prefetch=3)
    next(batches)
    time.sleep(0.2)  # long enough to run away
    assert len(read) <= 10 * (1 + 3 + 1)


def test_an_unreadable_image_stops_the_stream_with_its_own_error():
    def decode(i):
        if i == 7:
            raise UserError('seven.png cannot be read')
        return np.zeros((2, 2, 1), np.uint8)

    with pytest.raises(UserError, match=r'seven\.png'):
        list(itertools.islice(loader.stream(examples(20, decode=decode), batch_size=5, seed=0), 4))


@pytest.mark.parametrize('n', [1, 4, 9])
def test_chunks_hold_everything_in_order_and_have_one_shape(n):
    data = examples(n)
    chunks = list(loader.chunks(data, 4))
    assert {images.shape for images, _ in chunks} == {(4, 2, 2, 1)}
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in chunks]), np.arange(n))
    real = [images[: len(rows)] for images, rows in chunks]
    np.testing.assert_array_equal(np.concatenate(real), data.images)
    images, rows = chunks[-1]
    assert (images[len(rows) :] == data.images[-1]).all()


def test_no_examples_make_no_chunks():
    assert list(loader.chunks(examples(3).subset([]), 4)) == []
