import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood.losses import detection

HAND = jnp.array([[2.0, 0.0, 0.0]])  # worked on paper
LOGITS = jax.random.normal(jax.random.key(0), (6, 5)) * 4.0
OF_LOGITS = {'oe': detection.outlier_exposure, **detection.UNIFORMITY}


def gradient(loss, logits):
    return jax.grad(lambda z: loss(z).sum())(logits)


@pytest.mark.parametrize(
    ('name', 'value', 'slope'),
    [
        ('u_p', 0.474266, (0.453653, -0.226827, -0.226827)),
        ('p_u', 0.433040, (0.335278, -0.167639, -0.167639)),
        ('oe', 1.572878, (0.453653, -0.226827, -0.226827)),
    ],
)
def test_hand_numbers(name, value, slope):
    np.testing.assert_allclose(OF_LOGITS[name](HAND), [value], atol=1e-6)
    np.testing.assert_allclose(gradient(OF_LOGITS[name], HAND), [slope], atol=1e-6)


def test_cross_entropy_is_minus_log_p():
    labels = jnp.arange(6) % 5
    got = detection.cross_entropy(LOGITS, labels)
    want = -np.log(np.asarray(jax.nn.softmax(LOGITS))[np.arange(6), labels])
    np.testing.assert_allclose(got, want, rtol=1e-4)
    one_hot = jax.nn.one_hot(labels, 5)
    p = jax.nn.softmax(LOGITS)
    slope = gradient(lambda z: detection.cross_entropy(z, labels), LOGITS)
    np.testing.assert_allclose(slope, p - one_hot, atol=1e-6)


def test_kl_is_outlier_exposure_less_log_c():
    oe = detection.outlier_exposure(LOGITS)
    np.testing.assert_allclose(oe - np.log(5), detection.kl_uniform_p(LOGITS), atol=1e-6)
    every_class = [detection.cross_entropy(LOGITS, jnp.full(6, c)) for c in range(5)]
    np.testing.assert_allclose(oe, np.mean(every_class, axis=0), rtol=1e-5)


def test_gradients_in_closed_form():
    p = jax.nn.softmax(LOGITS)
    np.testing.assert_allclose(gradient(detection.kl_uniform_p, LOGITS), p - 1 / 5, atol=1e-6)
    entropy = -jnp.sum(p * jnp.log(p), axis=-1, keepdims=True)
    want = p * (jnp.log(p) + entropy)
    np.testing.assert_allclose(gradient(detection.kl_p_uniform, LOGITS), want, atol=1e-6)


@pytest.mark.parametrize('name', detection.UNIFORMITY)
def test_zero_only_where_the_output_is_uniform(name):
    kl = detection.UNIFORMITY[name]
    np.testing.assert_allclose(kl(jnp.full((1, 7), 3.0)), [0.0], atol=1e-6)
    assert (kl(LOGITS) > 0.01).all()
    assert float(detection.kl_p_uniform(jnp.array([[90.0, 0.0, 0.0]]))[0]) == pytest.approx(
        np.log(3)
    )


@pytest.mark.parametrize('name', OF_LOGITS)
def test_a_constant_and_the_order_of_classes_change_nothing(name):
    loss = OF_LOGITS[name]
    np.testing.assert_allclose(loss(LOGITS + 7.0), loss(LOGITS), rtol=1e-4)
    np.testing.assert_allclose(loss(LOGITS[:, ::-1]), loss(LOGITS), rtol=1e-5)


@pytest.mark.parametrize('name', OF_LOGITS)
def test_losses_are_float32_at_any_dtype_and_finite_far_out(name):
    loss = OF_LOGITS[name](jnp.array([[1e4, 0.0, -1e4]], jnp.bfloat16))
    assert loss.dtype == jnp.float32
    assert np.isfinite(loss).all()
    assert np.isfinite(gradient(OF_LOGITS[name], jnp.array([[1e4, 0.0, -1e4]]))).all()


def test_energies_beyond_their_margins_cost_a_square():
    """E = -log Σ e^z: of (0, 0) -.6931, of (3, 3) -3.6931."""
    logits = jnp.array([[0.0, 0.0], [3.0, 3.0]])
    hinge = lambda outlier: detection.energy_hinge(
        logits, jnp.full(2, outlier), m_in=-2.0, m_out=-1.0
    )
    np.testing.assert_allclose(hinge(False), [1.306853**2, 0.0], rtol=1e-5)
    np.testing.assert_allclose(hinge(True), [0.0, 2.693147**2], rtol=1e-5)
