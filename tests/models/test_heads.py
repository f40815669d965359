import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxood import parallel
from jaxood.errors import UserError
from jaxood.losses import margin
from jaxood.losses.detection import cross_entropy, kl_uniform_p
from jaxood.models import Classifier
from jaxood.models.backbones import CNN
from jaxood.models.heads import HEADS, branch, last_layer
from jaxood.train import loop, state

FEATURES = jax.random.normal(jax.random.key(0), (5, 16))
LABELS = jnp.array([0, 2, 1, 1, 0])
PLAIN = ('linear', 'three')
ANGULAR = [name for name in HEADS if name not in PLAIN]
NORMALISED = [name for name in ANGULAR if name != 'sphereface']


def init(name, features=FEATURES, num_classes=3, **keywords):
    head = HEADS[name](num_classes=num_classes, **keywords)
    return head, head.init(jax.random.key(1), features)


def loss_of(head, variables):
    """Mean cross-entropy as a function of features and kernel; a state is left as it is."""

    def loss(features, kernel, labels=LABELS, step=0):
        given = variables | {'params': variables['params'] | {'kernel': kernel}}
        return cross_entropy(head.apply(given, features, labels, step), labels).mean()

    return loss


def on_paper(cos, length=1.0):
    """One row of features and the kernel that together have these cosines."""
    cos = np.asarray(cos)
    return jnp.array([[length, 0.0]]), jnp.stack([cos, np.sqrt(1 - cos**2)])


# ---- every head -------------------------------------------------------------------------------


@pytest.mark.parametrize('name', HEADS)
def test_a_row_without_target_has_the_logits_of_inference(name):
    head, variables = init(name)
    inference = head.apply(variables, FEATURES)
    assert inference.shape == (5, 3)
    assert inference.dtype == jnp.float32
    no_target = head.apply(variables, FEATURES, jnp.full(5, -1), 7)
    np.testing.assert_allclose(no_target, inference, atol=1e-6)
    some = head.apply(variables, FEATURES, jnp.array([0, -1, 1, 2, -1]), 7)
    np.testing.assert_allclose(some[jnp.array([1, 4])], inference[jnp.array([1, 4])], atol=1e-6)


@pytest.mark.parametrize('name', HEADS)
def test_a_target_does_not_touch_the_other_logits_nor_raise_its_own(name):
    head, variables = init(name)
    inference, train = head.apply(variables, FEATURES), head.apply(variables, FEATURES, LABELS)
    own = jax.nn.one_hot(LABELS, 3, dtype=bool)
    np.testing.assert_allclose(jnp.where(own, 0, train), jnp.where(own, 0, inference), atol=1e-6)
    assert (train[own] <= inference[own] + 1e-6).all()


@pytest.mark.parametrize('name', HEADS)
def test_classifier_applies_its_head_to_its_features(name):
    model = Classifier(CNN(widths=(4, 16)), HEADS[name](num_classes=3))
    images = jax.random.normal(jax.random.key(2), (5, 8, 8, 1))
    variables = model.init(jax.random.key(3), images, train=False)
    outputs = model.apply(variables, images, train=False)
    assert variables['params'].keys() == {'backbone', 'head'}
    own = {c: tree['head'] for c, tree in variables.items() if 'head' in tree}
    logits = HEADS[name](num_classes=3).apply(own, outputs['features'])
    np.testing.assert_allclose(outputs['logits'], logits, atol=1e-6)


@pytest.mark.parametrize('name', HEADS)
def test_the_last_layer_predicts_as_the_head_does(name):
    head, variables = init(name, num_classes=7)
    kernel = variables['params']['kernel'] * jnp.arange(1, 8)  # lengths must not decide
    variables = variables | {'params': variables['params'] | {'kernel': kernel}}
    logits = head.apply(variables, FEATURES)
    last = last_layer(variables['params'])
    again = FEATURES @ last['kernel'] + last['bias']
    np.testing.assert_array_equal(jnp.argmax(again, axis=1), jnp.argmax(logits, axis=1))
    if name not in NORMALISED:
        np.testing.assert_allclose(again, logits, atol=1e-5)
    else:
        length = jnp.linalg.norm(FEATURES, axis=1, keepdims=True)
        factor = again / length / logits
        np.testing.assert_allclose(factor, factor[0, 0], rtol=1e-4)


@pytest.mark.parametrize('name', HEADS)
def test_ten_thousand_steps_in_bfloat16_at_cosines_of_1_stay_finite(name):
    """SGD with features along, against and without a direction of the weights, and with free ones.

    Features are bfloat16, and so are the weights between steps: both ends are hit exactly.
    """
    K, D = 4, 5
    labels = jnp.array([0, 1, 2, -1, -1, 3, 0, 1])
    pinned = jnp.array([[2, 0, 0, 0], [0, -2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 2], [0, 0, -2, 0]])
    head, variables = init(name, jnp.zeros((1, D)), num_classes=K)
    params, extra = variables['params'], {k: v for k, v in variables.items() if k != 'params'}
    coarse = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), tree)

    def loss(params, features, extra, step):
        variables = {'params': params, **extra}
        z, extra = head.apply(variables, features, labels, step, mutable=list(extra))
        ce = jnp.where(labels >= 0, cross_entropy(z, jnp.maximum(labels, 0)), 0.0)
        return ce.mean() + 0.5 * jnp.where(labels < 0, kl_uniform_p(z), 0.0).mean(), (z, extra)

    def update(carry, step):
        params, free, extra, finite, ends = carry
        along = pinned @ params['kernel'].T
        features = jnp.concatenate([along, free]).astype(jnp.bfloat16)
        grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (value, (z, extra)), (slope, of_features) = grad(params, features, extra, step)
        for x in jax.tree.leaves((value, z, slope, of_features, extra)):
            finite &= jnp.isfinite(x).all()
        cos = jnp.abs(margin.cosines(features, params['kernel'])[jnp.array([0, 1]), labels[:2]])
        params = coarse(jax.tree.map(lambda p, g: p - 0.1 * g, params, slope))
        free = free - 0.1 * of_features[len(pinned) :].astype(jnp.float32)
        return (params, free, extra, finite, jnp.minimum(ends, cos.min())), value

    free = 0.1 * jax.random.normal(jax.random.key(5), (len(labels) - len(pinned), D))
    carry = coarse(params), free, extra, jnp.bool_(True), jnp.float32(1.0)
    run = jax.jit(functools.partial(jax.lax.scan, update))
    (params, free, extra, finite, ends), losses = run(carry, jnp.arange(10_000))
    assert finite
    assert np.isfinite(losses).all()
    if name in ANGULAR:
        assert ends > 1 - 1e-6
        assert losses[-1] < losses[0] - 0.01  # it was a training


@pytest.mark.parametrize('name', HEADS)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_values_and_slopes_are_finite_at_both_ends_and_at_zero(name, dtype):
    head, variables = init(name, num_classes=3)
    kernel = variables['params']['kernel'].at[:, 2].set(0.0)
    along = kernel[:, :1].T
    features = jnp.concatenate([along, -along, 0 * along, 1e-30 * along, 1e6 * along])
    loss = loss_of(head, variables)
    for labels in (jnp.zeros(5, int), jnp.full(5, 2)):
        grad = jax.value_and_grad(loss, argnums=(0, 1))
        got = grad(features.astype(dtype), kernel, labels)
        assert all(np.isfinite(x.astype(jnp.float32)).all() for x in jax.tree.leaves(got))


@pytest.mark.parametrize(
    ('name', 'keywords', 'message'),
    [
        ('normface', dict(scale=0.0), 'scale=0.0 must be above 0'),
        ('cosface', dict(scale=-1.0), 'scale=-1.0'),
        ('arcface', dict(scale=float('nan')), 'scale=nan'),
        ('sphereface_norm', dict(scale=float('inf')), 'scale=inf'),
        ('cosface', dict(margin=2.0), 'margin=2.0 must be at least 0 and below 2'),
        ('cosface', dict(margin=-0.1), 'margin=-0.1'),
        ('arcface', dict(margin=1.6), 'margin=1.6 must be at least 0 and below 1.571'),
        ('arcface', dict(margin=-0.1, easy=True), 'margin=-0.1'),
        ('sphereface', dict(margin=0), 'margin=0 must be a whole number'),
        ('sphereface', dict(margin=1.35), 'margin=1.35 must be a whole number'),
        ('sphereface_norm', dict(margin=0.9), 'margin=0.9 must be at least 1 and below 2'),
        ('sphereface_norm', dict(margin=4.0), 'margin=4.0'),
    ],
)
def test_settings_out_of_range_are_refused_when_the_head_is_made(name, keywords, message):
    with pytest.raises(UserError, match=message):
        HEADS[name](num_classes=3, **keywords)


@pytest.mark.parametrize('dynamic', [True, False])
def test_adacos_refuses_two_classes(dynamic):
    with pytest.raises(UserError, match='adacos with 2 classes'):
        init('adacos', num_classes=2, dynamic=dynamic)


# ---- linear -----------------------------------------------------------------------------------


@pytest.mark.parametrize('name', PLAIN)
def test_linear_is_an_affine_map(name):
    head, variables = init(name)
    kernel, bias = variables['params']['kernel'], jnp.array([1.0, 2.0, 3.0])
    assert np.abs(kernel).max() <= 1 / np.sqrt(16)  # PyTorch's default
    assert np.std(kernel) == pytest.approx(1 / np.sqrt(3 * 16), rel=0.3)
    got = head.apply({'params': variables['params'] | {'bias': bias}}, FEATURES)
    np.testing.assert_allclose(got, FEATURES @ kernel + bias, atol=1e-5)


def test_the_other_two_of_three_heads_have_their_own_weights():
    _, variables = init('three')
    params = variables['params'] | {'bin_bias': jnp.array([1.0, 2.0])}
    kernel = params['bin_kernel']
    got = branch(params, 'bin', FEATURES)
    np.testing.assert_allclose(got, FEATURES @ kernel + jnp.array([1.0, 2.0]), atol=1e-5)
    assert branch(params, 'out', FEATURES).shape == (len(FEATURES), 3)
    assert last_layer(params).keys() == {'kernel', 'bias'}  # g_in's, as scores read them


# ---- angular heads ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'keywords', 'expected'),
    [
        ('normface', dict(scale=10.0), 0.019045),
        ('cosface', dict(scale=10.0), 0.492699),
        ('arcface', dict(scale=10.0), 1.049469),
        ('arcface', dict(scale=10.0, easy=True), 1.049469),
        ('sphereface', dict(), 0.307019),
        ('sphereface_norm', dict(scale=10.0, margin=1.0), 0.019045),
    ],
)
def test_hand_numbers(name, keywords, expected):
    """cos θ = (.6, .2, -.1), the first class is the target, scale or length 10; default margins."""
    features, kernel = on_paper([0.6, 0.2, -0.1], length=10.0)
    head = HEADS[name](num_classes=3, **keywords)
    logits = head.apply({'params': {'kernel': kernel}}, features, jnp.array([0]), 2000)
    got = float(cross_entropy(logits, jnp.array([0]))[0])
    assert got == pytest.approx(expected, abs=1e-6)


def test_without_their_margins_all_are_normface():
    normface, variables = init('normface')
    want = normface.apply(variables, FEATURES, LABELS)
    reduced = [('cosface', 0.0), ('arcface', 0.0), ('sphereface_norm', 1.0)]
    for name, m in reduced:
        got = HEADS[name](num_classes=3, margin=m).apply(variables, FEATURES, LABELS)
        np.testing.assert_allclose(got, want, atol=1e-4)
    got = HEADS['arcface'](num_classes=3, margin=0.0, easy=True).apply(variables, FEATURES, LABELS)
    np.testing.assert_allclose(got, want, atol=1e-4)
    length = jnp.linalg.norm(FEATURES, axis=1, keepdims=True)
    for step in (0, 10_000):
        head = HEADS['sphereface'](num_classes=3, margin=1)
        got = head.apply(variables, FEATURES, LABELS, step)
        np.testing.assert_allclose(got, length * want / 30.0, atol=1e-4)


def test_spherefaces_margin_comes_in_with_the_steps():
    head, variables = init('sphereface')
    loss = loss_of(head, variables)
    kernel = variables['params']['kernel']
    losses = [float(loss(FEATURES, kernel, step=t)) for t in (0, 100, 500, 1659, 10**6)]
    assert (np.diff(losses[:4]) > 0.01).all()
    assert losses[3] == losses[4]
    assert losses[0] == pytest.approx(
        float(cross_entropy(head.apply(variables, FEATURES), LABELS).mean()), abs=0.05
    )


@pytest.mark.parametrize('name', ANGULAR)
def test_lengths_do_not_matter_but_spherefaces_features(name):
    head, variables = init(name)
    assert variables['params'].keys() == {'kernel'}
    kernel = variables['params']['kernel']
    loss = functools.partial(loss_of(head, variables), step=2000)
    value, (of_features, of_kernel) = jax.value_and_grad(loss, (0, 1))(FEATURES, kernel)
    np.testing.assert_allclose(jnp.sum(kernel * of_kernel, axis=0), 0.0, atol=1e-5)
    np.testing.assert_allclose(loss(FEATURES, 5.0 * kernel), value, rtol=1e-5)
    radial = jnp.sum(FEATURES * of_features, axis=1)
    longer = loss(7.0 * FEATURES, kernel)
    if name in NORMALISED:
        np.testing.assert_allclose(radial, 0.0, atol=1e-5)
        np.testing.assert_allclose(longer, value, rtol=1e-5)
    else:
        assert np.abs(radial).min() > 1e-3
        assert abs(longer - value) > 0.1


def test_predictions_do_not_depend_on_scale_or_margin():
    _, variables = init('normface')
    want = jnp.argmax(HEADS['normface'](num_classes=3).apply(variables, FEATURES), axis=1)
    for name, keywords in [
        ('normface', dict(scale=1.0)),
        ('cosface', dict(scale=64.0, margin=1.9)),
        ('arcface', dict(scale=5.0, margin=1.5)),
        ('sphereface', dict(margin=7)),
        ('sphereface_norm', dict(margin=1.9)),
        ('adacos', dict(dynamic=False)),
    ]:
        logits = HEADS[name](num_classes=3, **keywords).apply(variables, FEATURES)
        np.testing.assert_array_equal(jnp.argmax(logits, axis=1), want)


def test_an_outliers_gradient_in_feature_space():
    """∂KL(U ‖ p)/∂h = s/‖h‖ Σ_k (p_k - 1/K) (ŵ_k - cos θ_k ĥ)."""
    head, variables = init('normface', scale=10.0)
    kl = lambda h: kl_uniform_p(head.apply(variables, h, jnp.full(5, -1))).sum()
    unit_w = np.asarray(variables['params']['kernel'], np.float64)
    unit_w = unit_w / np.linalg.norm(unit_w, axis=0)
    for got, h in zip(jax.grad(kl)(FEATURES), np.asarray(FEATURES, np.float64)):
        unit_h = h / np.linalg.norm(h)
        cos = unit_h @ unit_w
        p = np.exp(10 * cos) / np.exp(10 * cos).sum()
        pull = sum((p[k] - 1 / 3) * (unit_w[:, k] - cos[k] * unit_h) for k in range(3))
        np.testing.assert_allclose(got, 10 / np.linalg.norm(h) * pull, atol=1e-5)


# ---- AdaCos -----------------------------------------------------------------------------------


def test_the_scale_is_state():
    head, variables = init('adacos')
    start = np.sqrt(2) * np.log(2)
    assert float(variables['adacos']['scale']) == pytest.approx(start)
    with_labels = head.init(jax.random.key(1), FEATURES, LABELS)
    assert float(with_labels['adacos']['scale']) == pytest.approx(start)
    cos = margin.cosines(FEATURES, variables['params']['kernel'])
    # a model that is not trained leaves it alone
    for labels in (None, LABELS):
        np.testing.assert_allclose(head.apply(variables, FEATURES, labels), start * cos, rtol=1e-5)
    logits, _ = head.apply(variables, FEATURES, mutable=['adacos'])
    np.testing.assert_allclose(logits, start * cos, rtol=1e-5)
    # one that is asks for it, and uses it at once
    logits, new = head.apply(variables, FEATURES, LABELS, mutable=['adacos'])
    scale = margin.adacos_dynamic(cos, LABELS, jnp.float32(start))
    assert scale != pytest.approx(start, rel=0.01)
    assert new['adacos']['scale'] == pytest.approx(scale)
    np.testing.assert_allclose(logits, scale * cos, rtol=1e-5)
    # and keeps it
    trained = variables | new
    np.testing.assert_allclose(head.apply(trained, FEATURES), scale * cos, rtol=1e-5)


def test_the_fixed_scale_is_no_state():
    head, variables = init('adacos', num_classes=10, dynamic=False)
    assert variables.keys() == {'params'}
    cos = margin.cosines(FEATURES, variables['params']['kernel'])
    np.testing.assert_allclose(head.apply(variables, FEATURES, LABELS), 3.10734 * cos, rtol=1e-5)


def test_the_scale_is_that_of_the_global_batch():
    """Two devices by pmap, four by jit and one: the same scales and weights after every step."""
    rng = np.random.default_rng(3)
    kernel = np.float32(rng.normal(size=(6, 9)))
    labels = np.int32([0, 1, 2, -1, 3, -1, -1, 4])  # four of them on the first of two devices
    features = kernel.T[labels] + np.float32([[0.3], [2], [0.1], [1], [3], [1], [1], [2]]) * (
        np.float32(rng.normal(size=(8, 6)))
    )

    def train(mode, count):
        devices = parallel.setup(mode, count)
        head = HEADS['adacos'](num_classes=9, axis_name=devices.axis_name)

        def loss_fn(params, extra, data, batch, key, step):
            logits, extra = head.apply(
                {'params': params, **extra}, batch['h'], batch['y'], step, mutable=list(extra)
            )
            loss = jnp.mean(kl_uniform_p(logits))
            return loss, (extra, {'loss': loss})

        tx = optax.sgd(0.1)
        extra = {'adacos': {'scale': jnp.float32(margin.adacos_fixed(9))}}
        start = state.create({'kernel': jnp.asarray(kernel)}, tx, extra, ema=False)
        step = devices.compile_step(functools.partial(loop.train_step, loss_fn=loss_fn, tx=tx))
        now, scales = devices.replicate(start), []
        for _ in range(3):
            batch = devices.shard({'h': features, 'y': labels})
            now, _ = step(now, None, batch, jax.random.key(0))
            scales.append(float(devices.unreplicate(now).extra['adacos']['scale']))
        return scales, np.asarray(devices.unreplicate(now).params['kernel'])

    scales, weights = train('jit', 1)
    cos = margin.cosines(jnp.asarray(features), jnp.asarray(kernel))
    fixed = jnp.float32(margin.adacos_fixed(9))
    assert scales[0] == pytest.approx(float(margin.adacos_dynamic(cos, labels, fixed)), rel=1e-5)
    halves = [
        float(margin.adacos_dynamic(cos[at], labels[at], fixed))
        for at in (slice(0, 4), slice(4, 8))
    ]
    assert abs(np.mean(halves) - scales[0]) > 0.01  # what an average over devices would have
    for layout in [('jit', 4), ('pmap', 2)]:
        other_scales, other_weights = train(*layout)
        np.testing.assert_allclose(other_scales, scales, rtol=1e-5)
        np.testing.assert_allclose(other_weights, weights, atol=1e-5)
