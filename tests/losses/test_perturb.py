"""DOE's regret and perturbation: numbers worked on paper, and what must hold of any network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood.losses import perturb
from jaxood.losses.detection import outlier_exposure

HAND = jnp.array([[2.0, 0.0, 0.0]])
LOGITS = jax.random.normal(jax.random.key(0), (6, 5)) * 4.0
RNG = np.random.default_rng(0)


def tree(scale=1.0):
    draw = lambda *shape: jnp.float32(scale * RNG.normal(size=shape))
    return {
        'backbone': {'conv': {'kernel': draw(3, 3, 2, 4)}, 'bn': {'scale': draw(4)}},
        'head': {'kernel': draw(4, 3), 'bias': draw(3), 'bin_kernel': draw(4, 2)},
        'attention': {'bias': draw(2, 3), 'positions': draw(1, 4, 2)},  # two axes, and no kernels
    }


def norms(p):
    leaves = jax.tree_util.tree_leaves_with_path(p)
    return {jax.tree_util.keystr(path): float(jnp.linalg.norm(x.ravel())) for path, x in leaves}


def test_hand_numbers():
    np.testing.assert_allclose(perturb.excess(HAND), 0.907305, atol=1e-5)
    np.testing.assert_allclose(perturb.regret(HAND), 0.823204, atol=1e-5)


def test_it_is_the_slope_of_outlier_exposure_in_the_logits_scale():
    slope = jax.grad(lambda sigma: outlier_exposure(sigma * LOGITS).mean())(1.0)
    np.testing.assert_allclose(perturb.excess(LOGITS), slope, rtol=1e-5)


def test_it_vanishes_for_constant_logits_and_for_no_others():
    constant = jnp.array([[3.0] * 5, [-1.0] * 5])
    np.testing.assert_allclose(perturb.excess(constant), 0.0, atol=1e-6)
    for row in LOGITS:
        assert perturb.excess(row[None]) > 0.01
        np.testing.assert_allclose(  # blind to a constant, as the loss is
            perturb.excess(row[None] + 7.0), perturb.excess(row[None]), rtol=1e-4
        )


@pytest.mark.parametrize('size', [1e-6, 1.0, 1e6])
def test_it_moves_each_kernel_by_its_own_length(size):
    """So α P changes every kernel by the share α, however large the gradient is; nothing else."""
    params = tree()
    p = perturb.direction(params, tree(size))
    for name, norm in norms(p).items():
        here = norms(params)[name] if name.endswith("kernel']") else 0.0
        assert norm == pytest.approx(here, rel=1e-5), name
    moved = perturb.shifted(params, p, 1e-2)
    change = norms(jax.tree.map(lambda x, y: x - y, moved, params))
    head = "['head']['kernel']"
    assert change[head] / norms(params)[head] == pytest.approx(1e-2, rel=1e-3)
    assert change["['head']['bias']"] == 0.0


def test_the_signs_are_opposites_and_a_dead_kernel_stays():
    params, slope = tree(), tree()
    up, down = (perturb.direction(params, slope, sign=sign) for sign in '+-')
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, -y), up, down)
    inner = float(jnp.sum(up['head']['kernel'] * slope['head']['kernel']))
    assert inner > 0.0
    still = perturb.direction(params, jax.tree.map(jnp.zeros_like, slope))
    assert not any(norms(still).values())


def test_averages_stay_within_the_largest_length():
    params = tree()
    p, most, like = perturb.nothing(params), dict.fromkeys(norms(params), 0.0), norms(params)
    for n, size in enumerate((1, 2, 3, 1, 2, 3)):
        longer = jax.tree.map(lambda x, size=size: x * size, params)
        new = perturb.direction(longer, tree())
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, p)
        before, p = p, perturb.average(p, new, first=n == 0)
        most = {name: max(most[name], norm) for name, norm in norms(new).items()}
        if n == 0:
            jax.tree.map(np.testing.assert_array_equal, p, new)
        else:
            mean = jax.tree.map(lambda old, new: 0.6 * old + 0.4 * new, before, new)
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), p, mean)
        assert all(norms(p)[name] <= most[name] * (1 + 1e-6) for name in like)


def test_what_is_perturbed_is_another_array():
    params = tree()
    before = [np.asarray(x).tobytes() for x in jax.tree.leaves(params)]
    perturb.shifted(params, perturb.direction(params, tree()), 0.1)
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves(params)] == before


def test_every_alpha_is_drawn():
    draws = jax.vmap(lambda n: perturb.draw_alpha(jax.random.key(n)))(jnp.arange(400))
    values, counts = np.unique(np.asarray(draws), return_counts=True)
    np.testing.assert_allclose(values, sorted(perturb.ALPHAS), rtol=1e-6)
    assert counts.min() > 70
