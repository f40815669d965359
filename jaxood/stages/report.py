"""Puts all runs side by side: results.csv, results.json, report.html."""

import json
import os
from collections import Counter

import ml_collections
import numpy as np

from jaxood import artefacts, console, hosts
from jaxood import config as configs
from jaxood.errors import ConfigError, unknown
from jaxood.report import figures, grid, page, published, results, tables, terminal
from jaxood.stages import common, score, synthesise, words
from jaxood.stages.common import Context
from jaxood.stages.parts import restorers, scorers
from jaxood.stages.sections import SECTIONS

VERSION = 6
SEES = 'all'
ACROSS = True  # one task for all runs
NEEDS = ('scores', 'report')
GRID = ('rows', 'columns', 'scores')
PUBLISHED = ('results.csv', 'results.json', 'report.html', 'openood/*.csv', 'openood/*/*/*.csv')


def applies(config) -> bool:
    return True


def inputs(config) -> tuple[str, ...]:
    made = ()
    if 'synthesise' in config.stages and synthesise.applies(config):
        made = synthesise.inputs(config)
        made += words.inputs(config) if synthesise.reads_words(config) else ()
    pixels = tuple(s for s in ('reconstruct_pixels',) if s in config.stages)
    return ('score', *score.inputs(config), *made, *pixels)


def needs_labels(config) -> bool:
    return False


def settings(config) -> dict:
    return common.settings(config, 'report')


def check(config) -> None:
    c = config.report
    configs.whole(c, 'config.report', 'draws', minimum=10)
    configs.whole(c, 'config.report', 'gallery')
    configs.true_or_false(c, 'config.report', 'tsne')
    for key in ('every_score', 'openood'):
        if c.get(key) is not None:
            configs.true_or_false(c, 'config.report', key)
    labels = [method.label for method in scorers.methods(config)]
    if c.score not in labels:
        raise ConfigError(unknown(f'config.report.score={c.score!r}', c.score, labels))
    arms = list(configs.arms(config))
    if c.get('arm') is not None and c.arm not in arms:
        raise ConfigError(unknown(f'config.report.arm={c.arm!r}', c.arm, arms))
    if c.get('grid') is not None:
        check_grid(configs.plain(c.grid), arms, labels, c.get('arm') or arms[0])
    for section in SECTIONS.values():
        section.check(config)


def check_grid(layout, arms, labels, chief: str) -> None:
    """Raises ConfigError unless every cell is an arm, the report's own among them, and every row's
    score is scored."""
    where = 'config.report.grid'
    for key in layout:
        if key not in GRID:
            raise ConfigError(unknown(f'{where}.{key}', key, GRID))
    for key in ('rows', 'columns'):
        if not isinstance(layout.get(key), tuple) or not layout[key]:
            raise ConfigError(f'{where}.{key}={layout.get(key)!r}: give a tuple of names.')
    cells = [grid.arm(row, column) for row in layout['rows'] for column in layout['columns']]
    for name in cells:
        if name not in arms:
            raise ConfigError(unknown(f'{where}: the arm of a cell, {name!r},', name, arms))
    if chief not in cells:
        raise ConfigError(unknown(f'config.report.arm={chief!r}', chief, cells))
    for row, label in (layout.get('scores') or {}).items():
        if row not in layout['rows']:
            raise ConfigError(unknown(f'{where}.scores.{row}', row, layout['rows']))
        if label not in labels:
            raise ConfigError(unknown(f'{where}.scores.{row}={label!r}', label, labels))


def fits(config, data, devices) -> None:
    if not data.ood:
        raise ConfigError(
            'there is no OOD set to report on. Name one in config.data.ood, or hold classes out '
            '(config.data.held_out).'
        )
    for section in SECTIONS.values():
        if section.applies(config):
            section.fits(config, data)


def run(context: Context) -> dict:
    c, data = context.config.report, context.data
    runs = context.runs
    scored = [s for r in runs for s in score.read(r, context.inputs, data.ood)]
    facts = {(r.arm, r.seed): describe(r, context.inputs) for r in runs}
    chief = c.get('arm') or runs[0].arm
    rows = tables.long_rows(scored, data.groups, facts)
    summary = tables.summary(scored, data.groups, main=c.score, draws=c.draws)
    arms = list(dict.fromkeys(r.arm for r in runs))
    grids = make_grids(context, scored)
    drawn, beside = neighbours(c, chief, arms)
    comparisons = {
        arm: tables.compare(scored, data.groups, chief, arm, c.score, draws=c.draws)
        for arm in beside
        if arm != chief
    }
    if grids:
        verdict = '\n'.join(grid.verdict(next(iter(grids.values()))))
    else:
        verdict = tables.verdict(summary, c.score, chief, comparisons)
    main = next(r for r in runs if r.arm == chief)
    told = {k: v.tell(context) for k, v in SECTIONS.items() if v.applies(main.config)}
    whole = summary | {'verdict': verdict, 'grids': grids}
    whole |= {'sections': {name: found for name, (found, _) in told.items()}}
    if hosts.first():
        results.write_results(context.artefact.folder, rows, whole)
    if c.get('openood'):
        for name, text in results.openood(scored, data.groups, facts).items():
            artefacts.write(context.artefact / name, text)
    shown = [s for s in scored if s.arm in drawn]
    content = page.Content(
        title=c.title,
        what=what_was_run(context, arms),
        summary=summary,
        method=c.score,
        verdict=verdict,
        grids=grids,
        main=chief,
        comparisons=comparisons,
        arms={r.arm: about_arm(facts[r.arm, r.seed]) for r in runs},
        outliers=galleries(context),
        sections=[part for _, part in told.values()],
        histograms=figures.score_histograms(shown, c.score),
        roc=figures.roc_curves(shown, c.score, arms=arms),
        tsne=tsne(context, main),
        tsne_about=f't-SNE of the penultimate features of {main.name}.',
        mistaken=mistaken(context, scored, main),
        curves=curves(context, drawn),
        published=published.beside(
            summary,
            {r.arm: made_of(r, context.inputs) for r in _first_runs(context)},
            data.num_classes,
        ),
        every_score=bool(c.get('every_score')),
        costs=costs(context),
        score_costs=tables.score_costs(scored),
        settings=ml_collections.ConfigDict(configs.plain(main.config)).to_yaml(),
        facts=context.repro,
    )
    if hosts.first():
        page.write_report(context.artefact / 'report.html', content)
    return {}


def show(artefact, config) -> None:
    """Prints the tables and the verdict, on standard output."""
    summary = json.loads((artefact / 'results.json').read_text())['summary']
    if summary['grids']:
        terminal.print_grid(summary['grids']['own'])
    else:
        terminal.print_table(
            summary, config.report.score, every_score=bool(config.report.get('every_score'))
        )
    print(summary['verdict'])
    for name, found in summary['sections'].items():
        SECTIONS[name].show(found, config)


def describe(run, inputs) -> dict[str, str]:
    """The columns of results.csv that say what a run is."""
    config = run.config
    backbone, source = made_of(run, inputs)
    trained = not source
    restored = score.restores(config)
    others = (f'{k}={v}' for k, v in backbone.items() if k != 'name' and v is not None)
    return {
        'run_id': run.name,
        'id_dataset': dataset_name(config.data.id),
        'backbone': ' '.join([backbone['name'], *others]),
        'training': (config.detector.name if trained else f'pretrained ({source})')
        + (f', features restored by {restorers.describe(config)}' if restored else ''),
        'outliers': describe_outliers(config) if trained else 'none',
    }


def made_of(run, inputs) -> tuple[dict, str]:
    """The backbone's section, and the source of pretrained weights ('' if trained here)."""
    network = inputs[f'{run.name}/{score.detector(run.config)}'].done
    return configs.plain(network['backbone']), network.get('source', '')


def describe_outliers(config) -> str:
    outliers = configs.plain(config.outliers)
    made = outliers.pop('name')
    if made == 'none':
        return made
    if outliers.pop('source', None) and synthesise.takes_given(config):
        outliers = {'of': dataset_name(config.outliers.source)} | outliers
    details = (f'{k}={v}' for k, v in outliers.items() if k not in synthesise.LAYOUT)
    return f'{made} ({", ".join(details)}, filter {config.filter.name})'


def dataset_name(section) -> str:
    """What to call a set of images: TFDS' name, or that of the file or folder."""
    if section.get('dataset'):
        return section.dataset
    path = section.get('train') or section.get('path')
    if not path:
        return section.name
    return os.path.basename(os.path.normpath(path)).partition('.')[0].removesuffix('_train')


def about_arm(facts) -> str:
    """The small print under an arm's name."""
    made, training = facts['outliers'], facts['training']
    return training if 'pretrained' in training or 'restored' in training else made


def what_was_run(context: Context, arms) -> str:
    """The page's first paragraph."""
    data, config = context.data, context.config
    seeds = len({run.seed for run in context.runs})
    trained = score.detector(config) == 'train_detector'
    classes = 'without labels'
    if common.PSEUDO in config.stages:
        classes = f'{context.seen_by(context.runs[0]).num_classes} classes found without labels'
    elif data.class_names:
        names = ', '.join(data.class_names[:20]) + (', ...' if data.num_classes > 20 else '')
        classes = f'{data.num_classes} classes ({names})'
    restored = score.restores(config)
    each = ''
    if trained or restored:
        each = f', each with {seeds} training seed{"s" if seeds > 1 else ""}'
    what = 'Trained' if trained else 'Pretrained; scores fitted'
    if restored:
        what = f'{what.partition(";")[0]} network; restorers of its features trained'
    text = (
        f'{what} on {len(data.id.train)} images of {dataset_name(config.data.id)}, '
        f'{classes}, {data.shape[0]} x {data.shape[1]} pixels; '
        f'{len(arms)} arm{"s" if len(arms) > 1 else ""}'
        f'{each}. Tested on {len(data.id.test)} ID images and '
        + ', '.join(f'{len(v)} of {k} ({data.groups[k]}-OOD)' for k, v in data.ood.items())
    )
    if not trained or restored:
        return f'{text}. {about_tuning(context)}'
    shared = (
        'the diffusion model, its outliers and the judges are made once and shared by all seeds'
    )
    return f'{text}. Seeds repeat the training of the detectors; {shared}.'


def about_tuning(context: Context) -> str:
    """What settings were chosen on, and what to make of it."""
    config, data = context.config, context.data
    if not any(method.sweep for method in scorers.methods(config)):
        return 'All settings are defaults; none was chosen on data.'
    kind = 'distorted ID validation images (means of two, jigsaws, inversions)'
    against = kind if data.validation_ood is None else 'images of a validation OOD set'
    seen = config.data.get('validation_from') != 'test'
    return (
        f'Rows “{scorers.VALIDATED}” have settings chosen by AUROC of {len(data.id.validation)} ID '
        f'validation images against {len(data.tuning)} {against}, never on a test set. '
        + (
            'The validation images are part of the training split, which the networks may have '
            'seen: --config.data.validation_from=test takes them from the test split instead.'
            if seen
            else 'The validation images come from the test split and have left the test set.'
        )
    )


def make_grids(context: Context, scored) -> dict[str, dict]:
    """`grid.grid` of the experiment, if it is one: under each row's own score first, then under
    each score for all rows, so that what a row brings is not what its score brings."""
    c = context.config.report
    if c.get('grid') is None:
        return {}
    layout, groups = configs.plain(c.grid), context.data.groups
    own = dict.fromkeys(layout['rows'], c.score) | (layout.get('scores') or {})
    labels = [method.label for method in scorers.methods(context.config)]
    methods = {'own': own} | dict(zip(labels, labels))
    make = lambda m: grid.grid(scored, groups, layout['rows'], layout['columns'], m, draws=c.draws)
    return {name: make(method) for name, method in methods.items()}


def neighbours(c, chief: str, arms: list[str]) -> tuple[list[str], list[str]]:
    """(arms that are drawn, arms that the chief one is compared with): those of its row, and those
    of its row and column; all where arms are no grid."""
    if c.get('grid') is None:
        return arms, arms
    cells = [(r, k) for r in c.grid.rows for k in c.grid.columns]
    row, column = next(cell for cell in cells if grid.arm(*cell) == chief)
    drawn = [grid.arm(r, k) for r, k in cells if r == row]
    return drawn, [grid.arm(r, k) for r, k in cells if r == row or k == column]


def galleries(context: Context) -> dict[str, page.Outliers]:
    """Kept and rejected candidates of each kind of outliers, by the first arm that has them."""
    found = {}
    for folder, arms in context.sharing('synthesise'):
        run = next(r for r in context.runs if r.arm == arms[0])
        index = [json.loads(line) for line in (folder / 'index.jsonl').read_text().splitlines()]
        count = context.config.report.gallery
        filtered = run.config.filter.name != 'none'
        found[run.arm] = page.Outliers(
            about=describe_outliers(run.config),
            shared=arms[1:],
            num_candidates=len(index) if filtered else None,
            num_kept=sum(row['kept'] for row in index) if filtered else None,
            reasons=Counter(_reason(row) for row in index if not row['kept']),
            kept=figures.gallery(artefacts.load_table(folder / 'outliers')['images'][:count], 16),
            rejected=figures.gallery(
                artefacts.load(folder / 'rejected.npz')['images'][: count // 2], 16
            ),
        )
    return found


def tsne(context: Context, run):
    """A map of test, OOD and outlier features of one detector."""
    if not context.config.report.tsne:
        return figures.Markup()
    features = artefacts.load(context.inputs[f'{run.name}/score'] / 'features.npz')
    named = {'ID test' if k == score.TEST else k: v for k, v in features.items()}
    return figures.tsne_figure(figures.tsne(named))


def mistaken(context: Context, scored, run) -> dict:
    """The ID images that look most outlying to one detector, the OOD images that look least so."""
    data, method = context.seen_by(run), context.config.report.score
    s = next(s for s in scored if (s.arm, s.seed, s.method) == (run.arm, run.seed, method))
    names = data.id.train.class_names
    look = lambda examples: _Images(examples)
    test = data.id.test
    found = {
        f'ID images with the highest scores ({run.name})': figures.mistaken(
            *(look(test), s.scores[score.TEST], s.pred[score.TEST]),
            highest=True,
            label=test.labels,
            class_names=names,
        )
    }
    for name, examples in data.ood.items():
        found[f'{name} with the lowest scores ({run.name})'] = figures.mistaken(
            look(examples), s.scores[name], s.pred[name], highest=False, class_names=names
        )
    return found


LOGS = {'train_detector': 'log.jsonl', 'train_restorer': 'until_final/log.jsonl'}


def curves(context: Context, drawn):
    """Loss by step of each generator, and of the first detector of the arms that are drawn."""
    panels: dict[str, dict] = {}
    for folder, arms in context.sharing('train_diffusion'):
        lines = panels.setdefault('train_diffusion', {})
        lines[arms[0]] = console.read_log(folder / 'log.jsonl')
    for run in _first_runs(context):
        for stage, log in LOGS.items():
            folder = context.inputs.get(f'{run.name}/{stage}')
            if folder is not None and run.arm in drawn:
                panels.setdefault(stage, {})[run.arm] = console.read_log(folder / log)
    return figures.learning_curves(panels, arms=[run.arm for run in _first_runs(context)])


def costs(context: Context) -> list[dict]:
    """Seconds and images/s of what this run stands on, as measured when it was made, by arm."""
    found, seen, order = {}, set(), list(context.config.stages)
    for name, artefact in context.inputs.items():
        arm, _, stage = name.rsplit('/', 2)
        if artefact.fingerprint not in seen:
            seen.add(artefact.fingerprint)
            found.setdefault((order.index(stage), stage, arm), []).append(artefact.done)
    rows = []
    for (_, stage, arm), facts in sorted(found.items(), key=lambda item: item[0]):
        speeds = [f['images_per_s'] for f in facts if f.get('images_per_s')]
        rows.append(
            {
                'stage': stage,
                'what': arm,
                'times': len(facts),
                'seconds': sum(f['seconds'] for f in facts) / len(facts),
                'images_per_s': sum(speeds) / len(speeds) if speeds else None,
            }
        )
    return rows


class _Images:
    """images[i] of an `Examples`, read when asked for."""

    def __init__(self, examples):
        self.examples = examples

    def __getitem__(self, i):
        return self.examples.take(np.array([i]))[0]


def _first_runs(context: Context):
    return list({run.arm: run for run in reversed(context.runs)}.values())[::-1]


def _reason(row) -> str:
    if 'why' not in row:
        return ''
    if 'margin' in row:
        return 'CLIP sees an ID class rather than the word'
    return 'judges are as sure of a class as of ID images'
