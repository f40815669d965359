"""Training and running classifiers: what detectors and judges have in common."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxood import config as configs
from jaxood import detectors
from jaxood.data import augment, loader
from jaxood.data.examples import Examples
from jaxood.errors import ConfigError, blame
from jaxood.models.initial import compile_init
from jaxood.rng import key_for, seed_for
from jaxood.stages import common
from jaxood.stages.parts import networks
from jaxood.train import loop, state


def build(config, num_classes: int, backbone=None, where='config.backbone', axis_name=None):
    """The classifier that a backbone's section (`config.backbone`) and `config.head` describe."""
    return networks.build(
        *(backbone or config.backbone, config.head, num_classes),
        dtype=common.dtype(config),
        axis_name=axis_name,
        where=where,
    )


def check(config, section, where: str) -> None:
    """Raises ConfigError for a training section that cannot work."""
    configs.check_keys(section, where, 'detector')
    _method(section, where)
    configs.whole(section, where, 'steps', 'batch_size', 'log_every', 'checkpoint_every')
    configs.whole(section, where, 'crop', minimum=0)
    configs.within(section, where, 'noise', 0.0, np.inf)
    configs.true_or_false(section, where, 'flip')
    configs.whole({'frozen': section.get('frozen') or 0}, where, 'frozen', minimum=0)
    common.check_parts(section, where)
    configs.build(
        state.OPTIMIZERS, section['optimizer'], f'{where}.optimizer', steps=section['steps']
    )


def fits(config, data, devices, model, section, where: str, num_outliers: int = 0) -> None:
    """Raises UserError for a training that these images, devices and this network do not allow.

    Traces one step on shapes alone: what the method or the network refuse, they refuse here.
    """
    train, batch_size = data.id.train, section['batch_size']
    parts = common.parts(section)
    common.check_batch(batch_size, len(train), devices, f'{where}.batch_size', parts)
    common.check_look(config.preprocessing, train.shape[-1])
    batch = {
        'image': jax.ShapeDtypeStruct((batch_size, *train.shape), np.uint8),
        **{k: jax.ShapeDtypeStruct((batch_size,), np.int32) for k in ('label', 'index')},
        'outlier_image': jax.ShapeDtypeStruct((num_outliers, *train.shape), np.uint8),
        'outlier_index': jax.ShapeDtypeStruct((num_outliers,), np.int32),
    }
    method, keywords = _method(section, where)
    one = (1, *networks.sees(config, train.shape))
    if not method.trains:
        with common.rehearsal('config.backbone'):
            jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(one), train=False))
        return
    of = (model, section['name'], configs.freeze(keywords), frozen(section, model, where))
    of += _augmentation(config, section)
    loss, first = _loss(*of), _first(*of)
    losses = [loss] if first is None else [first[0], loss]

    def step(batch):
        key = jax.random.key(0)
        variables = model.init(key, jnp.zeros(one), train=False)
        args = (variables['params'], method.init_extra(variables), None, batch, key)
        return [loss(*args, jnp.zeros((), jnp.int32)) for loss in losses]

    with common.rehearsal(where):
        jax.eval_shape(step, batch)


def fit(
    context: common.Context,
    model,
    section,
    where: str,
    *,
    purpose: tuple,
    seed: int,
    outliers: Mapping[str, np.ndarray] | None,
    folder,
    what: str,
    initial=None,
):
    """Trains one classifier on the ID training images, and on outliers if the method uses them.

    Args:
        section: method name, its keywords, and `config.SECTIONS['detector']`'s own keys.
        purpose: sets this training's randomness apart from all others under the same seed.
        outliers: `outlier_image` uint8[M, H, W, C] and what else is known of each, or None.
        initial: the parts of the variables that are given, in place of random ones:
            {'params': {'backbone': ..., 'head': ...}, 'batch_stats': ...}, or less.

    Returns:
        (variables {'params', 'batch_stats'} as from one device, facts).
    """
    devices, train = context.devices, context.data.id.train
    method, keywords = _method(section, where)
    root = key_for(seed, *purpose)
    one = (1, *networks.sees(context.config, train.shape))
    variables = _init(model)(key_for(root, 'init'), jnp.zeros(one))
    if initial is not None:
        variables = {k: v | initial.get(k, {}) for k, v in variables.items()}
    if not method.trains:
        return jax.device_get(variables), {}
    optimizer, optimizer_keywords = configs.pick(
        state.OPTIMIZERS, section['optimizer'], f'{where}.optimizer', given=('steps',)
    )
    stays = frozen(section, model, where)
    tx = thaw(optimizer(steps=section['steps'], **optimizer_keywords), stays)
    start = state.create(variables['params'], tx, method.init_extra(variables), ema=False)
    step = _step(
        *(devices, model, section['name'], configs.freeze(keywords)),
        (section['optimizer']['name'], configs.freeze(optimizer_keywords), section['steps']),
        *(common.parts(section), stays),
        *_augmentation(context.config, section),
    )
    batch_size = section['batch_size']
    num_outliers = 0
    data, feed = common.feed(
        train,
        devices,
        batch_size=batch_size,
        seed=seed_for(seed, *purpose, 'batches'),
        limit=context.config.data.device_limit,
    )
    if outliers is not None:
        num_outliers = outliers_per_batch(section)
        data, feed = _with_outliers(
            *(data, feed, outliers, devices, num_outliers),
            seed=seed_for(seed, *purpose, 'outlier batches'),
            limit=context.config.data.device_limit,
        )
    final, facts = loop.fit(
        start,
        step,
        data,
        feed,
        key_for(root, 'steps'),
        steps=section['steps'],
        devices=devices,
        folder=folder,
        what=what,
        images_per_step=batch_size + num_outliers,
        where=f'{where}.batch_size',
        log_every=section['log_every'],
        checkpoint_every=section['checkpoint_every'],
    )
    own = {k: final.extra[k] for k in variables if k != 'params'}  # the model's, not the method's
    return {'params': final.params, **own}, facts


def network(context: common.Context, model, variables) -> networks.Network:
    """A classifier that was just trained, ready to be asked; nothing of it is memoised."""
    look = configs.plain(context.config.preprocessing)
    return networks.Network(model, variables, look, '', context.devices, context.num_rows())


def frozen(section, model, where: str) -> tuple[str, ...]:
    """Names of the backbone's parts that `frozen` of a training section keeps as they begin."""
    number = section.get('frozen') or 0
    if number == 0:
        return ()
    first = getattr(model.backbone, 'first', None)
    if first is None:
        raise ConfigError(
            f'{where}.frozen={number}: only a vit has blocks to freeze, and config.backbone.name '
            'is another. Set it to 0.'
        )
    with blame(f'{where}.frozen'):
        return first(number)


def thaw(tx, stays: tuple[str, ...]):
    """The optimiser, which leaves these parts of the backbone alone, weight decay and all."""
    if not stays:
        return tx

    def kinds(params):
        backbone = {
            k: jax.tree.map(lambda _, k=k: 'stays' if k in stays else 'moves', v)
            for k, v in params['backbone'].items()
        }
        moves = {k: jax.tree.map(lambda _: 'moves', v) for k, v in params.items()}
        return moves | {'backbone': backbone}

    return optax.multi_transform({'moves': tx, 'stays': optax.set_to_zero()}, kinds)


def outliers_per_batch(section) -> int:
    """How many outliers stand beside the ID images of a batch."""
    return round(section['batch_size'] * section['outlier_ratio'])


def _method(section, where):
    """The training method that a section names, and the keywords that it sets."""
    given = ('params', 'extra', 'batch', 'key', 'model', 'step', 'prepare')
    return configs.pick(detectors.DETECTORS, section, where, like='detector', given=given)


def _augmentation(config, section):
    look = configs.freeze(config.preprocessing)
    return section['crop'], section['flip'], section['noise'], look


@functools.cache
def _init(model):
    return compile_init(functools.partial(model.init, train=False))


@functools.cache
def _step(devices, model, method, keywords, optimizer, parts, stays, *augmentation):
    """The compiled training step. Memoised: arms and seeds that train alike compile once."""
    of = (model, method, keywords, stays, *augmentation)
    name, optimizer_keywords, steps = optimizer
    tx = thaw(state.OPTIMIZERS[name](steps=steps, **dict(optimizer_keywords)), stays)
    step = functools.partial(
        loop.train_step, loss_fn=_loss(*of), tx=tx, first=_first(*of), accumulate=parts
    )
    return devices.compile_step(step)


def _loss(model, method, keywords, stays, *augmentation):
    """The `loss_fn` of `loop.train_step` for one of the methods."""
    loss_fn = functools.partial(detectors.DETECTORS[method].loss_fn, **dict(keywords))
    return _of_rows(loss_fn, model, stays, *augmentation)


def _first(model, method, keywords, stays, *augmentation):
    """Its `first`; None for methods with one update a step."""
    first = detectors.DETECTORS[method].first
    if first is None:
        return None
    loss_fn, begin = first(**dict(keywords))
    return _of_rows(loss_fn, model, stays, *augmentation), begin


def _of_rows(loss_fn, model, stays, crop, flip, noise, preprocessing):
    """A method's loss of a step's rows, wherever these are: it reads, augments, standardises."""

    def prepare(images, keys):
        """uint8 rows, augmented by their own keys and standardised."""
        keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
        if crop:
            images = augment.random_crop(images, keys[:, 0], pad=crop)
        if flip:
            images = augment.random_flip(images, keys[:, 1])
        x = augment.standardise(images, **dict(preprocessing))
        return augment.random_noise(x, keys[:, 2], largest=noise) if noise else x

    def loss(params, extra, data, batch, key, step):
        batch = common.rows(data, batch)
        told = [k for k in data or () if k.startswith('outlier_')]
        batch |= {k: data[k][batch['outlier_index']] for k in told}
        if stays:  # nothing is computed back through them
            still = {k: jax.lax.stop_gradient(params['backbone'][k]) for k in stays}
            params = params | {'backbone': params['backbone'] | still}
        return loss_fn(params, extra, batch, key, model=model, step=step, prepare=prepare)

    return loss


def _with_outliers(data, feed, outliers, devices, number, *, seed: int, limit: int):
    """Adds `number` rows of the outliers, in an order of their own, to each batch: their numbers
    if all lie on the devices, else what is told of them, read from where it lies."""
    images = outliers['outlier_image']
    if images.nbytes <= limit:
        resident = devices.replicate({k: np.asarray(v) for k, v in outliers.items()})

        def both(n):
            for m, batch in enumerate(feed(n), start=n):
                index = loader.rows_of(m, size=len(images), batch_size=number, seed=seed)
                yield batch | {'outlier_index': index.astype(np.int32)}

        return (data or {}) | resident, both

    told = {k: np.asarray(v) for k, v in outliers.items() if k != 'outlier_image'}
    how = dict(batch_size=number, seed=seed, own=devices.own(number))

    def beside(n):
        for batch, more in zip(feed(n), loader.stream(Examples(images), start=n, **how)):
            rows = {k: v[more['index']] for k, v in told.items()}
            rows |= {'outlier_image': more['image'], 'outlier_index': more['index']}
            yield batch | devices.join(rows)

    return data, beside
