"""Experiments in two dimensions: arms as rows x columns, and what each row and column brings.

The first row and the first column are what the others are measured against: an experiment on heads
and outliers has softmax and "no outliers" there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxood import metrics
from jaxood.report import tables
from jaxood.report.tables import MEAN, TEST, Scored

ALL = 'mean of these rows'
METRICS = {'auroc': MEAN, 'id_acc': TEST}  # metric -> its column in `tables`


def arm(row: str, column: str) -> str:
    """The arm that stands in a cell."""
    return f'{row}_{column}'


def grid(
    scored: Sequence[Scored],
    groups: Mapping[str, str],
    rows: Sequence[str],
    columns: Sequence[str],
    method: str | Mapping[str, str],
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Mean AUROC and ID accuracy of every cell, and paired differences along both directions.

    All cells are resampled alike in every draw (same seeds, same images), so what they share
    cancels in a difference, and a mean of differences over rows has an interval of its own.

    Args:
        method: the score, or one for each row.

    Returns:
        A plain dict: `rows`, `columns`, `scores` (row -> method), `level`, `all` (`ALL`) and

            cells       row -> column -> metric -> {mean, low, high}
            by_column   column -> row or `ALL` -> metric -> {mean, low, high}: minus the first
                        column of that row
            by_row      row or `ALL` -> column -> metric -> {mean, low, high}: minus the first row
                        of that column

        with the metrics 'auroc' (mean over OOD sets) and, where there are labels, 'id_acc'. The
        `ALL` of `by_column` is over all rows, that of `by_row` over all rows but the first.
    """
    scores = {row: method if isinstance(method, str) else method[row] for row in rows}
    found = {}
    for row in rows:
        for column in columns:
            values, resampled = tables.measured(
                *(scored, groups, arm(row, column), scores[row]),
                draws=draws,
                seed=seed,
                shown=('auroc',),
            )
            found[row, column] = {
                m: (np.mean(values[place][m]), resampled[place][m])
                for m, place in METRICS.items()
                if m in values[place]
            }
    known = [m for m in METRICS if all(m in cell for cell in found.values())]

    def told(pairs):
        """Mean of the differences a - b over pairs of cells; b None: of the cells a."""
        out = {}
        for m in known:
            parts = [
                [found[a][m][i] - (found[b][m][i] if b else 0.0) for i in (0, 1)] for a, b in pairs
            ]
            low, high = metrics.interval(np.mean([p[1] for p in parts], axis=0), level=level)
            out[m] = {'mean': float(np.mean([p[0] for p in parts])), 'low': low, 'high': high}
        return out

    top, left, others = rows[0], columns[0], rows[1:]
    by_column = {
        c: {r: told([((r, c), (r, left))]) for r in rows}
        | {ALL: told([((r, c), (r, left)) for r in rows])}
        for c in columns[1:]
    }
    by_row = {r: {c: told([((r, c), (top, c))]) for c in columns} for r in others}
    if others:
        by_row[ALL] = {c: told([((r, c), (top, c)) for r in others]) for c in columns}
    return {
        'rows': list(rows),
        'columns': list(columns),
        'scores': scores,
        'level': level,
        'all': ALL,
        'cells': {r: {c: told([((r, c), None)]) for c in columns} for r in rows},
        'by_column': by_column,
        'by_row': by_row,
    }


def verdict(found: Mapping[str, Any]) -> list[str]:
    """What the columns and the rows bring, in plain words, whichever way it falls."""
    rows, columns = found['rows'], found['columns']

    def judged(what, mean, cells, metric):
        words = [tables.judge(cell, metric) for cell in cells]
        kinds = (k for k in ('better', 'worse', 'no clear difference') if k in words)
        counts = ', '.join(f'{kind} in {words.count(kind)}' for kind in kinds)
        by, low, high = (tables.percent(mean[k], sign=True) for k in ('mean', 'low', 'high'))
        level = f'{100 * found["level"]:g} %'
        return f'{what}: {by} points ({level} interval {low} to {high}) in the mean; {counts}.'

    said = []
    for column, by in found['by_column'].items():
        for metric, name in (('auroc', 'mean AUROC'), ('id_acc', 'ID accuracy')):
            if metric in by[ALL]:
                what = f'“{column}” against “{columns[0]}”, {name} of the {len(rows)} rows'
                said.append(judged(what, by[ALL][metric], [by[r][metric] for r in rows], metric))
    for column, cell in found['by_row'].get(ALL, {}).items():
        what = f'The other rows against “{rows[0]}”, mean AUROC with “{column}”'
        cells = [found['by_row'][row][column]['auroc'] for row in rows[1:]]
        said.append(judged(what, cell['auroc'], cells, 'auroc'))
    return said
