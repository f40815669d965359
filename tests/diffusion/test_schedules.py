import numpy as np
import pytest

from jaxood.diffusion import SCHEDULES, schedules


@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize('num_steps', [1, 10, 1000])
def test_signal_falls_from_exactly_one(name, num_steps):
    alpha_bar = SCHEDULES[name](num_steps)
    assert alpha_bar.shape == (num_steps + 1,)
    assert alpha_bar.dtype == np.float32
    assert alpha_bar[0] == 1.0
    assert np.all(np.diff(alpha_bar) < 0.0)
    assert alpha_bar[-1] > 0.0


def test_linear_has_the_levels_of_the_sd_outlier_spec():
    """sd_outlier: the edit depths S of its ablation; 1 - ᾱ_S is the variance added at S = 100."""
    alpha_bar = schedules.linear(1000)
    depths = [50, 80, 100, 150, 200]
    expected = [0.9710, 0.9315, 0.8970, 0.7883, 0.6590]
    np.testing.assert_allclose(alpha_bar[depths], expected, atol=5e-5)
    assert abs(1.0 - alpha_bar[100] - 0.1030) < 5e-5


def test_scaled_linear_is_stable_diffusions():
    alpha_bar = schedules.scaled_linear(1000)
    np.testing.assert_allclose(alpha_bar[[1, 500, 1000]], [0.99915, 0.27767, 0.0046601], rtol=2e-5)


def test_scaled_linear_is_dlsrs_and_linear_is_not():
    options = {'beta_start': 0.0015, 'beta_end': 0.0195}
    alpha_bar = schedules.scaled_linear(100, **options)
    expected = [0.99850, 0.99692, 0.99527, 0.99353, 0.98131, 0.93578, 0.80713, 0.41175]
    np.testing.assert_allclose(alpha_bar[[1, 2, 3, 4, 10, 25, 50, 100]], expected, atol=5e-6)
    assert abs(schedules.linear(100, **options)[-1] - 0.3475) < 5e-5


def test_cosine_is_its_closed_form_away_from_the_end():
    """The products telescope to f(t) / f(0); only the cap on β near T departs from it."""
    t = np.arange(1000)
    f = np.cos(0.5 * np.pi * (t / 1000 + 0.008) / 1.008) ** 2
    np.testing.assert_allclose(schedules.cosine(1000)[:1000], f / f[0], rtol=1e-5)
    assert schedules.cosine(1000)[1000] == pytest.approx(0.001 * f[999] / f[0], rel=1e-5)
