"""What an independent classifier makes of the outliers."""

import json

import numpy as np
import pytest
import tiny

from jaxood import main
from jaxood.errors import ConfigError
from jaxood.stages import examination


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
    rows = json.loads((tmp_path / 'results.json').read_text())['summary']['outliers']
    told = {tuple(row['outliers']): row for row in rows}
    assert set(told) == {('noise',), ('again', 'real')}  # one row for outliers that arms share
    assert told[('noise',)]['recognised'] is None
    assert told[('again', 'real')]['chance'] == pytest.approx(2 / (7 * 6))
    assert all(row['count'] == 40 and row['frechet'] >= 0 <= row['floor'] for row in rows)
    assert 'What an independent classifier sees' in (tmp_path / 'report.html').read_text()
    assert 'outliers of noise, as none sees them' in capsys.readouterr().err


def test_a_judge_that_is_no_arm(tmp_path):
    with pytest.raises(ConfigError, match='config.report.judge='):
        main.execute(tiny.config(report__judge='nobody'), str(tmp_path))
