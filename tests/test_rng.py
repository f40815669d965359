"""Keys follow purpose and index: nothing else, and the same in every process."""

import hashlib

import jax
import numpy as np
import pytest

from jaxood.rng import key_each, key_for, seed_for


def bits(key):
    return np.asarray(jax.random.key_data(key)).tolist()


def word(name):
    """The four bytes of SHA-256 that stand for a name, spelt out once more."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], 'little')


def test_a_purpose_is_folded_in_name_by_name():
    root = jax.random.key(3)
    by_hand = jax.random.fold_in(jax.random.fold_in(root, word('outliers')), 5)
    assert bits(key_for(root, 'outliers', 5)) == bits(by_hand)
    assert bits(key_for(3, 'outliers', 5)) == bits(by_hand)  # a seed is the root it makes


def test_names_do_not_depend_on_the_process():
    """Python's own hash of a string does. SHA-256 of 'noise' begins with ef e2 a5 c0."""
    by_hand = jax.random.fold_in(jax.random.key(0), 0xC0A5E2EF)
    assert bits(key_for(0, 'noise')) == bits(by_hand)


def test_different_purposes_have_different_keys():
    purposes = [(), ('a',), ('b',), ('a', 'b'), ('b', 'a'), ('ab',), ('a', 0), ('a', 1), (0,)]
    assert len({tuple(bits(key_for(0, *p))) for p in purposes}) == len(purposes)
    assert bits(key_for(0, 'a')) != bits(key_for(1, 'a'))


@pytest.mark.parametrize('index', [[0, 1, 2, 3], [3, 1], [7], [2, 2, 0]])
def test_a_row_has_its_examples_key_wherever_it_stands(index):
    root = key_for(0, 'rows')
    expected = [bits(jax.random.fold_in(root, i)) for i in index]
    assert bits(key_each(root, np.array(index, np.int32))) == expected


def test_seeds_for_numpy():
    digest = hashlib.sha256(b'7/detector/batches').digest()
    assert seed_for(7, 'detector', 'batches') == int.from_bytes(digest[:8], 'little')
    assert len({seed_for(s, p) for s in range(3) for p in ('a', 'b')}) == 6
    np.random.Generator(np.random.PCG64(seed_for(0, 'x')))  # whatever it is, NumPy takes it
