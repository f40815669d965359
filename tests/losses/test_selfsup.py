"""Self-supervised losses at points where their values are known, and what leaves them alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood.losses import selfsup

P = np.array([[0.9, 0.1], [0.2, 0.8]])
Q = np.array([[0.8, 0.2], [0.3, 0.7]])


def test_nt_xent_by_hand():
    """Every view against its partner, over all views but itself."""
    z = np.random.default_rng(0).normal(size=(6, 4))
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    s = unit @ unit.T / 0.5
    each = []
    for i in range(6):
        others = [s[i, k] for k in range(6) if k != i]
        each.append(np.log(np.sum(np.exp(others))) - s[i, (i + 3) % 6])
    got = selfsup.nt_xent(7.0 * z[:3], z[3:], temperature=0.5)  # lengths do not matter
    np.testing.assert_allclose(got, np.mean(each), rtol=1e-5)


def test_nt_xent_of_views_that_are_all_alike():
    same = jnp.ones((4, 3))
    np.testing.assert_allclose(selfsup.nt_xent(same, same), np.log(7), rtol=1e-5)
    apart = jnp.eye(4)
    assert selfsup.nt_xent(apart, apart) < 1e-3


def test_scan_by_hand():
    loss, terms = selfsup.scan(np.log(P), np.log(Q), entropy_weight=5.0)
    np.testing.assert_allclose(-np.log([0.74, 0.62]).mean(), 0.38957, atol=1e-5)
    np.testing.assert_allclose(terms['consistency'], 0.38957, atol=1e-5)
    np.testing.assert_allclose(terms['entropy'], 0.68814, atol=1e-5)
    np.testing.assert_allclose(loss, -3.05112, atol=1e-5)


def test_scan_at_its_ends():
    perfect = 200.0 * jnp.eye(10)
    np.testing.assert_allclose(selfsup.scan(perfect, perfect)[0], -5.0 * np.log(10), rtol=1e-6)
    np.testing.assert_allclose(selfsup.scan(perfect, perfect)[0], -11.5129, atol=1e-4)
    collapsed = jnp.zeros((10, 10)).at[:, 3].set(200.0)
    np.testing.assert_allclose(selfsup.scan(collapsed, collapsed)[0], 0.0, atol=1e-6)


def test_scan_knows_no_names_of_clusters():
    z = jax.random.normal(jax.random.key(0), (2, 12, 5))
    order = jnp.array([3, 0, 4, 1, 2])
    want = selfsup.scan(*z)[0]
    np.testing.assert_allclose(selfsup.scan(z[0][:, order], z[1][:, order])[0], want, rtol=1e-5)
    assert abs(selfsup.scan(z[0], z[1][:, order])[0] - want) > 1e-2


def test_self_label_weighs_classes_alike():
    """Three sure rows of class 0 and one of class 1; the unsure row has no say."""
    sure = 20.0 * jnp.eye(2)[jnp.array([0, 0, 0, 1, 0])]
    weak = sure.at[4].set(0.0)
    strong = jax.random.normal(jax.random.key(1), (5, 2))
    ce = -jax.nn.log_softmax(strong)[jnp.arange(4), jnp.array([0, 0, 0, 1])]
    loss, facts = selfsup.self_label(weak, strong, threshold=0.99)
    np.testing.assert_allclose(loss, (ce[:3].mean() + ce[3]) / 2, rtol=1e-5)
    np.testing.assert_allclose(facts['confident'], 0.8)


def test_self_label_when_nobody_is_sure_and_where_gradients_go():
    flat, strong = jnp.zeros((4, 3)), jnp.ones((4, 3)) * jnp.arange(3)
    assert selfsup.self_label(flat, strong)[0] == 0.0
    gradient = jax.grad(lambda w, s: selfsup.self_label(w, s)[0], argnums=(0, 1))
    through_weak, through_strong = gradient(20.0 * jnp.eye(3), jnp.ones((3, 3)))
    assert not through_weak.any()
    assert through_strong.any()


@pytest.mark.parametrize('scale', [1.0, 1e4])
def test_losses_stay_finite(scale):
    z = scale * jax.random.normal(jax.random.key(0), (2, 8, 4))
    for loss in (lambda *z: selfsup.nt_xent(*z), lambda *z: selfsup.scan(*z)[0]):
        value, gradient = jax.value_and_grad(loss)(*z)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
