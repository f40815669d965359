"""What several stages need: the data in its roles, networks built from the config, batches."""

import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxood import artefacts
from jaxood import config as configs
from jaxood import data as sources
from jaxood.artefacts import Artefact, Store
from jaxood.data import loader
from jaxood.data import roles as splits
from jaxood.data.examples import Examples
from jaxood.data.surrogates import surrogates
from jaxood.errors import ConfigError, blame, unknown
from jaxood.parallel import Devices
from jaxood.rng import seed_for

PSEUDO = 'pseudo_label'  # the stage whose labels later ones learn from
HELD_OUT = 'held_out'  # the near-OOD set of classes left out of the ID set
TRAIN, TEST, VALIDATION, TUNING = 'train', 'test', 'validation', 'validation_ood'
NAMED = (TRAIN, TEST, VALIDATION, TUNING, HELD_OUT)  # which no OOD test set may be called
GROUPS = ('near', 'far')
LAYOUT = ('log_every', 'checkpoint_every', 'remat')  # keys that no result depends on
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Data:
    """The run's images in their roles.

    Attributes:
        id: labels are None and there are no class names where the set has none.
        ood: the OOD test sets; `groups` says near or far.
        validation_ood: OOD images to choose settings on, from classes held out or a set of their
            own; None without.
    """

    id: splits.Roles
    ood: dict[str, Examples]
    groups: dict[str, str]
    validation_ood: Examples | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the ID classes; empty without labels."""
        return self.id.train.class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.id.train.shape

    @functools.cached_property
    def tuning(self) -> Examples:
        """What settings are chosen against: `validation_ood`, or distorted ID validation images."""
        if self.validation_ood is not None:
            return self.validation_ood
        with blame('config.data'):
            return surrogates(self.id.validation)

    def relabelled(self, count: int, clusters: Mapping[str, Any] | None = None) -> 'Data':
        """The same images with the labels of `pseudo_label`.

        Validation and test images keep their classes, under the numbers of the clusters that these
        are matched with, so that accuracy can be told; they have none where nobody knows them, or
        where the numbers of classes and clusters differ.

        Args:
            clusters: what the stage wrote; None before it has: then only the number of labels is
                right.
        """
        names = tuple(f'cluster {k}' for k in range(count))
        of = lambda examples, labels: dataclasses.replace(
            examples, labels=labels, class_names=() if labels is None else names
        )
        train, others = self.id.train, (self.id.validation, self.id.test)
        if clusters is None:
            labels, known = np.arange(len(train), dtype=np.int32) % count, [None, None]
        else:
            labels, known = clusters[TRAIN], [None, None]
            if 'match' in clusters and len(names) == len(self.class_names):
                position = np.argsort(clusters['match']).astype(np.int32)
                known = [position[examples.labels] for examples in others]
        validation, test = (of(examples, k) for examples, k in zip(others, known))
        parts = {'train': of(train, labels), 'validation': validation, 'test': test}
        return dataclasses.replace(self, id=dataclasses.replace(self.id, **parts))

    def digest(self, which: str) -> str:
        """Hash of the contents that a stage sees: 'none', 'id', or 'all' with the OOD sets."""
        if which == 'none':
            return ''
        parts = [self.id.train.digest, self.id.validation.digest]
        if which == 'all':
            parts += [self.id.test.digest, *(f'{k}:{v.digest}' for k, v in self.ood.items())]
            parts += [self.validation_ood.digest] if self.validation_ood is not None else []
        return configs.fingerprint(*parts)


@dataclasses.dataclass(frozen=True)
class Context:
    """What `run` of a stage gets: its settings, its own folder, what it builds on."""

    config: Any
    data: Data
    devices: Devices
    artefact: Artefact
    inputs: Mapping[str, Artefact]
    store: Store  # of memoised results that any stage may ask for
    what: str  # for the progress line
    runs: Sequence[configs.Run]  # those that share the artefact
    repro: Mapping[str, Any]  # versions, devices, hashes, for the report

    def num_rows(self) -> int:
        """Rows of one inference call, a multiple of the number of devices."""
        return self.devices.batch_size(self.config.parallel.inference_batch)

    def inputs_of(self, run: configs.Run) -> dict[str, Artefact]:
        """For a stage ACROSS runs: the artefacts of one run, by their stages."""
        mine = f'{run.name}/'
        return {k.removeprefix(mine): v for k, v in self.inputs.items() if k.startswith(mine)}

    def chief(self) -> configs.Run:
        """For a stage ACROSS runs: the first run of the arm that the report is about."""
        arm = self.config.report.get('arm') or self.runs[0].arm
        return next(run for run in self.runs if run.arm == arm)

    def seen_by(self, run: configs.Run) -> Data:
        """For a stage ACROSS runs: the data as the stages of one run saw them."""
        return seen(run.config, self.inputs_of(run))

    def sharing(self, stage: str) -> list[tuple[Artefact, list[str]]]:
        """For a stage ACROSS runs: the artefacts of another stage, each with the arms it serves."""
        found: dict[str, tuple[Artefact, dict]] = {}
        for run in self.runs:
            artefact = self.inputs.get(f'{run.name}/{stage}')
            if artefact is not None:
                found.setdefault(artefact.fingerprint, (artefact, {}))[1][run.arm] = None
        return [(artefact, list(arms)) for artefact, arms in found.values()]


def check(config) -> None:
    """Raises ConfigError for settings of the data, their look and the devices that cannot work.

    What is wrong with the data themselves, `load_data` finds.
    """
    c, data = config.parallel, config.data
    configs.whole(c, 'config.parallel', 'inference_batch')
    if c.get('shard_state') is not None:
        configs.true_or_false(c, 'config.parallel', 'shard_state')
    if c.get('num_devices') is not None:
        configs.whole(c, 'config.parallel', 'num_devices')
    configs.whole(data, 'config.data', 'device_limit', minimum=0)
    configs.within(data, 'config.data', 'validation', 0.0, 1.0)
    if data.get('labels') is not None:
        configs.true_or_false(data, 'config.data', 'labels')
    configs.within(data, 'config.data', 'test', 0.0, 1.0)
    for name, section in (data.get('ood') or {}).items():
        if name in NAMED:
            raise ConfigError(f'config.data.ood.{name}: a set of the run has that name already.')
        check_name(GROUPS, section.get('group', 'far'), f'config.data.ood.{name}.group')
    for key in ('mean', 'std'):
        values = configs.plain(config.preprocessing.get(key))
        if values is None:
            if not config.get('weights'):  # which would bring their own
                raise ConfigError(f'config.preprocessing.{key} is not set, and every run needs it.')
            continue
        values = dict(enumerate(values if isinstance(values, tuple) else [values]))
        for i in values:
            low = -np.inf if key == 'mean' else 1e-6  # the images are divided by std
            configs.within(values, f'config.preprocessing.{key}', i, low, np.inf)
    for key in ('size', 'matched'):
        if config.preprocessing.get(key) is not None:
            configs.whole(config.preprocessing, 'config.preprocessing', key)
    dtype(config)


def check_look(preprocessing: Mapping, channels: int) -> None:
    """Raises ConfigError unless `mean` and `std` have one value, or one for each channel."""
    for key in ('mean', 'std'):
        values = preprocessing[key]
        if isinstance(values, tuple) and len(values) not in (1, channels):
            raise ConfigError(
                f'config.preprocessing.{key} has {len(values)} values, the images have {channels} '
                'channels. Give one value for each, or one for all.'
            )


def load_data(config, over: Mapping | None = None) -> Data:
    """Reads all sets of a config once a process; arms that change other sections share them.

    Args:
        over: keys of `config.data` that a stage with images of its own has otherwise.
    """
    stretched = config.preprocessing.get('size') is not None  # then sets may differ in size
    section = json.dumps(configs.plain(config.data) | configs.plain(over or {}), sort_keys=True)
    return _load_data(section, config.seed, stretched)


@functools.lru_cache(maxsize=2)
def _load_data(section, seed, stretched):
    c = configs.plain(json.loads(section))
    load = functools.partial(_load, c)

    def without_labels(examples):
        return dataclasses.replace(examples, labels=None, class_names=())

    with blame('config.data'):
        images = load(c['id'], 'config.data.id')
        if c.get('labels') is False:
            images = {split: without_labels(examples) for split, examples in images.items()}
        roles = splits.roles(
            images,
            validation=c['validation'],
            validation_from=c.get('validation_from') or 'train',
            test=c['test'],
            held_out=c.get('held_out') or (),
            held_out_validation=c.get('held_out_validation') or (),
            seed=seed_for(seed, 'splits'),
        )
    if len(roles.validation) == 0:
        raise ConfigError(
            'config.data.validation=0 leaves no ID images to set thresholds on. 0.1 is usual.'
        )
    ood, groups = {}, {}
    if roles.held_out is not None:
        ood[HELD_OUT], groups[HELD_OUT] = roles.held_out, 'near'

    outside = lambda section, where: _outside(c, roles.train.shape, stretched, section, where)
    for name, section in (c.get('ood') or {}).items():
        ood[name] = outside(section, f'config.data.ood.{name}')
        groups[name] = section.get('group', 'far')
    tuning = roles.held_out_validation
    if (c.get('validation_ood') or {}).get('name'):
        tuning = outside(c['validation_ood'], 'config.data.validation_ood')
    return Data(roles, ood, groups, tuning)


def load_outside(config, section, where: str) -> Examples:
    """A set of the user's that is none of `config.data`, read as those are, once a process; all of
    it, or its training split.

    Raises:
        ConfigError: it cannot be read, or its images have another shape than the ID set's.
    """
    stretched = config.preprocessing.get('size') is not None
    data, section = (json.dumps(configs.plain(s), sort_keys=True) for s in (config.data, section))
    return _load_outside(data, load_data(config).shape, stretched, section, where)


@functools.lru_cache(maxsize=4)
def _load_outside(data, shape, stretched, section, where):
    data, section = (configs.plain(json.loads(text)) for text in (data, section))
    return _outside(data, shape, stretched, section, where, ('train', 'all'))


def _load(c, section, where):
    """The splits of one set, with what `config.data` says of all where the set says nothing."""
    shared = (
        *('size', 'resize', 'interpolation', 'channels'),
        *('root', 'on_error', 'memory_limit'),
    )
    section = {k: v for k, v in section.items() if k != 'group'}
    entry = sources.SOURCES.get(section.get('name'))
    takes = configs.parameters(entry) if entry else ()
    common = {k: c[k] for k in shared if c.get(k) is not None and k in takes}
    return configs.build(sources.SOURCES, common | section, where)


def _outside(c, shape, stretched, section, where, splits=('test', 'all')):
    """A set of other images than the ID set's, whose shape they must have."""
    parts = _load(c, section, where)
    examples = next(parts[split] for split in splits if split in parts)
    here, wanted = (s[-1:] if stretched else s for s in (examples.shape, shape))
    if here != wanted:
        raise ConfigError(
            f'{where} has images of shape {examples.shape}, the ID set of {shape}. Set '
            'config.data.size and config.data.channels to bring all sets to one shape, or '
            'config.preprocessing.size to stretch each for the network.'
        )
    return examples


def labelling(config) -> tuple[str, ...]:
    """What a stage that reads labels builds on: `pseudo_label` where a run has it."""
    return (PSEUDO,) if PSEUDO in config.stages else ()


def seen(config, inputs: Mapping[str, Artefact]) -> Data:
    """The data as a stage sees them: with the labels of `pseudo_label` if it builds on that."""
    data, artefact = load_data(config), inputs.get(PSEUDO)
    if artefact is None or config.pseudo_label.name == 'given':
        return data
    count = config.pseudo_label.get('classes') or data.num_classes
    done = artefact.done is not None
    return data.relabelled(count, artefacts.load(artefact / 'clusters.npz') if done else None)


def feed(examples, devices: Devices, *, batch_size: int, seed: int, limit: int):
    """How training reads a set: from the devices if it fits there, else as a stream of batches.

    Args:
        limit: bytes of uint8 images that may lie on each device.

    Returns:
        (data, batches). `data` is a replicated dict `image`, `label`, or None for a stream.
        `batches(n)` iterates over batches from number n on, without end: `index` alone, or with
        `image` and `label`, of which each host reads its own rows. `rows` turns either into the
        batch of the step.
    """
    if examples.images is None or examples.images.nbytes > limit:
        own = devices.own(batch_size)
        stream = lambda n: map(
            devices.join,
            loader.stream(examples, batch_size=batch_size, seed=seed, start=n, own=own),
        )
        return None, stream

    labels = np.zeros(len(examples), np.int32) if examples.labels is None else examples.labels
    data = devices.replicate({'image': examples.images, 'label': labels})

    def resident(n):
        for m in itertools.count(n):
            index = loader.rows_of(m, size=len(examples), batch_size=batch_size, seed=seed)
            yield {'index': index.astype(np.int32)}

    return data, resident


def rows(data, batch):
    """Inside the step: the batch with its images and labels, whichever way they came."""
    if data is None or 'image' in batch:
        return batch
    return batch | {k: data[k][batch['index']] for k in ('image', 'label')}


def settings(config, *sections: str) -> dict:
    """These sections as plain values, without what changes no result (logging, saving)."""

    def strip(value):
        if not isinstance(value, dict):
            return value
        return {k: strip(v) for k, v in value.items() if k not in LAYOUT and v is not None}

    return {name: strip(configs.plain(config[name])) for name in sections}


def check_labels(data: Data, stage: str) -> None:
    """Raises ConfigError for a stage that learns from labels, if the ID set has none."""
    if not data.class_names:
        raise ConfigError(
            f'config.data.id: the images have no labels, which {stage} learns from. Sort them into '
            "a folder for each class, or add 'labels' to the NPZ file; or learn them from the "
            "images alone: put 'pseudo_label' into config.stages, as configs/sd_outlier.py does."
        )


def parts(section) -> int:
    """Into how many parts a training's batches are split: `accumulate`, 1 unless set."""
    return section.get('accumulate') or 1


def check_parts(section, where: str) -> None:
    """Raises ConfigError unless `accumulate` is unset or a whole number."""
    if section.get('accumulate') is not None:
        configs.whole(section, where, 'accumulate')


def check_batch(batch_size: int, count: int, devices: Devices, where: str, parts: int = 1) -> None:
    """Raises ConfigError unless `count` images fill a batch whose parts the devices can share."""
    if batch_size > count:
        raise ConfigError(
            f'{where}={batch_size} is more than the {count} ID training images there are. Set it '
            f'to {count} or less.'
        )
    check_split(batch_size, devices, f'{where}={batch_size}', parts)


def check_split(rows: int, devices: Devices, what: str, parts: int = 1) -> None:
    """Raises ConfigError unless every device can have equally many rows of each part."""
    if rows % (devices.count * parts):
        each = '' if parts == 1 else f' and {parts} parts (accumulate)'
        raise ConfigError(
            f'{what} rows cannot be split over {devices.count} devices{each}. Make them a multiple '
            f'of {devices.count * parts}, or set config.parallel.num_devices.'
        )


@contextlib.contextmanager
def rehearsal(where: str):
    """Turns what a network refuses, tried out on shapes before anything is built, into an error
    of the config: modules know no config and raise ValueErrors."""
    try:
        with blame(where):
            yield
    except ValueError as e:
        raise ConfigError(f'{where}: {e}') from e


def check_name(table, name: str, where: str) -> None:
    """Raises ConfigError, with the nearest name, unless the table has it."""
    if name not in table:
        raise ConfigError(unknown(f'{where}={name!r}', name, table))


def dtype(config):
    """The compute type that `config.dtype` names."""
    check_name(DTYPES, config.dtype, 'config.dtype')
    return DTYPES[config.dtype]
