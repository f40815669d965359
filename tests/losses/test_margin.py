"""Margins against the spec's hand numbers, and against plain float64 formulas of the angle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood.errors import UserError
from jaxood.losses import margin
from jaxood.losses.detection import cross_entropy

COS = jnp.array([[0.6, 0.2, -0.1]])  # worked on paper, with the first class as the target
FIRST = jnp.array([0])
THETA = np.linspace(0.0, np.pi, 2001)
MARGINS = [
    ('cosface', 0.35),
    ('arcface', 0.5),
    ('arcface', 1.5),
    ('arcface_easy', 0.5),
    ('psi', 1),
    ('psi', 2),
    ('psi', 3),
    ('psi', 4),
    ('sphereface_norm', 1.0),
    ('sphereface_norm', 1.35),
    ('sphereface_norm', 1.9),
]


def formula(name, m):
    return functools.partial(getattr(margin, name), margin=m)


def plain(name, theta, m):
    """The same as functions of the angle, branches and all."""
    if name == 'cosface':
        return np.cos(theta) - m
    if name == 'sphereface_norm':
        return np.cos(m * theta)
    if name == 'psi':
        q = np.minimum(np.floor(m * theta / np.pi), m - 1)
        return (-1) ** q * np.cos(m * theta) - 2 * q
    limit, beyond = {
        'arcface': (np.pi - m, np.cos(theta) - m * np.sin(m)),
        'arcface_easy': (np.pi / 2, np.cos(theta)),
    }[name]
    return np.where(theta < limit, np.cos(theta + m), beyond)


def loss(name, m, cos=COS):
    """Cross-entropy at scale 10."""
    return float(cross_entropy(10.0 * margin.on_target(cos, FIRST, formula(name, m)), FIRST)[0])


# ---- formulas ---------------------------------------------------------------------------------


@pytest.mark.parametrize(('name', 'm'), MARGINS)
def test_formulas_are_those_of_the_angle(name, m):
    theta = THETA[(np.abs(THETA - (np.pi - m)) > 1e-3) & (np.abs(THETA - np.pi / 2) > 1e-3)]
    got = formula(name, m)(jnp.float32(np.cos(theta)))
    # cos is rounded to 6e-8, which near 0 and π is an angle of 3e-4
    np.testing.assert_allclose(got, plain(name, theta, m), atol=5e-4)
    inside = (theta > 0.2) & (theta < np.pi - 0.2)
    np.testing.assert_allclose(got[inside], plain(name, theta, m)[inside], atol=5e-6)


@pytest.mark.parametrize(
    ('name', 'm', 'target', 'expected'),
    [
        ('cosface', 0.0, 0.6, 0.019045),  # NormFace
        ('cosface', 0.35, 0.25, 0.492699),
        ('arcface', 0.5, 0.143009, 1.049469),
        ('psi', 4, -1.1568, None),
    ],
)
def test_hand_numbers(name, m, target, expected):
    got = margin.on_target(COS, FIRST, formula(name, m))
    np.testing.assert_allclose(got, [[target, 0.2, -0.1]], atol=1e-6)
    if expected is not None:
        assert loss(name, m) == pytest.approx(expected, abs=1e-6)


def test_hand_numbers_of_annealed_sphereface():
    annealed = functools.partial(margin.annealed_psi, margin=4, weight=5.0)
    cos = margin.on_target(COS, FIRST, annealed)
    np.testing.assert_allclose(cos, [[0.3072, 0.2, -0.1]], atol=1e-6)
    assert float(cross_entropy(10.0 * cos, FIRST)[0]) == pytest.approx(0.307019, abs=1e-6)


def test_without_a_margin_nothing_changes():
    cos = jnp.float32(np.cos(THETA))
    for name, m in [('cosface', 0.0), ('arcface', 0.0), ('arcface_easy', 0.0), ('psi', 1)]:
        np.testing.assert_array_equal(formula(name, m)(cos), cos)
    np.testing.assert_allclose(margin.sphereface_norm(cos, margin=1.0), cos, atol=1e-6)
    for weight in (0.0, 5.0, 1000.0):
        got = margin.annealed_psi(cos, margin=1, weight=weight)
        np.testing.assert_allclose(got, cos, atol=1e-6)
    np.testing.assert_allclose(margin.annealed_psi(cos, margin=4, weight=1e9), cos, atol=1e-6)


@pytest.mark.parametrize('m', [1, 2, 3, 4, 5])
def test_psi_is_continuous_and_falls_strictly(m):
    psi = np.asarray(margin.psi(jnp.float32(np.cos(THETA)), margin=m))
    assert (np.diff(psi) < 0).all()
    assert np.abs(np.diff(psi)).max() < 1.1 * m * THETA[1]  # its slope is at most m
    np.testing.assert_allclose(psi[[0, -1]], [1, 1 - 2 * m], atol=1e-6)  # q stays at m - 1 at π


def test_published_jumps_are_kept():
    after = np.pi - 0.5 + np.array([-1e-4, 1e-4])
    np.testing.assert_allclose(formula('arcface', 0.5)(np.cos(after)), [-1, -1.1173], atol=2e-4)
    assert float(formula('arcface', 0.5)(-0.95)) == pytest.approx(-1.18971, abs=1e-5)
    after = np.pi / 2 + np.array([-1e-4, 1e-4])
    got = formula('arcface_easy', 0.5)(np.cos(after))
    np.testing.assert_allclose(got, [-0.4794, 0], atol=2e-4)


def test_normalised_sphereface_turns_back_up_where_psi_does_not():
    beyond = jnp.float32(np.cos([np.pi / 1.9, 2.4]))
    low, high = margin.sphereface_norm(beyond, margin=1.9)
    assert low == pytest.approx(-1, abs=1e-6)
    assert high > low + 0.5
    low, high = margin.psi(beyond, margin=2)
    assert high < low - 0.5


@pytest.mark.parametrize(
    ('name', 'margins'),
    [
        ('cosface', np.linspace(0, 1.9, 20)),
        ('arcface', np.linspace(0, 1.57, 40)),
        ('psi', range(1, 8)),
    ],
)
def test_a_larger_margin_never_lowers_the_loss(name, margins):
    for theta in np.linspace(0, np.pi, 25):
        cos = COS.at[0, 0].set(np.cos(theta))
        losses = [loss(name, float(m) if name != 'psi' else m, cos) for m in margins]
        assert (np.diff(losses) > -1e-4).all(), theta


def test_but_that_of_normalised_sphereface_it_does():
    cos = COS.at[0, 0].set(-0.99)
    assert loss('sphereface_norm', 1.9, cos) < loss('sphereface_norm', 1.1, cos) - 1.0


def test_annealing_starts_at_1000_and_ends_at_5():
    got = [float(margin.annealing(t)) for t in (0, 1, 100, 1658, 1659, 10**6)]
    np.testing.assert_allclose(got, [1000, 1000 / 1.12, 1000 / 13, 5.001, 5, 5], rtol=2e-4)
    assert got[3] > got[4] == 5.0


# ---- slopes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(('name', 'm'), MARGINS)
def test_slopes_are_those_of_the_angle_and_finite_at_both_ends(name, m):
    slope = jax.vmap(jax.grad(formula(name, m)))
    assert np.isfinite(slope(jnp.array([1.0, -1.0, 1 - 6e-8, -1 + 6e-8, 0.0]))).all()
    theta = THETA[(THETA > 0.1) & (THETA < 3.0)]
    for edge in (np.pi - m, np.pi / 2, *(np.pi * np.arange(9) / m)):
        theta = theta[np.abs(theta - edge) > 2e-3]
    d = 1e-4
    down = plain(name, theta - d, m) - plain(name, theta + d, m)
    want = down / (np.cos(theta - d) - np.cos(theta + d))
    np.testing.assert_allclose(slope(jnp.float32(np.cos(theta))), want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize('m', [1, 2, 3, 4, 5])
def test_psis_slope_in_the_cosine_is_m_squared_at_both_ends(m):
    slope = jax.vmap(jax.grad(formula('psi', m)))(jnp.array([1.0, -1.0]))
    np.testing.assert_allclose(slope, m**2, rtol=1e-5)


def test_cosines_are_those_of_the_angle_and_stay_within_1():
    rng = np.random.default_rng(0)
    h, W = rng.normal(size=(40, 6)), rng.normal(size=(6, 5))
    h[:5], h[5:10] = 3.0 * W.T, -1e-3 * W.T
    for dtype in (jnp.float32, jnp.bfloat16):  # of the features; all is computed in float32
        given = jnp.asarray(h, dtype)
        got, h = margin.cosines(given, jnp.float32(W)), np.float64(given)
        want = h @ W / np.linalg.norm(h, axis=1, keepdims=True) / np.linalg.norm(W, axis=0)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=1e-6)
        assert np.abs(got).max() <= 1.0


def test_what_has_no_direction_has_cosine_0_and_no_gradient():
    W = jnp.eye(3).at[:, 2].set(0.0)
    h = jnp.array([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0], [1e-7, 0.0, 0.0]])
    np.testing.assert_allclose(
        margin.cosines(h, W), [[1 / 3, 2 / 3, 0], [0, 0, 0], [0, 0, 0]], atol=1e-6
    )
    of_h, of_W = jax.grad(lambda h, W: margin.cosines(h, W).sum(), argnums=(0, 1))(h, W)
    np.testing.assert_array_equal(of_h[1:], 0.0)
    np.testing.assert_array_equal(of_W[:, 2], 0.0)
    assert np.isfinite(of_h).all()
    assert np.isfinite(of_W).all()


# ---- targets ----------------------------------------------------------------------------------


def test_only_the_target_changes():
    cos = jnp.tile(COS, (3, 1))
    got = margin.on_target(cos, jnp.array([1, -1, 2]), formula('cosface', 1.0))
    np.testing.assert_allclose(got, [[0.6, -0.8, -0.1], COS[0], [0.6, 0.2, -1.1]], atol=1e-6)
    np.testing.assert_array_equal(margin.on_target(cos, None, formula('cosface', 1.0)), cos)


@pytest.mark.parametrize(('scale', 'expected'), [(3.10734, 0.250733), (10.0, 1.345e-4)])
def test_the_loss_has_a_floor_at_the_simplex(scale, expected):
    cos = jnp.full((1, 10), -1 / 9).at[0, 0].set(1.0)
    assert float(cross_entropy(scale * cos, FIRST)[0]) == pytest.approx(expected, abs=3e-6)
    assert expected == pytest.approx(np.log1p(9 * np.exp(-scale * 10 / 9)), rel=1e-3)


# ---- AdaCos -----------------------------------------------------------------------------------


def plain_scale(cos, labels, scale):
    """One update in float64, row by row."""
    rows = [(row, y) for row, y in zip(np.float64(cos), labels) if y >= 0]
    b = np.mean([np.exp(scale * np.delete(row, y)).sum() for row, y in rows])
    median = np.median([np.arccos(row[y]) for row, y in rows])
    return np.clip(np.log(b) / np.cos(min(np.pi / 4, median)), 1, 64)


def test_fixed_scales():
    for classes, expected in [(3, 0.98026), (10, 3.10734), (100, 6.49848), (1000, 9.76763)]:
        assert margin.adacos_fixed(classes) == pytest.approx(expected, abs=1e-5)
    for classes in (1, 2):
        with pytest.raises(UserError, match='takes 3 or more'):
            margin.adacos_fixed(classes)


def test_dynamic_scale_on_paper():
    cos, labels = jnp.array([[0.6, 0.2, -0.1], [0.1, 0.8, 0.0]]), jnp.array([0, 1])
    got = float(margin.adacos_dynamic(cos, labels, jnp.float32(0.98026)))
    assert got == pytest.approx(1.05805, abs=1e-5)  # the lower median would give .93520
    assert got == pytest.approx(np.log(2.11310) / np.cos(np.pi / 4), abs=1e-5)


@pytest.mark.parametrize('rows', [1, 2, 7, 8])
@pytest.mark.parametrize('outliers', [0, 3])
def test_dynamic_scale_plainly_and_outliers_do_not_enter_it(rows, outliers):
    rng = np.random.default_rng(rows)
    cos = np.float32(rng.uniform(-0.9, 0.9, size=(rows + outliers, 40)))
    labels = rng.integers(40, size=rows + outliers)
    cos[np.arange(len(cos)), labels] = rng.uniform(0.7, 0.99, size=len(cos))  # angles below π/4
    labels[rng.permutation(len(labels))[:outliers]] = -1
    got = margin.adacos_dynamic(cos, jnp.asarray(labels), jnp.float32(5.0))
    assert 1.5 < got < 60.0
    assert float(got) == pytest.approx(plain_scale(cos, labels, 5.0), rel=1e-5)


def test_dynamic_scale_is_clamped_and_survives_a_batch_without_targets():
    labels = jnp.array([0, 1])
    same = jnp.ones((2, 3))
    assert float(margin.adacos_dynamic(same, labels, jnp.float32(64.0))) == 64.0
    assert float(margin.adacos_dynamic(-same, labels, jnp.float32(64.0))) == 1.0
    nobody = margin.adacos_dynamic(same, jnp.array([-1, -1]), jnp.float32(7.5))
    assert float(nobody) == 7.5


def test_no_gradient_flows_through_the_scale():
    cos, labels = jnp.array([[0.6, 0.2, -0.1], [0.1, 0.8, 0.0]]), jnp.array([0, 1])
    slope = jax.grad(lambda c: margin.adacos_dynamic(c, labels, jnp.float32(3.0)))(cos)
    np.testing.assert_array_equal(slope, 0.0)
