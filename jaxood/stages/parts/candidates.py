"""Candidates for outliers: functions that make them by their numbers, by the config's strategy."""

import functools

import numpy as np

from jaxood import artefacts, diffusion, parallel
from jaxood import config as configs
from jaxood.data import augment
from jaxood.data.examples import Examples
from jaxood.diffusion import samplers
from jaxood.errors import ConfigError, blame
from jaxood.rng import key_for
from jaxood.stages import common, learn_tokens, train_diffusion, words
from jaxood.stages.common import Context
from jaxood.stages.parts import texts
from jaxood.synthesis import STRATEGIES, wordnet_prompts
from jaxood.synthesis.generator import generator
from jaxood.synthesis.painter import Painter
from jaxood.train import checkpoint

LAYOUT = ('shard_size', 'max_candidates')  # of config.outliers: change no result
COUNTS = ('count', 'per_image', 'per_class')  # of config.outliers: one of them is set


def paints(config) -> bool:
    """Whether the outliers are made by a generator that reads text."""
    strategy = STRATEGIES.get(config.outliers.name)
    return strategy is not None and 'painter' in strategy.needs


def reads_words(config) -> bool:
    """Whether they show the words that `words` has found."""
    return paints(config) and STRATEGIES[config.outliers.name].prompts == 'words'


def takes_given(config) -> bool:
    """Whether the outliers are images of the user's, those of `config.outliers.source`."""
    return 'given' in STRATEGIES[config.outliers.name].needs


def given(config) -> Examples | None:
    """These images; None where the strategy takes none."""
    if not takes_given(config):
        return None
    return common.load_outside(config, config.outliers.source, 'config.outliers.source')


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
    needs = strategy_of(config)[0].needs
    if 'labels' in needs:
        shared['images'] = data.id.train.images
    if 'given' in needs:
        shared['given'] = given(config).images
    if {'generate', 'edit'} & {*needs}:
        generate = _generate(config, data.num_classes)
        weights = checkpoint.load_weights(trained / 'weights')
        shared |= {'params': weights['params'], 'guidance': np.float32(config.sampler.guidance)}
    used = ('dtype', *(('generator', 'diffusion', 'sampler') if generate else ()))
    recipe = common.settings(config, *used)
    recipe['outliers'] = _one(config)
    if generate:  # neither how the weights were trained nor the traced weight of guidance matters
        recipe['diffusion'] = {k: recipe['diffusion'][k] for k in ('schedule', 'prediction')}
        recipe['sampler']['guidance'] = config.sampler.guidance != 0.0
    of = data.id.train.digest if 'labels' in needs else ''
    of += given(config).digest if 'given' in needs else ''
    key = configs.fingerprint(recipe, data.shape, data.num_classes, of)
    if key not in _ROWS:
        make = build(config, data, generate=generate)
        _ROWS[key] = lambda shared, index: make(shared, index, shared['key'])
    return _ROWS[key], shared


_ROWS: dict = {}  # by recipe: arms that render alike share one function, and compile it once


def painted(context: Context):
    """(rows, shared, words): as `renderer`, for strategies that paint; `words` are those that the
    rows give by number, None if they give none."""
    config, data, devices = context.config, context.data, context.devices
    sd, spelt = texts.load(config, context.inputs), None
    strategy, _ = strategy_of(config)
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
    painter = painter_of(config, data.shape, sd.networks, sd.size)
    of = data.id.train.digest if 'labels' in strategy.needs else ''
    key = painter, configs.fingerprint(_one(config), data.num_classes, of)
    if key not in _ROWS:
        make = build(config, data, painter=painter)
        _ROWS[key] = lambda shared, index: make(shared, index, shared['key'])
    return _ROWS[key], shared, spelt


def painter_of(config, shape, modules, size: int) -> Painter:
    sampler = config.sampler
    return Painter(
        modules,
        size,
        shape,
        sampler.name,
        sampler.steps,
        sampler.guidance != 0.0,
        configs.freeze(sampler_of(config)[1]),
    )


def build(config, data, *, generate=None, painter=None):
    """The strategy's `rows`; its own settings are checked here."""
    strategy, keywords = strategy_of(config)
    offers = {'shape': data.shape, 'num_classes': data.num_classes}
    offers |= {'generate': generate, 'edit': generate, 'painter': painter}
    offers['labels'] = data.id.train.labels
    offers['given'] = len(given(config)) if 'given' in strategy.needs else None
    if 'alpha_bar' in strategy.needs:
        offers['alpha_bar'] = train_diffusion.schedule(config)
    with blame('config.outliers'):
        return strategy.build(**{k: offers[k] for k in strategy.needs}, **keywords)


def strategy_of(config):
    offered = (
        *('shape', 'num_classes', 'generate', 'edit', 'alpha_bar', 'labels', 'given', 'painter'),
    )
    return configs.pick(STRATEGIES, config.outliers, 'config.outliers', given=offered)


def sampler_of(config):
    given = ('now', 'before', 'alpha_bar_s', 'draw')
    return configs.pick(diffusion.SAMPLERS, config.sampler, 'config.sampler', given=given)


def _generate(config, num_classes):
    sampler, options = sampler_of(config)
    return generator(
        train_diffusion.build(config, num_classes),
        alpha_bar=train_diffusion.schedule(config),
        timesteps=timesteps(config),
        prediction=diffusion.PREDICTIONS[config.diffusion.prediction],
        sampler=sampler,
        guided=config.sampler.guidance != 0.0,
        **options,
    )


def timesteps(config) -> np.ndarray:
    """The sampler's grid: of the whole chain, or of what lies below the depth of an edit, for which
    it keeps its stride."""
    num_steps, steps = len(train_diffusion.schedule(config)) - 1, config.sampler.steps
    strategy, keywords = strategy_of(config)
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


def _one(config) -> dict:
    """What of `config.outliers` a single candidate depends on."""
    others = (*COUNTS, *LAYOUT, 'source')
    return {k: v for k, v in configs.plain(config.outliers).items() if k not in others}
