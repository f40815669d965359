"""Outlier exposure at perturbed weights: its limits, its state, and one device against several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from jaxood import parallel
from jaxood.detectors import DETECTORS, doe
from jaxood.detectors.oe import mixture
from jaxood.errors import UserError
from jaxood.losses import perturb
from jaxood.models import Classifier
from jaxood.models.backbones import CNN, WRN, ResNet
from jaxood.models.heads import Linear
from jaxood.train import loop, state

KEY = jax.random.key(5)
NETWORKS = {  # as DOG has them: WRN-40-2 with dropout, ResNet-50
    'wrn': WRN(depth=10, width=1, base=4, dropout=0.3),
    'resnet': ResNet(blocks=(1, 1), width=4, bottleneck=True, stem='imagenet'),
}


def normalised(images, keys):
    return images.astype(jnp.float32) / 128 - 1


def rows():
    rng = np.random.default_rng(0)
    return {
        'image': rng.integers(256, size=(12, 8, 8, 1), dtype=np.uint8),
        'label': np.arange(12, dtype=np.int32) % 3,
        'index': np.arange(12, dtype=np.int32),
        'outlier_image': rng.integers(256, size=(8, 8, 8, 1), dtype=np.uint8),
        'outlier_index': np.arange(8, dtype=np.int32),
    }


BATCH = rows()


@functools.cache
def model_of(name, axis_name=None):
    backbone = NETWORKS.get(name) or CNN(widths=(4, 8), axis_name=axis_name)
    return Classifier(backbone, Linear(3))


@functools.cache
def start(name='cnn', method='doe'):
    """(params, extra), the last layer as if trained: larger logits make a regret worth climbing."""
    model = model_of(name)
    variables = jax.jit(lambda: model.init(KEY, jnp.zeros((1, 8, 8, 1)), train=False))()
    variables['params']['head']['kernel'] *= 6.0
    return variables['params'], DETECTORS[method].init_extra(variables)


@functools.cache
def compiled(method, name, keywords=(), grads=True):
    """Value and gradient of a method's loss on the batch; weight, key and step are traced."""
    loss = functools.partial(
        DETECTORS[method].loss_fn, model=model_of(name), prepare=normalised, **dict(keywords)
    )
    f = jax.value_and_grad(loss, has_aux=True) if grads else loss
    return jax.jit(
        lambda params, extra, weight, key, step: f(
            params, extra, BATCH, key, weight=weight, step=step
        )
    )


def run(method, weight=1.0, *, step=0, params=None, extra=None, key=KEY, **keywords):
    """(loss, extra, metrics, gradient) of the CNN."""
    own = start(method=method)
    params, extra = own[0] if params is None else params, own[1] if extra is None else extra
    f = compiled(method, 'cnn', tuple(keywords.items()))
    (loss, (extra, metrics)), grads = f(params, extra, weight, key, jnp.int32(step))
    return loss, extra, metrics, grads


def close(one, two, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), one, two)


def kept(extra):
    return {k: v for k, v in extra.items() if k != doe.P}


@pytest.mark.parametrize('name', NETWORKS)
def test_the_regret_rises_along_p_and_falls_against_it(name):
    """Small α, P of this batch alone."""
    params, extra = start(name)
    model, n = model_of(name), len(BATCH['label'])
    images, _, labels = mixture(BATCH, KEY, normalised)

    @jax.jit
    def measure(params):
        outputs, _ = model.apply(
            {'params': params, **kept(extra)}, images, train=True, mutable=['batch_stats']
        )
        return perturb.regret(outputs['logits'][n:])

    here = float(measure(params))
    p = jax.jit(
        lambda params: doe._next(
            *(extra[doe.P], params, kept(extra), BATCH, (images, None, labels)),
            *(model, 0, True, '+'),
        )
    )(params)
    for alpha in (1e-4, 1e-3):
        assert float(measure(perturb.shifted(params, p, alpha))) > here
        assert float(measure(perturb.shifted(params, p, -alpha))) < here
    length = lambda tree: float(jnp.linalg.norm(tree['head']['kernel']))
    assert length(p) == pytest.approx(length(params), rel=1e-5)


def test_without_a_step_it_is_plain_outlier_exposure():
    """α = 0, and the warm-up: the same loss, gradient and statistics."""
    want = run('oe')
    for more in (dict(alphas=(0.0,)), dict(warmup=2)):
        loss, extra, metrics, grads = run('doe', **more)
        assert float(loss) == pytest.approx(float(want[0]), rel=1e-5)
        close(grads, want[3], rtol=1e-3, atol=1e-5)
        close(kept(extra), want[1], rtol=1e-5)
        assert float(metrics['kl_worst']) == pytest.approx(float(metrics['kl']), rel=1e-5)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(extra[doe.P]))  # of the warm-up


def test_both_passes_drop_the_same_units():
    params, extra = start('wrn')
    f = compiled('doe', 'wrn', (('alphas', (0.0,)),), grads=False)
    _, (_, metrics) = f(params, extra, 1.0, KEY, jnp.int32(0))
    assert float(metrics['kl_worst']) == pytest.approx(float(metrics['kl']), rel=1e-5)


def test_without_a_weight_it_is_cross_entropy_and_at_a_distance_it_is_worse():
    ce = run('oe', 0.0)
    loss, extra, metrics, grads = run('doe', 0.0, alphas=(0.1,))
    assert float(loss) == pytest.approx(float(ce[0]), rel=1e-5)
    close(grads, ce[3], rtol=1e-3, atol=1e-5)
    close(kept(extra), ce[1], rtol=1e-5)  # statistics come from the pass at θ alone
    assert float(metrics['kl_worst']) > 1.02 * float(metrics['kl'])
    _, other, against, _ = run('doe', 0.0, alphas=(0.1,), sign='-')
    assert float(against['kl_worst']) < 0.98 * float(metrics['kl'])
    close(extra[doe.P], jax.tree.map(jnp.negative, other[doe.P]), rtol=1e-5)


def test_p_is_the_first_gradient_and_then_an_average():
    params, extra = start()
    old = perturb.direction(params, jax.tree.map(lambda x: jnp.cos(9.0 * x) + 0.3, params))
    p_new = run('doe', step=2, warmup=2)[1][doe.P]
    first = run('doe', step=2, warmup=2, extra=extra | {doe.P: old})[1][doe.P]
    close(first, p_new, rtol=1e-6)  # whatever stood there
    later = run('doe', step=3, warmup=2, extra=extra | {doe.P: old})[1][doe.P]
    close(later, jax.tree.map(lambda x, y: 0.6 * x + 0.4 * y, old, p_new), rtol=1e-4, atol=1e-6)


TX = state.sgd(steps=6, learning_rate=0.05, clip=1.0)


def step_of(method, axis_name=None, **keywords):
    """`train_step` of a method, as `stages.parts.classifiers` puts it together."""
    model, entry = model_of('cnn', axis_name), DETECTORS[method]

    def of_rows(loss):
        def loss_fn(params, extra, data, batch, key, step):
            return loss(params, extra, batch, key, model=model, step=step, prepare=normalised)

        return loss_fn

    first = None
    if entry.first is not None:
        loss, begin = entry.first(**keywords)
        first = (of_rows(loss), begin)
    loss = of_rows(functools.partial(entry.loss_fn, **keywords))
    return functools.partial(loop.train_step, loss_fn=loss, tx=TX, first=first)


def first_state(method):
    params, extra = start(method=method)
    fresh = jax.tree.map(jnp.copy, (params, extra))  # a step gives its buffers away
    return state.create(fresh[0], TX, fresh[1], ema=False)


@functools.cache
def compiled_step(method, mode, count):
    devices = parallel.setup(mode, count)
    return devices, devices.compile_step(step_of(method, devices.axis_name, warmup=1))


def fit(folder, method, mode='jit', count=1, steps=4, stop=None):
    """Trains `steps`, from a checkpoint in the folder if there is one; may be killed at `stop`."""
    devices, step = compiled_step(method, mode, count)

    def feed(n):
        while n != stop:
            yield {k: np.roll(v, 4 * n, axis=0) for k, v in BATCH.items()}
            n += 1

    return loop.fit(
        *(first_state(method), step, devices.replicate(jnp.zeros(())), feed, KEY),
        steps=steps,
        devices=devices,
        folder=epath.Path(folder),
        what='test',
        images_per_step=20,
        log_every=2,
        checkpoint_every=2,
    )[0]


def test_two_devices_train_as_one(tmp_path):
    """One step of warm-up, three with P, which is that of the rows of both."""
    one = fit(tmp_path / 'one', 'doe')
    for mode in ('jit', 'pmap'):
        two = fit(tmp_path / mode, 'doe', mode, 2)
        close((two.params, two.extra), (one.params, one.extra), rtol=2e-3, atol=2e-5)
    assert float(jnp.linalg.norm(one.extra[doe.P]['head']['kernel'])) > 0.1


@pytest.mark.parametrize('method', ['doe', 'doe_alternating'])
def test_resumed_it_ends_with_the_same_p_and_weights(tmp_path, method):
    """Killed after step 3; the checkpoint of step 2 has one P in it, which the rest builds on."""
    straight = fit(tmp_path / 'straight', method)
    with pytest.raises(StopIteration):
        fit(tmp_path / 'stopped', method, stop=3)
    again = fit(tmp_path / 'stopped', method)
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_alternating_is_two_updates_on_one_batch_at_one_rate():
    """By hand: the KL's gradient at θ + αP, applied to θ; then cross-entropy's, at what that gave.

    In the warm-up one update, of both terms, as plain outlier exposure has it.
    """
    method = 'doe_alternating'
    _, step = compiled_step(method, 'jit', 1)
    devices = parallel.setup('jit', 1)
    place = lambda state: (state, devices.replicate(jnp.zeros(())), devices.shard(BATCH), KEY)
    params, extra = start(method=method)

    warm, _ = step(*place(first_state(method)))
    grads = run('oe', key=jax.random.fold_in(KEY, 0))[3]
    updates, _ = TX.update(grads, TX.init(params), params)
    close(warm.params, optax.apply_updates(params, updates), rtol=1e-4, atol=1e-6)

    after, metrics = step(*place(first_state(method)._replace(step=jnp.int32(1))))
    key, at = jax.random.fold_in(KEY, 1), dict(model=model_of('cnn'), prepare=normalised, step=1)
    loss, begin = DETECTORS[method].first(warmup=1)
    grads, (extra, _) = jax.jit(jax.grad(lambda p, e: loss(p, e, BATCH, key, **at), has_aux=True))(
        params, extra
    )
    updates, trained = TX.update(grads, TX.init(params), params)
    params = optax.apply_updates(params, updates)
    trained = optax.tree.set(trained, count=0)
    grads = run('oe', 0.0, extra=kept(extra), key=key, params=params)[3]
    params = optax.apply_updates(params, TX.update(grads, trained, params)[0])
    close(after.params, params, rtol=1e-3, atol=1e-5)
    close(after.extra[doe.P], extra[doe.P], rtol=1e-4, atol=1e-6)
    assert begin == int(optax.tree.get(after.opt_state, 'count')) == int(after.step) - 1
    assert float(metrics['loss']) == float(metrics['ce'])


@pytest.mark.parametrize(
    ('method', 'keywords', 'message'),
    [
        ('doe', dict(sign='plus'), r"sign 'plus' is not known.*Known: \+, -"),
        ('doe', dict(warmup=-1), 'warmup=-1 steps: give 0 or more'),
        ('doe', dict(alphas=()), r'alphas=\(\): give the lengths'),
        ('doe_alternating', dict(alphas=(0.1, -0.1)), r'alphas=\(0.1, -0.1\)'),
        ('energy_oe', dict(m_in=-5.0, m_out=-5.0), 'm_in=-5.0 must lie below m_out=-5.0'),
    ],
)
def test_what_it_refuses(method, keywords, message):
    entry = DETECTORS[method]
    with pytest.raises(UserError, match=message):
        entry.loss_fn(
            *start(method=method), BATCH, KEY, model=None, step=0, prepare=normalised, **keywords
        )
