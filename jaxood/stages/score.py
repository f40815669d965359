"""Scores the ID test set, the ID validation set and every OOD set by every method in the config.

Outputs of the network and scores are kept for all runs and workdirs (`networks`, `scorers`): adding
a method or a set to the config costs that method or set alone.
"""

import dataclasses
import json
from collections.abc import Mapping

import numpy as np
from scipy.optimize import linear_sum_assignment

from jaxood import artefacts, console, metrics
from jaxood.data.examples import Examples
from jaxood.errors import ConfigError
from jaxood.report import tables
from jaxood.scores import SCORES
from jaxood.stages import common, train_detector
from jaxood.stages.common import TEST, TUNING, VALIDATION, Context
from jaxood.stages.parts import networks, restorers, scorers

VERSION = 3
SEES = 'all'
ACROSS = False
PUBLISHED = ()
NEEDS = ('scores',)
RESTORER = 'train_restorer'
EMBEDDED = 300  # rows a set whose features are kept for the report's t-SNE


def applies(config) -> bool:
    return True


def inputs(config) -> tuple[str, ...]:
    trained = detector(config) == 'train_detector'
    more = train_detector.inputs(config) if trained else common.labelling(config)
    return (*parts(config), *more)


def detector(config) -> str:
    """The stage that the network comes from."""
    return 'train_detector' if 'train_detector' in config.stages else 'load_weights'


def restores(config) -> bool:
    """Whether what is scored is a restorer's work on the network's features."""
    return RESTORER in config.stages


def parts(config) -> tuple[str, ...]:
    """The stages whose work `load` puts together."""
    return (detector(config), *((RESTORER,) if restores(config) else ()))


def load(inputs: Mapping, config, devices, rows: int) -> networks.Network:
    """What is scored, from the artefacts of `parts`: a network, perhaps with a restorer."""
    network = networks.load(inputs[detector(config)], config, devices, rows)
    if not restores(config):
        return network
    restorer = restorers.load(inputs[RESTORER], network, config, devices)
    return dataclasses.replace(network, restorer=restorer)


def needs_labels(config) -> bool:
    return False


def classifies(config) -> bool:
    """Whether the network's logits stand for the ID classes."""
    return detector(config) != 'train_detector' or train_detector.classifies(config)


def settings(config) -> dict:
    more = ('restoration',) if restores(config) else ()
    return common.settings(config, 'seeds', 'scores', *more)


def check(config) -> None:
    if not config.scores:
        raise ConfigError(f'config.scores is empty. Name a score, such as {", ".join(SCORES)}.')
    for method in scorers.methods(config):
        if not isinstance(method.sweep, Mapping):
            raise ConfigError(
                f'{method.where}.sweep={method.sweep!r} must be a section: dict(...).'
            )
        for key, values in method.sweep.items():
            if not isinstance(values, tuple) or not values:
                raise ConfigError(f'{method.where}.sweep.{key}={values!r}: give a tuple of values.')
        for section in method.candidates():
            _check_restored(config, section, method.where)


def _check_restored(config, section, where):
    """Raises ConfigError for a score of restorations that the run doesn't make."""
    reads, on = scorers.restored(section, where), section.get('on')
    if reads is not None and not restores(config):
        raise ConfigError(
            f'{where} scores what a restorer makes of features, and this run trains none. Add '
            f'{RESTORER!r} to config.stages (configs/dlsr.py has all it needs), or leave it out.'
        )
    if on is not None and config.get('taps') is None:
        raise ConfigError(f'{where}.on={on!r} reads tapped features; config.taps names none.')
    if reads is not None:
        restorers.check_depth(config, reads.depth, where)
        if reads.snapshot is None and config.restorer.epochs < 2:
            raise ConfigError(
                f'{where} compares the restorer after its first and after its last epoch, and with '
                f'config.restorer.epochs={config.restorer.epochs} one of these snapshots is '
                'missing. Set it to 2 or more, or leave this score out.'
            )


def fits(config, data, devices) -> None:
    for method in scorers.methods(config):
        for section in method.candidates():
            k = scorers.pick(section, method.where)[1].get('k', 1)
            if k > len(data.id.train):
                raise ConfigError(
                    f'{method.where}.k={k}, but there are only {len(data.id.train)} ID training '
                    'images to be neighbours. Set k to that or less.'
                )


def run(context: Context) -> dict:
    config, data = context.config, context.data
    network = load(context.inputs, config, context.devices, context.num_rows())
    sets = {TEST: data.id.test, **data.ood, VALIDATION: data.id.validation}
    known = {
        name: network.features(context.store, examples, f'features of {name}, {context.what}')
        for name, examples in sets.items()
    }
    bank = scorers.Bank(
        context.store, network, scorers.banked(data, context.inputs.get('synthesise'))
    )
    tuning = None
    if any(method.sweep for method in scorers.methods(config)):
        tuning = data.tuning
        network.features(context.store, tuning, f'features of {TUNING}, {context.what}')
    if depths := scorers.depths(config):  # all in one pass
        for examples in [*sets.values(), *([] if tuning is None else [tuning])]:
            network.restorer.outputs(context.store, network, examples, depths, context.what)
    classes = known[TEST]['logits'].shape[-1]
    known_ones = classes == data.num_classes  # a pretrained network may know others
    labels = data.id.test.labels if known_ones and classifies(config) else None
    if labels is not None and (
        doubt := warning(known[TEST]['logits'], labels, network.preprocessing)
    ):
        console.say(doubt)
    for method in scorers.methods(config):
        scorer = scorers.Scorer(bank, method, tuning)
        for name, examples in sets.items():
            labelled = name in (TEST, VALIDATION) and labels is not None
            artefacts.save(
                context.artefact / f'{method.label}/{name}.npz',
                score=scorer(examples),
                pred=known[name]['logits'].argmax(-1).astype(np.int32),
                label=examples.labels if labelled else np.full(len(examples), -1, np.int32),
            )
        sidecar = json.dumps(scorer.facts, indent=2) + '\n'
        artefacts.write(context.artefact / f'{method.label}.json', sidecar)
    embedded = {k: known[k]['features'][:EMBEDDED] for k in (TEST, *data.ood)}
    if 'synthesise' in context.inputs:
        outliers = artefacts.load_table(context.inputs['synthesise'] / 'outliers')['images']
        embedded['outliers'] = network.outputs(Examples(outliers[:EMBEDDED]))['features']
    artefacts.save(context.artefact / 'features.npz', **embedded)
    passed = networks.find_features(context.store, network.key, data.id.test.digest).done
    return {
        'images_per_s': passed.get('images_per_s'),  # of the network's forward pass
        'id_accuracy': _accuracy(known[TEST]['logits'], labels),
        'class_names': data.class_names if known_ones else tuple(map(str, range(classes))),
        'shape': data.shape,
        'bank': bank.digests,
    }


def read(run, inputs, names) -> list[tables.Scored]:
    """What this stage wrote for one run, one `Scored` a method."""
    folder = inputs[f'{run.name}/score']
    found = []
    for label in (method.label for method in scorers.methods(run.config)):
        sidecar = json.loads((folder / f'{label}.json').read_text())
        sets = {name: artefacts.load(folder / f'{label}/{name}.npz') for name in (TEST, *names)}
        found.append(
            tables.Scored(
                arm=run.arm,
                seed=run.seed,
                method=label,
                settings=sidecar['settings'],
                scores={k: v['score'] for k, v in sets.items()},
                pred={k: v['pred'] for k, v in sets.items()},
                label=sets[TEST]['label'],
                fit_s=sidecar['fit_s'],
                score_ms_per_image=sidecar['score_ms_per_image'],
                chosen=sidecar['chosen'],
            )
        )
    return found


def _accuracy(logits, labels):
    if labels is None:
        return None
    return round(metrics.accuracy(logits.argmax(-1), labels), 5)


def warning(logits: np.ndarray, labels: np.ndarray, preprocessing: Mapping) -> str | None:
    """What to say of a network that classifies little better than chance, and its likely cause."""
    predicted, classes = logits.argmax(-1), logits.shape[-1]
    accuracy = metrics.accuracy(predicted, labels)
    if accuracy >= 1 / classes + 0.1:
        return None
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (labels, predicted), 1)
    matched = confusion[linear_sum_assignment(-confusion)].sum() / len(labels)
    text = f'jaxood: warning: the ID accuracy is {100 * accuracy:.1f} %, near chance. '
    if matched > max(0.5, 2 * accuracy):
        return text + (
            f'With the classes in another order it would be {100 * matched:.1f} %: the labels of '
            'the ID set are not numbered as in the training of this network. Sort them alike.'
        )
    return text + (
        'Perhaps it was trained on images of another normalisation than mean '
        f'{preprocessing["mean"]} and std {preprocessing["std"]} (config.preprocessing.mean, .std),'
        ' of another size, or on other classes.'
    )
