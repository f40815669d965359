"""Scores the ID test set, the ID validation set and every OOD set by every method in the config."""

import functools
import json
import time

import jax
import numpy as np

from jaxood import artefacts, parallel
from jaxood import config as configs
from jaxood.data.examples import Examples
from jaxood.errors import ConfigError, UserError, blame
from jaxood.scores import SCORES
from jaxood.stages import classifiers, common, train_detector
from jaxood.stages.common import Context
from jaxood.train import checkpoint

VERSION = 2
SEES = 'all'
ACROSS = False
PUBLISHED = ()
VALIDATION, HELD_OUT_VALIDATION, TEST = 'validation', 'held_out_validation', 'test'
EMBEDDED = 300  # rows a set whose features are kept for the report's t-SNE


def applies(config) -> bool:
    return True


def inputs(config) -> tuple[str, ...]:
    return (
        ('train_detector', 'synthesise')
        if train_detector.uses_outliers(config)
        else ('train_detector',)
    )


def settings(config) -> dict:
    return common.settings(config, 'seeds', 'scores')


def check(config) -> None:
    if not config.scores:
        raise ConfigError(f'config.scores is empty. Name a score, such as {", ".join(SCORES)}.')
    for label, section in config.scores.items():
        _pick(label, section)


def fits(config, data, devices) -> None:
    for label, section in config.scores.items():
        k = _pick(label, section)[1].get('k', 1)
        if k > len(data.id.train):
            raise ConfigError(
                f'config.scores.{label}.k={k}, but there are only {len(data.id.train)} ID training '
                'images to be neighbours. Set k to that or less.'
            )


def _pick(label, section):
    where = f'config.scores.{label}'
    return configs.pick(SCORES, named(label, section), where, given=('bank', 'head'))


def named(label: str, section) -> dict:
    """A section of `config.scores`; its label is the score's name unless it gives another."""
    return {'name': label} | configs.plain(section)


def run(context: Context) -> dict:
    data = context.data
    axis_name = context.devices.axis_name
    model = train_detector.build(context.config, data.num_classes, axis_name)
    variables = checkpoint.load_weights(context.inputs['train_detector'] / 'weights')
    outputs = functools.partial(classifiers.outputs, context, model, variables)
    bank = outputs(data.id.train) | {'labels': data.id.train.labels}
    artefacts.save(context.artefact / 'bank.npz', **bank)
    sets = {VALIDATION: data.id.validation, TEST: data.id.test, **data.ood}
    if data.id.held_out_validation is not None:
        sets[HELD_OUT_VALIDATION] = data.id.held_out_validation
    known = {name: outputs(examples) for name, examples in sets.items()}
    head = variables['params']['head']
    for label, section in context.config.scores.items():
        started = time.monotonic()
        score = fit(label, section, bank, head, rows=context.num_rows())
        fit_s = time.monotonic() - started
        score(known[VALIDATION])  # compiles
        started = time.monotonic()
        scores = {name: score(out) for name, out in known.items()}
        score_s = time.monotonic() - started
        for name, out in known.items():
            labels = sets[name].labels if name in (TEST, VALIDATION) else None
            none = np.full(len(out['logits']), -1, np.int32)
            artefacts.save(
                context.artefact / f'{label}/{name}.npz',
                score=scores[name],
                pred=out['logits'].argmax(-1).astype(np.int32),
                label=none if labels is None else labels.astype(np.int32),
            )
        images = sum(len(out['logits']) for out in known.values())
        sidecar = {
            'settings': named(label, section),
            'fitted_on': 'ID training set',
            'fit_s': round(fit_s, 4),
            'score_ms_per_image': round(1e3 * score_s / images, 5),
        }
        artefacts.write(context.artefact / f'{label}.json', json.dumps(sidecar, indent=2) + '\n')
    embedded = {k: v['features'][:EMBEDDED] for k, v in known.items() if k in (TEST, *data.ood)}
    if train_detector.uses_outliers(context.config):
        outliers = artefacts.load(context.inputs['synthesise'] / 'outliers.npz')['images']
        embedded['outliers'] = outputs(Examples(outliers[:EMBEDDED]))['features']
    artefacts.save(context.artefact / 'features.npz', **embedded)
    accuracy = float(np.mean(known[TEST]['logits'].argmax(-1) == data.id.test.labels))
    return {'id_accuracy': round(accuracy, 5)}


def fit(label: str, section, bank, head, *, rows: int):
    """Fits one score -> `score(outputs of any length) -> float32[N]`, in calls of `rows` rows.

    Raises:
        UserError: settings that the bank does not allow, or a score that is not finite.
    """
    where = f'config.scores.{label}'
    entry, keywords = _pick(label, section)
    with blame(where):
        params = jax.device_put(entry.fit(bank, head, **keywords))
    compiled = _compiled(named(label, section)['name'])

    def score(outputs):
        parts = []
        for at in range(0, len(outputs['logits']), rows):
            chunk, n = parallel.pad_rows({k: v[at : at + rows] for k, v in outputs.items()}, rows)
            parts.append(np.asarray(compiled(params, chunk, head))[:n])
        values = np.concatenate(parts)
        if not np.all(np.isfinite(values)):
            bad = int(np.flatnonzero(~np.isfinite(values))[0])
            raise UserError(f'{where}: the score of image {bad} is {values[bad]}, not a number.')
        return values

    return score


@functools.cache
def _compiled(name):
    return jax.jit(SCORES[name].score)
