"""The numbers of a report: the long table, means with intervals, paired differences, a verdict.

Everything is a fraction until it is printed. An interval comes from bootstrap draws that resample
training seeds and images together (`metrics.bootstrap`); the mean over OOD sets is taken within
each draw, so its interval is that of the mean.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxood import metrics
from jaxood.errors import UserError, lookup

TEST = 'test'  # the ID test set's key among a run's sets
MEAN = 'mean:all'  # the column of the unweighted mean over all OOD sets
SHOWN = ('auroc', 'fpr95_id', 'fpr95_ood')
NAMES = {
    'auroc': 'AUROC ↑',
    'fpr95_id': 'FPR95-ID ↓',
    'fpr95_ood': 'FPR95-OOD ↓',
    'id_acc': 'ID accuracy ↑',
}
HIGHER_IS_BETTER = {'auroc': True, 'fpr95_id': False, 'fpr95_ood': False, 'id_acc': True}

FACTS = ('run_id', 'id_dataset', 'backbone', 'training', 'outliers')
METRICS = ('auroc', 'aupr_in', 'aupr_out', 'fpr95_id', 'fpr95_ood', 'det_err', 'oscr', 'id_acc')
COLUMNS = (
    *('run_id', 'seed', 'id_dataset', 'backbone', 'training', 'outliers', 'method', 'settings'),
    *('ood_dataset', 'group', 'n_id', 'n_ood', *METRICS, 'fit_s', 'score_ms_per_image', 'arm'),
)

# column ('test', an OOD set, 'mean:<group>', 'mean:all') -> metric -> number or cell
Cells = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Scored:
    """What one score method said about every test set, for one arm and one training seed.

    Attributes:
        scores: set name -> float32[n], larger = more outlying; 'test' is the ID test set.
        pred: set name -> int32[n], the predicted class; a set may be missing.
        label: int32[n] of the ID test set; -1 where no label exists.
        fit_s: seconds to fit the method, None if unknown.
        score_ms_per_image: of the score itself, on outputs that the network has computed.
        chosen: 'default', or 'validated' for settings chosen on validation data.
    """

    arm: str
    seed: int
    method: str
    settings: Mapping[str, Any]
    scores: Mapping[str, np.ndarray]
    pred: Mapping[str, np.ndarray]
    label: np.ndarray
    fit_s: float | None = None
    score_ms_per_image: float | None = None
    chosen: str = 'default'

    @property
    def correct(self) -> np.ndarray | None:
        """bool[n]: whether the class is right; None without predictions or labels."""
        if TEST not in self.pred or np.any(np.asarray(self.label) < 0):
            return None
        return np.asarray(self.pred[TEST]) == np.asarray(self.label)


def families(groups: Mapping[str, str]) -> dict[str, list[str]]:
    """The columns that average OOD sets: 'mean:<group>' for each group, then 'mean:all'."""
    means = {f'mean:{g}': [k for k in groups if groups[k] == g] for g in groups.values()}
    return means | {MEAN: list(groups)}


# ---- one row a set --------------------------------------------------------------


def long_rows(
    scored: Sequence[Scored],
    groups: Mapping[str, str],
    facts: Mapping[tuple[str, int], Mapping[str, str]],
) -> list[dict[str, Any]]:
    """One row for each run, method and OOD set, then the unweighted means over sets.

    Args:
        scored: in the order of the table.
        groups: OOD set -> 'near', 'far' ...
        facts: (arm, seed) -> `run_id`, `id_dataset`, `backbone`, `training`, `outliers`.

    Returns:
        Dicts with the keys `COLUMNS`. Rows 'mean:<group>' and 'mean:all' hold unweighted means of
        the metrics and the total of n_ood. `fit_s` and `score_ms_per_image` are None: these rows
        become results.csv, which two runs must agree on to the bit, and no clock does. The page's
        cost table (`score_costs`) has them.
    """
    _check(scored, groups)
    rows = []
    for s in scored:
        about = {k: facts[s.arm, s.seed][k] for k in FACTS}
        about |= {'arm': s.arm, 'seed': s.seed, 'method': s.method}
        about |= {'settings': json.dumps(s.settings | {'chosen': s.chosen}, sort_keys=True)}
        measured = {
            k: metrics.evaluate(s.scores[TEST], s.scores[k], correct=s.correct, name=_where(s, k))
            for k in groups
        }
        for name, row in measured.items():
            rows.append(about | {'ood_dataset': name, 'group': groups[name]} | row)
        for name, members in families(groups).items():
            parts = [measured[k] for k in members]
            row = {'n_id': parts[0]['n_id'], 'n_ood': sum(p['n_ood'] for p in parts)}
            row |= {m: _mean([p[m] for p in parts]) for m in METRICS}
            rows.append(about | {'ood_dataset': name, 'group': name.partition(':')[2]} | row)
    return [{k: row.get(k) for k in COLUMNS} for row in rows]


# ---- means, intervals, differences ----------------------------------------------------------


def summary(
    scored: Sequence[Scored],
    groups: Mapping[str, str],
    *,
    main: str | None = None,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Mean over training seeds, spread and interval of everything that the report shows.

    Args:
        main: the method whose every metric gets an interval; the others' AUROC alone does, which is
            a third of the work. None: all do.
        draws: bootstrap draws; `level`: the interval's; `seed`: of the resampling.

    Returns:
        A plain dict: `level`, `draws`, `groups`, `counts` (set -> images), `seeds` (arm -> list)
        and `cells`: arm -> method -> column -> metric -> {mean, std, low, high}. Columns are the
        OOD sets and their means (`families`) with the metrics `SHOWN`, and 'test' with `id_acc`
        (missing without labels). std is over seeds, ddof 0. `chosen`: method -> how its settings
        were chosen and, arm by arm, which they are.
    """
    _check(scored, groups)
    cells, chosen = {}, {}
    for arm, method in dict.fromkeys((s.arm, s.method) for s in scored):
        runs = _runs(scored, arm, method)
        shown = SHOWN if main in (None, method) else ('auroc',)
        values, resampled = measured(
            scored, groups, arm, method, draws=draws, seed=seed, shown=shown
        )
        cells.setdefault(arm, {})[method] = {
            column: {m: _cell(v, resampled[column].get(m), level) for m, v in by_metric.items()}
            for column, by_metric in values.items()
        }
        chosen.setdefault(method, {'how': runs[0].chosen, 'settings': {}})
        chosen[method]['settings'][arm] = dict(runs[0].settings)
    return {
        'level': level,
        'draws': draws,
        'groups': dict(groups),
        'counts': {k: len(scored[0].scores[k]) for k in (TEST, *groups)},
        'seeds': {arm: sorted({s.seed for s in scored if s.arm == arm}) for arm in cells},
        'cells': cells,
        'chosen': chosen,
    }


def compare(
    scored: Sequence[Scored],
    groups: Mapping[str, str],
    arm_a: str,
    arm_b: str,
    method: str,
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Cells:
    """Paired differences, arm_a minus arm_b, under one score method.

    Both arms are resampled alike in every draw (same seeds, same images), so what they share
    cancels: the interval of the difference is narrower than the two intervals suggest.

    Returns:
        column -> metric -> {mean, low, high}, with the columns and metrics of `summary`.

    Raises:
        UserError: the arms were not trained with the same seeds.
    """
    _check(scored, groups)
    seeds_a, seeds_b = ([s.seed for s in _runs(scored, arm, method)] for arm in (arm_a, arm_b))
    if seeds_a != seeds_b:
        raise UserError(
            f'arms {arm_a!r} (seeds {seeds_a}) and {arm_b!r} (seeds {seeds_b}) cannot be paired. '
            'Give all arms the same seeds.'
        )
    (value_a, draw_a), (value_b, draw_b) = (
        measured(scored, groups, arm, method, draws=draws, seed=seed) for arm in (arm_a, arm_b)
    )
    out: Cells = {}
    for column in value_a:
        for m in value_a[column]:
            if m not in value_b[column]:
                continue  # one of the two arms has no classifier
            cell = _cell(
                value_a[column][m] - value_b[column][m],
                draw_a[column][m] - draw_b[column][m],
                level,
            )
            out.setdefault(column, {})[m] = {k: cell[k] for k in ('mean', 'low', 'high')}
    return out


def measured(
    scored: Sequence[Scored],
    groups: Mapping[str, str],
    arm: str,
    method: str,
    *,
    draws: int = 1000,
    seed: int = 0,
    shown: Sequence[str] = SHOWN,
) -> tuple[Cells, Cells]:
    """One arm under one score: (value of each seed, mean over seeds in each draw).

    Draw n takes the same seeds and images whatever the arm and the score.

    Args:
        shown: the metrics of OOD sets that are resampled.

    Returns:
        column -> metric -> float64[S], and column -> metric -> float64[draws].
    """
    runs = _runs(scored, arm, method)
    return _values(runs, groups), _resample(runs, groups, draws, seed, shown)


def verdict(
    summary: Mapping[str, Any], method: str, main: str, comparisons: Mapping[str, Cells]
) -> str:
    """Whether the arm `main` beats each other arm, in plain words, whichever way it falls.

    Args:
        comparisons: other arm -> `compare(scored, groups, main, other, method)`.

    Returns:
        A sentence on mean AUROC and, where there are labels, one on ID accuracy. A difference
        whose interval includes 0 is called no clear difference; a single seed is owned up to.
    """
    cells = summary['cells'][main][method]
    num_sets, level = len(summary['groups']), f'{100 * summary["level"]:g} %'
    where = 'AUROC' if num_sets == 1 else f'mean AUROC over {num_sets} OOD sets'
    auroc = f'{percent(cells[MEAN]["auroc"]["mean"])} %'
    accuracy = cells[TEST].get('id_acc')
    if not comparisons:
        text = f'“{main}” reaches {where} {auroc} (score {method}). No other arm ran beside it.'
        return text + (f' ID accuracy is {percent(accuracy["mean"])} %.' if accuracy else '')
    text = f'In {where} (score {method}), “{main}” ({auroc}) '
    text += _judged({k: v[MEAN]['auroc'] for k, v in comparisons.items()}, level)
    measured = {k: v[TEST]['id_acc'] for k, v in comparisons.items() if 'id_acc' in v.get(TEST, {})}
    if measured:
        text += f' In ID accuracy ({percent(accuracy["mean"])} %), it '
        text += _judged(measured, level)
    if len(summary['seeds'][main]) == 1:
        text += ' One training seed: the intervals know of the test images, not of other trainings.'
    return text


def judge(difference: Mapping[str, float], metric: str = 'auroc') -> str:
    """'better', 'worse', or 'no clear difference' when the interval of a minus b includes 0."""
    if difference['low'] <= 0 <= difference['high']:
        return 'no clear difference'
    return 'better' if (difference['mean'] > 0) == HIGHER_IS_BETTER[metric] else 'worse'


def _judged(differences, level):
    """'is better than “x” by 1.00 points (95 % interval 0.50 to 1.50) and …'"""
    parts = []
    for other, d in differences.items():
        word, first = judge(d), '' if parts else f'{level} interval '
        if word == 'no clear difference':
            by, low, high = (percent(d[k], sign=True) for k in ('mean', 'low', 'high'))
            parts.append(f'shows {word} from “{other}” ({by} points, {first}{low} to {high})')
        else:  # how much better, or how much worse: positive either way
            by = percent(abs(d['mean']))
            low, high = (percent(v) for v in sorted((abs(d['low']), abs(d['high']))))
            parts.append(f'is {word} than “{other}” by {by} points ({first}{low} to {high})')
    return ' and '.join([', '.join(parts[:-1]), parts[-1]] if parts[1:] else parts) + '.'


# ---- layout, shared by the page and the terminal --------------------------------------------


def percent(value: float, *, sign: bool = False) -> str:
    """A fraction as percent with two decimals and a real minus sign; no sign before 0.00."""
    text = f'{100 * value:+.2f}' if sign else f'{100 * value:.2f}'
    return text[1:] if float(text) == 0 and text[0] in '+-' else text.replace('-', '−')


def with_interval(x: Mapping[str, float]) -> tuple[str, str]:
    """A cell of `page.Table`: `mean` as percent, and under it `low` to `high`."""
    return percent(x['mean']), f'{percent(x["low"])}–{percent(x["high"])}'


def shown_columns(groups: Mapping[str, str]) -> list[str]:
    """The mean over all OOD sets, the groups' means, the sets; means that repeat another column
    are left out."""
    overall = [MEAN] if len(groups) > 1 else []
    means = [k for k, v in families(groups).items() if 1 < len(v) < len(groups)]
    return [*overall, *means, *groups]


def cell(summary, arm: str, method: str, column: str, metric: str) -> Mapping | None:
    """One cell of a summary, or None where there is none."""
    return summary['cells'][arm].get(method, {}).get(column, {}).get(metric)


def is_best(summary, method: str, column: str, metric: str, found: Mapping[str, float]) -> bool:
    """Whether a cell is to be bold: no arm prints a better mean, and there are arms to beat."""
    return _best(
        found, metric, [cell(summary, a, method, column, metric) for a in summary['cells']]
    )


def is_best_method(summary, arm: str, column: str, metric: str, found: Mapping) -> bool:
    """The same among the methods of one arm."""
    every = [cell(summary, arm, m, column, metric) for m in summary['cells'][arm]]
    return _best(found, metric, every)


def _best(found, metric, every):
    means = [c['mean'] for c in every if c is not None]
    top = max(means) if HIGHER_IS_BETTER[metric] else min(means)
    return len(means) > 1 and percent(found['mean']) == percent(top)


def ranked(summary, arm: str) -> list[str]:
    """The methods of an arm, the best mean AUROC first."""
    mean = lambda method: summary['cells'][arm][method][MEAN]['auroc']['mean']
    return sorted(summary['cells'][arm], key=mean, reverse=True)


def settings_of(summary, arm: str, method: str) -> str:
    """What was set and how it was chosen, in a few words: 'k=50', 'validated: quantile=99'."""
    chosen = summary['chosen'][method]
    given = chosen['settings'][arm].items()
    text = ', '.join(f'{k}={_short(v)}' for k, v in given if k != 'name' and v is not None)
    return f'validated: {text}' if chosen['how'] == 'validated' else text


def _short(value):
    if isinstance(value, (tuple, list)):
        return ' '.join(_short(v) for v in value)
    return f'{value:g}' if isinstance(value, float) else str(value)


def title(column: str) -> str:
    """A column's name for people: a set's own name, 'mean near', 'mean of all'."""
    return column.replace('mean:all', 'mean of all').replace('mean:', 'mean ')


def methods(summary: Mapping[str, Any]) -> list[str]:
    """All score methods that any arm has, in order of first appearance."""
    return list(dict.fromkeys(m for arm in summary['cells'].values() for m in arm))


def score_costs(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """Seconds to fit and milliseconds an image for each method, means over arms and seeds."""
    rows = []
    for method in dict.fromkeys(s.method for s in scored):
        runs = [s for s in scored if s.method == method]
        row = {k: _mean([getattr(s, k) for s in runs]) for k in ('fit_s', 'score_ms_per_image')}
        rows.append({'method': method, **row})
    return rows if any(r['score_ms_per_image'] or r['fit_s'] for r in rows) else []


# ---- inside -------------------------------------------------------------------------------


def _where(s, name):
    return f'score {s.method!r} of arm {s.arm!r}, seed {s.seed}, on {name!r}'


def _check(scored, groups):
    """Refuses what cannot be tabulated, before anything is computed."""
    if not scored or not groups:
        raise UserError('nothing to report: give at least one scored run and one OOD set.')
    seen, sizes = set(), {k: len(v) for k, v in scored[0].scores.items()}
    for s in scored:
        if (s.arm, s.seed, s.method) in seen:
            raise UserError(f'arm {s.arm!r}, seed {s.seed}, score {s.method!r} is given twice.')
        seen.add((s.arm, s.seed, s.method))
        for name in (TEST, *groups):
            scores = np.asarray(lookup(s.scores, name, f'{_where(s, name)}: set'))
            if len(scores) != sizes.get(name):
                raise UserError(
                    f'{_where(s, name)}: {len(scores)} images, but {sizes.get(name)} in arm '
                    f'{scored[0].arm!r}. All arms must score the same images.'
                )
            bad = np.count_nonzero(~np.isfinite(scores))
            if bad:
                raise UserError(
                    f'{_where(s, name)}: {bad} of {len(scores)} scores are NaN or infinite. '
                    'A metric of such scores means nothing: look at the training log, or leave '
                    'the score out.'
                )


def _runs(scored, arm, method):
    runs = [s for s in scored if (s.arm, s.method) == (arm, method)]
    if not runs:
        raise UserError(f'arm {arm!r} has no score {method!r}.')
    return sorted(runs, key=lambda s: s.seed)


def _stacked(runs, name):
    return np.stack([np.asarray(s.scores[name]) for s in runs])


def _right(runs):
    """bool[S, n], or None if any seed's accuracy is unknown."""
    right = [s.correct for s in runs]
    return None if any(r is None for r in right) else np.stack(right)


def _values(runs, groups):
    """column -> metric -> float64[S], one value a seed."""
    out: Cells = {TEST: {}}
    right = _right(runs)
    if right is not None:
        out[TEST]['id_acc'] = right.mean(axis=1)
    for name in groups:
        pairs = [(s.scores[TEST], s.scores[name]) for s in runs]
        out[name] = {m: np.array([getattr(metrics, m)(a, b) for a, b in pairs]) for m in SHOWN}
    return out | _means(out, groups)


def _resample(runs, groups, draws, seed, shown=SHOWN):
    """column -> metric -> float64[draws], of the mean over seeds."""
    out: Cells = {TEST: {}}
    more = {'draws': draws, 'seed': seed}
    right = _right(runs)
    a = _stacked(runs, TEST)
    if right is not None:
        one = next(iter(groups))  # any set will do: accuracy looks at ID rows only
        out[TEST]['id_acc'] = metrics.bootstrap(
            a, _stacked(runs, one), 'id_acc', correct=right, ood_set=one, **more
        )
    for name in groups:
        b = _stacked(runs, name)
        out[name] = metrics.bootstraps(a, b, shown, ood_set=name, **more)
    return out | _means(out, groups)


def _means(by_set, groups):
    return {
        name: {m: np.mean([by_set[k][m] for k in members], axis=0) for m in by_set[members[0]]}
        for name, members in families(groups).items()
    }


def _cell(values, draws, level):
    low, high = (None, None) if draws is None else metrics.interval(draws, level=level)
    mean, std = float(np.mean(values)), float(np.std(values))
    return {'mean': mean, 'std': std, 'low': low, 'high': high}


def _mean(values):
    return None if any(v is None for v in values) else float(np.mean(values))
