"""What an independent classifier makes of the outliers, and how far they lie from the ID images."""

import json

import numpy as np

from jaxood import artefacts, console, frechet, metrics
from jaxood.data.examples import Examples
from jaxood.scores import logit
from jaxood.stages import networks, score
from jaxood.stages.common import Context

ROWS = 10_000  # outliers that are looked at


def examine(context: Context) -> list[dict]:
    """One row for each kind of outliers of the experiment, under the detector of the arm that
    `config.report.judge` names. It is independent only if that arm trains without outliers.

    Returns:
        Dicts with `outliers` (arms that share them), `count`, `entropy_id`, `entropy` (mean, nats),
        `auroc` (of outliers' entropy over ID test images', with interval), `recognised` (share
        whose top classes are those asked for: both of a mixture, the one of a pure class; with
        interval; None where none was asked for), `chance`, `frechet`, `floor`, `caution`.
    """
    config, data = context.config, context.data
    run = next(r for r in context.runs if r.arm == config.report.judge)
    network = networks.load(
        context.inputs[f'{run.name}/{score.detector(run.config)}'],
        *(run.config, context.devices, context.num_rows()),
    )
    features = lambda examples, what: network.features(context.store, examples, what)
    id_test = features(data.id.test, 'features of test, judge')
    reference = features(data.id.train, 'features of train, judge')['features']
    whole = frechet.moments(reference, 'ID training images')
    sharing: dict[str, tuple] = {}
    for r in context.runs:
        folder = context.inputs.get(f'{r.name}/synthesise')
        if folder is not None:
            sharing.setdefault(folder.fingerprint, (folder, {}))[1][r.arm] = None
    rows = []
    for folder, arms in sharing.values():
        images = artefacts.load(folder / 'outliers.npz')['images'][:ROWS]
        outputs = features(Examples(images), f'features of outliers, {next(iter(arms))}')
        index = [json.loads(line) for line in (folder / 'index.jsonl').read_text().splitlines()]
        asked = [line for line in index if line['kept']][: len(images)]
        a, b = (np.asarray(logit.entropy(o['logits'])) for o in (id_test, outputs))
        count = min(len(images), len(reference) // 2)
        low, high = metrics.interval(metrics.bootstrap(a, b, draws=config.report.draws))
        there = frechet.moments(outputs['features'], 'outliers')
        rows.append(
            {
                'outliers': list(arms),
                'count': len(images),
                'entropy_id': float(a.mean()),
                'entropy': float(b.mean()),
                'auroc': {'mean': metrics.auroc(a, b), 'low': low, 'high': high},
                **recognised(outputs['logits'], asked),
                'frechet': frechet.distance(there, whole),
                'floor': frechet.floor(reference, count=count),
                'caution': frechet.caution(there, whole),
            }
        )
    return rows


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


def show(rows: list[dict], judge: str) -> None:
    """One line for each kind of outliers, on the terminal."""
    for row in rows:
        text = f'outliers of {", ".join(row["outliers"])}, as {judge} sees them: '
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
