"""What an independent classifier makes of the outliers."""

import json

import jax
import numpy as np
import pytest
import tiny

from jaxood import frechet, main
from jaxood.errors import ConfigError, UserError
from jaxood.stages import common
from jaxood.stages.sections import examination


def test_recognised_counts_the_classes_asked_for():
    logits = np.array([[5.0, 4.0, 0.0], [5.0, 0.0, 4.0], [0.0, 5.0, 4.0], [4.0, 5.0, 0.0]])
    pairs = [{'first': 0, 'second': 1}] * 4  # in either order, and nothing else
    found = examination.recognised(logits, pairs)
    assert found['recognised']['mean'] == 0.5
    assert found['recognised']['low'] < 0.5 < found['recognised']['high']
    assert found['chance'] == pytest.approx(1 / 3)
    pure = examination.recognised(logits, [{'first': 0}] * 4)
    assert (pure['recognised']['mean'], pure['chance']) == (0.5, pytest.approx(1 / 3))
    assert examination.recognised(logits, [{}] * 4) == {'recognised': None, 'chance': None}


def test_a_run_tells_what_its_judge_sees(tmp_path, capsys):
    arms = dict(
        none=dict(outliers=dict(name='none'), detector=dict(name='plain')),
        noise=dict(outliers=dict(name='uniform_noise')),
        real=dict(outliers=dict(name='real_mixup', low=0.4, high=0.6)),
        again=dict(outliers=dict(name='real_mixup', low=0.4, high=0.6), detector=dict(weight=1.0)),
    )
    config = tiny.config(
        arms=arms,
        report__arm='real',
        report__judge='none',
        filter__name='none',
        scores=dict(msp={}),
    )
    main.execute(config, str(tmp_path))
    rows = json.loads((tmp_path / 'results.json').read_text())['summary']['sections']['examination']
    told = {tuple(row['outliers']): row for row in rows}
    assert set(told) == {('noise',), ('again', 'real')}  # one row for outliers that arms share
    assert told[('noise',)]['recognised'] is None
    assert told[('again', 'real')]['chance'] == pytest.approx(2 / (7 * 6))
    assert all(row['count'] == 40 and row['frechet'] >= 0 <= row['floor'] for row in rows)
    assert 'What an independent classifier sees' in (tmp_path / 'report.html').read_text()
    assert 'outliers of noise, as none sees them' in capsys.readouterr().err


def test_distances_over_a_given_extractor(tmp_path):
    """Its features of images that are stretched to its own size, against all training images."""
    look = tiny.LOOK._replace(size=12)
    path, model, variables = tiny.weights(tmp_path / 'extractor', look=look)
    config = tiny.config(
        arms=dict(
            none=dict(outliers=dict(name='none'), detector=dict(name='plain')),
            noise=dict(outliers=dict(name='uniform_noise')),
        ),
        report__arm='noise',
        report__judge='none',
        report__extractor=path,
        filter__name='none',
        scores=dict(msp={}),
    )
    main.execute(config, str(tmp_path / 'run'))
    (row,) = json.loads((tmp_path / 'run/results.json').read_text())['summary']['sections'][
        'examination'
    ]
    (made,) = (tmp_path / 'run').glob('artefacts/synthesise/*/outliers/images.npy')

    def moments(images):
        x = jax.image.resize(images / np.float32(255), (len(images), 12, 12, 1), 'bilinear')
        x = (x - look.mean[0]) / look.std[0]
        return frechet.moments(model.apply(variables, x, train=False)['features'])

    train = common.load_data(config).id.train.images
    want = frechet.distance(moments(np.load(made)), moments(train))
    assert row['frechet'] == pytest.approx(want, rel=1e-4)
    assert row['reference'] == len(train)
    assert row['extractor'].startswith(
        'wrn (depth=10, width=1, base=4) by a test, images stretched'
    )
    assert 'stretched to 12 x 12 pixels' in (tmp_path / 'run/report.html').read_text()


def test_an_extractor_that_cannot_be(tmp_path):
    path, *_ = tiny.weights(tmp_path / 'extractor')
    with pytest.raises(ConfigError, match='config.report.judge, which names no arm'):
        main.execute(tiny.config(report__extractor=path), str(tmp_path / 'run'))
    with pytest.raises(UserError, match='config.report.extractor: .*no such file'):
        main.execute(
            tiny.config(report__extractor=path + 'x', report__judge='none'), str(tmp_path / 'run')
        )
    with pytest.raises(ConfigError, match='takes images of 1 channels, these have 3'):
        main.execute(
            tiny.config(report__extractor=path, report__judge='none', data__channels=3),
            str(tmp_path / 'run'),
        )


def test_a_judge_that_is_no_arm(tmp_path):
    with pytest.raises(ConfigError, match='config.report.judge='):
        main.execute(tiny.config(report__judge='nobody'), str(tmp_path))
