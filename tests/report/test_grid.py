"""Arms as rows x columns."""

import numpy as np
import pytest

from jaxood.report import grid, tables

ROWS, COLUMNS = ('a', 'b', 'c'), ('none', 'mix')


@pytest.fixture
def runs(experiment):
    """Row b is better than a and c, mix better than none, in row c by nothing."""
    shifts = {'a_none': 0.5, 'a_mix': 1.5, 'b_none': 1.5, 'b_mix': 2.5, 'c_none': 0.5, 'c_mix': 0.5}
    return experiment(shifts)


def test_cells_and_differences_are_those_of_the_tables(runs, groups):
    """One cell is `summary`'s, one difference `compare`'s, to the bit: the draws are the same."""
    found = grid.grid(runs, groups, ROWS, COLUMNS, 'msp', draws=30)
    summary = tables.summary(runs, groups, draws=30)
    cell = tables.cell(summary, 'b_mix', 'msp', tables.MEAN, 'auroc')
    assert found['cells']['b']['mix']['auroc'] == {k: cell[k] for k in ('mean', 'low', 'high')}
    across = tables.compare(runs, groups, 'b_mix', 'b_none', 'msp', draws=30)
    assert found['by_column']['mix']['b']['auroc'] == across[tables.MEAN]['auroc']
    down = tables.compare(runs, groups, 'b_mix', 'a_mix', 'msp', draws=30)
    assert found['by_row']['b']['mix']['auroc'] == down[tables.MEAN]['auroc']
    assert found['by_row']['b']['mix']['id_acc'] == down[tables.TEST]['id_acc']


def test_means_over_rows(runs, groups):
    found = grid.grid(runs, groups, ROWS, COLUMNS, 'msp', draws=30)
    by = found['by_column']['mix']
    every = np.mean([by[row]['auroc']['mean'] for row in ROWS])
    assert by[grid.ALL]['auroc']['mean'] == pytest.approx(every)
    others = np.mean([found['by_row'][row]['none']['auroc']['mean'] for row in 'bc'])
    assert found['by_row'][grid.ALL]['none']['auroc']['mean'] == pytest.approx(others)


def test_each_row_may_have_its_own_score(runs, groups):
    own = {'a': 'energy', 'b': 'msp', 'c': 'msp'}
    found = grid.grid(runs, groups, ROWS, COLUMNS, own, draws=20)
    energy = grid.grid(runs, groups, ROWS, COLUMNS, 'energy', draws=20)
    msp = grid.grid(runs, groups, ROWS, COLUMNS, 'msp', draws=20)
    assert found['cells']['a'] == energy['cells']['a'] != msp['cells']['a']
    assert found['cells']['b'] == msp['cells']['b'] != energy['cells']['b']


def test_the_verdict_says_which_way_it_falls(runs, groups):
    said = grid.verdict(grid.grid(runs, groups, ROWS, COLUMNS, 'msp', draws=100))
    assert len(said) == 4  # mix against none in AUROC and accuracy; others against a, twice
    assert said[0].startswith('“mix” against “none”, mean AUROC of the 3 rows: +')
    assert said[0].endswith('better in 2, no clear difference in 1.')
    assert 'ID accuracy of the 3 rows: 0.00 points' in said[1]
    assert said[2].startswith('The other rows against “a”, mean AUROC with “none”: +')
    assert said[3].endswith('better in 1, worse in 1.')


def test_one_row_has_nothing_to_be_compared_with(runs, groups):
    found = grid.grid(runs, groups, ('b',), COLUMNS, 'msp', draws=20)
    assert found['by_row'] == {}
    assert len(grid.verdict(found)) == 2
