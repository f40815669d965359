"""Takes a pretrained classifier in place of a trained one."""

import functools
import os

from jaxood import artefacts, console
from jaxood import config as configs
from jaxood.errors import ConfigError, blame
from jaxood.models import pretrained
from jaxood.stages import common
from jaxood.stages.common import Context
from jaxood.train import checkpoint

VERSION = 1
SEES = 'none'
ACROSS = False
PUBLISHED = ()
NEEDS = ('weights',)


def applies(config) -> bool:
    return True


def inputs(config) -> tuple[str, ...]:
    return ()


def needs_labels(config) -> bool:
    return False  # they bring their classes


def settings(config) -> dict:
    """The weights by their contents, so that a file may move; and the look of the images."""
    return {'digest': load(config.weights).digest, 'preprocessing': preprocessing(config)}


def check(config) -> None:
    load(config.weights)


def fits(config, data, devices) -> None:
    """Raises ConfigError unless the images and classes are such as the network knows."""
    found = load(config.weights)
    foreign = found.num_classes != data.num_classes
    if data.class_names and foreign and 'train_restorer' not in config.stages:
        raise ConfigError(
            f'config.weights={config.weights!r} classifies {found.num_classes} classes, the ID set '
            f'has {data.num_classes}. Take weights that were trained on this ID set, or the set '
            'that they were trained on.'
        )
    common.check_look(preprocessing(config), data.shape[-1])
    if config.preprocessing.get('size') is not None:
        return  # whoever stretches the images for the network has chosen
    look, c = found.preprocessing, config.data
    wanted = {'size': look.size, 'resize': look.resize, 'interpolation': look.interpolation}
    flags = ' '.join(f'--config.data.{k}={v}' for k, v in wanted.items() if v is not None)
    if data.shape[:2] != (look.size, look.size):
        raise ConfigError(
            f'config.weights={config.weights!r} ({found.source}) sees {look.size} x {look.size} '
            f'pixels, the images have {data.shape[1]} x {data.shape[0]}. Set {flags}.'
        )
    resized = c.get('resize') or look.size, c.get('interpolation') or 'bilinear'
    if resized != (look.resize or look.size, look.interpolation):
        console.say(
            f'jaxood: images are resized to {resized[0]} pixels, {resized[1]}; for the weights of '
            f'{found.source} they were otherwise ({flags}), so figures may differ from theirs.'
        )


def preprocessing(config) -> dict:
    """`mean` and `std`: the weights' own, unless the config overrides them; and how images are
    stretched (`augment.standardise`), if the config says so."""
    look = load(config.weights).preprocessing
    given = configs.plain(config.preprocessing)
    own = {'mean': look.mean, 'std': look.std}
    look = {k: own[k] if given.get(k) is None else given[k] for k in own}
    return look | {k: given[k] for k in ('size', 'matched') if given.get(k) is not None}


def run(context: Context) -> dict:
    config = context.config
    found = load(config.weights)
    checkpoint.save_weights(context.artefact / 'weights', found.variables)
    return {
        'backbone': found.backbone,
        'head': found.head,
        'num_classes': found.num_classes,
        'preprocessing': preprocessing(config),
        'source': found.source,
        'digest': found.digest,
    }


def load(path: str, where: str = 'config.weights') -> pretrained.Pretrained:
    """A folder written by `jaxood.convert`, or an original checkpoint; read once a process."""
    path = os.fspath(artefacts.place(path))
    inside = os.path.join(path, 'model.json')
    file = inside if os.path.exists(inside) else path
    return _load(path, os.path.getmtime(file) if os.path.exists(file) else None, where)


@functools.lru_cache(maxsize=8)
def _load(path, modified, where):
    with blame(where):
        return pretrained.load(path)
