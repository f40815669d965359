"""Edits: which class is asked for, how far the image is noised, and what it costs."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from jaxood import diffusion
from jaxood.data import augment
from jaxood.diffusion import samplers, schedules
from jaxood.errors import UserError
from jaxood.synthesis import semantic_discrepant
from jaxood.synthesis.generator import generator

N, C, SHAPE = 40, 5, (4, 4, 1)
ALPHA_BAR = schedules.linear(1000)
LABELS = np.random.default_rng(0).integers(C, size=N).astype(np.int32)
IMAGES = np.random.default_rng(1).integers(256, size=(N, *SHAPE), dtype=np.uint8)
SHARED = {'images': jnp.asarray(IMAGES)}


def noise_only(shared, x_start, bind, key, index):
    """Stands in for the way back: what stands at level S comes out."""
    return x_start


def build(edit=noise_only, **keywords):
    return semantic_discrepant.build(LABELS, C, ALPHA_BAR, edit, **keywords)


def rows(count=N, seed=0, **keywords):
    make = jax.jit(lambda index, key: build(**keywords)(SHARED, index, key))
    return jax.device_get(make(np.arange(count, dtype=np.int32), jax.random.key(seed)))


def test_another_class_is_asked_for_each_alike_often():
    label = np.repeat(np.arange(C, dtype=np.int32), 2000)
    index = np.arange(len(label))
    wanted, discrepant = semantic_discrepant.draw(jax.random.key(0), index, label, num_classes=C)
    assert (wanted != label).all()
    assert discrepant.all()
    for k in range(C):
        counts = np.bincount(wanted[label == k], minlength=C)
        assert chisquare(np.delete(counts, k)).pvalue > 1e-3
    assert (wanted >= 0).all()
    assert (wanted < C).all()


def test_a_share_is_led_to_its_own_class():
    made = rows(4000, same=0.25)
    own = made['first'] == made['label']
    np.testing.assert_array_equal(made['discrepant'], ~own)
    assert own.mean() == pytest.approx(0.25, abs=0.03)
    assert not rows(same=1.0)['discrepant'].any()


def test_one_outlier_an_image_and_then_another():
    made = rows(2 * N)
    for half in (made['source'][:N], made['source'][N:]):
        assert sorted(half) == list(range(N))
    np.testing.assert_array_equal(made['label'], LABELS[made['source']])
    np.testing.assert_array_equal(made['source'][:N], made['source'][N:])
    assert np.abs(made['image'][:N] - made['image'][N:]).mean() > 0.1  # not the same one


CALLS = []


class Counting(nn.Module):
    """A denoiser that tells how many rows it is asked for, as often as it runs."""

    @nn.compact
    def __call__(self, x, t, condition):
        jax.debug.callback(lambda t: CALLS.append(len(t)), t, ordered=False)
        return 0.1 * x * jnp.sum(condition * jnp.arange(C + 1), axis=-1)[:, None, None, None]


def test_depth_zero_returns_the_image_bit_for_bit():
    """Through the real chain, whose grid is then [0]: no step is taken."""
    CALLS.clear()
    edit = generator(
        Counting(),
        alpha_bar=ALPHA_BAR,
        timesteps=samplers.strided(1000, 10, start=0),
        prediction=diffusion.PREDICTIONS['eps'],
        sampler=diffusion.SAMPLERS['ddpm'],
        guided=True,
    )
    shared = SHARED | {'params': {}, 'guidance': np.float32(2.0)}
    made = build(edit, depth=0)(shared, np.arange(N), jax.random.key(0))
    jax.effects_barrier()
    assert CALLS == []
    np.testing.assert_array_equal(augment.from_unit(made['image']), IMAGES[made['source']])


@pytest.mark.parametrize(('depth', 'variance'), [(50, 0.0290), (100, 0.1030), (200, 0.3410)])
def test_noise_of_depth_s_has_the_variance_of_the_schedule(depth, variance):
    made = rows(100 * N, depth=depth)
    x_0 = augment.to_unit(jnp.asarray(IMAGES[made['source']]))
    noise = made['image'] - np.sqrt(ALPHA_BAR[depth]) * x_0
    assert noise.var() == pytest.approx(variance, rel=0.02)
    assert noise.mean() == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize(('steps', 'expected'), [(1000, 20), (500, 10), (50, 1)])
def test_an_edit_costs_two_evaluations_a_step_in_one_batch(steps, expected):
    """S = 20 of T = 1000; a sampler that strides keeps its stride, and S its noise level."""
    CALLS.clear()
    grid = samplers.strided(1000, max(1, round(steps * 20 / 1000)), start=20)
    assert (grid[0], grid[-1]) == (20, 0)
    edit = generator(
        Counting(),
        alpha_bar=ALPHA_BAR,
        timesteps=grid,
        prediction=diffusion.PREDICTIONS['eps'],
        sampler=diffusion.SAMPLERS['ddpm'],
        guided=True,
    )
    shared = SHARED | {'params': {}, 'guidance': np.float32(2.0)}
    image = build(edit, depth=20)(shared, np.arange(8), jax.random.key(0))['image']
    jax.block_until_ready(image)
    jax.effects_barrier()
    assert [2 * 8] * expected == CALLS


def test_more_guidance_compiles_nothing_and_moves_further():
    class Toy(nn.Module):
        @nn.compact
        def __call__(self, x, t, condition):
            return 0.5 * jnp.ones_like(x) * (condition @ jnp.arange(C + 1.0))[:, None, None, None]

    edit = generator(
        Toy(),
        alpha_bar=ALPHA_BAR,
        timesteps=samplers.strided(1000, 20, start=20),
        prediction=diffusion.PREDICTIONS['eps'],
        sampler=diffusion.SAMPLERS['ddim'],
        guided=True,
    )
    traces = []

    @jax.jit
    def make(shared, index):
        traces.append(1)
        return build(edit, depth=20)(shared, index, jax.random.key(0))['image']

    made = [
        make(SHARED | {'params': {}, 'guidance': np.float32(w)}, np.arange(8)) for w in (0.0, 4.0)
    ]
    assert len(traces) == 1
    assert np.abs(made[0] - made[1]).mean() > 0.01


@pytest.mark.parametrize(
    ('keywords', 'message'),
    [
        (dict(depth=1001), r'depth=1001 is no time of this chain.*0\.\.1000'),
        (dict(depth=-1), 'depth=-1'),
        (dict(same=1.5), r'same=1\.5 is a share'),
    ],
)
def test_what_it_refuses(keywords, message):
    with pytest.raises(UserError, match=message):
        build(**keywords)


def test_one_class_has_no_other():
    with pytest.raises(UserError, match='needs two classes or more; the ID set has 1'):
        semantic_discrepant.build(LABELS, 1, ALPHA_BAR, noise_only)


def test_the_wrong_clusters_cost_is_what_the_docstring_says():
    """At 12 % wrong labels, about .12 / (C - 1) of the edits ask for the true class."""
    rng = np.random.default_rng(0)
    truth = rng.integers(10, size=20_000).astype(np.int32)
    wrong = rng.random(len(truth)) < 0.12
    label = np.where(wrong, (truth + rng.integers(1, 10, len(truth))) % 10, truth).astype(np.int32)
    draw = functools.partial(semantic_discrepant.draw, num_classes=10)
    wanted, _ = draw(jax.random.key(0), np.arange(len(label)), label)
    assert np.mean(wanted == truth) == pytest.approx(0.12 / 9, abs=0.003)
