"""What an independent classifier makes of the outliers, and how far they lie from the ID images."""

import json

import numpy as np

from jaxood import artefacts, console, frechet, metrics
from jaxood import config as configs
from jaxood.data.examples import Examples
from jaxood.errors import ConfigError, unknown
from jaxood.models import pretrained
from jaxood.report import page, tables
from jaxood.scores import logit
from jaxood.stages import load_weights, score
from jaxood.stages.common import Context
from jaxood.stages.parts import networks

EXTRACTOR = 'config.report.extractor'
ROWS = 10_000  # outliers that are looked at
HEADER = (
    *('outliers of', 'images', 'entropy', 'above an ID image, %', 'shows the classes asked for, %'),
    *('by chance, %', 'Fréchet distance', 'its floor'),
)


def applies(config) -> bool:
    return config.report.get('judge') is not None


def check(config) -> None:
    """Raises ConfigError for a judge that is no arm, or an extractor that cannot be read."""
    c = config.report
    arms = list(configs.arms(config))
    if c.get('judge') is not None and c.judge not in arms:
        raise ConfigError(unknown(f'config.report.judge={c.judge!r}', c.judge, arms))
    if c.get('extractor') is not None:
        if c.get('judge') is None:
            raise ConfigError(
                'config.report.extractor measures outliers in the section of '
                'config.report.judge, which names no arm. Name one that trains without outliers.'
            )
        load_weights.load(c.extractor, EXTRACTOR)


def fits(config, data) -> None:
    """Raises ConfigError for an extractor that does not take such images."""
    if config.report.get('extractor') is None:
        return
    wanted = len(load_weights.load(config.report.extractor, EXTRACTOR).preprocessing.mean)
    if data.shape[-1] != wanted:
        raise ConfigError(
            f'{EXTRACTOR}={config.report.extractor!r} takes images of {wanted} channels, these '
            f'have {data.shape[-1]}. Set config.data.channels={wanted}, or leave it unset to take '
            'the features of config.report.judge.'
        )


def tell(context: Context) -> tuple[list[dict], page.Section]:
    rows = examine(context)
    return rows, section(rows, context.config.report.judge)


def examine(context: Context) -> list[dict]:
    """One row for each kind of outliers of the experiment, under the detector of the arm that
    `config.report.judge` names. It is independent only if that arm trains without outliers.

    Returns:
        Dicts with `outliers` (arms that share them), `count`, `entropy_id`, `entropy` (mean, nats),
        `auroc` (of outliers' entropy over ID test images', with interval), `recognised` (share
        whose top classes are those asked for: both of a mixture, the one of a pure class; with
        interval; None where none was asked for), `chance`, `extractor` (whose features the Fréchet
        distance is of, and what it sees), `reference` (ID training images), `frechet`, `floor`,
        `caution`.
    """
    config, data = context.config, context.data
    run = next(r for r in context.runs if r.arm == config.report.judge)
    judge = networks.load(
        context.inputs[f'{run.name}/{score.detector(run.config)}'],
        *(run.config, context.devices, context.num_rows()),
    )
    extractor, seen = (
        judge,
        f'the penultimate layer of {run.name}, images as the detector sees them',
    )
    if config.report.get('extractor') is not None:
        found = load_weights.load(config.report.extractor, EXTRACTOR)
        extractor = networks.pretrained(found, config, context.devices, context.num_rows())
        seen = about(found)
    ask = lambda network, examples, what: network.features(context.store, examples, what)
    id_entropy = _entropy(ask(judge, data.id.test, 'features of test, judge'))
    reference = ask(extractor, data.id.train, 'features of train, extractor')['features']
    whole = frechet.moments(reference, 'ID training images')
    rows = []
    for folder, arms in context.sharing('synthesise'):
        images = Examples(artefacts.load_table(folder / 'outliers')['images'][:ROWS])
        index = [json.loads(line) for line in (folder / 'index.jsonl').read_text().splitlines()]
        asked = [line for line in index if line['kept']][: len(images)]
        what = f'features of outliers, {arms[0]}'
        outputs, features = ask(judge, images, what), ask(extractor, images, what)['features']
        entropy = _entropy(outputs)
        draws = metrics.bootstrap(id_entropy, entropy, draws=config.report.draws)
        low, high = metrics.interval(draws)
        there = frechet.moments(features, 'outliers')
        count = min(len(images), len(reference) // 2)
        rows.append(
            {
                'outliers': arms,
                'count': len(images),
                'entropy_id': float(id_entropy.mean()),
                'entropy': float(entropy.mean()),
                'auroc': {'mean': metrics.auroc(id_entropy, entropy), 'low': low, 'high': high},
                **recognised(outputs['logits'], asked),
                'extractor': seen,
                'reference': len(reference),
                'frechet': frechet.distance(there, whole),
                'floor': frechet.floor(reference, count=count),
                'caution': frechet.caution(there, whole),
            }
        )
    return rows


def about(found: pretrained.Pretrained) -> str:
    """Which network the Fréchet distance is taken over, in words."""
    fid = found.backbone.get('variant') == 'fid' and found.backbone.get('width') == 1
    name = 'FID: ' if fid else ''
    size = found.preprocessing.size
    return (
        f'{name}{pretrained.words(found.backbone)} by {found.source}, images stretched to '
        f'{size} x {size} pixels, bilinear, antialiased where that shrinks them'
    )


def _entropy(outputs):
    return np.asarray(logit.entropy(outputs['logits']))


def recognised(logits: np.ndarray, asked: list[dict]) -> dict:
    """Share of candidates whose highest logits are those of the classes asked for, and chance."""
    K = logits.shape[1]
    order = np.argsort(-logits, axis=1)
    if 'second' in asked[0]:
        pair = np.sort([[line['first'], line['second']] for line in asked], axis=1)
        hits, chance = (np.sort(order[:, :2], axis=1) == pair).all(axis=1), 2 / (K * (K - 1))
    elif 'first' in asked[0]:
        hits, chance = order[:, 0] == [line['first'] for line in asked], 1 / K
    else:
        return {'recognised': None, 'chance': None}
    low, high = metrics.proportion(int(hits.sum()), len(hits))
    return {'recognised': {'mean': float(hits.mean()), 'low': low, 'high': high}, 'chance': chance}


def section(rows: list[dict], judge: str) -> page.Section:
    """The part of the page that shows `examine`'s rows."""
    share = lambda x: tables.with_interval(x) if x else '–'
    lines = [
        (
            (row['outliers'][0], _also(row['outliers'][1:])),
            f'{row["count"]:,}',
            f'{row["entropy"]:.3f}',
            share(row['auroc']),
            share(row['recognised']),
            tables.percent(row['chance']) if row['chance'] else '–',
            f'{row["frechet"]:.3g}',
            f'{row["floor"]:.3g}',
        )
        for row in rows
    ]
    parts = [
        f'The detector of {judge} looks at each kind. Its mean entropy on ID test images is '
        f'{rows[0]["entropy_id"]:.3f} nats.',
        page.Table(HEADER, lines),
    ]
    extractor = rows[0]['extractor']
    note = (
        'Asked for: both classes of a mixture among the two highest logits, or the one of a pure '
        'class on top. Fréchet distance (Heusel et al. 2017) to the '
        f'{rows[0]["reference"]:,} ID training images, over {extractor}; its floor is that of two '
        'disjoint sets of ID images of the same number.'
    )
    if not extractor.startswith('FID'):
        note += " It is not FID, which takes Inception's features."
    cautions = (f' {row["outliers"][0]}: {row["caution"]}' for row in rows if row['caution'])
    return page.Section(
        'judge', 'What an independent classifier sees', parts, note + ''.join(cautions)
    )


def _also(arms) -> str:
    return f'and of {", ".join(arms)}' if arms else ''


def show(rows: list[dict], config) -> None:
    """One line for each kind of outliers, on the terminal."""
    judge = config.report.judge
    for row in rows:
        first, more = row['outliers'][0], len(row['outliers']) - 1
        text = f'outliers of {first}{f" and {more} more" if more else ""}, as {judge} sees them: '
        a = row['auroc']
        text += (
            f'entropy {row["entropy"]:.3f} (ID test {row["entropy_id"]:.3f}; higher than an ID '
            f'image in {100 * a["mean"]:.1f} %, {100 * a["low"]:.1f} to {100 * a["high"]:.1f}); '
        )
        if r := row['recognised']:
            text += (
                f'shows the classes asked for in {100 * r["mean"]:.1f} % ({100 * r["low"]:.1f} to '
                f'{100 * r["high"]:.1f}; chance {100 * row["chance"]:.1f}); '
            )
        text += f'Fréchet distance {row["frechet"]:.3g} (floor {row["floor"]:.3g})'
        console.say(text)
    if rows:
        console.say(
            f'Fréchet distances to {rows[0]["reference"]} ID training images, over '
            f'{rows[0]["extractor"]}'
        )
