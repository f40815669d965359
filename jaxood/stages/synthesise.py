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

import jax
import numpy as np

from jaxood import artefacts, console, diffusion, parallel
from jaxood import config as configs
from jaxood.data import augment
from jaxood.data.examples import Examples
from jaxood.diffusion import samplers
from jaxood.errors import ConfigError, UserError, blame
from jaxood.models.stable_diffusion import pipeline
from jaxood.rng import key_for
from jaxood.stages import common, learn_tokens, train_diffusion, train_judges, words
from jaxood.stages.common import Context
from jaxood.stages.parts import classifiers, clips, networks, texts
from jaxood.synthesis import STRATEGIES, wordnet_prompts
from jaxood.synthesis import filter as leaks
from jaxood.synthesis.generator import generator
from jaxood.synthesis.painter import Painter
from jaxood.train import checkpoint

VERSION = 2
SEES = 'id'
ACROSS = False
NEEDS = ('outliers', 'filter')
PUBLISHED = ()
LAYOUT = ('shard_size', 'max_candidates')  # of config.outliers: change no result
COUNTS = ('count', 'per_image', 'per_class')  # of config.outliers: one of them is set
NOT_ONES = (*COUNTS, 'source')  # ... that candidate i does not depend on
CANDIDATES = 30  # for each outlier, at most, where config.outliers.max_candidates is not set
REJECTED_KEPT = 256  # rejected candidates that are kept for the report


def applies(config) -> bool:
    return config.outliers.name != 'none'


def inputs(config) -> tuple[str, ...]:
    needs = common.labelling(config)
    needs += ('train_diffusion',) if train_diffusion.applies(config) else ()
    needs += texts.inputs(config) if paints(config) else ()
    needs += ('words',) if reads_words(config) else ()
    return needs + (('train_judges',) if train_judges.applies(config) else ())


def paints(config) -> bool:
    """Whether the outliers are made by a generator that reads text."""
    strategy = STRATEGIES.get(config.outliers.name)
    return strategy is not None and 'painter' in strategy.needs


def reads_words(config) -> bool:
    """Whether they show the words that `words` has found."""
    return paints(config) and STRATEGIES[config.outliers.name].prompts == 'words'


def needs_labels(config) -> bool:
    strategy = STRATEGIES[config.outliers.name]
    return bool({'labels', 'num_classes'} & {*strategy.needs}) or bool(strategy.prompts)


def settings(config) -> dict:
    outliers = configs.plain(config.outliers)
    for key in (*LAYOUT, 'source'):
        outliers.pop(key, None)
    if takes_given(config):  # by their contents, so that files may move
        outliers['source'] = given(config).digest
    used = common.settings(config, 'seed', 'dtype') | {'outliers': outliers}
    if train_diffusion.applies(config) or paints(config):
        used |= common.settings(config, 'sampler')
    if paints(config):
        used |= texts.settings(config) | learn_tokens.called(config)
        used['template'] = config.words.template
    if train_judges.applies(config):
        used |= {'quantile': config.filter.quantile}
    if config.filter.name == 'clip':
        used |= common.settings(config, 'filter') | {'clip': clips.digest(config)}
    return used


def takes_given(config) -> bool:
    """Whether the outliers are images of the user's, those of `config.outliers.source`."""
    return 'given' in STRATEGIES[config.outliers.name].needs


def given(config) -> Examples:
    """These images."""
    return common.load_outside(config, config.outliers.source, 'config.outliers.source')


def check(config) -> None:
    c = config.outliers
    configs.whole(c, 'config.outliers', 'shard_size')
    asks = [key for key in COUNTS if c.get(key) is not None]
    if len(asks) != 1:
        values = ', '.join(f'{key}={c.get(key)}' for key in COUNTS)
        raise ConfigError(
            f'config.outliers: {values}. Set one of them: how many outliers there are to be, how '
            'many for each training image, or how many for each ID class.'
        )
    configs.whole(c, 'config.outliers', *asks)
    if c.get('max_candidates') is not None:
        configs.whole(c, 'config.outliers', 'max_candidates', minimum=c.get('count') or 1)
    _strategy(config)
    if takes_given(config) and c.get('source') is None:
        raise ConfigError(
            f'config.outliers.name={c.name!r} takes given images, and config.outliers.source names '
            "none. Set it as sets of config.data are: dict(name='folder', path='...'), or npz."
        )
    common.check_name(leaks.FILTERS, config.filter.name, 'config.filter.name')
    if config.filter.name == 'clip':
        _check_clip(config)
    if not (train_diffusion.applies(config) or paints(config)):
        return
    configs.require(config, 'sampler')
    _sampler(config)
    configs.whole(config.sampler, 'config.sampler', 'steps')
    configs.within(config.sampler, 'config.sampler', 'guidance', -np.inf, np.inf)
    if paints(config):
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
        _timesteps(config)


def _check_clip(config) -> None:
    """Raises ConfigError for a strategy whose images CLIP could not compare with a word."""
    configs.within(config.filter, 'config.filter', 'margin', -2.0, 2.0)
    if not reads_words(config):
        raise ConfigError(
            "config.filter.name='clip' asks whether an image shows the word that was painted or an "
            f'ID class, and config.outliers.name={config.outliers.name!r} paints no words. Set '
            "config.filter.name='none' or 'judges'."
        )


def fits(config, data, devices) -> None:
    needs, painter = _strategy(config)[0].needs, None
    taken = {'labels': data.id.train} | ({'given': given(config)} if takes_given(config) else {})
    for need, what in (('labels', 'the training images'), ('given', 'the given images')):
        if need in needs and taken[need].images is None:
            raise ConfigError(
                f'config.outliers.name={config.outliers.name!r} takes {what} into the devices’ '
                'memory, but they are read from files as they are needed. Raise '
                'config.data.memory_limit, or take another strategy.'
            )
    if paints(config):
        texts.fits(config, data)
        learn_tokens.names(config, data)
        no_networks = pipeline.Networks(None, None, None, texts.schedule(config))
        painter = _painter(config, data.shape, no_networks, 0)
    _build(config, data, painter=painter)
    if 'given' in needs and number(config, data) > len(taken['given']):
        raise ConfigError(
            f'config.outliers.source has {len(taken["given"])} images, but '
            f'{asked(config, number(config, data))}. Ask for as many or fewer.'
        )


def number(config, data) -> int:
    """How many outliers there are to be."""
    c = config.outliers
    each = {'count': 1, 'per_image': len(data.id.train), 'per_class': data.num_classes}
    key = next(key for key in COUNTS if c.get(key) is not None)
    return c[key] * each[key]


def asked(config, count: int) -> str:
    """Which setting asks for how many outliers, for messages."""
    key = next(key for key in COUNTS if config.outliers.get(key) is not None)
    asks = f'config.outliers.{key}={config.outliers[key]}'
    return asks if key == 'count' else f'{asks} makes {count}'


def run(context: Context) -> dict:
    c, data, count = context.config.outliers, context.data, number(context.config, context.data)
    source = given(context.config) if takes_given(context.config) else None
    limit = c.get('max_candidates') or CANDIDATES * count
    limit = limit if source is None else min(limit, len(source))
    gate = gatekeeper(context)
    names = learn_tokens.names(context.config, data) if paints(context.config) else data.class_names
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
    candidates = sum(len(part.numbers) for part in parts)
    rate = {'acceptance': round(made / candidates, 5)}
    progress.close(candidates=candidates, **rate, **speed)
    return {'candidates': candidates, **rate, **speed}


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
    if paints(config):
        rows, shared, spelt = painted(context)
        painted_at = {'size': texts.load(config, context.inputs).size}
        size = devices.batch_size(networks.rows_of(size, painted_at))
    else:
        rows, shared = renderer(config, context.data, context.inputs.get('train_diffusion'))
    render = functools.partial(rendered, devices, rows, devices.replicate(shared), size=size)
    length = min(config.outliers.shard_size, -(-number(config, context.data) // size) * size)
    there = len(given(config)) if takes_given(config) else np.inf
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


def rendered(devices, rows, shared, numbers: np.ndarray, *, size: int) -> dict[str, np.ndarray]:
    """Candidates by their numbers, `size` at a time: `image` uint8[n, H, W, C] and its facts."""
    chunks = (
        parallel.pad_rows(numbers[at : at + size], size) for at in range(0, len(numbers), size)
    )
    parts = list(parallel.map_rows(devices, _compiled(devices, rows), shared, chunks))
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


def renderer(config, data: common.Data, trained: artefacts.Artefact | None):
    """(rows, shared): `rows(shared, index)` makes candidates `index` int32[B], before rounding.

    Args:
        trained: the finished `train_diffusion`, for strategies that need one.
    """
    generate, shared = None, {'key': key_for(config.seed, 'outliers')}
    needs = _strategy(config)[0].needs
    if 'labels' in needs:
        shared['images'] = data.id.train.images
    if 'given' in needs:
        shared['given'] = given(config).images
    if {'generate', 'edit'} & {*needs}:
        generate = _generate(config, data.num_classes)
        weights = checkpoint.load_weights(trained / 'weights')
        shared |= {'params': weights['params'], 'guidance': np.float32(config.sampler.guidance)}
    used = ('dtype', 'outliers', *(('generator', 'diffusion', 'sampler') if generate else ()))
    recipe = common.settings(config, *used)
    recipe['outliers'] = {
        k: v for k, v in recipe['outliers'].items() if k not in (*NOT_ONES, *LAYOUT)
    }
    if generate:  # neither how the weights were trained nor the traced weight of guidance matters
        recipe['diffusion'] = {k: recipe['diffusion'][k] for k in ('schedule', 'prediction')}
        recipe['sampler']['guidance'] = config.sampler.guidance != 0.0
    of = data.id.train.digest if 'labels' in needs else ''
    of += given(config).digest if 'given' in needs else ''
    key = configs.fingerprint(recipe, data.shape, data.num_classes, of)
    if key not in _ROWS:
        make = _build(config, data, generate=generate)
        _ROWS[key] = lambda shared, index: make(shared, index, shared['key'])
    return _ROWS[key], shared


_ROWS: dict = {}  # by recipe: arms that render alike share one function, and compile it once


def painted(context: Context):
    """(rows, shared, words): as `renderer`, for strategies that paint; `words` are those that the
    rows give by number, None if they give none."""
    config, data, devices = context.config, context.data, context.devices
    sd, spelt = texts.load(config, context.inputs), None
    strategy, _ = _strategy(config)
    shared = {
        'key': key_for(config.seed, 'outliers'),
        'params': {name: sd.params[name] for name in ('unet', 'vae')},
        'guidance': np.float32(config.sampler.guidance),
    }
    if 'labels' in strategy.needs:
        shared['images'] = data.id.train.images
    what = learn_tokens.names(config, data)
    if strategy.prompts == 'words':
        shared['anchors'], spelt = wordnet_prompts.arrange(words.anchors(context.inputs['words']))
        what = spelt
    prompts = ['', *(config.words.template.format(name) for name in what)]
    contexts = texts.contexts(sd, devices, prompts, context.num_rows())
    shared |= {'null': contexts[0], 'contexts': contexts[1:]}
    painter = _painter(config, data.shape, sd.networks, sd.size)
    of = data.id.train.digest if 'labels' in strategy.needs else ''
    outliers = {k: v for k, v in settings(config)['outliers'].items() if k not in COUNTS}
    key = painter, configs.fingerprint(outliers, data.num_classes, of)
    if key not in _ROWS:
        make = _build(config, data, painter=painter)
        _ROWS[key] = lambda shared, index: make(shared, index, shared['key'])
    return _ROWS[key], shared, spelt


def _painter(config, shape, modules, size: int) -> Painter:
    sampler = config.sampler
    return Painter(
        modules,
        size,
        shape,
        sampler.name,
        sampler.steps,
        sampler.guidance != 0.0,
        configs.freeze(_sampler(config)[1]),
    )


def _build(config, data, *, generate=None, painter=None):
    """The strategy's `rows`; its own settings are checked here."""
    strategy, keywords = _strategy(config)
    offers = {'shape': data.shape, 'num_classes': data.num_classes}
    offers |= {'generate': generate, 'edit': generate, 'painter': painter}
    offers['labels'] = data.id.train.labels
    offers['given'] = len(given(config)) if takes_given(config) else None
    if 'alpha_bar' in strategy.needs:
        offers['alpha_bar'] = train_diffusion.schedule(config)
    with blame('config.outliers'):
        return strategy.build(**{k: offers[k] for k in strategy.needs}, **keywords)


def _strategy(config):
    offered = (
        *('shape', 'num_classes', 'generate', 'edit', 'alpha_bar', 'labels', 'given', 'painter'),
    )
    return configs.pick(STRATEGIES, config.outliers, 'config.outliers', given=offered)


def _sampler(config):
    given = ('now', 'before', 'alpha_bar_s', 'draw')
    return configs.pick(diffusion.SAMPLERS, config.sampler, 'config.sampler', given=given)


def _generate(config, num_classes):
    sampler, options = _sampler(config)
    return generator(
        train_diffusion.build(config, num_classes),
        alpha_bar=train_diffusion.schedule(config),
        timesteps=_timesteps(config),
        prediction=diffusion.PREDICTIONS[config.diffusion.prediction],
        sampler=sampler,
        guided=config.sampler.guidance != 0.0,
        **options,
    )


def _timesteps(config) -> np.ndarray:
    """The sampler's grid: of the whole chain, or of what lies below the depth of an edit, for which
    it keeps its stride."""
    num_steps, steps = len(train_diffusion.schedule(config)) - 1, config.sampler.steps
    strategy, keywords = _strategy(config)
    if 'edit' not in strategy.needs:
        return samplers.strided(num_steps, steps)
    samplers.strided(num_steps, steps)  # more steps than there are is an error here too
    depth = keywords.get('depth', configs.parameters(strategy)['depth'].default)
    if not 0 <= depth <= num_steps:
        raise ConfigError(
            f'config.outliers.depth={depth} must lie in 0..{num_steps}: S counts steps of the '
            'training (config.diffusion.schedule.num_steps), whatever the sampler.'
        )
    return samplers.strided(num_steps, max(1, round(steps * depth / num_steps)), start=depth)


@functools.cache
def _compiled(devices, rows):
    def render(shared, index):
        made = rows(shared, index)
        return made | {'image': augment.from_unit(made['image'])}

    return devices.compile_rows(render)


def gatekeeper(context: Context):
    """Who lets candidates pass: the judges, CLIP, or None for nobody.

    An object with `facts(facts) -> more of them`, `passes(facts) -> bool[n]`, and `why(fact)`, the
    reason for one that doesn't.
    """
    if train_judges.applies(context.config):
        return Judges(context)
    return Clip(context) if context.config.filter.name == 'clip' else None


class Judges:
    """The ensemble, and the uncertainty that a candidate must exceed."""

    def __init__(self, context: Context):
        folder = context.inputs['train_judges']
        weights = checkpoint.load_weights(folder / 'weights')
        axis_name = context.devices.axis_name
        model = train_judges.build(context.config, context.data.num_classes, axis_name)
        self.members = [
            classifiers.network(context, model, jax.tree.map(lambda x, j=j: x[j], weights))
            for j in range(context.config.filter.count)
        ]
        id_uncertainty = artefacts.load(folder / 'validation.npz')['uncertainty']
        quantile = context.config.filter.quantile
        self.threshold = leaks.threshold(id_uncertainty, quantile=quantile)

    def facts(self, facts):
        examples = Examples(facts['image'])
        logits = [member.outputs(examples)['logits'] for member in self.members]
        return {'uncertainty': np.asarray(leaks.uncertainty(np.stack(logits)))}

    def passes(self, facts):
        return facts['uncertainty'] > self.threshold

    def why(self, fact) -> str:
        return (
            f'judges are {np.exp(-fact["uncertainty"]):.4f} sure of a class; of '
            f'ID images too, only those below {np.exp(-self.threshold):.4f} pass'
        )


class Clip:
    """CLIP, and how much more a candidate must look like its word than like any ID class."""

    def __init__(self, context: Context):
        config, self.store = context.config, context.store
        self.clip = clips.load(config, context.inputs, context.devices, context.num_rows())
        self.template, self.margin = config.words.template, config.filter.margin
        self.classes = self._prompts(learn_tokens.names(config, context.data))
        self.what = f'images, {context.what}'

    def _prompts(self, words):
        return self.clip.ids(self.clip.tokenizer([self.template.format(word) for word in words]))

    def facts(self, facts):
        images = self.clip.images(self.store, Examples(facts['image']), self.what)
        words, place = np.unique(facts['word'], return_inverse=True)
        found = leaks.margin(images, self._prompts(words.tolist())[place], self.classes)
        return {'margin': found}

    def passes(self, facts):
        return facts['margin'] > self.margin

    def why(self, fact) -> str:
        return (
            f'CLIP finds it {fact["margin"]:+.4f} more like its word than like an ID class; those '
            f'above {self.margin:+.4f} pass'
        )


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
