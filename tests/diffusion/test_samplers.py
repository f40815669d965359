import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood.diffusion import PREDICTIONS, SAMPLERS, process, samplers, schedules
from jaxood.errors import UserError
from jaxood.rng import key_each

alpha_bar = schedules.linear(1000)
MEAN, STD = 0.3, 0.5


def gaussian(levels):
    """denoise for x_0 ~ N(MEAN, STD²), exactly: ε_hat = -√(1 - ᾱ) times the score of x_t."""
    levels = jnp.asarray(levels)

    def network(x, t):
        a = process.per_row(levels[t], x)
        return jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * MEAN) / (a * STD**2 + 1 - a)

    return process.denoiser(network, alpha_bar=levels, prediction=PREDICTIONS['eps'])


def gaussian_ode(levels, x, t, s):
    """Where the probability-flow ODE takes x from t to s: its quantile stays the same."""
    a = levels.astype(np.float64)
    std = lambda t: np.sqrt(a[t] * STD**2 + 1 - a[t])
    return np.sqrt(a[s]) * MEAN + (x - np.sqrt(a[t]) * MEAN) * std(s) / std(t)


def oracle(x_0, levels=alpha_bar):
    return process.denoiser(lambda x, t: x_0, alpha_bar=levels, prediction=PREDICTIONS['x_0'])


def data(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def keys(count):
    return key_each(jax.random.key(9), jnp.arange(count))


@pytest.mark.parametrize('name', ['ddim', 'dpmpp_2m', 'pndm'])
def test_with_the_true_noise_a_deterministic_step_lands_on_the_path(name):
    """Given eps_hat = eps, x_t goes to x_s for every s < t, and to the data for s = 0."""
    x_0, eps = data((4, 3)), data((4, 3), 1)
    for t, s in [(900, 500), (500, 1), (20, 0), (1, 0)]:
        x_t = process.add_noise(x_0, eps, alpha_bar[t])
        got = samplers.sample(
            oracle(x_0), x_t, None, alpha_bar=alpha_bar, timesteps=[t, s], sampler=SAMPLERS[name]
        )
        np.testing.assert_allclose(got, process.add_noise(x_0, eps, alpha_bar[s]), atol=2e-3)


@pytest.mark.parametrize('stride', [1, 3, 'all'])
@pytest.mark.parametrize('start', [3, 50, 100])
@pytest.mark.parametrize(
    ('name', 'options'),
    [(name, {}) for name in SAMPLERS] + [('ddim', {'eta': 0.5}), ('ddim', {'eta': 1.0})],
)
def test_a_denoiser_that_knows_the_data_restores_it(name, options, start, stride):
    """dlsr: from any time, with any stride and η."""
    levels = schedules.scaled_linear(100, beta_start=0.0015, beta_end=0.0195)
    z_0 = data((2, 5))
    z_t = process.add_noise(z_0, data((2, 5), 1), levels[start])
    steps = {1: start, 3: max(start // 3, 1), 'all': 1}[stride]
    got = samplers.sample(
        oracle(z_0, levels),
        z_t,
        keys(2),
        alpha_bar=levels,
        timesteps=samplers.strided(100, steps, start),
        sampler=SAMPLERS[name],
        **options,
    )
    np.testing.assert_allclose(got, z_0, atol=1e-5)


@pytest.mark.parametrize(('t', 's'), [(1000, 999), (1000, 300), (300, 200), (200, 1), (5, 2)])
@pytest.mark.parametrize(('name', 'options'), [('ddpm', {}), ('ddim', {'eta': 0.7})])
def test_a_stochastic_step_has_the_moments_of_the_level_it_goes_to(name, options, t, s):
    """Given x_0, x_t ~ q(x_t | x_0) must become x_s ~ q(x_s | x_0): N(√ᾱ_s x_0, 1 - ᾱ_s)."""
    rows, value = 2_000, 1.7
    x_0 = jnp.full((rows, 20), value)
    x_t = process.add_noise(x_0, data((rows, 20)), alpha_bar[t])
    x_s = samplers.sample(
        oracle(x_0),
        x_t,
        keys(rows),
        alpha_bar=alpha_bar,
        timesteps=[t, s],
        sampler=SAMPLERS[name],
        **options,
    )
    noise = np.sqrt(1 - alpha_bar[s])
    assert abs(x_s.mean() - np.sqrt(alpha_bar[s]) * value) < 0.02 * noise
    assert abs(x_s.std() / noise - 1.0) < 0.02


def test_a_ddpm_step_is_the_gaussian_posterior_of_bayes():
    """q(x_s | x_t, x_0) from precisions: N(√ᾱ_s x_0, 1 - ᾱ_s) times the likelihood of x_t."""
    x_t, x_0 = 0.4, -1.2
    for t, s in [(2, 1), (500, 499), (800, 300)]:
        a, b = np.float64(alpha_bar[t]), np.float64(alpha_bar[s])
        prior, likelihood = 1 / (1 - b), (a / b) / (1 - a / b)
        mean = (prior * np.sqrt(b) * x_0 + likelihood * x_t / np.sqrt(a / b)) / (prior + likelihood)
        now = samplers.Estimate(x_t, x_0, None, jnp.float32(a))
        step = lambda xi, now=now, b=b: samplers.ddpm(now, None, jnp.float32(b), lambda: xi)
        np.testing.assert_allclose(step(0.0), mean, rtol=1e-3)
        std = (prior + likelihood) ** -0.5
        np.testing.assert_allclose(step(1.0) - step(0.0), std, rtol=1e-3)


def test_ddim_with_eta_one_is_ddpm():
    x = data((8, 4))
    chain = {'alpha_bar': alpha_bar, 'timesteps': samplers.strided(1000, 50)}
    denoise = gaussian(alpha_bar)
    ddpm = samplers.sample(denoise, x, keys(8), sampler=SAMPLERS['ddpm'], **chain)
    ddim = samplers.sample(denoise, x, keys(8), sampler=SAMPLERS['ddim'], eta=1.0, **chain)
    np.testing.assert_allclose(ddim, ddpm, atol=1e-4)


@pytest.mark.parametrize(('name', 'steps'), [('ddpm', 1000), ('ddim', 200), ('dpmpp_2m', 100)])
def test_pure_noise_becomes_the_data_distribution(name, steps):
    x = samplers.sample(
        gaussian(alpha_bar),
        data((1_000, 8)),
        keys(1_000),
        alpha_bar=alpha_bar,
        timesteps=samplers.strided(1000, steps),
        sampler=SAMPLERS[name],
    )
    assert abs(x.mean() - MEAN) < 0.02
    assert abs(x.std() - STD) < 0.02


def test_dpmpp_2m_is_second_order_where_ddim_is_first():
    """Errors against the exact ODE solution fall by 4 and by 2 when the steps are halved."""
    levels = schedules.cosine(1000)
    x = jnp.linspace(-2.0, 2.0, 9)[:, None]

    def error(name, steps, start, end):
        got = samplers.sample(
            gaussian(levels),
            x,
            None,
            alpha_bar=levels,
            timesteps=end + samplers.strided(1000, steps, start - end),
            sampler=SAMPLERS[name],
        )
        return np.abs(got - gaussian_ode(levels, x, start, end)).max()

    assert 3.4 < error('dpmpp_2m', 40, 900, 100) / error('dpmpp_2m', 80, 900, 100) < 4.6
    assert 1.8 < error('ddim', 40, 900, 100) / error('ddim', 80, 900, 100) < 2.2
    for steps in (10, 20, 40):  # and over the whole chain, whose last step is first order
        assert error('dpmpp_2m', steps, 1000, 0) < 0.5 * error('ddim', steps, 1000, 0)


@pytest.mark.parametrize('name', SAMPLERS)
def test_a_chain_of_no_steps_returns_its_input_bit_for_bit(name):
    x = data((3, 4, 4, 2))
    got = samplers.sample(
        oracle(0.0 * x),
        x,
        keys(3),
        alpha_bar=alpha_bar,
        timesteps=samplers.strided(1000, 50, start=0),
        sampler=SAMPLERS[name],
        clip=(-1.0, 1.0),
    )
    np.testing.assert_array_equal(got, x)


def test_pndm_is_of_higher_order_than_ddim_and_begins_with_heuns_step():
    levels = schedules.cosine(1000)
    x = jnp.linspace(-2.0, 2.0, 9)[:, None]

    def error(name, grid):
        got = samplers.sample(
            gaussian(levels),
            x,
            None,
            alpha_bar=levels,
            timesteps=grid,
            sampler=SAMPLERS[name],
        )
        return np.abs(got - gaussian_ode(levels, x, grid[0], grid[-1])).max()

    grids = {steps: 100 + samplers.strided(1000, steps, 800) for steps in (20, 40)}
    repeated = {steps: samplers.with_repeat(grid) for steps, grid in grids.items()}
    np.testing.assert_array_equal(repeated[20][:4], [900, 860, 860, 820])
    assert error('pndm', repeated[20]) / error('pndm', repeated[40]) > 3.4
    assert error('pndm', repeated[40]) < 0.1 * error('ddim', grids[40])
    first = lambda h: error('pndm', np.array([500, 500 - h, 500 - h]))  # corrected: error O(h³)
    assert 6.0 < first(80) / first(40) < 10.0


def test_stable_diffusions_times():
    """Those of diffusers, which counts from 0, plus 1; the last ᾱ is its ᾱ_0, our alpha_bar[1]."""
    grid = samplers.leading(1000, 50)
    np.testing.assert_array_equal(grid, [*range(982, 0, -20), 1])
    np.testing.assert_array_equal(samplers.leading(1000, 3), [668, 335, 2, 1])
    dpm = samplers.spread(1000, 20)  # DPMSolverMultistepScheduler: 999, 949 ... 549, 500 ... 50
    np.testing.assert_array_equal(dpm, [*range(1000, 549, -50), *range(501, 50, -50), 0])
    np.testing.assert_array_equal(samplers.spread(1000, 20, start=101), [101, 51, 0])
    np.testing.assert_array_equal(samplers.leading(1000, 50, start=42), [42, 22, 2, 1])
    np.testing.assert_array_equal(samplers.leading(1000, 50, start=50), [50, 42, 22, 2, 1])
    for start in (1, 0):
        np.testing.assert_array_equal(samplers.leading(1000, 50, start=start), [start])
    assert len(samplers.with_repeat(samplers.leading(1000, 1))) == 2
    for steps, start in [(0, None), (501, None), (50, -1), (50, 1001)]:
        with pytest.raises(UserError, match=r'in 1\.\.500|no time of this chain'):
            samplers.leading(1000, steps, start=start)
    with pytest.raises(UserError, match=r'in 1\.\.999'):
        samplers.spread(1000, 1000)


def test_a_grid_may_end_above_zero():
    """Stable Diffusion's stops at alpha_bar[1]; one more step goes from there to the data."""
    x_0, eps = data((2, 3)), data((2, 3), 1)
    for name in ('ddim', 'dpmpp_2m', 'pndm'):
        got = samplers.sample(
            oracle(x_0),
            process.add_noise(x_0, eps, alpha_bar[982]),
            None,
            alpha_bar=alpha_bar,
            timesteps=[*range(982, 0, -20), 1],
            sampler=SAMPLERS[name],
        )
        np.testing.assert_allclose(got, process.add_noise(x_0, eps, alpha_bar[1]), atol=1e-4)


@pytest.mark.parametrize('name', SAMPLERS)
def test_rows_do_not_depend_on_their_batch(name):
    x = data((6, 2, 2, 1))
    run = lambda rows: samplers.sample(
        gaussian(alpha_bar),
        x[rows],
        keys(6)[rows],
        alpha_bar=alpha_bar,
        timesteps=samplers.strided(1000, 10),
        sampler=SAMPLERS[name],
    )
    order = np.array([4, 0, 3])
    np.testing.assert_allclose(run(order), run(np.arange(6))[order], atol=1e-5)


def test_noise_belongs_to_a_time_and_is_fresh_at_every_step():
    """A chain resumed half-way draws what the whole chain would have drawn."""
    x = data((3, 50))
    run = lambda x, grid: samplers.sample(
        gaussian(alpha_bar),
        x,
        keys(3),
        alpha_bar=alpha_bar,
        timesteps=grid,
        sampler=SAMPLERS['ddpm'],
    )
    grid = samplers.strided(1000, 20)
    halves = run(run(x, grid[:11]), grid[10:])
    np.testing.assert_allclose(halves, run(x, grid), atol=1e-5)

    noise = lambda now, before, alpha_bar_s, draw: draw()
    seen = [
        samplers.sample(
            gaussian(alpha_bar), x, keys(3), alpha_bar=alpha_bar, timesteps=grid, sampler=noise
        )
        for grid in ([9, 6], [6, 3], [3, 0])
    ]
    assert np.abs(np.corrcoef(np.concatenate(seen)) - np.eye(9)).max() < 0.6


def test_clip_bounds_the_estimate_and_keeps_it_consistent():
    """ε_hat is recomputed, so √ᾱ x_0_hat + √(1 - ᾱ) ε_hat is still x_t."""
    x = 3.0 * data((4, 5))
    x_0_hat, eps_hat = (
        samplers.sample(
            oracle(5.0 * data((4, 5), 1)),
            x,
            None,
            alpha_bar=alpha_bar,
            timesteps=[700, 0],
            sampler=lambda now, before, alpha_bar_s, draw, field=field: getattr(now, field),
            clip=(-1.0, 1.0),
        )
        for field in ('x_0', 'eps')
    )
    assert jnp.abs(x_0_hat).max() == 1.0
    np.testing.assert_allclose(process.add_noise(x_0_hat, eps_hat, alpha_bar[700]), x, atol=1e-5)


def test_the_grid_is_even_and_walks_from_start_to_zero():
    np.testing.assert_array_equal(samplers.strided(1000, 4), [1000, 750, 500, 250, 0])
    np.testing.assert_array_equal(samplers.strided(1000, 100, start=100), np.arange(100, -1, -1))
    np.testing.assert_array_equal(samplers.strided(100, 3, start=3), [3, 2, 1, 0])
    for steps in range(1, 38):
        grid = samplers.strided(1000, steps, start=37)
        assert (grid[0], grid[-1], len(grid)) == (37, 0, steps + 1)
        assert np.all(np.diff(grid) < 0)
        assert np.ptp(np.diff(grid)) <= 1


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((1000, 1001), 'steps in 1..1000'),
        ((1000, 0), 'steps in 1..1000'),
        ((1000, 101, 100), 'steps in 1..100'),
        ((1000, 10, 1001), 'one in 0..1000'),
        ((1000, 10, -1), 'one in 0..1000'),
    ],
)
def test_grids_that_cannot_be_walked_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        samplers.strided(*arguments)
