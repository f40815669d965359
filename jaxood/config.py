"""What a config means: its sections, the entry that each one names, arms, and fingerprints.

A section is a name and that entry's keyword arguments, beside a few keys that the stage itself
reads (`SECTIONS` lists them). Only stages and `main` read configs; everything below takes arrays
and keywords.
"""

import collections
import copy
import hashlib
import inspect
import json
import math
import pathlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from jaxood.errors import ConfigError, blame, unknown

FORMAT = 1  # of the workdir: raised when older workdirs can no longer be read

# Of a detector's training, and of the one that it goes on from.
TRAINING = (
    *('steps', 'batch_size', 'accumulate', 'outlier_ratio', 'crop', 'flip', 'noise', 'optimizer'),
    *('init', 'frozen', 'log_every', 'checkpoint_every'),
)

# The sections, and which of their keys belong to the stage rather than to the named entry.
SECTIONS: dict[str, tuple[str, ...]] = {
    'seed': (),
    'seeds': (),
    'dtype': (),
    'stages': (),
    'artefacts_dir': (),
    'parallel': ('mode', 'num_devices', 'inference_batch', 'shard_state'),
    'data': (
        *('root', 'on_error', 'memory_limit', 'device_limit'),
        *('size', 'resize', 'interpolation', 'channels'),
        *('held_out', 'held_out_validation', 'validation', 'validation_from', 'test'),
        *('labels', 'id', 'ood', 'validation_ood'),
    ),
    'pseudo_label': ('smallest',),
    'tokens': (
        *('names', 'names_file', 'initial', 'templates', 'per_class', 'draw', 'flip'),
        *('steps', 'batch_size', 'optimizer', 'at_once', 'remat', 'log_every', 'checkpoint_every'),
    ),
    'words': ('clip', 'template', 'k', 'rule', 'eta', 'threshold', 'keep', 'collisions'),
    'generator': (),
    'diffusion': (
        *('schedule', 'prediction', 'label_dropout', 'flip', 'steps', 'batch_size', 'optimizer'),
        *('accumulate', 'ema_decay', 'log_every', 'checkpoint_every'),
    ),
    'sampler': ('steps', 'guidance'),
    'outliers': ('source', 'count', 'per_image', 'per_class', 'max_candidates', 'shard_size'),
    'pipeline': (
        *('names', 'template', 'positions', 'plain', 'clip', 'autoencoder', 'unet'),
        *('guidance', 'sampling_steps', 'samples', 'data'),
    ),
    'filter': ('quantile', 'count', 'backbone', 'training', 'margin'),
    'weights': (),
    'preprocessing': ('mean', 'std', 'size', 'matched'),
    'backbone': (),
    'head': (),
    'pretraining': TRAINING,
    'detector': TRAINING,
    'taps': ('at', 'pool'),
    'restorer': (
        *('last', 'schedule', 'epochs', 'batch_size', 'optimizer', 'ema_decay'),
        *('log_every', 'checkpoint_every'),
    ),
    'restoration': ('stride', 'eta'),
    'pixels': ('count', 'steps', 'every', 'single', 'batch_size'),
    'scores': ('sweep', 'on'),
    'arms': (),
    'report': (
        'title',
        'arm',
        'score',
        'draws',
        'gallery',
        'tsne',
        'every_score',
        'openood',
        'judge',
        'extractor',
        'grid',
    ),
}
VALUES = ('seed', 'seeds', 'dtype', 'stages', 'artefacts_dir', 'weights')  # these are no sections
LABELLED = ('scores', 'arms')  # the keys of these are labels
UNNAMED = (  # these name no entry
    *('parallel', 'data', 'diffusion', 'pipeline', 'preprocessing', 'taps', 'restoration'),
    *('pixels', 'report'),
)
# Belong to the experiment: its runs are compared, so no arm may have its own.
COMMON = ('seed', 'seeds', 'stages', 'artefacts_dir', 'parallel', 'data', 'report', 'arms')
OPTIONAL = frozenset(
    (
        *('artefacts_dir', 'num_devices', 'shard_state', 'accumulate', 'outlier_ratio'),
        *('source', 'count', 'per_image', 'max_candidates'),
        *('root', 'on_error', 'memory_limit', 'size', 'resize', 'interpolation', 'channels'),
        *('held_out', 'held_out_validation', 'validation_from', 'ood', 'validation_ood'),
        *('labels', 'names', 'names_file', 'mean', 'std', 'matched', 'at', 'last', 'init'),
        *('frozen', 'per_class', 'words.clip', 'threshold'),
        *('quantile', 'backbone', 'training', 'margin'),
        *('arm', 'every_score', 'openood', 'judge', 'extractor', 'grid', 'data'),
    )
)


def pick(
    table: Mapping[str, Any],
    section: Mapping,
    where: str,
    *,
    like: str | None = None,
    given: Sequence[str] = (),
) -> tuple[Any, dict[str, Any]]:
    """The entry that a section names, and the keyword arguments that the section sets for it.

    Args:
        table: name -> entry; an entry is a function or a class, or a tuple whose first element
            is the function that takes the keywords.
        section: `name` and keywords. Keys of the stage (`SECTIONS`) and keys that are None are left
            out.
        where: the section's path, e.g. `'config.sampler'`.
        like: the entry of `SECTIONS` with the stage's keys; by default the path's last part.
        given: arguments of the entry that the caller passes itself, which no config may set.

    Returns:
        (entry, keywords), the keywords as plain Python values.

    Raises:
        ConfigError: no name, an unknown name, a keyword that the entry does not take (with the
            nearest and the list of known ones), one that it needs, or a value of another type.
    """
    if not isinstance(section, (Mapping, ml_collections.ConfigDict)):
        raise ConfigError(f"{where}={section!r} must be a section, such as dict(name='...').")
    if section.get('name') is None:
        raise ConfigError(f'{where}.name is not set. Known: {", ".join(table)}.')
    name = section['name']
    if name not in table:
        raise ConfigError(unknown(f'{where}.name={name!r}', name, table))
    entry = table[name]
    own = SECTIONS.get(like or where.rpartition('.')[2], ())
    keywords = {k: plain(v) for k, v in section.items() if k != 'name' and k not in own}
    keywords = {k: v for k, v in keywords.items() if v is not None}
    takes = parameters(entry, given)
    hints = typing.get_type_hints(_function(entry))
    for key, value in keywords.items():
        if key not in takes:
            raise ConfigError(unknown(f'{where}.{key} (of {name!r})', key, takes))
        if not _is_a(value, hints.get(key)):
            wanted = inspect.formatannotation(hints[key]).replace('collections.abc.', '')
            raise ConfigError(f'{where}.{key}={value!r} must be {wanted}.')
    for key, parameter in takes.items():
        if parameter.default is parameter.empty and key not in keywords:
            raise ConfigError(f'{where}.{key} is not set, and {name!r} needs it.')
    return entry, keywords


def parameters(entry: Any, given: Sequence[str] = ()) -> dict[str, inspect.Parameter]:
    """The arguments of a table's entry that configs may set, by name."""
    function = _function(entry)
    hidden = {*given} | ({'parent', 'name'} if inspect.isclass(function) else set())  # of Flax
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(function).parameters
    return {k: p for k, p in found.items() if p.kind in kinds and k not in hidden}


def _function(entry):
    return entry[0] if isinstance(entry, tuple) else entry


def _is_a(value, hint) -> bool:
    """Whether a plain value is what an annotation asks for. One that says nothing here is met."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_is_a(value, h) for h in inside)
    if origin in (tuple, Sequence):
        return isinstance(value, tuple) and all(_is_a(v, inside[0]) for v in value)
    if hint in (int, float):
        kinds = int if hint is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (str, bool, type(None)) else True


def plain(value: Any) -> Any:
    """ConfigDicts as dicts, lists as tuples: values that hash and compare by content."""
    if isinstance(value, (ml_collections.ConfigDict, Mapping)):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(plain(v) for v in value)
    return value


def freeze(value: Any) -> Any:
    """`plain` as nested tuples: a key for `functools.cache`."""
    value = plain(value)
    if isinstance(value, dict):
        return tuple((k, freeze(v)) for k, v in sorted(value.items()))
    if isinstance(value, tuple):
        return tuple(freeze(v) for v in value)
    return value


def fingerprint(*parts: Any) -> str:
    """16 hex digits of the SHA-256 of the parts' canonical JSON."""
    text = json.dumps([plain(p) for p in parts], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Run(collections.namedtuple('Run', ('arm', 'seed', 'config'))):
    """One arm under one seed, with everything resolved. `config.seeds` holds just this seed."""

    @property
    def name(self) -> str:
        return f'{self.arm}/{self.seed}'


def runs(config: ml_collections.ConfigDict) -> Iterator[Run]:
    """The experiment: arms x seeds, in the config's order."""
    for arm, overrides in arms(config).items():
        base = override(config, overrides, f'config.arms.{arm}')
        for seed in config.seeds:
            resolved = base.copy_and_resolve_references()
            with resolved.unlocked():
                resolved.seeds = (seed,)
            yield Run(arm, seed, ml_collections.FrozenConfigDict(resolved))


def arms(config: Mapping) -> Mapping[str, Mapping]:
    """Arm -> its overrides: `config.arms`; or one for each checkpoint in `config.weights`, named
    after the file or folder; or a single one named 'main'."""
    if config.get('arms'):
        return config['arms']
    if not config.get('weights'):
        return {'main': {}}
    paths = [path.strip() for path in config['weights'].split(',')]
    named = {pathlib.PurePath(path).name.partition('.')[0]: path for path in paths}
    if len(named) < len(paths):
        raise ConfigError(
            f'config.weights={config["weights"]!r}: two files share a name, and arms are named '
            'after them. Rename one.'
        )
    return {name: {'weights': path} for name, path in named.items()}


def override(config: ml_collections.ConfigDict, overrides: Mapping, where: str):
    """A copy of the config with an arm's overrides merged in.

    A section that is given another `name` keeps the stage's own keys (`SECTIONS`) and loses the
    keywords of the old entry; any other section is merged key by key.
    """
    changed = copy.deepcopy(config)
    with changed.unlocked():
        for key, value in overrides.items():
            if key in COMMON:
                raise ConfigError(f'{where}.{key}: all arms share config.{key}. Set it there.')
            if key not in SECTIONS or key not in changed:
                known = [k for k in changed if k not in COMMON]
                raise ConfigError(unknown(f'{where}.{key}', key, known))
            _merge(changed, key, value, f'{where}.{key}', SECTIONS[key])
    return changed


def _merge(parent, key, value, where, own=()):
    old = parent.get(key)
    if not isinstance(value, (Mapping, ml_collections.ConfigDict)) or not isinstance(
        old, ml_collections.ConfigDict
    ):
        try:
            parent[key] = value
        except (TypeError, ValueError) as e:  # ConfigDict holds on to a value's type
            raise ConfigError(f'{where}={value!r}: {e}') from e
        return
    if 'name' in value and value['name'] != old.get('name'):
        for stale in [k for k in old if k not in own]:
            del old[stale]
    for k, v in value.items():
        _merge(old, k, v, f'{where}.{k}')


def check_sections(config: ml_collections.ConfigDict, required: Sequence[str]) -> None:
    """What can be said of a config without knowing its tables.

    Every section is one we know, those required are there, each with all keys that its stage reads
    and no others; values are plain and finite; seeds are different integers; arms override what
    they may.

    Raises:
        ConfigError: with the nearest known name, or what is missing.
    """
    for key in config:
        if key not in SECTIONS:
            raise ConfigError(unknown(f'config.{key}', key, SECTIONS))
    require(config, *required)
    for key, value in config.items():
        _check_values(value, f'config.{key}')
        if key not in VALUES and value is not None:
            _check_section(value, key)
    whole(config, 'config', 'seed', minimum=0, maximum=2**32 - 1)  # JAX would wrap around
    seeds = config.seeds
    if not isinstance(seeds, (tuple, list)) or not seeds or len({*seeds}) != len(seeds):
        raise ConfigError(f'config.seeds={seeds!r}: give one or more different integers.')
    for i in range(len(seeds)):
        whole(seeds, 'config.seeds', i, minimum=0, maximum=2**32 - 1)


def _check_section(section, name):
    where = f'config.{name}'
    if not isinstance(section, (Mapping, ml_collections.ConfigDict)):
        raise ConfigError(f"{where}={section!r} must be a section, such as dict(name='...').")
    if name in LABELLED:
        for label, inner in section.items():
            if not isinstance(inner, (Mapping, ml_collections.ConfigDict)):
                raise ConfigError(f'{where}.{label}={inner!r} must be a section: dict(...).')
        return
    if name not in UNNAMED and not isinstance(section.get('name'), str):
        raise ConfigError(f'{where}.name={section.get("name")!r} must name what is wanted.')
    if section.get('name') != 'none':  # else nobody looks at the rest
        check_keys(section, where, name)


def require(config: Mapping, *keys: str) -> None:
    """Raises ConfigError unless the config has these sections."""
    for key in keys:
        if config.get(key) is None:
            raise ConfigError(f'config.{key} is missing: this run cannot do without it.')


def check_keys(section: Mapping, where: str, like: str) -> None:
    """Raises ConfigError unless a section has the keys that a stage reads (`SECTIONS[like]`).

    Other keys than these are for the entry that the section names (`pick` looks at them); where
    none is named, or none takes keywords (the filter), there can be no others.
    """
    known = SECTIONS[like]
    if like in (*UNNAMED, 'filter', 'tokens'):
        for key in section:
            if key not in (*known, 'name'):
                raise ConfigError(unknown(f'{where}.{key}', key, known))
    for key in known:
        if section.get(key) is None and not {key, f'{like}.{key}'} & OPTIONAL:
            raise ConfigError(f'{where}.{key} is missing: this run cannot do without it.')


def _check_values(value, where):
    value = plain(value)
    if isinstance(value, dict):
        for k, v in value.items():
            _check_values(v, f'{where}.{k}')
    elif isinstance(value, tuple):
        for i, v in enumerate(value):
            _check_values(v, f'{where}[{i}]')
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(f'{where}={value} must be a finite number.')
    elif value is not None and type(value) not in (int, bool, str):
        raise ConfigError(
            f'{where} is a {type(value).__name__}. A config holds numbers, strings, True and '
            'False, None, tuples and sections.'
        )


def whole(config: Any, where: str, *keys: Any, minimum: int = 1, maximum: float = math.inf) -> None:
    """Raises ConfigError unless each `config[key]` is a whole number of at least `minimum`."""
    for key in keys:
        value = config[key]
        if not _is_a(value, int) or not minimum <= value <= maximum:
            most = '' if maximum == math.inf else f' and at most {maximum}'
            path = f'{where}[{key}]' if isinstance(key, int) else f'{where}.{key}'
            raise ConfigError(
                f'{path}={value!r} must be a whole number of at least {minimum}{most}.'
            )


def within(config: Mapping, where: str, key: str, low: float, high: float) -> None:
    """Raises ConfigError unless low <= config[key] <= high."""
    value = config[key]
    if not _is_a(value, float) or not low <= value <= high:
        limits = f'at least {low}' if high == math.inf else f'between {low} and {high}'
        raise ConfigError(f'{where}.{key}={value!r} must be a number, {limits}.')


def true_or_false(config: Mapping, where: str, *keys: str) -> None:
    """Raises ConfigError unless each `config[key]` is a bool."""
    for key in keys:
        if not isinstance(config[key], bool):
            raise ConfigError(f'{where}.{key}={config[key]!r} must be True or False.')


def build(
    table: Mapping[str, Any], section: Mapping, where: str, like: str | None = None, **more: Any
) -> Any:
    """Calls the picked entry with its keywords and `more`."""
    entry, keywords = pick(table, section, where, like=like, given=tuple(more))
    with blame(where):
        return entry(**keywords, **more)
