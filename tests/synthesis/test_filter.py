"""Judges that are sure reject; how sure, ID images that they have not seen say."""

import numpy as np
import pytest

from jaxood.synthesis import filter as leaks


def test_certain_judges_have_no_uncertainty():
    logits = np.zeros((3, 2, 4), np.float32)
    logits[:, 0, 1] = logits[:, 1, 3] = 200.0
    np.testing.assert_allclose(leaks.uncertainty(logits), 0.0, atol=1e-6)


@pytest.mark.parametrize('classes', [2, 10])
def test_undecided_judges_have_all_there_is(classes):
    logits = np.full((3, 2, classes), 7.0, np.float32)
    np.testing.assert_allclose(leaks.uncertainty(logits), np.log(classes), rtol=1e-6)


def test_certain_judges_who_disagree_are_uncertain_together():
    """Each of two is sure of another class: the mean probability of either is a half."""
    logits = np.zeros((2, 1, 5), np.float32)
    logits[0, 0, 1] = logits[1, 0, 2] = 200.0
    np.testing.assert_allclose(leaks.uncertainty(logits), np.log(2.0), rtol=1e-6)


def test_it_is_the_log_of_the_mean_probability():
    logits = np.random.default_rng(0).normal(size=(3, 20, 6)).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p = (p / p.sum(-1, keepdims=True)).mean(0)
    np.testing.assert_allclose(leaks.uncertainty(logits), -np.log(p.max(-1)), rtol=1e-5)
    one = leaks.uncertainty(logits[:1])
    np.testing.assert_allclose(leaks.uncertainty(np.repeat(logits[:1], 4, 0)), one, rtol=1e-5)
    np.testing.assert_allclose(leaks.uncertainty(logits + 50.0), leaks.uncertainty(logits), 1e-4)


def test_the_order_survives_where_probabilities_round_to_one():
    """1 - max p would tie from margins of 17 on in float32; here those up to 15 keep apart."""
    logits = np.zeros((2, 6, 3), np.float32)
    logits[..., 0] = np.linspace(5.0, 15.0, 6)
    u = np.asarray(leaks.uncertainty(logits))
    assert np.all(np.diff(u) < 0)


@pytest.mark.parametrize('quantile', [0.0, 0.05, 0.1, 0.5, 1.0])
def test_the_quantile_is_the_share_of_id_images_that_would_pass(quantile):
    known = np.random.default_rng(0).gamma(0.3, size=10_001).astype(np.float32)
    passing = np.mean(known > leaks.threshold(known, quantile=quantile))
    assert passing == pytest.approx(quantile, abs=2e-4)


def test_a_larger_quantile_lets_more_pass():
    known = np.random.default_rng(0).gamma(0.3, size=500)
    thresholds = [leaks.threshold(known, quantile=q) for q in (0.01, 0.1, 0.5, 0.9)]
    assert thresholds == sorted(thresholds, reverse=True)
    assert len(set(thresholds)) == 4


def test_the_margin_is_that_of_the_word_over_the_likeliest_class():
    images = np.array([[1.0, 0.0], [0.6, 0.8]], np.float32)
    words = np.array([[0.0, 1.0], [0.6, 0.8]], np.float32)
    classes = np.array([[1.0, 0.0], [0.0, -1.0]], np.float32)
    np.testing.assert_allclose(leaks.margin(images, words, classes), [0 - 1, 1 - 0.6], atol=1e-6)
    assert (leaks.margin(words, words, classes[1:]) > 0).all()
