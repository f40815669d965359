"""results.csv and results.json, and OpenOOD's layouts of the same."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from jaxood import metrics
from jaxood.report.tables import COLUMNS, TEST, Scored, families


def write_results(folder, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    """Writes results.csv (the rows) and results.json (rows and summary) into `folder`.

    Fractions with every digit, keys sorted, no clock, path or host: equal runs give equal bytes.
    """
    folder = epath.Path(folder)
    (folder / 'results.csv').write_text(_csv(COLUMNS, rows))
    content = {'rows': list(rows), 'summary': summary}
    dumped = json.dumps(content, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    (folder / 'results.json').write_text(dumped + '\n')


OPENOOD = ('dataset', 'FPR@95', 'AUROC', 'AUPR_IN', 'AUPR_OUT', 'ACC')
LEADERBOARD = (
    *('Training', 'Postprocessor', 'Near-OOD_AUROC', 'Far-OOD_AUROC', 'ID_Accuracy'),
    *('Outlier_Data', 'Arch', 'Additional_Description'),
)


def openood(scored: Sequence[Scored], groups: Mapping[str, str], facts: Mapping) -> dict[str, str]:
    """File name -> contents, as OpenOOD v1.5 lays them out.

    `openood/<arm>_<seed>/<method>/ood.csv` has a row for each set and the means `nearood` and
    `farood`, in percent; FPR@95 is `fpr95_ood`, AUPR the trapezoid, as there.
    `openood/leaderboard.csv` has a row for each arm and method, "88.03 ± 0.25" over seeds.
    """
    files, runs = {}, {}
    for s in scored:
        rows = {}
        for name in groups:
            row = metrics.evaluate(
                s.scores[TEST], s.scores[name], correct=s.correct, convention='openood'
            )
            kept = ('fpr95_ood', 'auroc', 'aupr_in', 'aupr_out', 'id_acc')
            rows[name] = [None if row[k] is None else 100 * row[k] for k in kept]
        for name, members in families(groups).items():
            if name != 'mean:all':
                columns = zip(*(rows[m] for m in members))
                rows[f'{name[5:]}ood'] = [None if None in c else sum(c) / len(c) for c in columns]
        runs.setdefault((s.arm, s.method), []).append(rows)
        table = [
            dict(zip(OPENOOD, [name, *('' if v is None else f'{v:.2f}' for v in row)]))
            for name, row in rows.items()
        ]
        files[f'openood/{s.arm}_{s.seed}/{s.method}/ood.csv'] = _csv(OPENOOD, table)
    board = []
    for (arm, method), tables in runs.items():
        seed = next(seed for name, seed in facts if name == arm)
        about = facts[arm, seed]
        cells = [about['training'], method]
        for name, place in (('nearood', 1), ('farood', 1), (next(iter(groups)), 4)):
            values = [t[name][place] for t in tables if name in t and t[name][place] is not None]
            cells.append(_spread(values))
        board.append(dict(zip(LEADERBOARD, [*cells, about['outliers'], about['backbone'], arm])))
    return files | {'openood/leaderboard.csv': _csv(LEADERBOARD, board)}


def _spread(values):
    if not values:
        return ''
    mean = sum(values) / len(values)
    std = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
    return f'{mean:.2f} ± {std:.2f}'


def _csv(columns, rows) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
