"""Every example has one role, classes are held out whole, and the cast is always the same."""

import numpy as np
import pytest

from jaxood.data.examples import Examples
from jaxood.data.roles import roles
from jaxood.errors import UserError

NAMES = ('ant', 'bee', 'cat', 'dog')


def source(counts, first=0, names=None):
    """`counts[k]` examples of class k, mixed; an example's only pixels hold its number."""
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    labels = np.random.default_rng(0).permutation(labels)
    numbers = np.arange(first, first + len(labels), dtype=np.uint16)
    images = numbers.view(np.uint8).reshape(-1, 1, 2, 1)
    return Examples(images, labels, names or NAMES[: len(counts)])


def numbers(*parts):
    return np.concatenate([p.images.reshape(-1, 2).view(np.uint16).ravel() for p in parts])


def names_of(part, by_number):
    """True if each example still has the class name that its source gave it."""
    mine = [part.class_names[k] for k in part.labels]
    return mine == [by_number.class_names[by_number.labels[n]] for n in numbers(part)]


@pytest.mark.parametrize('held_out', [(), ('bee',)])
@pytest.mark.parametrize('tuning', [(), (3,)])
def test_one_source_is_partitioned(held_out, tuning):
    data = source([50, 30, 20, 10])
    got = roles({'all': data}, held_out=held_out, held_out_validation=tuning)
    parts = [got.train, got.validation, got.test, got.held_out, got.held_out_validation]
    parts = [p for p in parts if p is not None]
    assert len(parts) == 3 + bool(held_out) + bool(tuning)
    np.testing.assert_array_equal(np.sort(numbers(*parts)), np.arange(110))
    assert all(names_of(p, data) for p in parts)
    kept = tuple(n for n in NAMES if n not in held_out and not (tuning and n == 'dog'))
    for part in parts[:3]:
        assert part.class_names == kept
        assert set(part.labels) == set(range(len(kept)))
    counts = np.bincount(got.test.labels), np.bincount(got.validation.labels)
    of_class = [c for c, n in zip([50, 30, 20, 10], NAMES) if n in kept]
    np.testing.assert_array_equal(counts, [np.array(of_class) // 5, np.array(of_class) // 10])


def test_a_test_split_is_left_whole_and_validation_cut_from_train():
    train, test = source([20, 20, 20, 20]), source([5, 5, 5, 5], first=1000)
    got = roles({'train': train, 'test': test}, validation=0.25, test=0.9, held_out=(0,))
    np.testing.assert_array_equal(
        np.sort(numbers(got.train, got.validation)), np.flatnonzero(train.labels != 0)
    )
    assert len(got.validation) == 15
    np.testing.assert_array_equal(numbers(got.test), 1000 + np.flatnonzero(test.labels != 0))
    np.testing.assert_array_equal(numbers(got.held_out), 1000 + np.flatnonzero(test.labels == 0))


def test_the_cast_depends_on_the_seed_and_on_nothing_else():
    data = {'all': source([40, 40, 40, 40])}
    first, again, other = roles(data), roles(data), roles(data, seed=1)
    assert first.train.digest == again.train.digest
    assert first.train.digest != other.train.digest
    fewer = roles(data, held_out=('ant',))  # the other classes are cast as before
    assert set(numbers(fewer.test)) < set(numbers(first.test))
    assert set(numbers(fewer.train)) < set(numbers(first.train))


def test_names_and_numbers_of_classes_mean_the_same():
    data = {'all': source([10, 10, 10, 10])}
    by_name, by_number = roles(data, held_out=('dog', 'bee')), roles(data, held_out=(1, 3))
    assert by_name.held_out.class_names == ('bee', 'dog')
    assert by_name.held_out.digest == by_number.held_out.digest
    assert roles(data, held_out='cat').held_out.class_names == ('cat',)


def test_images_without_labels_are_split_at_random():
    data = Examples(source([50, 50]).images)
    got = roles({'all': data})
    np.testing.assert_array_equal(
        np.sort(numbers(got.train, got.validation, got.test)), np.arange(100)
    )
    assert [len(p) for p in (got.train, got.validation, got.test)] == [70, 10, 20]
    assert got.train.labels is None


def test_no_validation_is_an_empty_set_of_the_same_classes():
    got = roles({'all': source([10, 10])}, validation=0)
    assert len(got.validation) == 0
    assert got.validation.class_names == got.train.class_names


TWO = source([10, 10])


@pytest.mark.parametrize(
    ('splits', 'settings', 'message'),
    [
        ({'all': TWO}, dict(held_out=('bea',)), "held_out: class 'bea' .*Did you mean 'bee'"),
        ({'all': TWO}, dict(held_out_validation=(2,)), 'held_out_validation: class 2 .*ant, bee'),
        ({'all': TWO}, dict(held_out=(0,)), 'needs two ID classes, and here it has 1 of 2'),
        (
            {'all': source([9] * 4)},
            dict(held_out=(1, 2), held_out_validation=('bee',)),
            "'bee' is in held_out and in held_out_validation",
        ),
        ({'all': Examples(TWO.images)}, dict(held_out=(0,)), 'no labels'),
        ({'all': source([9, 0])}, {}, "'bee' has no image to train on"),
        ({'all': source([9])}, {}, 'needs two ID classes'),
        ({'all': source([2, 2])}, {}, 'no image is left for (validation|test)'),
        ({'all': TWO}, dict(validation=0.5, test=0.5), 'validation=0.5 and test=0.5'),
        ({'all': TWO}, dict(test=-0.1), 'test=-0.1'),
        (
            {'train': TWO, 'test': source([5, 5], names=('bee', 'ant'))},
            {},
            r"classes \('ant', 'bee'\), the test split \('bee', 'ant'\)",
        ),
        (
            {'train': TWO, 'test': Examples(np.zeros((4, 3, 3, 1), np.uint8), TWO.labels[:4])},
            {},
            r'shape \(1, 2, 1\), the test split \(3, 3, 1\)',
        ),
        ({'train': TWO, 'test': Examples(TWO.images)}, {}, 'labels True, the test split False'),
        (
            {'train': source([9] * 4), 'test': source([9, 9, 9, 0])},
            dict(held_out=('dog',)),
            'held_out: the test split has no image of dog',
        ),
    ],
)
def test_a_cast_that_cannot_be(splits, settings, message):
    with pytest.raises(UserError, match=message):
        roles(splits, **settings)


def test_validation_images_from_the_test_split():
    """OpenOOD's protocol: the whole train split is the bank, and the test set gives some away."""
    data = {'train': source([20, 20]), 'test': source([10, 10])}
    got = roles(data, validation=0.2, validation_from='test')
    assert [len(p) for p in (got.train, got.validation, got.test)] == [40, 4, 16]
    np.testing.assert_array_equal(numbers(got.train), numbers(data['train']))
    both = np.sort(numbers(got.validation, got.test))
    np.testing.assert_array_equal(both, np.sort(numbers(data['test'])))
    assert np.bincount(got.validation.labels).tolist() == [2, 2]
    one_split = {'all': source([20, 20])}  # nothing but the shares to go by
    assert roles(one_split, validation_from='test').train.digest == roles(one_split).train.digest
    with pytest.raises(UserError, match="must be 'train' or 'test'"):
        roles(data, validation_from='val')
