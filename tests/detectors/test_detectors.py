"""What must hold of every training method, on two bright blobs and outliers between them."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxood.detectors import DETECTORS, oe
from jaxood.errors import UserError
from jaxood.losses.detection import UNIFORMITY
from jaxood.models import Classifier
from jaxood.models.backbones import CNN
from jaxood.models.heads import HEADS, Linear
from jaxood.models.layers import dropout


class _Dropping(CNN):
    """With dropout before the head: keys a row, at the compile time of a CNN."""

    def __call__(self, images, *, train, keys=None, after=None):
        features, maps = super().__call__(images, train=train, keys=keys, after=after)
        return dropout(features, 0.3, keys) if train else features, maps


SMALL = CNN(widths=(4, 8))
MODEL = Classifier(SMALL, Linear(2))
DROPPING = _Dropping(widths=(4, 8))
TRAINING = [name for name, method in DETECTORS.items() if method.trains]
KEY = jax.random.key(5)


def normalised(images, keys):
    return images.astype(jnp.float32) / 128 - 1


def noisy(images, keys):
    """An augmentation: each row's own noise."""
    noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(keys)
    return normalised(images, keys) + 0.3 * noise


@pytest.fixture(scope='module')
def batch():
    """Label 0 is bright on the left, 1 on the right, outliers on both sides at half strength."""
    rng = np.random.default_rng(0)
    label = np.arange(12) % 2
    image = rng.integers(0, 60, (12, 8, 8, 1))
    image[label == 0, :, :4] += 150
    image[label == 1, :, 4:] += 150
    return {
        'image': jnp.uint8(image),
        'label': jnp.int32(label),
        'index': jnp.arange(12) + 100,
        'outlier_image': jnp.uint8(rng.integers(0, 60, (8, 8, 8, 1)) + 75),
        'outlier_index': jnp.arange(8) + 100,
    }


@pytest.fixture(scope='module')
def variables():
    return init(MODEL)


def model_of(name, backbone=SMALL):
    """With the head that the method trains."""
    return Classifier(backbone, HEADS[DETECTORS[name].head or 'linear'](2))


@functools.cache
def init(model):
    return jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False))()


def start(name, variables):
    return variables['params'], DETECTORS[name].init_extra(variables)


def loss_of(name, model=None, prepare=normalised, **keywords):
    model = model or model_of(name)
    return partial(DETECTORS[name].loss_fn, model=model, prepare=prepare, step=0, **keywords)


def gradients(name, variables, batch, **keywords):
    grad = jax.jit(jax.grad(loss_of(name, **keywords), has_aux=True))
    return grad(*start(name, variables), batch, KEY)[0]


@pytest.mark.parametrize('name', TRAINING)
def test_thirty_steps_lower_the_loss(name, batch):
    model = model_of(name)
    params, extra = start(name, init(model))
    tx = optax.sgd(0.1, momentum=0.9, nesterov=True)

    @jax.jit
    def step(i, params, extra, opt_state):
        loss_fn = partial(DETECTORS[name].loss_fn, model=model, prepare=noisy, step=i)
        grads, (extra, metrics) = jax.grad(loss_fn, has_aux=True)(
            params, extra, batch, jax.random.fold_in(KEY, i)
        )
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), extra, opt_state, metrics

    opt_state, history = tx.init(params), []
    for i in range(30):
        params, extra, opt_state, metrics = step(i, params, extra, opt_state)
        history.append(metrics)
    assert np.mean([m['loss'] for m in history[-3:]]) < 0.3 * history[0]['loss']
    assert history[-1].get('accuracy', 1.0) == 1.0
    assert history[-1].get('bin_accuracy', 1.0) == 1.0
    if not DETECTORS[name].classifies:
        return
    outputs = model.apply(
        {'params': params, **extra}, normalised(batch['image'], None), train=False
    )
    assert (jnp.argmax(outputs['logits'], -1) == batch['label']).all()  # running statistics serve


@pytest.mark.parametrize('name', TRAINING)
def test_jit_equals_no_jit(name, batch):
    args = (*start(name, init(model_of(name))), batch, KEY)
    loss_fn = loss_of(name, prepare=noisy)
    one, two = loss_fn(*args), jax.jit(loss_fn)(*args)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), one, two)


@pytest.mark.parametrize('name', TRAINING)
def test_extra_keeps_its_shape_and_gets_new_statistics(name, batch):
    params, extra = start(name, init(model_of(name)))
    loss, (new, metrics) = loss_of(name)(params, extra, batch, KEY)
    assert jax.tree.structure(new) == jax.tree.structure(extra)
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), new, extra)
    assert max(jax.tree.leaves(moved['batch_stats'])) > 1e-3
    assert metrics['loss'] == loss
    assert all(jnp.shape(m) == () for m in metrics.values())


@pytest.mark.parametrize('name', TRAINING)
def test_randomness_follows_the_index_and_not_the_row(name, batch):
    """The same rows in another order: the same loss, with augmentation and dropout on."""
    model = model_of(name, DROPPING)
    variables = init(model)
    order = {12: np.random.default_rng(0).permutation(12), 8: np.arange(8)[::-1]}
    permuted = {field: x[order[len(x)]] for field, x in batch.items()}
    loss_fn = jax.jit(loss_of(name, model=model, prepare=noisy))
    args = start(name, variables)
    want = loss_fn(*args, batch, KEY)[0]
    np.testing.assert_allclose(loss_fn(*args, permuted, KEY)[0], want, rtol=1e-5)
    renumbered = batch | {'index': batch['index'] + 1}
    assert abs(loss_fn(*args, renumbered, KEY)[0] - want) > 1e-4
    assert abs(loss_fn(*args, batch, jax.random.key(6))[0] - want) > 1e-4


def test_plain_ignores_outliers(batch, variables):
    others = batch | {'outlier_image': 255 - batch['outlier_image']}
    without = {k: v for k, v in batch.items() if not k.startswith('outlier')}
    want = gradients('plain', variables, batch)
    for other in (others, without):
        same = gradients('plain', variables, other)
        jax.tree.map(np.testing.assert_array_equal, same, want)
    here, there = gradients('oe', variables, batch), gradients('oe', variables, others)
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), here, there)
    assert max(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize('direction', UNIFORMITY)
def test_oe_by_hand(direction, batch, variables):
    """Both terms from one forward pass of the concatenated batch, each a mean of its own rows."""
    images = jnp.concatenate([batch['image'], batch['outlier_image']])
    outputs, after = MODEL.apply(
        variables, normalised(images, None), train=True, mutable=['batch_stats']
    )
    log_p = jax.nn.log_softmax(outputs['logits'])
    ce = -np.mean(np.asarray(log_p)[np.arange(12), batch['label']])
    kl = np.mean(UNIFORMITY[direction](outputs['logits'][12:]))
    args = (*start('oe', variables), batch, KEY)
    for weight in (0.0, 0.5, 2.0):
        loss, (extra, metrics) = loss_of('oe', weight=weight, direction=direction)(*args)
        np.testing.assert_allclose(loss, ce + weight * kl, rtol=1e-5)
        np.testing.assert_allclose(metrics['ce'], ce, rtol=1e-5)
        np.testing.assert_allclose(metrics['kl'], kl, rtol=1e-4)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
        extra['batch_stats'],
        after['batch_stats'],
    )


def test_repeating_a_stream_does_not_change_its_weight(batch, variables):
    """Each term is a mean over its own rows: a mean over the mixture would weigh 128:256 as 1:2.

    Without BatchNorm, which would see the other mixture.
    """
    model = Classifier(_Halves(), Linear(2))
    variables = init(model)
    twice = batch | {
        field: jnp.concatenate([batch[field]] * 2) for field in ('outlier_image', 'outlier_index')
    }
    args = start('oe', variables)
    loss_fn = loss_of('oe', model=model)
    np.testing.assert_allclose(
        loss_fn(*args, twice, KEY)[0], loss_fn(*args, batch, KEY)[0], rtol=1e-6
    )


class _Halves(CNN):
    """The mean of the left and of the right half: a backbone without batch statistics."""

    def __call__(self, images, *, train, keys=None, after=None):
        halves = images.reshape(len(images), 8, 2, 4).mean((1, 3))
        return halves, (halves[:, None, None],)


def test_the_two_streams_never_share_a_key(batch, variables):
    """ID image 100 and outlier 100 are different images: other augmentation, other dropout."""
    seen = []

    def spy(images, keys):
        seen.append(np.asarray(jax.random.key_data(keys)))
        return normalised(images, keys)

    loss_of('oe', prepare=spy)(*start('oe', variables), batch, KEY)
    rows = np.concatenate(seen)
    assert len(np.unique(rows, axis=0)) == len(rows) == 20


def test_an_unknown_direction_names_the_known_ones(batch, variables):
    with pytest.raises(UserError, match='u_p, p_u'):
        oe.loss_fn(
            *start('oe', variables),
            batch,
            KEY,
            model=MODEL,
            step=0,
            prepare=normalised,
            direction='kl',
        )
