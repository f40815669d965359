import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood.diffusion import MIXES, PREDICTIONS, SAMPLERS, process, samplers, schedules

alpha_bar = jnp.asarray(schedules.linear(1000))


def bilinear(x, t, condition):
    """A stand-in for a network: depends on all three inputs, linearly on the condition."""
    weights = jnp.arange(1.0, 1.0 + condition.shape[-1])
    return jnp.sin(x) * (condition @ weights / (1.0 + t / 1000))[:, None]


x = jax.random.normal(jax.random.key(0), (5, 3))
t = jnp.array([1, 10, 100, 500, 1000])
e_i, e_j = (jax.nn.one_hot(jnp.array(labels), 4) for labels in ([0, 1, 2, 0, 1], [1, 2, 0, 2, 0]))
null = process.null_condition(e_i)


def test_guidance_identities():
    """w = 0 is the conditional branch, w = -1 the null branch, and g = 1 + w the other notation."""
    conditional, unconditional = bilinear(x, t, e_i), bilinear(x, t, null)
    at = lambda w: samplers.guided(bilinear, e_i, w)(x, t)
    np.testing.assert_array_equal(at(0.0), conditional)
    np.testing.assert_array_equal(at(-1.0), unconditional)
    np.testing.assert_array_equal(samplers.guided(bilinear, e_i)(x, t), conditional)
    g = 7.5
    expected = unconditional + g * (conditional - unconditional)
    np.testing.assert_allclose(at(g - 1.0), expected, rtol=1e-5, atol=1e-5)


def test_guidance_towards_the_null_condition_does_nothing():
    for w in (0.5, 2.0, 10.0):
        got = samplers.guided(bilinear, null, w)(x, t)
        np.testing.assert_allclose(got, bilinear(x, t, null), rtol=1e-5)


def test_guidance_may_differ_between_rows_and_null_may_be_given():
    w = jnp.arange(5.0)
    got = samplers.guided(bilinear, e_i, w, null=e_j)(x, t)
    expected = (1 + w)[:, None] * bilinear(x, t, e_i) - w[:, None] * bilinear(x, t, e_j)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', PREDICTIONS)
def test_guiding_the_raw_output_guides_the_noise_estimate(name):
    """Weights sum to 1 and conversions are affine, so it makes no difference which is combined."""
    a, w = alpha_bar[t], 2.0
    estimate = lambda output: PREDICTIONS[name].estimate(output, x, a)
    guided = estimate(samplers.guided(bilinear, e_i, w)(x, t))
    branches = estimate(bilinear(x, t, e_i)), estimate(bilinear(x, t, null))
    for got, conditional, unconditional in zip(guided, *branches):
        expected = (1 + w) * conditional - w * unconditional
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize('guidance', [None, 2.0])
@pytest.mark.parametrize('mix', MIXES)
def test_mixing_at_the_ends_is_no_mixing_and_it_has_no_order(mix, guidance):
    mixed = lambda i, j, ratio: MIXES[mix](bilinear, i, j, ratio, guidance)(x, t)
    np.testing.assert_array_equal(
        mixed(e_i, e_j, 1.0), samplers.guided(bilinear, e_i, guidance)(x, t)
    )
    np.testing.assert_array_equal(
        mixed(e_i, e_j, 0.0), samplers.guided(bilinear, e_j, guidance)(x, t)
    )
    ratio = jnp.linspace(0.3, 0.7, 5)
    np.testing.assert_allclose(mixed(e_i, e_j, ratio), mixed(e_j, e_i, 1 - ratio), atol=1e-5)


@pytest.mark.parametrize('guidance', [None, 2.0])
def test_for_a_network_linear_in_its_condition_both_mixes_agree_and_else_they_differ(guidance):
    ratio = jnp.linspace(0.3, 0.7, 5)
    mixed = lambda mix, network: MIXES[mix](network, e_i, e_j, ratio, guidance)(x, t)
    np.testing.assert_allclose(mixed('label', bilinear), mixed('score', bilinear), atol=1e-5)
    bent = lambda x, t, condition: bilinear(x, t, condition) ** 2
    assert np.abs(mixed('label', bent) - mixed('score', bent)).max() > 0.05


@pytest.mark.parametrize(
    ('branch_count', 'build'),
    [
        (1, lambda network: samplers.guided(network, e_i)),
        (2, lambda network: samplers.guided(network, e_i, 2.0)),
        (2, lambda network: samplers.score_mixed(network, e_i, e_j, 0.5)),
        (3, lambda network: samplers.score_mixed(network, e_i, e_j, 0.5, 2.0)),
    ],
)
def test_all_branches_share_one_call(branch_count, build):
    calls = []

    def network(x, t, condition):
        calls.append((len(x), len(t), len(condition)))
        return x

    build(network)(x, t)
    assert calls == [(5 * branch_count,) * 3]


def test_changing_guidance_compiles_nothing():
    traces = []

    @jax.jit
    def run(w):
        traces.append(w)
        denoise = process.denoiser(
            samplers.guided(bilinear, e_i, w), alpha_bar=alpha_bar, prediction=PREDICTIONS['eps']
        )
        grid = samplers.strided(1000, 5)
        ddim = SAMPLERS['ddim']
        return samplers.sample(denoise, x, None, alpha_bar=alpha_bar, timesteps=grid, sampler=ddim)

    assert not np.allclose(run(0.0), run(1.0))
    assert len(traces) == 1


@pytest.mark.parametrize('guidance', [None, 2.0])
@pytest.mark.parametrize('mix', MIXES)
def test_eight_devices_draw_what_one_draws_without_talking(mix, guidance):
    """Rows stay on their device, guided and mixed branches with them: no collective operation."""
    rows = 16
    mesh = jax.make_mesh((8,), ('batch',), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('batch'))
    e = jax.nn.one_hot(jnp.arange(rows) % 3, 4)
    inputs = (
        jax.random.normal(jax.random.key(0), (rows, 3)),
        jax.random.split(jax.random.key(1), rows),
        e,
        jnp.roll(e, 1, axis=0),
        jnp.linspace(0.3, 0.7, rows),
    )

    @jax.jit
    def run(x, keys, e_i, e_j, ratio):
        network = MIXES[mix](bilinear, e_i, e_j, ratio, guidance)
        denoise = process.denoiser(network, alpha_bar=alpha_bar, prediction=PREDICTIONS['eps'])
        grid, ddpm = samplers.strided(1000, 5), SAMPLERS['ddpm']
        return samplers.sample(
            denoise, x, keys, alpha_bar=alpha_bar, timesteps=grid, sampler=ddpm, clip=(-1, 1)
        )

    spread = jax.device_put(inputs, sharding)
    np.testing.assert_allclose(run(*spread), run(*inputs), atol=1e-5)
    program = run.lower(*spread).compile().as_text()
    assert not re.search('all-gather|all-to-all|all-reduce|collective-permute', program)


# A toy with exact scores: coordinate 0 is N(±1, 0.3²) by class, coordinate 1 N(0, 1) in both.
CENTRES, STD = jnp.array([1.0, -1.0]), 0.3


def two_classes(x, t, condition):
    """Exact eps_hat for a one-hot condition: class 0, class 1, or null (both equally likely)."""
    a = alpha_bar[t][:, None]
    variance = a * STD**2 + 1 - a
    offset = x[:, :1] - jnp.sqrt(a) * CENTRES
    by_class = jnp.sqrt(1 - a) * offset / variance
    posterior = jax.nn.softmax(-(offset**2) / (2 * variance))
    either = (posterior * by_class).sum(-1, keepdims=True)
    semantic = (jnp.concatenate([by_class, either], -1) * condition).sum(-1)
    return jnp.stack([semantic, jnp.sqrt(1 - a[:, 0]) * x[:, 1]], -1)


def test_guidance_pushes_the_class_and_no_nuisance():
    """sd_outlier, check 8.4: where the classes differ, ε_c - ε_∅ points, and nowhere else."""
    points = jax.random.normal(jax.random.key(3), (64, 2))
    times = jnp.arange(64) * 15 + 1
    branch = lambda k: two_classes(points, times, jnp.tile(jnp.eye(3)[k], (64, 1)))
    for k in (0, 1):
        difference = branch(k) - branch(2)
        np.testing.assert_array_equal(difference[:, 1], 0.0)
        assert (jnp.sign(difference[:, 0]) == -CENTRES[k]).mean() > 0.9  # noise points away


@functools.partial(jax.jit, static_argnames=('sampler', 'depth'))
def edit(guidance, *, sampler, depth, rows=10_000):
    """Half-noised samples of each class, denoised as the other: x_0, the result, target class."""
    draw = lambda n: jax.random.normal(jax.random.key(n), (rows, 2))
    label = jnp.arange(rows) % 2
    x_0 = jnp.stack([CENTRES[label] + STD * draw(0)[:, 0], draw(0)[:, 1]], -1)
    condition = jax.nn.one_hot(1 - label, 3)
    denoise = process.denoiser(
        samplers.guided(two_classes, condition, guidance),
        alpha_bar=alpha_bar,
        prediction=PREDICTIONS['eps'],
    )
    x = samplers.sample(
        denoise,
        process.add_noise(x_0, draw(1), alpha_bar[depth]),
        jax.random.split(jax.random.key(2), rows),
        alpha_bar=alpha_bar,
        timesteps=samplers.strided(1000, depth, depth),
        sampler=SAMPLERS[sampler],
    )
    return x_0, x, CENTRES[1 - label]


@pytest.mark.parametrize(
    ('sampler', 'depth', 'guidance', 'correlation', 'moved'),
    [
        ('ddim', 100, 0.0, 0.947, 0.14),
        ('ddim', 100, 3.0, 0.947, 1.00),
        ('ddpm', 100, 0.0, 0.897, 0.66),
        ('ddpm', 100, 3.0, 0.897, 1.00),
        ('ddim', 50, 3.0, None, 0.57),
        ('ddpm', 50, 3.0, None, 1.00),
        ('ddim', 200, 0.0, 0.812, None),
        ('ddpm', 200, 0.0, 0.659, None),
    ],
)
def test_edits_move_the_class_and_keep_the_nuisance(sampler, depth, guidance, correlation, moved):
    """sd_outlier, check 8.4: √ᾱ_S for deterministic sampling, ᾱ_S for ancestral, any guidance."""
    x_0, x, centre = edit(guidance, sampler=sampler, depth=depth)
    if correlation is not None:
        assert abs(np.corrcoef(x_0[:, 1], x[:, 1])[0, 1] - correlation) < 0.02
    if moved is not None:
        assert abs(np.mean(np.sign(x[:, 0]) == centre) - moved) < 0.03


def test_mixed_scores_sample_the_geometric_mixture():
    """Two classes N(±1, σ²): λ ε_i + (1 - λ) ε_j samples N(λ μ_i + (1 - λ) μ_j, σ²)."""
    rows, ratio = 4_000, 0.7
    first, second = (jnp.tile(row, (rows, 1)) for row in jnp.eye(3)[:2])
    denoise = process.denoiser(
        samplers.score_mixed(two_classes, first, second, ratio),
        alpha_bar=alpha_bar,
        prediction=PREDICTIONS['eps'],
    )
    got = samplers.sample(
        denoise,
        jax.random.normal(jax.random.key(0), (rows, 2)),
        jax.random.split(jax.random.key(1), rows),
        alpha_bar=alpha_bar,
        timesteps=samplers.strided(1000, 250),
        sampler=SAMPLERS['ddpm'],
    )[:, 0]
    assert abs(got.mean() - (2 * ratio - 1)) < 0.02
    assert abs(got.std() - STD) < 0.02
