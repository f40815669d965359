"""Trains the plain classifier that detectors go on from, once for each seed and for all arms."""

from jaxood import detectors
from jaxood.errors import ConfigError
from jaxood.stages import common
from jaxood.stages.common import Context
from jaxood.stages.parts import classifiers
from jaxood.train import checkpoint

VERSION = 1
SEES = 'id'
ACROSS = False
NEEDS = ('pretraining', 'backbone', 'head', 'detector')
PUBLISHED = ()


def applies(config) -> bool:
    return config.detector.get('init') == 'pretrained'


def inputs(config) -> tuple[str, ...]:
    return common.labelling(config)


def needs_labels(config) -> bool:
    return True


def settings(config) -> dict:
    return common.settings(
        config, 'seeds', 'dtype', 'preprocessing', 'backbone', 'head', 'pretraining'
    )


def check(config) -> None:
    c, where = config.pretraining, 'config.pretraining'
    classifiers.check(config, c, where)
    method = detectors.DETECTORS[c.name]
    if method.uses_outliers or not method.trains:
        raise ConfigError(f"{where}.name={c.name!r}: this training sees ID images alone, 'plain'.")
    if c.get('init') is not None:
        raise ConfigError(f'{where}.init={c.init!r}: it begins at random weights. Leave it unset.')
    classifiers.frozen(c, classifiers.build(config, num_classes=2), where)


def fits(config, data, devices) -> None:
    model = classifiers.build(config, data.num_classes)
    classifiers.fits(config, data, devices, model, config.pretraining, 'config.pretraining')


def run(context: Context) -> dict:
    config, devices = context.config, context.devices
    variables, facts = classifiers.fit(
        context,
        classifiers.build(config, context.data.num_classes, axis_name=devices.axis_name),
        config.pretraining,
        'config.pretraining',
        purpose=('pretraining',),
        seed=config.seeds[0],
        outliers=None,
        folder=context.artefact.folder,
        what=context.what,
    )
    checkpoint.save_weights(context.artefact / 'weights', variables)
    return facts
