"""The result on the terminal."""

import sys
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxood.report.tables import (
    MEAN,
    NAMES,
    SHOWN,
    TEST,
    cell,
    is_best,
    is_best_method,
    methods,
    percent,
    ranked,
    settings_of,
    shown_columns,
    title,
)


def print_table(
    summary: Mapping[str, Any],
    method: str,
    *,
    every_score: bool = False,
    console: Console | None = None,
) -> None:
    """The result on the terminal: the main score by arm and set, then all methods' mean AUROC.

    Made for 100 columns: four sets (or means) beside each other, more in a table below.

    Args:
        every_score: also FPR95-ID and AUROC of every method and set, a table an arm.
    """
    console = console or Console(width=None if sys.stdout.isatty() else 200)
    arms = {arm: escape(arm) for arm in summary['cells']}
    columns = shown_columns(summary['groups'])
    for start in range(0, len(columns), 4):
        chunk = columns[start : start + 4]
        table = _table(f'Score {escape(method)}, percent' if start == 0 else None)
        table.add_column('arm', overflow='fold')
        if start == 0:
            table.add_column('ID\naccuracy ↑', justify='right', no_wrap=True)
        table.add_column('', no_wrap=True)
        for column in chunk:
            table.add_column(escape(_heading(summary, column)), justify='right')
        for arm, name in arms.items():
            lines = [[NAMES[m], *(_text(summary, arm, method, c, m) for c in chunk)] for m in SHOWN]
            accuracy = [_text(summary, arm, method, TEST, 'id_acc')] if start == 0 else []
            table.add_row(name, *accuracy, *('\n'.join(cells) for cells in zip(*lines)))
            table.add_section()
        console.print(table)
    if len(methods(summary)) > 1 and (len(arms) > 1 or not every_score):
        console.print(_every_score(summary, arms))
    if every_score:
        for arm in arms:
            _print_methods(summary, arm, console)
    console.print(f'[dim]{_footnote(summary)}[/dim]', highlight=False)


def _every_score(summary, arms):
    """Mean AUROC of each arm under each score, the longer list downwards."""
    table = _table('All scores: AUROC ↑, mean over OOD sets, percent')
    cells = {
        (arm, m): _text(summary, arm, m, MEAN, 'auroc') for arm in arms for m in methods(summary)
    }
    scores = {m: escape(m) for m in methods(summary)}
    down, across = ('arm', 'score') if len(arms) > len(scores) else ('score', 'arm')
    lists = {'arm': arms, 'score': scores}
    table.add_column(down)
    for name in lists[across].values():
        table.add_column(name, justify='right')
    for key, name in lists[down].items():
        at = lambda other, key=key: (key, other) if down == 'arm' else (other, key)
        table.add_row(name, *(cells[at(other)] for other in lists[across]))
    return table


def print_grid(found: Mapping[str, Any], *, console: Console | None = None) -> None:
    """Mean AUROC with its interval, and ID accuracy, of each cell of a `grid.grid`."""
    console = console or Console(width=None if sys.stdout.isatty() else 200)
    table = _table('AUROC ↑, mean over OOD sets (interval) / ID accuracy ↑, percent')
    for name in ('', 'score', *found['columns']):
        table.add_column(escape(name), justify='right' if name in found['columns'] else 'left')
    for row in found['rows']:
        cells = [found['cells'][row][column] for column in found['columns']]
        texts = [
            '{} ({}–{})'.format(*(percent(cell['auroc'][k]) for k in ('mean', 'low', 'high')))
            + (f' / {percent(cell["id_acc"]["mean"])}' if 'id_acc' in cell else '')
            for cell in cells
        ]
        table.add_row(escape(row), escape(found['scores'][row]), *texts)
    console.print(table)


def _print_methods(summary, arm, console):
    columns = shown_columns(summary['groups'])
    wide = max(1, (console.width - 50) // 17)
    for start in range(0, len(columns), wide):
        table = _table(f'{escape(arm)}: FPR95-ID ↓ / AUROC ↑, percent' if start == 0 else None)
        table.add_column('', justify='right')
        table.add_column('score', no_wrap=True)
        for column in columns[start : start + wide]:
            table.add_column(escape(_heading(summary, column)), justify='right', no_wrap=True)
        table.add_column('settings', overflow='fold', style='dim')
        for rank, method in enumerate(ranked(summary, arm), start=1):
            cells = [
                ' / '.join(_among(summary, arm, method, c, m) for m in ('fpr95_id', 'auroc'))
                for c in columns[start : start + wide]
            ]
            settings = escape(settings_of(summary, arm, method))
            table.add_row(str(rank), escape(method), *cells, settings)
        console.print(table)


def _among(summary, arm, method, column, metric):
    """A mean, bold where no method of the arm has a better one."""
    found = cell(summary, arm, method, column, metric)
    text = percent(found['mean'])
    return f'[bold]{text}[/bold]' if is_best_method(summary, arm, column, metric, found) else text


def _table(title):
    return Table(box=box.SIMPLE_HEAD, title=title, title_justify='left', title_style='bold')


def _footnote(summary):
    num_seeds = max(len(seeds) for seeds in summary['seeds'].values())
    several = f'Mean over {num_seeds} training seeds, ± standard deviation (population). '
    return (several if num_seeds > 1 else 'One training seed. ') + (
        'FPR95-ID: share of OOD accepted when 95 % of ID is accepted. FPR95-OOD: share of ID '
        'flagged when 95 % of OOD is caught. Bold: best of the arms (of the scores, in a table of '
        'one arm).'
    )


def _heading(summary, column):
    if column in summary['groups']:
        return f'{column}\n{summary["groups"][column]}, n = {summary["counts"][column]:,}'
    return title(column)


def _text(summary, arm, method, column, metric):
    found = cell(summary, arm, method, column, metric)
    if found is None:
        return '–'
    text = percent(found['mean'])
    if len(summary['seeds'][arm]) > 1 and column in (TEST, MEAN):
        text += f' ±{percent(found["std"])}'
    return f'[bold]{text}[/bold]' if is_best(summary, method, column, metric, found) else text
