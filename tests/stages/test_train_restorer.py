"""The restorer's loss, and what it learns of data whose best restoration is known."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood import diffusion, metrics, parallel
from jaxood.diffusion import process
from jaxood.models import taps
from jaxood.models.denoisers import LFDN
from jaxood.scores import SCORES
from jaxood.stages import train_restorer
from jaxood.stages.parts import restorers
from jaxood.train import loop, state

ALPHA_BAR = diffusion.SCHEDULES['scaled_linear'](100, beta_start=0.0015, beta_end=0.0195)
B4 = (24, 32, 56, 160, 448)  # channels of EfficientNet-B4's taps
C, RANK = 12, 6


@pytest.mark.parametrize(('channels', 'loss'), [(B4, 0.99306), ((256, 512, 1024), 0.99833)])
def test_the_untrained_loss_is_known(channels, loss):
    """(c - M)/c: an untrained output is 0, and M blocks have the squared length c_m - 1."""
    rng = np.random.default_rng(0)
    blocks = [taps.normalised(jnp.asarray(100 * rng.normal(size=(4, c)))) for c in channels]
    z_0 = jnp.concatenate(blocks, axis=1)
    model = LFDN(width=4, num_blocks=1)
    how = dict(model=model, alpha_bar=ALPHA_BAR, columns=tuple(range(z_0.shape[1])))
    batch = {'taps': z_0, 'index': np.arange(4)}
    params = jax.jit(model.init)(jax.random.key(0), z_0, jnp.ones(4, jnp.int32))['params']
    untrained = jax.jit(lambda *args: train_restorer.loss_fn(*args, 0, **how)[0])
    for seed in (0, 1):  # whatever t is drawn
        got = untrained(params, {}, None, batch, jax.random.key(seed))
        assert float(got) == pytest.approx(loss, abs=1e-5)


def test_blocks_from_the_deepest():
    assert restorers.blocks(B4, None)[1] == (0, 24, 56, 112, 272, 720)
    columns, edges = restorers.blocks(B4, 2)
    assert (columns[0], columns[-1], edges) == (112, 719, (0, 160, 608))


def test_rows_that_are_not_on_the_device_are_the_same_batch():
    z = np.arange(40.0, dtype=np.float32).reshape(20, 2)
    devices = parallel.setup(num_devices=1)
    how = dict(batch_size=8, seed=3)
    data, resident = train_restorer.feed(z, devices, limit=10**6, **how)
    none, streamed = train_restorer.feed(z, devices, limit=10, **how)
    assert none is None
    for a, b in zip((next(resident(n)) for n in range(4)), (next(streamed(n)) for n in range(4))):
        at = np.sort(a['index'])
        np.testing.assert_array_equal(at, b['index'])
        np.testing.assert_array_equal(np.asarray(data['taps'])[at], b['taps'])


@pytest.fixture(scope='module')
def gaussian():
    """(Σ, samples, restorer): a small LFDN trained on N(0, Σ) with a Σ of half the rank."""
    rng = np.random.default_rng(0)
    A = np.linalg.qr(rng.normal(size=(C, C)))[0][:, :RANK] * np.linspace(0.8, 1.6, RANK)
    sample = lambda n: (rng.normal(size=(n, RANK)) @ A.T).astype(np.float32)
    model, z = LFDN(width=64, num_blocks=2), sample(4096)
    params = model.init(jax.random.key(0), z[:1], jnp.ones(1, jnp.int32))['params']
    tx = state.adamw(steps=1, learning_rate=3e-3)
    loss = functools.partial(
        train_restorer.loss_fn, model=model, alpha_bar=ALPHA_BAR, columns=tuple(range(C))
    )
    devices = parallel.setup(num_devices=1)
    step = devices.compile_step(
        functools.partial(loop.train_step, loss_fn=loss, tx=tx, ema_limit=0.99)
    )
    data, feed = train_restorer.feed(z, devices, batch_size=256, seed=0, limit=2**30)
    now, key, batches = state.create(params, tx, {}, ema=True), jax.random.key(1), feed(0)
    first = jax.tree.map(np.asarray, now.ema)
    for _ in range(800):
        now, _ = step(now, data, next(batches), key)
    how = dict(columns=tuple(range(C)), edges=(0, C // 2, C), eta=1.0, stride=1, seed=0)
    snapshots = [first, jax.tree.map(np.asarray, now.ema)]
    restorer = restorers.Restorer(model, snapshots, ALPHA_BAR, devices=devices, key='a', **how)
    return A @ A.T, sample, restorer


@pytest.mark.slow
def test_it_approaches_the_best_estimate_of_a_gaussian(gaussian):
    """E[z_0 | z_t] = √ᾱ Σ (ᾱ Σ + (1 - ᾱ) I)⁻¹ z_t: the loss comes near that of this formula."""
    sigma, sample, restorer = gaussian
    z_0, t = sample(2000), np.random.default_rng(1).integers(1, 101, 2000)
    eps = np.random.default_rng(2).normal(size=z_0.shape).astype(np.float32)
    a = ALPHA_BAR[t]
    z_t = np.asarray(process.add_noise(z_0, eps, a))
    gains = {
        s: np.sqrt(ALPHA_BAR[s])
        * sigma
        @ np.linalg.inv(ALPHA_BAR[s] * sigma + (1 - ALPHA_BAR[s]) * np.eye(C))
        for s in range(1, 101)
    }
    best = np.stack([gains[s] @ z for s, z in zip(t, z_t)])
    got = restorer.model.apply({'params': restorer.snapshots[1]}, z_t, t)
    mean = lambda z: float(np.mean((z - z_0) ** 2))
    assert mean(best) < mean(got) < 1.4 * mean(best)
    assert mean(np.zeros_like(z_0)) > 4 * mean(got)


@pytest.mark.slow
def test_what_is_off_the_subspace_is_not_restored(gaussian):
    _, sample, restorer = gaussian
    rng = np.random.default_rng(3)
    sets = {'id': sample(400), 'ood': rng.normal(size=(400, C)).astype(np.float32)}
    made = {
        k: restorer.restore({'taps': z, 'mark': np.arange(400, dtype=np.uint32)}, (3, 10), 128)
        for k, z in sets.items()
    }
    for name, depth in itertools.product(('mse', 'mfsim'), (3, 10)):
        entry = SCORES[name]
        params = entry.fit({}, {}, depth=depth)
        s = {k: entry.score(params, {'restored': v}, {}) for k, v in made.items()}
        assert metrics.auroc(s['id'], s['ood']) > 0.95, (name, depth)


@pytest.mark.slow
def test_a_restoration_follows_the_image_alone(gaussian):
    """Batch, padding, order, devices, and the depths beside it change nothing."""
    _, sample, restorer = gaussian
    z, mark = sample(50), np.arange(100, 150, dtype=np.uint32)
    whole = restorer.restore({'taps': z, 'mark': mark}, (3, 10), 128)
    at = np.array([7, 3, 41])
    some = restorer.restore({'taps': z[at], 'mark': mark[at]}, (10,), 2)
    for name in ('errors', 'cosines'):
        np.testing.assert_allclose(some[10][name], whole[10][name][at], atol=1e-5)
    two = dataclasses.replace(restorer, devices=parallel.setup('pmap', 2))
    shared_out = two.restore({'taps': z[at], 'mark': mark[at]}, (10,), 2)[10]
    np.testing.assert_allclose(shared_out['errors'], some[10]['errors'], atol=1e-5)
    other = restorer.restore({'taps': z[at], 'mark': mark[at] + 1}, (10,), 2)
    assert np.abs(other[10]['errors'] - some[10]['errors']).max() > 1e-4


@pytest.mark.slow
def test_a_random_stride_is_drawn_once_for_each_depth(gaussian):
    drawn = dataclasses.replace(gaussian[2], stride='random')
    strides = {t: int(-np.diff(drawn.times(t)).min()) for t in range(1, 60)}
    again = dataclasses.replace(drawn)
    assert all(np.array_equal(drawn.times(t), again.times(t)) for t in strides)
    assert all(drawn.times(t)[0] == t and drawn.times(t)[-1] == 0 for t in strides)
    assert len({*strides.values()}) > 3
    fixed = dataclasses.replace(drawn, stride=5)
    np.testing.assert_array_equal(fixed.times(3), [3, 0])  # never longer than the chain
