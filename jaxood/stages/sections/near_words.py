"""The words near the ID classes, what was painted of them, and DOG's table of ways to do so."""

import csv
import io
import json

from jaxood import artefacts, console
from jaxood.report import figures, page, published, tables
from jaxood.stages import score
from jaxood.stages.common import Context
from jaxood.stages.parts import candidates

WORDS = 'words'
LISTED, PAINTED = 12, 48  # words of each kind that are listed for a class; images that are shown
CLASSES = 100  # that are listed
HEADER = ('class', 'kept', 'too far from the images', 'would show an ID class')


def applies(config) -> bool:
    return WORDS in config.stages and candidates.reads_words(config)


def check(config) -> None:
    """Its settings are those of the stages that it tells of."""


def fits(config, data) -> None:
    """It takes any data that these stages take."""


def tell(context: Context) -> tuple[dict, page.Section]:
    run = context.chief()
    kinds = [told(folder, arms) for folder, arms in context.sharing(WORDS)]
    ways = strategies(context)
    found = {'words': kinds, 'strategies': ways}
    parts: list = []
    for one in kinds:
        parts += [_about(one), page.Table(HEADER, _listing(one), prose=True)]
    parts += [
        f'Painted for {run.arm}, and under each image the class, and the word that it was painted '
        'from:',
        painted(context, run),
        'Each way to make outliers, FPR95 / AUROC in percent (ID-positive: the share of OOD images '
        'accepted where 95 % of ID images are). Published: the paper’s means over five OOD sets, '
        'WRN-40-2.',
        *(page.Table(*_strategy_table(label, rows)) for label, rows in ways.items()),
    ]
    note = (
        'Intervals: 95 % bootstrap over seeds and images, of the mean AUROC. Similarity: cosine of '
        'CLIP’s embeddings of the prompts of word and class; value: how far the word’s prompt is '
        'from the ID images (config.words.rule), below the threshold λ for those that are kept.'
    )
    return found, page.Section('near-words', 'Words near the classes', parts, note)


# ---- words ------------------------------------------------------------------------------------


def told(folder, arms) -> dict:
    """What `words` found, as plain values: of every class the words kept, far, and collided."""
    done = folder.done
    listed = {name: {'kept': [], 'far': [], 'collided': []} for name in done['classes']}
    for row in csv.DictReader(io.StringIO((folder / 'words.csv').read_text())):
        if row['kept'] == 'yes':
            kind = 'kept'
        else:
            kind = 'far' if row['value'] else 'collided'
        listed[row['class']][kind].append((row['word'], float(row['similarity'])))
    facts = ('vocabulary', 'collisions', 'candidates', 'kept', 'threshold', 'nearest_is_name')
    return {'arms': arms, 'classes': listed, 'nearest': done['nearest']} | {
        k: done[k] for k in facts
    }


def _about(one) -> str:
    arms = f'{", ".join(one["arms"][:3])}{" and more" if len(one["arms"]) > 3 else ""}'
    return (
        f'For {arms}: of {one["vocabulary"]:,} words {one["collisions"]:,} would show an ID class; '
        f'{one["candidates"]:,} are candidates, {one["kept"]:,} of them anchors (λ = '
        f'{one["threshold"]:.4f}). For {100 * one["nearest_is_name"]:.0f} % of the classes, what '
        'the class is compared by lies nearest to its own name.'
    )


def _listing(one):
    rows = []
    for name, kinds in list(one['classes'].items())[:CLASSES]:
        word, close = one['nearest'][name]
        cells = [_some(kinds[kind]) for kind in ('kept', 'far', 'collided')]
        rows.append(((name, f'nearest: {word} {close:.3f}'), *cells))
    return rows


def _some(words):
    """The nearest words, and under them how many there are."""
    if not words:
        return '–'
    text = ', '.join(f'{word} {similarity:.3f}' for word, similarity in words[:LISTED])
    return text, f'{len(words)} in all' if len(words) > LISTED else ''


def painted(context: Context, run):
    """The first outliers of a run, each with its class and word."""
    folder = context.inputs[f'{run.name}/synthesise']
    index = [json.loads(line) for line in (folder / 'index.jsonl').read_text().splitlines()]
    kept = [line for line in index if line['kept']]
    lines = sorted(kept[:PAINTED], key=lambda line: line['class'])
    images = artefacts.load_table(folder / 'outliers')['images']
    return figures.gallery(
        [images[line['outlier']] for line in lines],
        captions=[f'{line["class_name"]}: {line["word"]}' for line in lines],
    )


# ---- table 2 ----------------------------------------------------------------------------------


def strategies(context: Context) -> dict[str, list[dict]]:
    """By the report's own score, and by the energy alone: a row for each arm, with how its outliers
    were made, FPR95 and AUROC on every test set, and the published means of that way."""
    config, groups = context.config, context.data.groups
    labels = [config.report.score, *(k for k, v in config.scores.items() if _is_energy(k, v))]
    scored = [s for run in context.runs for s in score.read(run, context.inputs, context.data.ood)]
    found = {}
    for label in dict.fromkeys(labels):
        own = [s for s in scored if s.method == label]
        summary = tables.summary(own, groups, main=label, draws=config.report.draws)
        found[label] = [
            {
                'arm': run.arm,
                **_published(run, context.chief()),
                'cells': {
                    column: {
                        metric: tables.cell(summary, run.arm, label, column, metric)
                        for metric in ('fpr95_id', 'auroc')
                    }
                    for column in tables.shown_columns(groups)
                },
            }
            for run in {run.arm: run for run in context.runs}.values()
        ]
    return found


def _is_energy(label, section):
    return section.get('name', label) == 'energy'


def _published(run, chief) -> dict:
    """What the paper calls an arm's way, and its figures, if all else is as in the chief arm."""
    made, tokens = run.config.outliers.name, run.config.get('tokens') or {}
    label, means = published.dog_strategies(made, tokens.get('name', 'none') != 'none')
    if made != 'none' and _beside_the_way(run.config) != _beside_the_way(chief.config):
        label, means = f'{label}; made or trained otherwise', ()
    return {'paper': label, 'published': means}


def _beside_the_way(config):
    """What arms must share so that they differ in how outliers are made alone."""
    counts = {key: config.outliers.get(key) for key in candidates.COUNTS}
    return config.detector, config.filter, counts, config.words.k


def _strategy_table(label, rows):
    columns = list(rows[0]['cells'])
    lines = []
    for row in rows:
        cells = []
        for column in columns:
            fpr95, auroc = (row['cells'][column][m] for m in ('fpr95_id', 'auroc'))
            pair = f'{tables.percent(fpr95["mean"])} / {tables.percent(auroc["mean"])}'
            cells.append((pair, tables.with_interval(auroc)[1]))
        means = [f'{f:.2f} / {a:.2f}' for f, a in row['published']] or ['–', '–']
        lines.append(((row['arm'], row['paper']), *cells, *means))
    header = ('arm', *map(tables.title, columns), 'published, CIFAR-10', 'published, CIFAR-100')
    return header, lines, f'Ways to make outliers, score {label}'


def show(found: dict, config) -> None:
    """What became of the words, on the terminal; how the arms fared, the report says itself."""
    for one in found['words']:
        console.say(_about(one))
