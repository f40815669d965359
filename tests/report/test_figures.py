"""Figures as markup: what they show, and that they are self-contained and repeatable."""

import base64
import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from jaxood.errors import UserError
from jaxood.report import figures, tables


def svgs(markup):
    found = re.findall(r'<svg .*?</svg>', markup, flags=re.DOTALL)
    for svg in found:
        ET.fromstring(svg)  # well-formed
    return found


def pictures(markup):
    data = re.findall(r'src="data:image/\w+;base64,([^"]+)"', markup)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(d)))) for d in data]


def random_images(n, shape=(8, 8, 1)):
    return np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)


# ---- curves ---------------------------------------------------------------------------------


def test_curves_have_a_panel_for_each_and_name_them(experiment, groups):
    runs = experiment({'a<b': 0.5, '$x$': 2.0, 'third': 1.0})
    histograms = figures.score_histograms(runs, 'energy')
    assert len(svgs(histograms)) == 3
    roc = figures.roc_curves(runs, 'energy')
    assert len(svgs(roc)) == len(groups)
    for name in groups:
        assert name in histograms
        assert name in roc
    for text in (histograms, roc):
        assert 'a&lt;b' in text
        assert 'a<b' not in text
        assert '$x$' in text  # not mathematics


def test_the_same_content_gives_the_same_markup(runs):
    """No date, no random ids: a report can be compared with another byte by byte."""
    for draw in (figures.score_histograms, figures.roc_curves):
        assert draw(runs, 'energy') == draw(runs, 'energy')
        assert '<metadata' not in draw(runs, 'energy')


def test_an_unknown_score_draws_nothing(runs):
    assert figures.score_histograms(runs, 'knn') == ''
    assert figures.roc_curves(runs, 'knn') == ''


def test_an_arm_has_one_colour(runs, groups):
    summary = tables.summary(runs, groups, draws=20)
    blue, vermilion = figures.colours(['none', 'diffusion']).values()
    drawn = [
        figures.roc_curves(runs, 'energy'),
        figures.intervals(summary, 'energy'),
        figures.learning_curves(
            {'detector': {k: [{'step': 1, 'loss': 2.0}] for k in ('diffusion', 'none')}},
            arms=('none', 'diffusion'),
        ),
    ]
    for markup in drawn:
        assert blue.lower() in markup.lower()
        assert vermilion.lower() in markup.lower()
    legend = re.findall(r'background:(#\w+)"></i>([^<]+)', drawn[2])
    assert sorted(legend) == sorted([(blue, 'none'), (vermilion, 'diffusion')])


def test_roc_of_known_scores():
    """By hand: a = 1, 2, 3, 4 and b = 2.5, 5: at no false alarm one of two is caught."""
    caught = figures._roc(np.array([1.0, 2, 3, 4]), np.array([2.5, 5]), np.array([0, 0.5, 1]))
    np.testing.assert_allclose(caught, [0.5, 1, 1])
    a, b = np.random.default_rng(0).normal(size=(2, 500)) + [[0], [1]]
    grid = np.linspace(0, 1, 20_001)
    area = np.mean(figures._roc(a, b, grid))
    assert area == pytest.approx(float(np.mean(a[:, None] < b)), abs=1e-3)


def test_constant_scores_can_be_drawn(experiment):
    runs = experiment({'none': 0.0})
    for s in runs:
        for v in s.scores.values():
            v[:] = 1.0
    assert len(svgs(figures.score_histograms(runs, 'energy'))) == 1


def test_moving_mean_by_hand():
    np.testing.assert_allclose(figures._moving_mean(np.array([1.0, 3, 5, 7]), 2), [1, 2, 4, 6])


def test_learning_curves_skip_what_was_not_logged():
    rows = [{'step': i, 'loss': 1.0 / (i + 1)} for i in range(50)]
    assert len(svgs(figures.learning_curves({'a': {'x': rows}, 'b': {'x': [{'step': 1}]}}))) == 1
    assert figures.learning_curves({'a': {'x': []}}) == ''


def test_tsne_keeps_groups_apart_and_repeats_itself():
    rng = np.random.default_rng(0)
    features = {k: rng.normal(size=(40, 60)) + 30 * i for i, k in enumerate(('id', 'ood', 'few'))}
    features['few'] = features['few'][:3]
    points = figures.tsne(features, limit=60)
    assert {k: v.shape for k, v in points.items()} == {'id': (20, 2), 'ood': (20, 2), 'few': (3, 2)}
    again = figures.tsne(features, limit=60)
    assert all(np.array_equal(points[k], again[k]) for k in points)
    centres = [points[k].mean(axis=0) for k in ('id', 'ood')]
    spread = max(points[k].std() for k in ('id', 'ood'))
    assert np.linalg.norm(centres[0] - centres[1]) > 2 * spread
    markup = figures.tsne_figure(points)
    assert 'few' in markup
    assert len(svgs(markup)) == 1
    with pytest.raises(UserError, match='at least 5'):
        figures.tsne({'id': np.zeros((3, 2))})


# ---- images ---------------------------------------------------------------------------------


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('count', [0, 1, 25])
def test_gallery_lays_out_any_number(count, channels):
    """Every pixel of every image is there, enlarged by a whole factor, in reading order."""
    images = random_images(count, (8, 8, channels))
    markup = figures.gallery(images, 10)
    if count == 0:
        assert markup == ''
        return
    (sheet,) = pictures(markup)
    tile, gap = 64, 3
    columns, rows = min(count, 10), -(-count // 10)
    assert sheet.shape[:2] == (rows * (tile + gap) - gap, columns * (tile + gap) - gap)
    sheet = sheet.reshape(*sheet.shape[:2], channels)
    for i, image in enumerate(images):
        y, x = i // 10 * (tile + gap), i % 10 * (tile + gap)
        np.testing.assert_array_equal(sheet[y : y + tile : 8, x : x + tile : 8], image)


def test_large_images_are_reduced():
    (sheet,) = pictures(figures.gallery(random_images(2, (256, 512, 3))))
    assert sheet.shape == (64, 128 + 3 + 128, 3)


def test_captions_are_escaped():
    markup = figures.gallery(random_images(2), captions=['<script>', '7 & 8'])
    assert len(pictures(markup)) == 2
    assert '<script>' not in markup
    assert '7 &amp; 8</figcaption>' in markup


def test_gallery_refuses_what_is_no_image():
    with pytest.raises(UserError, match='uint8'):
        figures.gallery(np.zeros((1, 8, 8, 1), np.float32))


def test_mistaken_picks_the_right_end():
    images = np.stack([np.full((8, 8, 1), i, np.uint8) for i in range(6)])
    scores = np.array([0.1, 0.9, -0.5, 0.7, 0.2, 0.3])
    names, pred = ['cat', 'dog'], np.array([0, 1, 0, 0, -1, 1])
    worst = figures.mistaken(
        images, scores, pred, label=pred, class_names=names, highest=True, count=2
    )
    assert [p[0, 0] for p in pictures(worst)] == [1, 3]
    assert 'is dog\nseen as dog</figcaption>' in worst
    lowest = figures.mistaken(images, scores, pred, class_names=names, highest=False, count=3)
    assert [p[0, 0] for p in pictures(lowest)] == [2, 0, 4]
    assert '−0.50\nseen as cat' in lowest
    assert lowest.count('seen as') == 2  # the third has no prediction
    assert figures.mistaken(images, scores, highest=True, count=99).count('<figure') == 6
