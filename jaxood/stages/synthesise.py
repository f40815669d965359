"""Invents outliers, in shards, and lets the judges or CLIP reject those that leak ID content.

Candidate i is made from (seed, i) alone, and the first `outliers.count` that pass are kept, so
neither shard nor batch size, devices or a restart change which images come out.

Shards stay in files while they are made and sorted, and outliers are read from memory maps, so a
million need no more memory than a thousand. An artefact has `outliers/` (`images.npy`, and
`label.npy`, `source.npy` of strategies that tell them), `controls/` alike where there are any,
`rejected.npz` and `index.jsonl`.
"""

import functools
import itertools
import json
import time
from typing import Any, NamedTuple

import numpy as np

from jaxood import artefacts, console
from jaxood import config as configs
from jaxood.data.examples import Examples
from jaxood.errors import ConfigError, UserError, blame
from jaxood.models.stable_diffusion import pipeline
from jaxood.stages import common, learn_tokens, train_diffusion, train_judges
from jaxood.stages.common import Context
from jaxood.stages.parts import candidates, clips, gates, networks, texts
from jaxood.synthesis import STRATEGIES
from jaxood.synthesis import filter as leaks

VERSION = 2
SEES = 'id'
ACROSS = False
NEEDS = ('outliers', 'filter')
PUBLISHED = ()
CANDIDATES = 30  # for each outlier, at most, where config.outliers.max_candidates is not set
REJECTED_KEPT = 256  # rejected candidates that are kept for the report


def applies(config) -> bool:
    return config.outliers.name != 'none'


def inputs(config) -> tuple[str, ...]:
    needs = common.labelling(config)
    needs += ('train_diffusion',) if train_diffusion.applies(config) else ()
    needs += texts.inputs(config) if candidates.paints(config) else ()
    needs += ('words',) if candidates.reads_words(config) else ()
    return needs + (('train_judges',) if train_judges.applies(config) else ())


def needs_labels(config) -> bool:
    strategy = STRATEGIES[config.outliers.name]
    return bool({'labels', 'num_classes'} & {*strategy.needs}) or bool(strategy.prompts)


def settings(config) -> dict:
    outliers = configs.plain(config.outliers)
    for key in (*candidates.LAYOUT, 'source'):
        outliers.pop(key, None)
    if candidates.takes_given(config):  # by their contents, so that files may move
        outliers['source'] = candidates.given(config).digest
    used = common.settings(config, 'seed', 'dtype') | {'outliers': outliers}
    if train_diffusion.applies(config) or candidates.paints(config):
        used |= common.settings(config, 'sampler')
    if candidates.paints(config):
        used |= texts.settings(config) | learn_tokens.called(config)
        used['template'] = config.words.template
    if train_judges.applies(config):
        used |= {'quantile': config.filter.quantile}
    if config.filter.name == 'clip':
        used |= common.settings(config, 'filter') | {'clip': clips.digest(config)}
    return used


def check(config) -> None:
    c = config.outliers
    configs.whole(c, 'config.outliers', 'shard_size')
    asks = [key for key in candidates.COUNTS if c.get(key) is not None]
    if len(asks) != 1:
        values = ', '.join(f'{key}={c.get(key)}' for key in candidates.COUNTS)
        raise ConfigError(
            f'config.outliers: {values}. Set one of them: how many outliers there are to be, how '
            'many for each training image, or how many for each ID class.'
        )
    configs.whole(c, 'config.outliers', *asks)
    if c.get('max_candidates') is not None:
        configs.whole(c, 'config.outliers', 'max_candidates', minimum=c.get('count') or 1)
    candidates.strategy_of(config)
    if candidates.takes_given(config) and c.get('source') is None:
        raise ConfigError(
            f'config.outliers.name={c.name!r} takes given images, and config.outliers.source names '
            "none. Set it as sets of config.data are: dict(name='folder', path='...'), or npz."
        )
    common.check_name(leaks.FILTERS, config.filter.name, 'config.filter.name')
    if config.filter.name == 'clip':
        _check_clip(config)
    if not (train_diffusion.applies(config) or candidates.paints(config)):
        return
    configs.require(config, 'sampler')
    candidates.sampler_of(config)
    configs.whole(config.sampler, 'config.sampler', 'steps')
    configs.within(config.sampler, 'config.sampler', 'guidance', -np.inf, np.inf)
    if candidates.paints(config):
        configs.require(config, 'tokens', 'words')
        texts.check(config)
        with blame('config.sampler'):
            pipeline.grid(
                texts.schedule(config), sampler=config.sampler.name, steps=config.sampler.steps
            )
        return
    guidance, label_dropout = config.sampler.guidance, config.diffusion.label_dropout
    if guidance != 0.0 and label_dropout == 0.0:
        raise ConfigError(
            f'config.sampler.guidance={guidance} needs an unconditional branch, but '
            f'config.diffusion.label_dropout={label_dropout} trains none. Set label_dropout above '
            '0 (0.1 is usual), or guidance=0.0.'
        )
    with blame('config.sampler'):
        candidates.timesteps(config)


def _check_clip(config) -> None:
    """Raises ConfigError for a strategy whose images CLIP could not compare with a word."""
    configs.within(config.filter, 'config.filter', 'margin', -2.0, 2.0)
    if not candidates.reads_words(config):
        raise ConfigError(
            "config.filter.name='clip' asks whether an image shows the word that was painted or an "
            f'ID class, and config.outliers.name={config.outliers.name!r} paints no words. Set '
            "config.filter.name='none' or 'judges'."
        )


def fits(config, data, devices) -> None:
    needs, painter = candidates.strategy_of(config)[0].needs, None
    taken = {'labels': data.id.train, 'given': candidates.given(config)}
    for need, what in (('labels', 'the training images'), ('given', 'the given images')):
        if need in needs and taken[need].images is None:
            raise ConfigError(
                f'config.outliers.name={config.outliers.name!r} takes {what} into the devices’ '
                'memory, but they are read from files as they are needed. Raise '
                'config.data.memory_limit, or take another strategy.'
            )
    if candidates.paints(config):
        texts.fits(config, data)
        learn_tokens.names(config, data)
        no_networks = pipeline.Networks(None, None, None, texts.schedule(config))
        painter = candidates.painter_of(config, data.shape, no_networks, 0)
    candidates.build(config, data, painter=painter)
    if 'given' in needs and number(config, data) > len(taken['given']):
        raise ConfigError(
            f'config.outliers.source has {len(taken["given"])} images, but '
            f'{asked(config, number(config, data))}. Ask for as many or fewer.'
        )


def number(config, data) -> int:
    """How many outliers there are to be."""
    c = config.outliers
    each = {'count': 1, 'per_image': len(data.id.train), 'per_class': data.num_classes}
    key = next(key for key in candidates.COUNTS if c.get(key) is not None)
    return c[key] * each[key]


def asked(config, count: int) -> str:
    """Which setting asks for how many outliers, for messages."""
    key = next(key for key in candidates.COUNTS if config.outliers.get(key) is not None)
    asks = f'config.outliers.{key}={config.outliers[key]}'
    return asks if key == 'count' else f'{asks} makes {count}'


def run(context: Context) -> dict:
    c, data, count = context.config.outliers, context.data, number(context.config, context.data)
    source = candidates.given(context.config)
    limit = c.get('max_candidates') or CANDIDATES * count
    limit = limit if source is None else min(limit, len(source))
    gate = gates.gatekeeper(context)
    paints = candidates.paints(context.config)
    names = learn_tokens.names(context.config, data) if paints else data.class_names
    progress = console.Progress(context.what, count)
    parts, rejected, made, speed = [], [], 0, {}
    for path, numbers, images, facts, speed in shards(context, gate):
        passes = gate.passes(facts) if gate else np.ones(len(images), bool)
        outlying = facts.get('discrepant', np.ones(len(images), bool))
        chosen = np.flatnonzero(passes & outlying)[: count - made]
        last = chosen[-1] if made + len(chosen) == count else len(images) - 1
        seen = np.arange(len(images)) <= last
        beside = np.flatnonzero(seen & passes & ~outlying)
        parts.append(Part(path, numbers[: last + 1], chosen, beside, passes[: last + 1], made))
        if sum(map(len, rejected)) < REJECTED_KEPT:
            rejected.append(images[seen & ~passes])
        made += len(chosen)
        progress.update(made, candidates=int(numbers[last]) + 1, **speed)
        if made == count:
            break
        if numbers[-1] + 1 >= limit:
            raise UserError(_too_few(context.config, count, made, int(numbers[-1]) + 1))
    lines = (lines_of(part, gate, names, source) for part in parts)
    artefacts.write_parts(context.artefact / 'index.jsonl', lines)
    rejected = np.concatenate(rejected)[:REJECTED_KEPT]
    artefacts.save(context.artefact / 'rejected.npz', images=rejected)
    columns = {'images': 'image'} | {k: k for k in ('label', 'source') if k in facts}
    for name, rows in (
        ('outliers', [part.chosen for part in parts]),
        ('controls', [part.controls for part in parts]),
    ):
        save_some(context.artefact / name, columns, parts, rows)
    seen = sum(len(part.numbers) for part in parts)
    rate = {'acceptance': round(made / seen, 5)}
    progress.close(candidates=seen, **rate, **speed)
    return {'candidates': seen, **rate, **speed}


class Part(NamedTuple):
    """What became of one shard. Its images stay in its file, so that memory is that of a shard.

    Attributes:
        numbers: of the candidates that were looked at.
        chosen: rows that are outliers; `controls`: those that passed and are ID images.
        passes: bool, of those looked at.
        before: how many outliers the shards before it gave.
    """

    path: Any
    numbers: np.ndarray
    chosen: np.ndarray
    controls: np.ndarray
    passes: np.ndarray
    before: int


def save_some(folder, columns, parts, rows) -> None:
    """Writes some rows of each shard, one file a column, if there are any.

    Args:
        columns: name of the file -> name in the shards.
        rows: of each part.
    """
    if number := sum(map(len, rows)):
        for name, key in columns.items():
            values = (artefacts.load(p.path, key)[key][r] for p, r in zip(parts, rows))
            artefacts.save_rows(folder / f'{name}.npy', values, number)


def shards(context: Context, gate):
    """Candidates without end, shard by shard: (file, numbers, images uint8, facts, speed so far).

    A shard that is there from before a restart is read; `facts` holds what the strategy tells of
    each candidate, words as they are spelt, and what the gate says of it. The speed leaves out the
    first, which compiles.
    """
    config, devices, spelt = context.config, context.devices, None
    size, times = context.num_rows(), []
    if candidates.paints(config):
        rows, shared, spelt = candidates.painted(context)
        painted_at = {'size': texts.load(config, context.inputs).size}
        size = devices.batch_size(networks.rows_of(size, painted_at))
    else:
        trained = context.inputs.get('train_diffusion')
        rows, shared = candidates.renderer(config, context.data, trained)
    placed = devices.replicate(shared)
    render = functools.partial(candidates.rendered, devices, rows, placed, size=size)
    length = min(config.outliers.shard_size, -(-number(config, context.data) // size) * size)
    source = candidates.given(config)
    there = np.inf if source is None else len(source)
    for start in itertools.count(0, length):
        numbers = np.arange(start, min(start + length, there), dtype=np.int32)
        path = context.artefact / f'shards/{start:09d}-{start + length:09d}.npz'
        if artefacts.exists(path):
            facts = artefacts.load(path)
        else:
            started = time.monotonic()
            facts = render(numbers)
            if spelt is not None:
                facts['word'] = np.array(spelt)[facts['word']]
            if gate is not None:
                facts |= gate.facts(facts)
            times.append(time.monotonic() - started)
            artefacts.save(path, **facts)
        steady = times[1:]
        speed = (
            {'images_per_s': round(len(numbers) * len(steady) / sum(steady), 1)} if steady else {}
        )
        yield path, numbers, facts.pop('image'), facts, speed


def lines_of(part: Part, gate, class_names, source: Examples | None) -> str:
    """Lines of index.jsonl, one a candidate: its number, what it is made of, kept or why not."""
    facts, size = artefacts.load(part.path), len(part.numbers)
    facts = {k: v[:size] for k, v in facts.items() if k != 'image'}
    outliers = np.full(size, -1)
    outliers[part.chosen] = part.before + np.arange(len(part.chosen))
    columns = {'candidate': part.numbers.tolist(), 'kept': (outliers >= 0).tolist()}
    columns['outlier'] = [None if i < 0 else i for i in outliers.tolist()]
    for name, values in facts.items():
        decimal = np.issubdtype(values.dtype, np.floating)
        columns[name] = (np.round(values.astype(np.float64), 6) if decimal else values).tolist()
        if name in ('first', 'second', 'class'):
            spelt = 'class_name' if name == 'class' else f'{name}_class'
            columns[spelt] = [class_names[k] for k in columns[name]]
    found = [dict(zip(columns, values)) for values in zip(*columns.values())]
    for row in np.flatnonzero(~part.passes):
        found[row]['why'] = gate.why({k: v[row] for k, v in facts.items()})
    for line in found if source is not None else ():
        line |= about(source, line['of_given'])
    return ''.join(json.dumps(line) + '\n' for line in found)


def about(images: Examples, row: int) -> dict:
    """What is known of a given image, for its line of index.jsonl: its file and class."""
    known = {} if images.names is None else {'file': images.names[row]}
    if images.labels is not None:
        known['of_class'] = images.class_names[images.labels[row]]
    return known


def _too_few(config, count, made, number) -> str:
    knob = 'Lower config.filter.margin' if config.filter.name == 'clip' else ''
    knob = knob or f'Raise config.filter.quantile (now {config.filter.get("quantile")})'
    return (
        f'only {made} of {number} candidates passed the leak filter, and {asked(config, count)}. '
        f'{knob} or config.outliers.max_candidates, ask for fewer, or make candidates that look '
        'less like ID images (config.outliers, config.sampler). --config.filter.name=none keeps '
        'all.'
    )
