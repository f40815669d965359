"""What is restored, from which depth it is restored best, and what training changed."""

import collections
import dataclasses

import numpy as np

from jaxood import console, metrics
from jaxood.report import figures, page
from jaxood.stages import score
from jaxood.stages.common import TEST, Context
from jaxood.stages.parts import restorers, scorers

FIRST, LAST = 'after the first epoch', 'after the last epoch'


def applies(config) -> bool:
    return score.restores(config)


def check(config) -> None:
    """Its settings are those of the stages that it tells of."""


def fits(config, data) -> None:
    """It takes any data that these stages take."""


def tell(context: Context) -> tuple[dict, page.Section]:
    runs = context.runs
    scored = [s for run in runs for s in score.read(run, context.inputs, context.data.ood)]
    arms = {run.arm: describe(context, run) for run in reversed(runs)}
    arms = dict(reversed(arms.items()))
    curves = over_depths(context, scored)
    found = {'arms': arms, 'curves': curves}
    header = ('arm', 'restorer', 'parameters', 'features', 'loss')
    rows = [(arm, *(facts[k] for k in header[1:])) for arm, facts in arms.items()]
    parts = [labels_seen(context), page.Table(header, rows)]
    if any(len(points) > 1 for lines in curves.values() for points in lines.values()):
        parts += ['Mean AUROC over the OOD sets, in percent, by the depth t restored from:']
        parts += [figures.over_settings(curves, 'depth t', 'mean AUROC, %')]
    if pair := snapshots(context):
        chief = context.config.report.get('arm') or runs[0].arm
        parts += [f'Errors of {chief} {FIRST} (left) and {LAST} (right):']
        parts += [histograms(scored, chief, *pair)]
    note = (
        'Loss: mean squared error over all depths at the end of training; an untrained restorer '
        f'has {next(iter(arms.values()))["untrained"]:.5f}, (c - M)/c of c entries in M blocks.'
    )
    return found, page.Section('restoration', 'Restored features', parts, note)


def labels_seen(context: Context) -> str:
    """Whether the frozen network was told the ID classes, in words."""
    config = context.config
    classes = context.data.num_classes
    network = context.inputs[f'{context.runs[0].name}/{score.detector(config)}'].done
    source = network.get('source')
    if source and network['num_classes'] != classes:
        return (
            f'The frozen network is {source}’s, trained on {network["num_classes"]} classes of '
            'other images; no label of the ID set was used.'
        )
    return (
        f'The frozen network ({source or "trained in this run"}) has learned the {classes} ID '
        'classes from their labels. The paper’s has not: it was trained on ImageNet. So these '
        'figures are not those of its unsupervised setting; the restorer itself saw no label.'
    )


def describe(context: Context, run) -> dict:
    """Facts of one arm's restorer, for the table."""
    done = context.inputs[f'{run.name}/{score.RESTORER}'].done
    c, blocks = done['edges'][-1], len(done['taps'])
    return {
        'restorer': restorers.describe(run.config),
        'parameters': f'{done["parameters"]:,}',
        'features': f'{c} of {", ".join(done["taps"])} ({run.config.taps.pool})',
        'loss': f'{done["loss"]:.4f}',
        'untrained': (c - blocks) / c,
    }


def over_depths(context: Context, scored) -> dict[str, dict[str, dict[int, float]]]:
    """arm -> score -> depth -> mean AUROC over OOD sets and seeds, in percent."""
    found = collections.defaultdict(lambda: collections.defaultdict(dict))
    for s in scored:
        entry = s.settings['name']
        depth = scorers.depth_of(s.settings, f'config.scores.{s.method}')
        plain = {'name', 'depth'} >= {k for k, v in s.settings.items() if v}
        if depth is None or s.chosen != 'default' or not plain:
            continue
        aurocs = [metrics.auroc(s.scores[TEST], v) for k, v in s.scores.items() if k != TEST]
        found[s.arm][entry].setdefault(depth, []).append(100 * np.mean(aurocs))
    means = lambda points: {t: float(np.mean(values)) for t, values in points.items()}
    lines = lambda by: {name: means(points) for name, points in by.items()}
    return {arm: lines(by) for arm, by in found.items()}


def snapshots(context: Context) -> tuple[str, str] | None:
    """Labels of two scores that differ in nothing but the restorer's snapshot."""
    by = {}
    for method in scorers.methods(context.config):
        section = dict(method.section)
        if section['name'] == 'mse' and not method.sweep:
            snapshot = section.get('snapshot', 'final')
            by.setdefault(section.get('depth'), {}).setdefault(snapshot, method.label)
    return next(((d['initial'], d['final']) for d in by.values() if len(d) == 2), None)


def histograms(scored, chief: str, initial: str, final: str):
    """Errors under both snapshots, side by side (figure 3 of the paper)."""
    renamed = [
        dataclasses.replace(s, arm=name, method='mse')
        for label, name in ((initial, FIRST), (final, LAST))
        for s in scored
        if s.arm == chief and s.method == label
    ]
    return figures.score_histograms(renamed, 'mse')


def show(found: dict, config) -> None:
    """One line for each arm's restorer, one for each curve."""
    for arm, facts in found['arms'].items():
        console.say(
            f'{arm}: {facts["restorer"]}, {facts["parameters"]} parameters, restores '
            f'{facts["features"]}; loss {facts["loss"]} (untrained {facts["untrained"]:.5f})'
        )
    for arm, lines in found['curves'].items():
        for name, points in lines.items():
            if len(points) > 1:
                told = ', '.join(f't={t} {v:.2f}' for t, v in points.items())
                console.say(f'{arm}: mean AUROC of {name} by depth: {told}')
