"""Trains a detector: a classifier of the ID classes, by one of the methods in `detectors`."""

import numpy as np

from jaxood import artefacts, detectors
from jaxood import config as configs
from jaxood.errors import ConfigError
from jaxood.stages import classifiers, common
from jaxood.stages.common import Context
from jaxood.train import checkpoint

VERSION = 2
SEES = 'id'
ACROSS = False
NEEDS = ('outliers', 'backbone', 'head', 'detector')
PUBLISHED = ()


def applies(config) -> bool:
    return True


def inputs(config) -> tuple[str, ...]:
    return common.labelling(config) + (('synthesise',) if uses_outliers(config) else ())


def uses_outliers(config) -> bool:
    return config.outliers.name != 'none'


def needs_labels(config) -> bool:
    return True


def settings(config) -> dict:
    return common.settings(
        config, 'seeds', 'dtype', 'preprocessing', 'backbone', 'head', 'detector'
    )


def check(config) -> None:
    c, where = config.detector, 'config.detector'
    classifiers.check(config, c, where)
    build(config, num_classes=2)
    reads = detectors.DETECTORS[c.name].uses_outliers
    if reads and not uses_outliers(config):
        raise ConfigError(
            f"{where}.name={c.name!r} trains on outliers, but config.outliers.name='none' makes "
            "none. Name a strategy there, or set config.detector.name='plain'."
        )
    if uses_outliers(config) and not reads:
        raise ConfigError(
            f'config.outliers.name={config.outliers.name!r} makes outliers that {where}.name='
            f"{c.name!r} does not look at. Set config.outliers.name='none', or a method that reads "
            'them, such as oe.'
        )
    if reads:
        configs.within(c, where, 'outlier_ratio', 1 / c.batch_size, np.inf)
        number = classifiers.outliers_per_batch(c)
        if number > config.outliers.count:
            raise ConfigError(
                f'a batch takes {number} outliers, but config.outliers.count='
                f'{config.outliers.count}. Raise that, or lower {where}.outlier_ratio.'
            )


def fits(config, data, devices) -> None:
    c, where, number = config.detector, 'config.detector', 0
    if uses_outliers(config):
        number = classifiers.outliers_per_batch(c)
        common.check_split(number, devices, f'{where}.outlier_ratio={c.outlier_ratio}: {number}')
    model = build(config, data.num_classes)
    classifiers.fits(config, data, devices, model, c, where, number)


def build(config, num_classes: int, axis_name=None):
    """The detector's network, as `run` trains it and others load it."""
    return classifiers.build(config, num_classes, axis_name=axis_name)


def run(context: Context) -> dict:
    config = context.config
    outliers = None
    if uses_outliers(config):
        outliers = artefacts.load(context.inputs['synthesise'] / 'outliers.npz')['images']
    variables, facts = classifiers.fit(
        context,
        build(config, context.data.num_classes, context.devices.axis_name),
        config.detector,
        'config.detector',
        purpose=('detector',),
        seed=config.seeds[0],
        outliers=outliers,
        folder=context.artefact.folder,
        what=context.what,
    )
    checkpoint.save_weights(context.artefact / 'weights', variables)
    train = context.data.id.train
    made_of = common.settings(config, 'backbone', 'head', 'preprocessing')
    return facts | made_of | {'num_classes': len(train.class_names)}
