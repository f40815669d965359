"""Gives the ID images labels that nobody wrote: later stages learn from these alone.

Where true labels exist, they are compared with in the end, and choose nothing. An entry of
`METHODS` is `(context, **keywords) -> (clusters, facts)`, clusters being int32[n] of the images
of each of `PARTS`.
"""

from collections.abc import Mapping

import numpy as np

from jaxood import artefacts, clustering, console
from jaxood import config as configs
from jaxood.errors import ConfigError, blame
from jaxood.rng import seed_for
from jaxood.stages import common, load_weights
from jaxood.stages.common import TRAIN, VALIDATION, Context
from jaxood.stages.parts import networks
from jaxood.stages.parts import scan as trainings
from jaxood.train import checkpoint

VERSION = 1
SEES = 'id'
ACROSS = False
NEEDS = ('pseudo_label', 'preprocessing')
PUBLISHED = ()
PARTS = (TRAIN, VALIDATION)
WHERE = 'config.pseudo_label'


# ---- methods ----------------------------------------------------------------------------------


def scan(
    context: Context,
    *,
    classes: int,
    backbone: Mapping,
    views: Mapping,
    pretext: Mapping,
    clustering: Mapping,
    self_labelling: Mapping,
):
    """SimCLR, neighbours, SCAN, self-labelling: `parts.scan`. Van Gansbeke et al. 2020.

    Args:
        classes: C, how many clusters are asked for.
        backbone: a section like `config.backbone`.
        views: what the network sees of an image: `contrast` in the pretext, `strong` in the
            clustering, `weak` and `strong` in the self-labelling; sections named in `views.VIEWS`.
        pretext, clustering, self_labelling: the phases: `steps`, `batch_size`, `optimizer`,
            `log_every`, `checkpoint_every`, and keywords of `scan.PHASES`.
    """
    phases = dict(pretext=pretext, clustering=clustering, self_labelling=self_labelling)
    network, facts = trainings.train(context, trainings.Plan(classes, backbone, views, phases))
    checkpoint.save_weights(context.artefact / 'weights', network.variables)
    outputs = {part: network.outputs(examples) for part, examples in _parts(context.data).items()}
    made_of = {'head': {'name': 'linear'}, 'preprocessing': network.preprocessing}
    facts |= {'backbone': configs.plain(backbone), 'num_classes': classes} | made_of
    return {part: out['logits'].argmax(-1) for part, out in outputs.items()}, facts


def kmeans(context: Context, *, classes: int, weights: str | None = None, restarts: int = 10):
    """K-means on the features of a pretrained backbone, or on pixels without one (our choice).

    Args:
        classes: C, how many clusters.
        weights: a converted classifier or an original checkpoint, like `config.weights`, which is
            taken if this is not set; 'pixels' for the images themselves.
        restarts: the best of so many.
    """
    from sklearn.cluster import KMeans  # noqa: PLC0415 - takes a second

    found = _pretrained(context.config, weights)
    if found is None:
        features = {k: _pixels(examples) for k, examples in _parts(context.data).items()}
    else:
        network = networks.pretrained(found, context.config, context.devices, context.num_rows())
        features = {
            k: network.features(context.store, examples, f'features of {k}, {context.what}')
            for k, examples in _parts(context.data).items()
        }
        features = {k: np.asarray(outputs['features']) for k, outputs in features.items()}
    seed = seed_for(context.config.seed, 'pseudo_label') % 2**32
    model = KMeans(classes, n_init=restarts, random_state=seed).fit(features[TRAIN])
    facts = {'features': 'pixels' if found is None else found.source}
    return {k: model.predict(x).astype(np.int32) for k, x in features.items()}, facts


def given(context: Context):
    """The user's own labels: nothing is learnt, and all that reads pseudo-labels reads these."""
    parts = _parts(context.data)
    return {part: examples.labels for part, examples in parts.items()}, {}


METHODS = {'scan': scan, 'kmeans': kmeans, 'given': given}


# ---- the stage --------------------------------------------------------------------------------


def applies(config) -> bool:
    return True


def inputs(config) -> tuple[str, ...]:
    return ()


def needs_labels(config) -> bool:
    return config.pseudo_label.name == 'given'


def settings(config) -> dict:
    used = common.settings(config, 'seed', 'dtype', 'pseudo_label')
    name, keywords = config.pseudo_label.name, _pick(config)
    if name == 'scan':
        used |= common.settings(config, 'preprocessing')
    if name == 'kmeans':
        found = _pretrained(config, keywords.get('weights'))
        used['pseudo_label'] |= {'weights': found.digest if found else 'pixels'}
    return used


def check(config) -> None:
    c, keywords = config.pseudo_label, _pick(config)
    configs.within(c, WHERE, 'smallest', 0.0, 1.0)
    if 'classes' in keywords:
        configs.whole(c, WHERE, 'classes', minimum=2)
    if c.name == 'scan':
        for key in ('mean', 'std'):
            if config.preprocessing.get(key) is None:
                raise ConfigError(f"config.preprocessing.{key} is not set, and 'scan' needs it.")
        _plan(keywords).check()
    if c.name == 'kmeans':
        configs.whole({'restarts': 10} | keywords, WHERE, 'restarts')
        _pretrained(config, keywords.get('weights'))


def fits(config, data, devices) -> None:
    keywords, train = _pick(config), data.id.train
    if keywords.get('classes', 0) > len(train):
        raise ConfigError(
            f'{WHERE}.classes={keywords["classes"]} clusters are more than the {len(train)} '
            'training images. Ask for as many as there may be kinds of images.'
        )
    if config.pseudo_label.name == 'scan':
        _plan(keywords).fits(data, devices)
    if config.pseudo_label.name == 'kmeans':
        found = _pretrained(config, keywords.get('weights'))
        if found is None and train.images is None:
            raise ConfigError(
                f"{WHERE}.weights='pixels' takes all images into memory, but they are read from "
                'files as they are needed. Raise config.data.memory_limit, or name weights.'
            )
        if found is not None and len(found.preprocessing.mean) not in (1, train.shape[-1]):
            raise ConfigError(
                f'{WHERE}.weights takes images of {len(found.preprocessing.mean)} channels, these '
                f'have {train.shape[-1]}. Set config.data.channels.'
            )


def run(context: Context) -> dict:
    config, data = context.config, context.data
    method, keywords = configs.pick(METHODS, config.pseudo_label, WHERE, given=('context',))
    clusters, facts = method(context, **keywords)
    count = keywords.get('classes') or data.num_classes
    with blame(WHERE):
        sizes = clustering.check(clusters[TRAIN], count, smallest=config.pseudo_label.smallest)
    facts |= {'classes': count, 'sizes': sizes.tolist()}
    found = {part: clusters[part].astype(np.int32) for part in PARTS}
    if data.class_names:
        agreement, table, match = _compare(clusters, data, count)
        facts |= {'agreement': agreement}
        found |= {'confusion': table, 'match': match}
        said = ', '.join(f'{k} {100 * v["accuracy"]:.2f} %' for k, v in agreement.items())
        console.say(
            f'{context.what}: clusters matched with classes, accuracy {said}; training images '
            f'NMI {agreement[TRAIN]["nmi"]:.3f}, ARI {agreement[TRAIN]["ari"]:.3f}'
        )
    artefacts.save(context.artefact / 'clusters.npz', **found)
    return facts


def _compare(clusters, data, count):
    """What the true labels say: matched on the training images, looked at on all."""
    parts = _parts(data)
    shape = (count, data.num_classes)
    table = clustering.confusion(clusters[TRAIN], parts[TRAIN].labels, shape)
    match = clustering.matching(table)
    agreement = {
        part: clustering.agreement(clusters[part], examples.labels, match)
        for part, examples in parts.items()
    }
    return agreement, table, match


def _parts(data):
    return {TRAIN: data.id.train, VALIDATION: data.id.validation}


def _pick(config):
    return configs.pick(METHODS, config.pseudo_label, WHERE, given=('context',))[1]


def _plan(keywords):
    phases = {name: keywords[name] for name in trainings.PHASES}
    return trainings.Plan(keywords['classes'], keywords['backbone'], keywords['views'], phases)


def _pretrained(config, weights):
    """The backbone of `kmeans`; None for pixels."""
    if weights == 'pixels':
        return None
    path = weights or config.get('weights')
    if path is None:
        raise ConfigError(
            f"{WHERE}.weights is not set, and neither is config.weights: 'kmeans' takes the "
            "features of a pretrained classifier. Name its checkpoint, or 'pixels'."
        )
    return load_weights.load(path, f'{WHERE}.weights')


def _pixels(examples):
    images = examples.take(np.arange(len(examples)))
    return images.reshape(len(images), -1).astype(np.float32) / 255.0
