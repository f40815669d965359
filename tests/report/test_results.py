"""OpenOOD's layouts of the results."""

import csv
import io

import numpy as np
import pytest

from jaxood import metrics
from jaxood.report import results


def table(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_a_run_has_a_row_a_set_and_the_means_of_near_and_far(runs, groups, facts):
    files = results.openood(runs, groups, facts(runs))
    one = next(s for s in runs if (s.arm, s.seed, s.method) == ('none', 1, 'msp'))
    rows = {r['dataset']: r for r in table(files['openood/none_1/msp/ood.csv'])}
    assert list(rows) == [*groups, 'nearood', 'farood']
    for name in groups:
        want = metrics.evaluate(one.scores['test'], one.scores[name], convention='openood')
        assert float(rows[name]['FPR@95']) == pytest.approx(100 * want['fpr95_ood'], abs=0.006)
        assert float(rows[name]['AUPR_IN']) == pytest.approx(100 * want['aupr_in'], abs=0.006)
        assert float(rows[name]['ACC']) == pytest.approx(100 * one.correct.mean(), abs=0.006)
    far = np.mean([float(rows[k]['AUROC']) for k in groups if groups[k] == 'far'])
    assert float(rows['farood']['AUROC']) == pytest.approx(far, abs=0.02)
    assert rows['nearood']['AUROC'] == rows['held_out']['AUROC']


def test_the_leaderboard_spreads_over_seeds(runs, groups, facts):
    files = results.openood(runs, groups, facts(runs))
    board = table(files['openood/leaderboard.csv'])
    assert [(r['Additional_Description'], r['Postprocessor']) for r in board] == [
        *(('none', 'energy'), ('none', 'msp'), ('diffusion', 'energy'), ('diffusion', 'msp'))
    ]
    near = [
        100 * metrics.auroc(s.scores['test'], s.scores['held_out'])
        for s in runs
        if (s.arm, s.method) == ('none', 'msp')
    ]
    assert board[1]['Near-OOD_AUROC'] == f'{np.mean(near):.2f} ± {np.std(near):.2f}'
