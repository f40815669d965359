"""Trains the judges of the leak filter: classifiers that see the ID images alone."""

import jax
import numpy as np

from jaxood import artefacts, detectors
from jaxood import config as configs
from jaxood.errors import ConfigError
from jaxood.stages import common
from jaxood.stages.common import Context
from jaxood.stages.parts import classifiers
from jaxood.synthesis import filter as leaks
from jaxood.train import checkpoint

VERSION = 1
SEES = 'id'
ACROSS = False
NEEDS = ('outliers', 'filter', 'backbone', 'head')
PUBLISHED = ()


def applies(config) -> bool:
    return config.outliers.name != 'none' and config.filter.name not in ('none', 'clip')


def inputs(config) -> tuple[str, ...]:
    return common.labelling(config)


def needs_labels(config) -> bool:
    return True


def settings(config) -> dict:
    used = common.settings(config, 'seed', 'dtype', 'preprocessing', 'head', 'filter')
    del used['filter']['quantile']  # which candidates pass is the next stage's business
    return used


def check(config) -> None:
    c, where = config.filter, 'config.filter'
    common.check_name(leaks.FILTERS, c.name, f'{where}.name')
    for key in ('quantile', 'count', 'backbone', 'training'):
        if c.get(key) is None:
            raise ConfigError(f'{where}.{key} is missing: the judges cannot do without it.')
    configs.whole(c, where, 'count')
    configs.within(c, where, 'quantile', 0.0, 1.0)
    classifiers.check(config, c.training, f'{where}.training')
    if detectors.DETECTORS[c.training.name].uses_outliers:
        raise ConfigError(f"{where}.training.name: judges see ID images alone, such as 'plain'.")
    build(config, num_classes=2)


def fits(config, data, devices) -> None:
    model, where = build(config, data.num_classes), 'config.filter.training'
    classifiers.fits(config, data, devices, model, config.filter.training, where)


def run(context: Context) -> dict:
    config, data = context.config, context.data
    c = config.filter
    model = build(config, data.num_classes, context.devices.axis_name)
    members = []
    for j in range(c.count):
        variables, _ = classifiers.fit(
            context,
            model,
            c.training,
            'config.filter.training',
            purpose=('judges', j),
            seed=config.seed,
            outliers=None,
            folder=context.artefact / f'judge_{j}',
            what=f'{context.what} {j + 1}/{c.count}',
        )
        members.append(variables)
    judges = jax.tree.map(lambda *leaves: np.stack(leaves), *members)
    checkpoint.save_weights(context.artefact / 'weights', judges)
    logits = np.stack(
        [
            classifiers.network(context, model, member).outputs(data.id.validation)['logits']
            for member in members
        ]
    )
    uncertainty = np.asarray(leaks.uncertainty(logits))
    artefacts.save(context.artefact / 'validation.npz', uncertainty=uncertainty)
    accuracies = (logits.argmax(-1) == data.id.validation.labels).mean(axis=1)
    return {'validation_accuracy': [round(float(a), 5) for a in accuracies]}


def build(config, num_classes: int, axis_name=None):
    """The judges' network."""
    where = 'config.filter.backbone'
    return classifiers.build(config, num_classes, config.filter.backbone, where, axis_name)
