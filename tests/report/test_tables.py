"""The long table, means and intervals, paired differences and the verdict."""

import csv
import dataclasses
import io
import itertools
import json

import numpy as np
import pytest
from rich.console import Console

from jaxood import metrics
from jaxood.errors import UserError
from jaxood.report import results, tables, terminal

DRAWS = 60
LONG = (
    'run_id seed id_dataset backbone training outliers method settings ood_dataset group n_id '
    'n_ood auroc aupr_in aupr_out fpr95_id fpr95_ood det_err oscr id_acc fit_s score_ms_per_image'
)


def report_of(runs, groups, main='diffusion', method='energy'):
    summary = tables.summary(runs, groups, draws=DRAWS)
    comparisons = {
        arm: tables.compare(runs, groups, main, arm, method, draws=DRAWS)
        for arm in summary['cells']
        if arm != main
    }
    return summary, comparisons, tables.verdict(summary, method, main, comparisons)


# ---- rows -----------------------------------------------------------------------------------


def test_rows_have_the_long_layout(runs, groups, facts):
    """The columns of the specification in their order, then the arm; one row a set and a mean."""
    rows = tables.long_rows(runs, groups, facts(runs))
    assert all(tuple(row) == (*LONG.split(), 'arm') for row in rows)
    names = [*groups, 'mean:near', 'mean:far', 'mean:all']
    assert [r['ood_dataset'] for r in rows] == names * len(runs)
    assert [r['group'] for r in rows[:6]] == ['near', 'far', 'far', 'near', 'far', 'all']
    assert rows[0]['settings'] == '{"a": 2.5, "b": 1, "chosen": "default"}'
    assert rows[0]['n_id'] == 80
    assert [r['n_ood'] for r in rows[:6]] == [80, 70, 60, 80, 130, 210]


def test_mean_rows_are_unweighted_means_of_their_rows(runs, groups, facts):
    rows = tables.long_rows(runs, groups, facts(runs))
    for start in range(0, len(rows), 6):
        near, far_1, far_2, mean_near, mean_far, mean_all = rows[start : start + 6]
        for m in tables.METRICS:
            assert mean_near[m] == near[m]
            assert mean_far[m] == pytest.approx((far_1[m] + far_2[m]) / 2, abs=1e-15)
            assert mean_all[m] == pytest.approx((near[m] + far_1[m] + far_2[m]) / 3, abs=1e-15)
            assert isinstance(mean_all[m], float)


def test_a_row_holds_what_metrics_says(runs, groups, facts):
    row, run = tables.long_rows(runs, groups, facts(runs))[0], runs[0]
    expected = metrics.evaluate(
        run.scores['test'], run.scores['held_out'], correct=run.pred['test'] == run.label
    )
    assert expected.items() <= row.items()
    assert row['id_acc'] == 75 / 80


def test_without_labels_there_is_no_accuracy(runs, groups, facts):
    blind = [dataclasses.replace(s, label=np.full(80, -1)) for s in runs]
    rows = tables.long_rows(blind, groups, facts(blind))
    assert all(r['id_acc'] is None and r['oscr'] is None for r in rows)
    summary, comparisons, verdict = report_of(blind, groups)
    assert summary['cells']['none']['energy']['test'] == {}
    assert 'accuracy' not in verdict
    assert comparisons['none']['mean:all']['auroc']['mean'] > 0


def test_results_are_the_same_bytes_and_tell_no_time(tmp_path, runs, groups, facts):
    """Another run's clock changes nothing; every digit survives the trip through either file."""
    for name, fit_s in (('a', 1.0), ('b', 77.25)):
        timed = [dataclasses.replace(s, fit_s=fit_s, score_ms_per_image=fit_s) for s in runs]
        rows = tables.long_rows(timed, groups, facts(timed))
        (tmp_path / name).mkdir()
        results.write_results(tmp_path / name, rows, tables.summary(timed, groups, draws=DRAWS))
    for file in ('results.csv', 'results.json'):
        assert (tmp_path / 'a' / file).read_bytes() == (tmp_path / 'b' / file).read_bytes()
    text = (tmp_path / 'b' / 'results.csv').read_text()
    read = list(csv.DictReader(io.StringIO(text)))
    assert [float(r['auroc']) for r in read] == [r['auroc'] for r in rows]
    assert all(r['fit_s'] == r['score_ms_per_image'] == '' for r in read)
    content = (tmp_path / 'b' / 'results.json').read_text()
    assert content.endswith('}\n')
    loaded = json.loads(content)
    assert loaded['rows'] == rows
    assert list(loaded) == sorted(loaded)
    assert '77.25' not in content


# ---- summary, differences, verdict ------------------------------------------------------------


def test_summary_is_mean_and_population_spread_over_seeds(runs, groups):
    summary = tables.summary(runs, groups, draws=DRAWS)
    cell = summary['cells']['none']['energy']['photos']['auroc']
    values = [
        metrics.auroc(s.scores['test'], s.scores['photos'])
        for s in runs
        if (s.arm, s.method) == ('none', 'energy')
    ]
    assert cell['mean'] == pytest.approx(sum(values) / 2, abs=1e-15)
    assert cell['std'] == pytest.approx(abs(values[0] - values[1]) / 2, abs=1e-15)
    assert cell['low'] < cell['mean'] < cell['high']
    assert summary['cells']['none']['msp']['test']['id_acc']['mean'] == (75 + 74) / 160
    assert summary['counts'] == {'test': 80, 'held_out': 80, 'photos': 70, 'noise': 60}


def test_the_interval_of_the_mean_is_not_the_mean_of_the_intervals(runs, groups):
    """Sets are resampled independently, so their mean varies less than each of them."""
    cells = tables.summary(runs, groups, draws=400)['cells']['none']['energy']
    width = {k: cells[k]['auroc']['high'] - cells[k]['auroc']['low'] for k in (*groups, 'mean:all')}
    assert width['mean:all'] < np.mean([width[k] for k in groups])
    means = [cells[k]['auroc']['mean'] for k in groups]
    assert cells['mean:all']['auroc']['mean'] == pytest.approx(np.mean(means), abs=1e-15)


def test_an_arm_differs_from_itself_by_exactly_nothing(runs, groups):
    same = tables.compare(runs, groups, 'none', 'none', 'energy', draws=DRAWS)
    assert set(same) == {'test', *groups, 'mean:near', 'mean:far', 'mean:all'}
    for column, by_metric in same.items():
        for metric, d in by_metric.items():
            assert d == {'mean': 0, 'low': 0, 'high': 0}, (column, metric)
            assert tables.judge(d, metric) == 'no clear difference'


def test_differences_change_sign_with_the_order(runs, groups):
    ab, ba = (
        tables.compare(runs, groups, *arms, 'energy', draws=DRAWS)['mean:all']['fpr95_id']
        for arms in itertools.permutations(('none', 'diffusion'))
    )
    np.testing.assert_allclose([ab['mean'], ab['low']], [-ba['mean'], -ba['high']], atol=1e-12)
    assert (tables.judge(ab, 'fpr95_id'), tables.judge(ba, 'fpr95_id')) == ('worse', 'better')


@pytest.mark.parametrize(
    ('shift', 'words'),
    [
        (2.0, 'is better than “none” by'),
        (-1.0, 'is worse than “none” by'),
        (0.5, 'shows no clear difference from “none” (0.00 points'),
    ],
)
def test_the_verdict_says_which_way_it_fell(experiment, groups, shift, words):
    _, comparisons, verdict = report_of(experiment({'none': 0.5, 'diffusion': shift}), groups)
    first, second = verdict.split(' In ID accuracy ')
    assert words in first
    assert 'shows no clear difference from “none” (0.00 points' in second  # same predictions
    shown = abs(comparisons['none']['mean:all']['auroc']['mean'])
    assert tables.percent(shown) in first


def test_the_verdict_lists_every_arm_and_a_single_arm_stands_alone(experiment, groups):
    arms = {'diffusion': 1.5, 'a{0}': 0.5, 'b': 1.5, 'c': 2.9}
    verdict = report_of(experiment(arms), groups)[2]
    assert 'is better than “a{0}”' in verdict
    assert 'shows no clear difference from “b”' in verdict
    assert 'is worse than “c”' in verdict
    alone = report_of(experiment({'diffusion': 1.5}), groups)[2]
    assert alone.startswith('“diffusion” reaches mean AUROC over 3 OOD sets ')
    assert 'No other arm' in alone


def test_one_seed_has_no_spread_but_an_interval(experiment, groups):
    arms = {'none': 0.5, 'diffusion': 2.0}
    summary, _, verdict = report_of(experiment(arms, seeds=(3,)), groups)
    assert 'One training seed' in verdict
    assert 'One training seed' not in report_of(experiment(arms), groups)[2]
    cell = summary['cells']['diffusion']['energy']['mean:all']['auroc']
    assert cell['std'] == 0
    assert cell['low'] < cell['mean'] < cell['high']
    assert summary['seeds'] == {'none': [3], 'diffusion': [3]}


@pytest.mark.parametrize(('value', 'plain', 'signed'), [
    (0.97306, '97.31', '+97.31'), (-0.012, '−1.20', '−1.20'), (-1e-9, '0.00', '0.00'),
    (1, '100.00', '+100.00'),
])  # fmt: skip
def test_percent(value, plain, signed):
    assert (tables.percent(value), tables.percent(value, sign=True)) == (plain, signed)


def test_columns_leave_out_means_that_repeat_a_column():
    assert tables.shown_columns({'a': 'near'}) == ['a']
    assert tables.shown_columns({'a': 'far', 'b': 'far'}) == ['mean:all', 'a', 'b']
    assert tables.shown_columns({'a': 'near', 'b': 'far'}) == ['mean:all', 'a', 'b']
    mixed = tables.shown_columns({'a': 'near', 'b': 'far', 'c': 'far'})
    assert mixed == ['mean:all', 'mean:far', 'a', 'b', 'c']


def test_costs_are_means_over_runs(runs):
    timed = [dataclasses.replace(s, fit_s=float(s.seed)) for s in runs]
    assert tables.score_costs(timed) == [
        {'method': m, 'fit_s': 0.5, 'score_ms_per_image': 0.25} for m in ('energy', 'msp')
    ]
    assert (
        tables.score_costs([dataclasses.replace(runs[0], fit_s=None, score_ms_per_image=None)])
        == []
    )


# ---- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize('name', ['test', 'photos'])
def test_scores_that_are_not_numbers_are_refused_by_name(runs, groups, facts, name, bad):
    scores = {k: v.copy() for k, v in runs[3].scores.items()}
    scores[name][2] = bad
    broken = [*runs[:3], dataclasses.replace(runs[3], scores=scores), *runs[4:]]
    match = f"score 'msp' of arm 'none', seed 1, on '{name}': 1 of"
    with pytest.raises(UserError, match=match):
        tables.long_rows(broken, groups, facts(broken))
    with pytest.raises(UserError, match=match):
        tables.summary(broken, groups, draws=DRAWS)


def test_what_cannot_be_tabulated_is_refused(runs, groups):
    with pytest.raises(UserError, match='at least one'):
        tables.summary([], groups)
    with pytest.raises(UserError, match='given twice'):
        tables.summary([*runs, runs[0]], groups)
    with pytest.raises(UserError, match="'svhn' is not known"):
        tables.summary(runs, {**groups, 'svhn': 'far'})
    short = dataclasses.replace(runs[-1], scores={k: v[:-1] for k, v in runs[-1].scores.items()})
    with pytest.raises(UserError, match='same images'):
        tables.summary([*runs[:-1], short], groups)
    unpaired = [s for s in runs if (s.arm, s.seed) != ('none', 1)]
    with pytest.raises(UserError, match='same seeds'):
        tables.compare(unpaired, groups, 'diffusion', 'none', 'energy')
    with pytest.raises(UserError, match="no score 'knn'"):
        tables.compare(runs, groups, 'diffusion', 'none', 'knn')


# ---- terminal -------------------------------------------------------------------------------


def printed(summary, width=100):
    out = io.StringIO()
    terminal.print_table(summary, 'energy', console=Console(file=out, width=width))
    return out.getvalue()


def test_the_terminal_table_fits_and_is_complete(experiment, groups):
    """100 columns, nothing cut off, names in brackets are not taken for markup."""
    runs = experiment({'[none]': 0.5, 'diffusion': 2.0})
    summary = tables.summary(runs, groups, draws=DRAWS)
    text = printed(summary)
    assert max(map(len, text.splitlines())) <= 100
    assert '…' not in text
    for word in ('[none]', 'diffusion', 'msp', *groups, 'n = 70', 'FPR95-ID', 'FPR95-OOD'):
        assert word in text
    for arm, by_method in summary['cells'].items():
        for column in ('mean:all', *groups):
            for m in tables.SHOWN:
                mean = by_method['energy'][column][m]['mean']
                assert tables.percent(mean) in text, (arm, column, m)


def test_an_arm_without_the_main_score_is_shown_as_such(runs, groups):
    """Arms may have different scores (a reconstruction has no logits)."""
    fewer = [s for s in runs if (s.arm, s.method) != ('none', 'energy')]
    summary = tables.summary(fewer, groups, draws=DRAWS)
    assert tables.methods(summary) == ['msp', 'energy']
    cell = summary['cells']['diffusion']['energy']['mean:all']['auroc']
    assert not tables.is_best(summary, 'energy', 'mean:all', 'auroc', cell)  # nobody to beat
    row = next(line for line in printed(summary).splitlines() if line.strip().startswith('none'))
    assert '–' in row


def test_a_table_of_every_score_is_ranked_and_says_what_was_set(experiment, groups):
    runs = experiment({'net': 1.0}, seeds=(0,), methods=('energy', 'msp', 'longer'))
    runs[0] = dataclasses.replace(
        runs[0], chosen='validated', settings={'name': 'energy', 'T': 2.0}
    )
    summary = tables.summary(runs, groups, main='msp', draws=20)
    order = tables.ranked(summary, 'net')
    means = [summary['cells']['net'][m]['mean:all']['auroc']['mean'] for m in order]
    assert means == sorted(means, reverse=True)
    assert tables.settings_of(summary, 'net', 'energy') == 'validated: T=2'
    assert tables.settings_of(summary, 'net', 'msp') == 'b=1, a=2.5'
    assert summary['cells']['net']['energy']['photos']['fpr95_id']['low'] is None  # AUROC alone
    assert summary['cells']['net']['energy']['photos']['auroc']['low'] is not None
    out = Console(record=True, width=100, file=io.StringIO())
    terminal.print_table(summary, 'msp', every_score=True, console=out)
    text = out.export_text()
    assert max(map(len, text.splitlines())) <= 100
    for method in order:
        cells = summary['cells']['net'][method]['photos']
        both = [tables.percent(cells[m]['mean']) for m in ('fpr95_id', 'auroc')]
        assert ' / '.join(both) in text
