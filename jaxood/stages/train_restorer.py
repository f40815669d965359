"""Trains a restorer: a diffusion model of the features that a frozen network gives ID images."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxood import config as configs
from jaxood import diffusion
from jaxood.data import loader
from jaxood.diffusion import process
from jaxood.errors import ConfigError
from jaxood.models.initial import compile_init
from jaxood.rng import key_each, key_for, seed_for
from jaxood.stages import common, load_weights, score
from jaxood.stages.common import TRAIN, Context
from jaxood.stages.parts import networks, restorers
from jaxood.train import checkpoint, loop, state

VERSION = 1
SEES = 'id'
ACROSS = False
NEEDS = ('taps', 'restorer', 'restoration')
PUBLISHED = ()
LARGE = 1024  # pixels, a multiple of every stride there is


def applies(config) -> bool:
    return True


def inputs(config) -> tuple[str, ...]:
    return (score.detector(config),)


def needs_labels(config) -> bool:
    return False


def settings(config) -> dict:
    return common.settings(config, 'seeds', 'dtype', 'taps', 'restorer')


def check(config) -> None:
    c, where = config.restorer, 'config.restorer'
    configs.whole(c, where, 'epochs', 'batch_size', 'log_every', 'checkpoint_every')
    configs.within(c, where, 'ema_decay', 0.0, 1.0)
    restorers.check(config)
    restorers.build(config)
    restorers.schedule(config)
    configs.build(state.OPTIMIZERS, c.optimizer, f'{where}.optimizer', steps=c.epochs)
    tapped = networks.tap(backbone(config), config.taps)
    if c.get('last') is not None:
        configs.whole(c, where, 'last', maximum=len(tapped.names))
    for label, section in config.scores.items():
        if section.get('skip_first') and (c.get('last') or len(tapped.names)) == 1:
            raise ConfigError(
                f'config.scores.{label}.skip_first leaves out the only block that is restored. Set '
                'it to False, or restore more (config.restorer.last, config.taps.at).'
            )


def fits(config, data, devices) -> None:
    """Raises ConfigError for images that the network can't see, or too few of them."""
    c = config.restorer
    common.check_batch(c.batch_size, len(data.id.train), devices, 'config.restorer.batch_size')
    shape, tapped = networks.sees(config, data.shape), networks.tap(backbone(config), config.taps)
    with common.rehearsal('config.backbone'):
        maps = _maps(config, shape)
        columns, _ = restorers.blocks([maps[i].shape[-1] for i in tapped.positions], c.get('last'))
        one = jnp.ones(1, jnp.int32)
        model = restorers.build(config)
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, len(columns))), one))
    if backbone(config)['name'] == 'vit':  # which has looked at its size itself
        return
    large = _maps(config, (LARGE, LARGE, shape[-1]))
    for name, i in zip(tapped.names, tapped.positions):
        stride = LARGE // large[i].shape[1]
        if min(shape[:2]) < stride:
            raise ConfigError(
                f'the network sees images of {shape[0]} x {shape[1]} pixels, fewer than the stride '
                f'{stride} of its map {name!r}. Set config.preprocessing.size to {stride} or more '
                '(224 is usual), or leave that map out of config.taps.at.'
            )


def backbone(config) -> dict:
    """The section that describes the frozen network."""
    if score.detector(config) == 'load_weights':
        return load_weights.load(config.weights).backbone
    return configs.plain(config.backbone)


def _maps(config, shape):
    """Shapes of all maps for one image."""
    model = networks.build(backbone(config), {'name': 'linear'}, 2, dtype=common.dtype(config))
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    outputs, _ = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, train=False), x
    )
    return outputs['maps']


def run(context: Context) -> dict:
    config, data, devices = context.config, context.data, context.devices
    c, seed = config.restorer, config.seeds[0]
    network = networks.load(
        context.inputs[score.detector(config)], config, devices, context.num_rows()
    )
    known = network.features(context.store, data.id.train, f'features of {TRAIN}, {context.what}')
    maps = _maps(config, networks.sees(config, data.shape))
    widths = [maps[i].shape[-1] for i in network.taps.positions]
    columns, edges = restorers.blocks(widths, c.get('last'))
    model = restorers.build(config)
    root = key_for(seed, 'restorer')
    params = _init(model, len(columns))(key_for(root, 'init'))
    epoch = len(known['taps']) // c.batch_size  # full batches, as the loader deals them
    steps = epoch * c.epochs
    where = 'config.restorer.optimizer'
    tx = configs.build(state.OPTIMIZERS, c.optimizer, where, steps=steps)
    step = _step(
        *(devices, model, tuple(restorers.schedule(config).tolist()), columns),
        *(configs.freeze(c.optimizer), steps, c.ema_decay),
    )
    arrays, batches = feed(
        known['taps'],
        devices,
        batch_size=c.batch_size,
        seed=seed_for(seed, 'restorer', 'batches'),
        limit=config.data.device_limit,
    )
    now, facts = state.create(params, tx, {}, ema=True), {}
    # Twice the same loop: a run that was cut off repeats a part of the first epoch at the most.
    for name, until in (('initial', epoch), ('final', steps)):
        now, facts = loop.fit(
            now,
            step,
            arrays,
            batches,
            key_for(root, 'steps'),
            steps=until,
            devices=devices,
            folder=context.artefact / f'until_{name}',
            what=context.what,
            images_per_step=c.batch_size,
            where='config.restorer.batch_size',
            log_every=c.log_every,
            checkpoint_every=c.checkpoint_every,
        )
        checkpoint.save_weights(context.artefact / name, now.ema)
    size = sum(x.size for x in jax.tree.leaves(params))
    seen_by = network.taps.names[-(c.get('last') or 0) :]
    return facts | {'columns': columns, 'edges': edges, 'taps': seen_by, 'parameters': size}


def feed(taps, devices, *, batch_size: int, seed: int, limit: int):
    """How training reads feature vectors: from the devices if they fit there, else row by row.

    Args:
        taps: float32[N, c], perhaps a memory map.
        limit: bytes that may lie on each device.

    Returns:
        (data, batches), as `common.feed`: `taps` and `index` in place of images.
    """
    resident = taps.nbytes <= limit

    def batches(n):
        for m in itertools.count(n):
            index = loader.rows_of(m, size=len(taps), batch_size=batch_size, seed=seed)
            there = {} if resident else {'taps': np.asarray(taps[np.sort(index)])}
            yield {'index': (index if resident else np.sort(index)).astype(np.int32), **there}

    return devices.replicate({'taps': np.asarray(taps)}) if resident else None, batches


def loss_fn(params, extra, data, batch, key, step, *, model, alpha_bar, columns):
    """1/(B c) Σ ‖z_0 - D_θ(z_t, t)‖², t ~ U{1..T}; every row draws from (key, its index).

    arXiv:2411.10701 and its official code. With the output 0 of an untrained network it is
    (c - M) / c, as each of M blocks has the squared length c_m - 1.
    """
    z_0 = batch['taps'] if data is None else data['taps'][batch['index']]
    z_0 = z_0[:, np.asarray(columns)]
    keys = key_each(key_for(key, 'noise'), batch['index'])
    t, eps = process.draw_noise(keys, z_0.shape[1:], len(alpha_bar) - 1)
    network = functools.partial(model.apply, {'params': params})
    prediction = diffusion.PREDICTIONS['x_0']
    loss = process.loss(network, z_0, t, eps, alpha_bar=alpha_bar, prediction=prediction)
    loss = jnp.mean(loss)
    return loss, (extra, {'loss': loss})


@functools.lru_cache(maxsize=32)
def _step(devices, model, alpha_bar, columns, optimizer, steps, ema_limit):
    """The compiled training step. Memoised: arms and seeds that train alike compile once."""
    section = dict(optimizer)
    tx = configs.build(state.OPTIMIZERS, section, 'config.restorer.optimizer', steps=steps)
    loss = functools.partial(
        loss_fn, model=model, alpha_bar=np.asarray(alpha_bar, np.float32), columns=columns
    )
    return devices.compile_step(
        functools.partial(loop.train_step, loss_fn=loss, tx=tx, ema_limit=ema_limit)
    )


@functools.lru_cache(maxsize=32)
def _init(model, channels):
    z, t = jnp.zeros((1, channels)), jnp.ones(1, jnp.int32)
    return compile_init(lambda key: model.init(key, z, t)['params'])
