"""The nearest of a bank, against a sort of all."""

import jax.numpy as jnp
import numpy as np

from jaxood import neighbours


def test_the_largest_are_those_of_a_sort():
    """Ties, infinities and a bank that is sorted: all the largest in one block, or one in each."""
    rng = np.random.default_rng(0)
    rows = {
        'random': rng.normal(size=320),
        'sorted': np.arange(320.0),
        'ties': rng.integers(3, size=320),
        'constant': np.zeros(320),
        'infinite': np.where(rng.random(320) < 0.5, -np.inf, rng.normal(size=320)),
    }
    for kind, row in rows.items():
        row = np.float32(row)
        for count, k in [(320, 11), (300, 40), (289, 1)]:
            best, places = neighbours.largest(jnp.asarray(row), k, count)
            np.testing.assert_array_equal(best, np.sort(row[:count])[::-1][:k], kind)
            np.testing.assert_array_equal(row[places], best, kind)
            assert len({*places.tolist()}) == k


def test_mined_neighbours_are_those_of_a_sort_behind_the_image_itself():
    """Also for images that are the same, and a number of them that fills no block."""
    vectors = np.random.default_rng(0).normal(size=(203, 6))
    vectors[7] = vectors[180] = vectors[3]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, np.inf)
    found = neighbours.mine(5.0 * vectors, k=10)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found[:, 0], np.arange(203))
    here = np.take_along_axis(similarity, found, axis=1)
    np.testing.assert_allclose(here, -np.sort(-similarity, axis=1)[:, :11], atol=1e-6)
    assert all(len({*row}) == 11 for row in found.tolist())
    assert {*found[7, :3].tolist()} == {3, 7, 180}
