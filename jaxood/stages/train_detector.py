"""Trains a detector: a classifier of the ID classes, by one of the methods in `detectors`."""

import numpy as np

from jaxood import artefacts, detectors
from jaxood import config as configs
from jaxood.errors import ConfigError
from jaxood.models import pretrained
from jaxood.models.backbones import BACKBONES
from jaxood.stages import common, load_weights, synthesise
from jaxood.stages.common import PSEUDO, Context
from jaxood.stages.parts import classifiers
from jaxood.train import checkpoint

VERSION = 2
SEES = 'id'
ACROSS = False
NEEDS = ('outliers', 'backbone', 'head', 'detector')
PUBLISHED = ()
PRETRAINED = 'pretrained'
INITIAL = (PRETRAINED, 'weights', PSEUDO)  # where a network may begin, if not at random


def applies(config) -> bool:
    return True


def inputs(config) -> tuple[str, ...]:
    begins = ('pretrain_detector',) if config.detector.get('init') == PRETRAINED else ()
    return common.labelling(config) + begins + (('synthesise',) if uses_outliers(config) else ())


def uses_outliers(config) -> bool:
    return config.outliers.name != 'none'


def begins_whole(config) -> bool:
    """Whether a network begins with its head, too, as a classifier of the ID classes.

    A pretrained one does, and one with given weights that has a linear head like theirs.
    """
    init = config.detector.get('init')
    return init == PRETRAINED or (init == 'weights' and config.head.name == 'linear')


def classifies(config) -> bool:
    """Whether the detector's logits stand for the ID classes."""
    method = detectors.DETECTORS[config.detector.name]
    return method.classifies or (not method.trains and begins_whole(config))


def needs_labels(config) -> bool:
    return True


def settings(config) -> dict:
    used = common.settings(
        config, 'seeds', 'dtype', 'preprocessing', 'backbone', 'head', 'detector'
    )
    if config.detector.get('init') == 'weights':
        used['digest'] = load_weights.load(config.weights).digest
        used |= {'whole': True} if begins_whole(config) else {}
    return used


def check(config) -> None:
    c, where = config.detector, 'config.detector'
    classifiers.check(config, c, where)
    model, method = build(config, num_classes=2), detectors.DETECTORS[c.name]
    classifiers.frozen(c, model, where)
    if method.head is not None and config.head.name != method.head:
        raise ConfigError(
            f'{where}.name={c.name!r} trains a head of its own: set config.head.name='
            f'{method.head!r} (it is {config.head.name!r}).'
        )
    if c.get('init') is not None:
        common.check_name(INITIAL, c.init, f'{where}.init')
        if c.init != PRETRAINED:
            _check_initial(config)
    if config.preprocessing.get('size') is not None:
        configs.whole(config.preprocessing, 'config.preprocessing', 'size')
    reads = method.uses_outliers
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
        if config.outliers.get('count') is not None:
            _check_number(config, config.outliers.count)


def fits(config, data, devices) -> None:
    c, where, number = config.detector, 'config.detector', 0
    if c.get('init') == 'weights' and begins_whole(config):
        found = load_weights.load(config.weights)
        if found.num_classes != data.num_classes:
            raise ConfigError(
                f"{where}.init='weights', but config.weights={config.weights!r} classifies "
                f'{found.num_classes} classes, the ID set has {data.num_classes}. Take weights '
                'that were trained on this ID set, or the set that they were trained on.'
            )
    if uses_outliers(config):
        number = classifiers.outliers_per_batch(c)
        _check_number(config, synthesise.number(config, data))
        what = f'{where}.outlier_ratio={c.outlier_ratio}: {number}'
        common.check_split(number, devices, what, common.parts(c))
    model = build(config, data.num_classes)
    classifiers.fits(config, data, devices, model, c, where, number)


def _check_number(config, there: int) -> None:
    """Raises ConfigError unless a batch finds its outliers among those there are."""
    number = classifiers.outliers_per_batch(config.detector)
    if number > there:
        raise ConfigError(
            f'a batch takes {number} outliers, but {synthesise.asked(config, there)}. Raise that, '
            'or lower config.detector.outlier_ratio.'
        )


def build(config, num_classes: int, axis_name=None):
    """The detector's network, as `run` trains it and others load it."""
    return classifiers.build(config, num_classes, axis_name=axis_name)


def run(context: Context) -> dict:
    config = context.config
    variables, facts = classifiers.fit(
        context,
        build(config, context.data.num_classes, context.devices.axis_name),
        config.detector,
        'config.detector',
        purpose=('detector',),
        seed=config.seeds[0],
        outliers=_outliers(context.inputs['synthesise']) if uses_outliers(config) else None,
        initial=_initial(context),
        folder=context.artefact.folder,
        what=context.what,
    )
    checkpoint.save_weights(context.artefact / 'weights', variables)
    made_of = common.settings(config, 'backbone', 'head', 'preprocessing')
    return facts | made_of | {'num_classes': context.data.num_classes}


def _outliers(artefact) -> dict[str, np.ndarray]:
    """What a training reads of outliers, and of the controls among them, which are ID images."""
    found, controls = (artefacts.load_table(artefact / k) for k in ('outliers', 'controls'))
    parts = [found, controls] if controls else [found]
    join = lambda name: np.concatenate([p[name] for p in parts]) if controls else found[name]
    read = {'outlier_image': join('images')}
    if 'label' in found:
        read['outlier_label'] = join('label')
        flags = [np.full(len(part['images']), part is not found) for part in parts]
        read['outlier_is_id'] = np.concatenate(flags)
    return read


def _check_initial(config) -> None:
    """Raises ConfigError for an `init` that is not there, or is another backbone."""
    where = f'config.detector.init={config.detector.init!r}'
    backbone = configs.plain(config.backbone)
    if config.detector.init == 'weights':
        if config.get('weights') is None:
            raise ConfigError(f'{where}, but config.weights names no checkpoint.')
        found = load_weights.load(config.weights)
        theirs = dict(found.backbone)
        for key in ('mean', 'std'):
            if config.preprocessing.get(key) is None:
                own = tuple(round(v, 4) for v in getattr(found.preprocessing, key))
                raise ConfigError(
                    f'config.preprocessing.{key} is not set, and a training needs it. These '
                    f'weights have seen images with {own}.'
                )
    else:
        if PSEUDO not in config.stages or config.pseudo_label.name != 'scan':
            raise ConfigError(f"{where} takes the network of config.pseudo_label.name='scan'.")
        theirs = configs.plain(config.pseudo_label.backbone)
    if _whole(backbone) != _whole(theirs):
        raise ConfigError(
            f'{where} is {pretrained.words(theirs)}, config.backbone is '
            f'{pretrained.words(backbone)}. Make them the same.'
        )


def _whole(backbone):
    """A backbone's section with the defaults filled in, less what its weights know nothing of."""
    parameters = configs.parameters(BACKBONES[backbone['name']])
    whole = {k: p.default for k, p in parameters.items()} | dict(backbone)
    return configs.freeze({k: v for k, v in whole.items() if k != 'dropout'})


def _initial(context: Context):
    """The variables that `init` begins with; None for random ones."""
    config = context.config
    init = config.detector.get('init')
    if init is None:
        return None
    if init == 'weights':
        found = load_weights.load(config.weights).variables
    else:
        stage = 'pretrain_detector' if init == PRETRAINED else PSEUDO
        found = checkpoint.load_weights(context.inputs[stage] / 'weights')
    parts = ('backbone', 'head') if begins_whole(config) else ('backbone',)
    return {kind: {k: v[k] for k in parts if k in v} for kind, v in found.items()}
