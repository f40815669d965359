"""SD-outliers' detector: its loss where it is known, and which rows move which head."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood.detectors import three_head
from jaxood.errors import UserError
from jaxood.losses import detection
from jaxood.models import Classifier
from jaxood.models.backbones import CNN
from jaxood.models.heads import ThreeHeads

C = 10
MODEL = Classifier(CNN(widths=(4,)), ThreeHeads(C))
KEY = jax.random.key(0)


def terms(outlier, labels, logits=None):
    n = len(labels)
    zeros = jnp.zeros((n, 2)), jnp.zeros((n, C)), jnp.zeros((n, C))
    return detection.three_head(
        *(zeros if logits is None else logits), jnp.int32(labels), jnp.asarray(outlier)
    )


def test_the_loss_at_zero_logits():
    """ID: log 2 + log 10 = 2.99573; an outlier at λ = .5: log 2 + .5 log 10 = 1.84444."""
    t = terms([False, True, True], [3, 7, -1])
    rows = np.asarray(t['bin'] + t['in'] + 0.5 * t['out'])
    np.testing.assert_allclose(rows, [2.99573, 1.84444, np.log(2)], atol=1e-5)


@pytest.fixture(scope='module')
def batch():
    rng = np.random.default_rng(0)
    draw = lambda n: jnp.uint8(rng.integers(256, size=(n, 8, 8, 1)))
    return {
        'image': draw(6),
        'label': jnp.int32(rng.integers(C, size=6)),
        'index': jnp.arange(6),
        'outlier_image': draw(4),
        'outlier_index': jnp.arange(4),
        'outlier_label': jnp.int32([1, 5, 1, 2]),
        'outlier_is_id': jnp.zeros(4, bool),
    }


@pytest.fixture(scope='module')
def variables():
    return jax.jit(lambda: MODEL.init(KEY, jnp.zeros((1, 8, 8, 1)), train=False))()


def gradients(variables, batch, loss_fn=three_head.loss_fn, **keywords):
    prepare = lambda images, keys: images.astype(jnp.float32) / 255
    loss = partial(loss_fn, model=MODEL, step=0, prepare=prepare, **keywords)
    extra = {k: v for k, v in variables.items() if k != 'params'}
    grads, (_, metrics) = jax.grad(loss, has_aux=True)(variables['params'], extra, batch, KEY)
    moved = {k: float(jnp.abs(v).max()) for k, v in grads['head'].items()}
    return moved, metrics


def test_rows_move_their_own_heads_alone():
    """ID rows send nothing into g_out, outliers nothing into g_in; λ = 0 leaves g_out alone."""
    z = jax.random.normal(KEY, (4, C)), jax.random.normal(jax.random.key(1), (4, C))
    labels = [0, 1, 2, 3]
    for name, at in (('in', 0), ('out', 1)):
        for outlier in (False, True):
            total = lambda *logits, o=outlier: sum(
                jnp.sum(t) for t in terms([o] * 4, labels, (jnp.zeros((4, 2)), *logits)).values()
            )
            gradient = jax.grad(total, argnums=at)(*z)
            assert gradient.any() == (outlier == (name == 'out'))


def test_lambda_weighs_the_source_and_zero_leaves_its_head(batch, variables):
    moved, metrics = gradients(variables, batch, weight=0.0)
    assert moved['out_kernel'] == moved['out_bias'] == 0.0
    assert min(moved['kernel'], moved['bin_kernel']) > 0.0
    half, more = gradients(variables, batch, weight=0.5)
    assert half['out_kernel'] > 0.0
    np.testing.assert_allclose(more['loss'] - metrics['loss'], 0.5 * more['out'], rtol=1e-4)
    np.testing.assert_allclose(metrics['loss'], metrics['bin'] + metrics['in'], rtol=1e-5)


def test_outliers_without_a_source_have_no_third_term(batch, variables):
    bare = {k: v for k, v in batch.items() if k not in ('outlier_label', 'outlier_is_id')}
    moved, metrics = gradients(variables, bare)
    assert moved['out_kernel'] == 0.0
    assert metrics['out'] == 0.0
    assert moved['bin_kernel'] > 0.0


def test_a_control_is_an_id_row(batch, variables):
    """Among the outliers, an image led to its own class counts as the ID image that it is."""
    controls = batch | {'outlier_is_id': jnp.ones(4, bool)}
    moved, metrics = gradients(variables, controls)
    assert moved['out_kernel'] == 0.0
    joined = batch | {
        'image': jnp.concatenate([batch['image'], batch['outlier_image']]),
        'label': jnp.concatenate([batch['label'], batch['outlier_label']]),
        'index': jnp.arange(10),
        **{k: batch[k][:0] for k in batch if k.startswith('outlier')},
    }
    np.testing.assert_allclose(metrics['loss'], gradients(variables, joined)[1]['loss'], rtol=1e-5)


def test_two_way_knows_no_classes(batch, variables):
    moved, metrics = gradients(variables, batch, three_head.two_way)
    assert moved['kernel'] == moved['out_kernel'] == 0.0
    assert moved['bin_kernel'] > 0.0
    assert 'accuracy' not in metrics


def test_lambda_must_be_a_share(batch, variables):
    with pytest.raises(UserError, match=r'weight=1\.5 .* between 0 and 1'):
        gradients(variables, batch, weight=1.5)
