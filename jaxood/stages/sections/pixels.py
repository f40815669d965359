"""Restoring features against restoring pixels: AUROC of both on the same images, and the pace."""

import numpy as np

from jaxood import artefacts, console
from jaxood.report import page, tables
from jaxood.stages import reconstruct_pixels, score
from jaxood.stages.common import TEST, VALIDATION, Context
from jaxood.stages.parts import scorers

STAGE = 'reconstruct_pixels'


def applies(config) -> bool:
    return STAGE in config.stages


def check(config) -> None:
    """Its settings are those of the stage that it tells of."""


def fits(config, data) -> None:
    """It takes any data that the stage takes."""


def tell(context: Context) -> tuple[dict, page.Section]:
    found = compare(context)
    counts, pace = found['counts'], found['pace']
    columns = [k for k in counts if k != TEST]
    header = ('score', 'mean AUROC, %', *columns, 'images/s', 'features are faster by')
    rows = []
    for name, row in found['rows'].items():
        cells = [tables.with_interval(row['auroc'][k]) for k in (tables.MEAN, *columns)]
        rows.append((name, *cells, _digits(row['images_per_s']), _times(row['ratio'])))
    parts = [
        f'Measured on few images alone, {", ".join(f"{n} of {k}" for k, n in counts.items())}, all '
        'scores on the same ones, and in this run: intervals are wide.',
        page.Table(header, rows),
    ]
    parts += [
        f'{label} minus {name}: {tables.percent(d["mean"], sign=True)} points of mean AUROC '
        f'({tables.percent(d["low"], sign=True)} to {tables.percent(d["high"], sign=True)}).'
        for (label, name), d in found['differences'].items()
    ]
    note = (
        f'Pixels: DDIM (η = 0) of an unconditional U-Net, {pace["calls"]} network calls an image '
        'over all depths; squared errors z-scored by as many held-out ID images. Images/s '
        'without compilation; of features from pixels to both snapshots, with the frozen network. '
        "The paper's own table has 999.3 against 11.4 images/s, 88 times, on an RTX 4090."
    )
    found['differences'] = {f'{a} - {b}': d for (a, b), d in found['differences'].items()}
    return found, page.Section('pixels', 'Features against pixels', parts, note)


def compare(context: Context) -> dict:
    """AUROCs of restoration scores and of the pixel-level ones on the same images, and the pace."""
    config = context.config
    run = context.chief()
    made = context.inputs[f'{run.name}/{STAGE}']
    pace, names = made.done, (TEST, *context.data.ood)
    arrays = {k: artefacts.load(made / f'{k}.npz') for k in (*names, VALIDATION)}
    single = list(reconstruct_pixels.calls(config)).index(config.pixels.single)
    depths = {
        f'pixels, {len(reconstruct_pixels.calls(config))} depths': slice(None),
        'pixels, one depth': slice(single, single + 1),
    }
    some = []

    def add(name, scores):
        nothing = np.full(len(scores[TEST]), -1, np.int32)
        some.append(tables.Scored(name, run.seed, 'restored', {}, scores, {}, nothing))

    ours = []
    for s in score.read(run, context.inputs, context.data.ood):
        if scorers.depth_of(s.settings, f'config.scores.{s.method}') is not None:
            ours.append(s.method)
            add(s.method, {k: s.scores[k][arrays[k]['rows']] for k in names})
    for name, chosen in depths.items():
        errors = {k: arrays[k]['errors'][:, chosen] for k in arrays}
        held_out = errors[VALIDATION]
        add(name, {k: reconstruct_pixels.scores(errors[k], held_out) for k in names})
    groups, draws = context.data.groups, config.report.draws
    summary = tables.summary(some, groups, main='restored', draws=draws)
    seconds = dict.fromkeys(ours, pace['features_s'])
    seconds |= zip(depths, (pace['pixels_s'], pace['single_s']))
    rows = {}
    for name, cost in seconds.items():
        cells = summary['cells'][name]['restored']
        rows[name] = {
            'auroc': {k: cells[k]['auroc'] for k in (tables.MEAN, *names[1:])},
            'images_per_s': 1 / cost,
            'ratio': cost / pace['features_s'] if name in depths else None,
        }
    best = config.report.score if config.report.score in ours else ours[0]
    differences = {
        (best, name): tables.compare(some, groups, best, name, 'restored', draws=draws)[
            tables.MEAN
        ]['auroc']
        for name in depths
    }
    counts = {k: len(arrays[k]['rows']) for k in names}
    return {'rows': rows, 'counts': counts, 'differences': differences, 'pace': pace}


def _digits(number: float) -> str:
    return f'{number:,.0f}' if number >= 100 else f'{number:.3g}'


def _times(ratio) -> str:
    return '–' if ratio is None else f'{_digits(ratio)} ×'


def show(found: dict, config) -> None:
    """Both ratios and both differences, with what they were measured on."""
    images = ', '.join(f'{n} of {k}' for k, n in found['counts'].items())
    pace = 1 / found['pace']['features_s']
    for name, row in found['rows'].items():
        if row['ratio'] is not None:
            console.say(
                f'{name}: {_digits(row["images_per_s"])} images/s, features {_digits(pace)}: '
                f'{_digits(row["ratio"])} times faster; mean AUROC '
                f'{tables.percent(row["auroc"][tables.MEAN]["mean"])} (on {images})'
            )
    for name, d in found['differences'].items():
        console.say(
            f'{name}: {tables.percent(d["mean"], sign=True)} points of mean AUROC '
            f'({tables.percent(d["low"], sign=True)} to {tables.percent(d["high"], sign=True)})'
        )
