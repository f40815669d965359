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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_collections

from jaxood.errors import ConfigError, unknown

FORMAT = 1  # of the workdir: raised when older workdirs can no longer be read

# The sections, and which of their keys belong to the stage rather than to the named entry.
SECTIONS: dict[str, tuple[str, ...]] = {
    'seed': (),
    'seeds': (),
    'dtype': (),
    'stages': (),
    'artefacts_dir': (),
    'parallel': ('mode', 'num_devices', 'inference_batch'),
    'data': (
        *('root', 'on_error', 'memory_limit', 'device_limit', 'size', 'channels'),
        *('held_out', 'held_out_validation', 'validation', 'test', 'id', 'ood'),
    ),
    'pseudo_label': (),
    'tokens': (),
    'words': (),
    'generator': (),
    'diffusion': (
        *('schedule', 'prediction', 'label_dropout', 'flip', 'steps', 'batch_size', 'optimizer'),
        *('ema_decay', 'log_every', 'checkpoint_every'),
    ),
    'sampler': ('steps', 'guidance'),
    'outliers': ('count', 'max_candidates', 'shard_size'),
    'filter': (),
    'weights': (),
    'preprocessing': ('mean', 'std'),
    'backbone': (),
    'head': (),
    'detector': (
        *('steps', 'batch_size', 'outlier_ratio', 'crop', 'flip', 'noise', 'optimizer'),
        *('log_every', 'checkpoint_every'),
    ),
    'scores': (),
    'arms': (),
    'report': ('title', 'arm', 'score', 'keep', 'draws', 'gallery', 'tsne'),
}


def pick(
    table: Mapping[str, Any], section: Mapping, where: str, *, like: str | None = None
) -> tuple[Any, dict[str, Any]]:
    """The entry that a section names, and the keyword arguments that the section sets for it.

    Args:
        table: name -> entry; an entry is a function or a class, or a tuple whose first element
            is the function that takes the keywords.
        section: `name` and keywords. Keys of the stage (`SECTIONS`) and keys that are None are left
            out.
        where: the section's path, e.g. `'config.sampler'`.
        like: the entry of `SECTIONS` with the stage's keys; by default the path's last part.

    Returns:
        (entry, keywords), the keywords as plain Python values.

    Raises:
        ConfigError: no name, an unknown name, or a keyword that the entry does not take; with the
            nearest and the list of known ones.
    """
    if 'name' not in section or section['name'] is None:
        raise ConfigError(f'{where}.name is not set. Known: {", ".join(table)}.')
    name = section['name']
    if name not in table:
        raise ConfigError(unknown(f'{where}.name={name!r}', name, table))
    entry = table[name]
    own = SECTIONS.get(like or where.rpartition('.')[2], ())
    given = {k: plain(v) for k, v in section.items() if k != 'name' and k not in own}
    given = {k: v for k, v in given.items() if v is not None}
    takes = keywords_of(entry)
    for key in given:
        if key not in takes:
            raise ConfigError(unknown(f'{where}.{key} (of {name!r})', key, takes))
    return entry, given


def keywords_of(entry: Any) -> list[str]:
    """Names of the keyword arguments that configs may set on a table's entry."""
    function = entry[0] if isinstance(entry, tuple) else entry
    if hasattr(function, '__dataclass_fields__'):  # a Flax module
        hidden = {'parent', 'name'}
        return [f for f in function.__dataclass_fields__ if f not in hidden]
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds]


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
    """The experiment: arms x seeds, in the config's order. Without arms, one arm named 'main'."""
    for arm, overrides in (config.get('arms') or {'main': {}}).items():
        base = override(config, overrides, f'config.arms.{arm}')
        for seed in config.seeds:
            resolved = base.copy_and_resolve_references()
            with resolved.unlocked():
                resolved.seeds = (seed,)
            yield Run(arm, seed, ml_collections.FrozenConfigDict(resolved))


def override(config: ml_collections.ConfigDict, overrides: Mapping, where: str):
    """A copy of the config with an arm's overrides merged in.

    A section that is given another `name` keeps the stage's own keys (`SECTIONS`) and loses the
    keywords of the old entry; any other section is merged key by key.
    """
    changed = copy.deepcopy(config)
    with changed.unlocked():
        for key, value in overrides.items():
            if key not in SECTIONS or key not in changed:
                raise ConfigError(
                    unknown(f'{where}.{key}', key, [k for k in changed if k != 'arms'])
                )
            _merge(changed, key, value, f'{where}.{key}', SECTIONS[key])
    return changed


def _merge(parent, key, value, where, own=()):
    old = parent.get(key)
    if not isinstance(value, (Mapping, ml_collections.ConfigDict)) or not isinstance(
        old, ml_collections.ConfigDict
    ):
        parent[key] = value
        return
    if 'name' in value and value['name'] != old.get('name'):
        for stale in [k for k in old if k not in own]:
            del old[stale]
    for k, v in value.items():
        _merge(old, k, v, f'{where}.{k}')


def check_sections(config: ml_collections.ConfigDict, required: tuple[str, ...]) -> None:
    """Every section is one we know, those required are there, and seeds are different integers.

    Raises:
        ConfigError: with the nearest known section, or what is missing.
    """
    for key in config:
        if key not in SECTIONS:
            raise ConfigError(unknown(f'config.{key}', key, SECTIONS))
    for key in ('seed', 'seeds', 'stages', *required):
        if config.get(key) is None:
            raise ConfigError(f'config.{key} is missing: this run cannot do without it.')
    seeds = config.seeds
    if not seeds or len(set(seeds)) != len(seeds) or not all(isinstance(s, int) for s in seeds):
        raise ConfigError(f'config.seeds={tuple(seeds)}: give one or more different integers.')


def positive(config: Mapping, where: str, *keys: str, minimum: float = 1) -> None:
    """Raises ConfigError unless each `config[key]` is a number of at least `minimum`."""
    for key in keys:
        value = config.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= minimum:
            raise ConfigError(f'{where}.{key}={value!r} must be a number of at least {minimum}.')


def within(config: Mapping, where: str, key: str, low: float, high: float) -> None:
    """Raises ConfigError unless low <= config[key] <= high."""
    value = config.get(key)
    if not isinstance(value, (int, float)) or not low <= value <= high:
        raise ConfigError(f'{where}.{key}={value!r} must lie between {low} and {high}.')


def build(table: Mapping[str, Callable], section: Mapping, where: str, **more: Any) -> Any:
    """Calls the picked entry with its keywords and `more`."""
    entry, keywords = pick(table, section, where)
    try:
        return entry(**keywords, **more)
    except TypeError as e:
        raise ConfigError(f'{where}: {e}') from e
