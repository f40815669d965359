import jax
import jax.numpy as jnp
import numpy as np

from jaxood.losses import contrastive


def test_without_repetitions_it_is_the_papers():
    """Fig. 3: the mean of two cross-entropies with the diagonal as labels."""
    images, texts = jax.random.normal(jax.random.key(0), (2, 5, 4))
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    logits = np.exp(1.3) * unit(np.asarray(images)) @ unit(np.asarray(texts)).T
    entropy = lambda z: np.log(np.exp(z).sum(1)) - np.diag(z)
    want = (entropy(logits) + entropy(logits.T)) / 2
    got = contrastive.clip(images, texts, jnp.float32(1.3), jnp.arange(5))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_rows_with_one_caption_are_no_mistake():
    """Two rows that are the same can't be told apart: at best the entropy of the choice, log 2."""
    rows = jnp.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    loss = contrastive.clip(rows, rows, jnp.log(50.0), jnp.array([7, 7, 2, 2]))
    np.testing.assert_allclose(loss, np.log(2.0), rtol=1e-5)
    wrong = contrastive.clip(rows, rows, jnp.log(50.0), jnp.array([7, 2, 7, 2]))
    assert np.all(wrong > 10.0)


def test_sizes_of_vectors_do_not_matter():
    images, texts = jax.random.normal(jax.random.key(0), (2, 5, 4))
    loss = lambda a, b: contrastive.clip(a, b, jnp.float32(0.0), jnp.arange(5))
    np.testing.assert_allclose(loss(3.0 * images, 0.2 * texts), loss(images, texts), rtol=1e-5)
