"""Trains the class-conditional diffusion model on the ID training images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxood import config as configs
from jaxood import diffusion
from jaxood.data import augment
from jaxood.diffusion import process
from jaxood.errors import ConfigError
from jaxood.models.denoisers import DENOISERS
from jaxood.models.initial import compile_init
from jaxood.rng import key_each, key_for, seed_for
from jaxood.stages import common
from jaxood.stages.common import Context
from jaxood.synthesis import STRATEGIES
from jaxood.train import checkpoint, loop, state

VERSION = 1
SEES = 'id'
ACROSS = False
NEEDS = ()
PUBLISHED = ()


def applies(config) -> bool:
    if 'reconstruct_pixels' in config.stages:
        return True
    strategy = STRATEGIES.get(config.outliers.name)
    return strategy is not None and bool({'generate', 'edit'} & {*strategy.needs})


def inputs(config) -> tuple[str, ...]:
    return common.labelling(config)


def needs_labels(config) -> bool:
    return config.diffusion.label_dropout < 1.0  # the condition is a class


def settings(config) -> dict:
    return common.settings(config, 'seed', 'dtype', 'generator', 'diffusion')


def check(config) -> None:
    drawn = ('sampler',) if 'synthesise' in config.stages else ()
    configs.require(config, 'generator', 'diffusion', *drawn)
    c, where = config.diffusion, 'config.diffusion'
    configs.whole(c, where, 'steps', 'batch_size', 'log_every', 'checkpoint_every')
    common.check_parts(c, where)
    configs.within(c, where, 'label_dropout', 0.0, 1.0)
    configs.within(c, where, 'ema_decay', 0.0, 1.0)
    configs.true_or_false(c, where, 'flip')
    build(config, num_classes=2)
    common.check_name(diffusion.PREDICTIONS, c.prediction, f'{where}.prediction')
    alpha_bar = schedule(config)
    if not (np.all(np.diff(alpha_bar) <= 0) and alpha_bar[-1] > 0):
        raise ConfigError(f'{where}.schedule: the signal must fall, and some be left at the end.')
    configs.build(state.OPTIMIZERS, c.optimizer, f'{where}.optimizer', steps=c.steps)


def fits(config, data, devices) -> None:
    train, model = data.id.train, build(config, data.num_classes)
    c, where = config.diffusion, 'config.diffusion.batch_size'
    common.check_batch(c.batch_size, len(train), devices, where, common.parts(c))
    with common.rehearsal('config.generator'):
        jax.eval_shape(_init(model, train.shape), jax.random.key(0))


def schedule(config):
    """alpha_bar float32[T + 1] of `config.diffusion.schedule`."""
    where, section = 'config.diffusion.schedule', config.diffusion.schedule
    if 'num_steps' in section:
        configs.whole(section, where, 'num_steps')
    return configs.build(diffusion.SCHEDULES, section, where)


def build(config, num_classes: int):
    """The network that `config.generator` describes."""
    layout = dict(num_classes=num_classes, dtype=common.dtype(config))
    return configs.build(DENOISERS, config.generator, 'config.generator', **layout)


def run(context: Context) -> dict:
    config, devices, train = context.config, context.devices, context.data.id.train
    c = config.diffusion
    model = build(config, context.data.num_classes)
    root = key_for(config.seed, 'diffusion')
    params = compile_init(_init(model, train.shape))(key_for(root, 'init'))
    where = 'config.diffusion.optimizer'
    tx = configs.build(state.OPTIMIZERS, c.optimizer, where, steps=c.steps)
    loss = functools.partial(
        loss_fn,
        model=model,
        alpha_bar=schedule(config),
        prediction=diffusion.PREDICTIONS[c.prediction],
        label_dropout=c.label_dropout,
        flip=c.flip,
    )
    step = functools.partial(
        loop.train_step,
        loss_fn=loss,
        tx=tx,
        accumulate=common.parts(c),
        ema_limit=c.ema_decay,
    )
    data, feed = common.feed(
        train,
        devices,
        batch_size=c.batch_size,
        seed=seed_for(config.seed, 'diffusion', 'batches'),
        limit=config.data.device_limit,
    )
    final, facts = loop.fit(
        state.create(params, tx, {}, ema=True),
        devices.compile_step(step),
        data,
        feed,
        key_for(root, 'steps'),
        steps=c.steps,
        devices=devices,
        folder=context.artefact.folder,
        what=context.what,
        images_per_step=c.batch_size,
        where='config.diffusion.batch_size',
        log_every=c.log_every,
        checkpoint_every=c.checkpoint_every,
    )
    checkpoint.save_weights(context.artefact / 'weights', {'params': final.ema})
    return facts


def loss_fn(
    params, extra, data, batch, key, step, *, model, alpha_bar, prediction, label_dropout, flip
):
    """The denoising loss of one batch; every row draws from (key, its index)."""
    batch = common.rows(data, batch)
    keys = lambda purpose: key_each(key_for(key, purpose), batch['index'])
    images = augment.random_flip(batch['image'], keys('flip')) if flip else batch['image']
    x_0 = augment.to_unit(images)
    condition = jax.nn.one_hot(batch['label'], model.num_classes + 1)
    condition = process.drop_condition(condition, keys('drop'), label_dropout)
    t, eps = process.draw_noise(keys('noise'), x_0.shape[1:], len(alpha_bar) - 1)
    dropout = keys('dropout')
    network = lambda x, t: model.apply({'params': params}, x, t, condition, keys=dropout)
    loss = process.loss(network, x_0, t, eps, alpha_bar=alpha_bar, prediction=prediction)
    loss = jnp.mean(loss)
    return loss, (extra, {'loss': loss})


def _init(model, shape):
    """key -> params."""
    x, t = jnp.zeros((1, *shape)), jnp.ones(1, jnp.int32)
    condition = jnp.zeros((1, model.num_classes + 1))
    return lambda key: model.init(key, x, t, condition)['params']
