"""SCAN's three trainings: what the images themselves say about which belong together.

Van Gansbeke et al. 2020 (arXiv:2005.12320). Each phase is a function whose keywords are a section
of `config.pseudo_label`, beside what every training has.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxood import artefacts, models
from jaxood import config as configs
from jaxood import neighbours as nearest
from jaxood.data import augment, views
from jaxood.errors import ConfigError, blame
from jaxood.losses import selfsup
from jaxood.models.backbones import BACKBONES
from jaxood.models.heads import Linear, Projection
from jaxood.models.initial import compile_init
from jaxood.rng import key_each, key_for, seed_for
from jaxood.stages import common
from jaxood.stages.parts import networks
from jaxood.train import checkpoint, loop, state

WHERE = 'config.pseudo_label'
VIEWS = ('contrast', 'weak', 'strong')  # what `views` of the section must name


# ---- the phases -------------------------------------------------------------------------------
#
#   phase(params, extra, batch, key, *, apply, see, gather, **keywords) -> (loss, extra, terms)
#   apply(params, extra, x) -> (logits, the new extra): one pass in training mode
#   see(name, images, keys) -> a view of uint8 images, standardised
#   gather(x): the rows of all devices


def pretext(params, extra, batch, key, *, apply, see, gather, temperature: float = 0.1):
    """SimCLR on two views of each image: `selfsup.nt_xent`."""
    keys = lambda purpose: key_each(key_for(key, purpose), batch['index'])
    a, b = (see('contrast', batch['image'], keys(purpose)) for purpose in ('first', 'second'))
    z, extra = apply(params, extra, jnp.concatenate([a, b]))
    loss = selfsup.nt_xent(*(gather(half) for half in jnp.split(z, 2)), temperature=temperature)
    return loss, extra, {}


def clustering(
    params, extra, batch, key, *, apply, see, gather, neighbours: int = 20, entropy_weight=5.0
):
    """An image and one of its neighbours in one cluster: `selfsup.scan`. Both strongly augmented.

    Args:
        neighbours: how many were mined; the image itself is one more of the list (official code).
    """
    keys = lambda purpose: key_each(key_for(key, purpose), batch['index'])
    anchors = see('strong', batch['image'], keys('anchor'))
    others = see('strong', batch['neighbour'], keys('neighbour'))
    logits, extra = apply(params, extra, jnp.concatenate([anchors, others]))
    halves = (gather(half) for half in jnp.split(logits, 2))
    loss, terms = selfsup.scan(*halves, entropy_weight=entropy_weight)
    return loss, extra, terms


def self_labelling(params, extra, batch, key, *, apply, see, gather, threshold: float = 0.99):
    """The strong view learns what the weak view is sure of: `selfsup.self_label`."""
    keys = lambda purpose: key_each(key_for(key, purpose), batch['index'])
    x = [see(name, batch['image'], keys(name)) for name in ('weak', 'strong')]
    logits, extra = apply(params, extra, jnp.concatenate(x))
    halves = (gather(half) for half in jnp.split(logits, 2))
    loss, terms = selfsup.self_label(*halves, threshold=threshold)
    return loss, extra, terms


PHASES = {'pretext': pretext, 'clustering': clustering, 'self_labelling': self_labelling}
GIVEN = ('params', 'extra', 'batch', 'key', 'apply', 'see', 'gather')
OWN = ('steps', 'batch_size', 'optimizer', 'log_every', 'checkpoint_every')


# ---- checking ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the method `scan` is asked for: its sections, picked and checked.

    Attributes:
        backbone, views: sections; `views` has one for each of `VIEWS`.
        phases: name -> its section, in order.
    """

    classes: int
    backbone: Mapping[str, Any]
    views: Mapping[str, Mapping]
    phases: Mapping[str, Mapping]

    def check(self) -> None:
        """Raises ConfigError for what cannot work, before data are read."""
        configs.pick(BACKBONES, self.backbone, f'{WHERE}.backbone', given=('dtype', 'axis_name'))
        for name in VIEWS:
            if name not in self.views:
                raise ConfigError(f'{WHERE}.views.{name} is not set. Known: {", ".join(VIEWS)}.')
            self.view(name)
        for name, section in self.phases.items():
            where = f'{WHERE}.{name}'
            for key in OWN:
                if section.get(key) is None:
                    raise ConfigError(f'{where}.{key} is missing: this run cannot do without it.')
            configs.whole(section, where, *(k for k in OWN if k != 'optimizer'))
            self.keywords(name)
            configs.build(
                *(state.OPTIMIZERS, section['optimizer'], f'{where}.optimizer'),
                steps=section['steps'],
            )
        keywords = self.keywords('self_labelling')
        configs.within(
            {'threshold': 0.99} | keywords, f'{WHERE}.self_labelling', 'threshold', 0.0, 1.0
        )
        keywords = {'temperature': 0.1} | self.keywords('pretext')
        configs.within(keywords, f'{WHERE}.pretext', 'temperature', 1e-6, np.inf)

    def fits(self, data: common.Data, devices) -> None:
        """Raises ConfigError for what these images or devices do not allow."""
        train = data.id.train
        if train.images is None:
            raise ConfigError(
                f"{WHERE}.name='scan' takes the training images into the devices' memory, but they "
                'are read from files as they are needed. Raise config.data.memory_limit.'
            )
        for name in VIEWS:
            _, keywords = self.view(name)
            with blame(f'{WHERE}.views.{name}'):
                views.check(self.views[name]['name'], min(train.shape[:2]), **keywords)
        for name, section in self.phases.items():
            where = f'{WHERE}.{name}.batch_size'
            common.check_batch(section['batch_size'], len(train), devices, where)
        if self.count_neighbours() >= len(train):
            raise ConfigError(
                f'{WHERE}.clustering.neighbours={self.count_neighbours()}, but an image has only '
                f'{len(train) - 1} others. Set it to that or less (20 is usual).'
            )

    def view(self, name: str) -> tuple[Callable, dict]:
        given = ('images', 'keys')
        return configs.pick(views.VIEWS, self.views[name], f'{WHERE}.views.{name}', given=given)

    def see(self, name: str) -> Callable:
        function, keywords = self.view(name)
        return functools.partial(function, **keywords)

    def keywords(self, phase: str) -> dict:
        """What a phase's section sets for its function."""
        section = {k: v for k, v in self.phases[phase].items() if k not in OWN}
        return configs.pick(PHASES, section | {'name': phase}, f'{WHERE}.{phase}', given=GIVEN)[1]

    def count_neighbours(self) -> int:
        return self.keywords('clustering').get('neighbours', 20)


# ---- training ---------------------------------------------------------------------------------


def train(context: common.Context, plan: Plan) -> tuple[networks.Network, dict]:
    """The clustering network, trained in three phases; one that is done is not done again.

    Returns:
        (the network, whose logits are clusters; facts of each phase).
    """
    config, devices, images = context.config, context.devices, context.data.id.train
    backbone = configs.build(
        BACKBONES,
        plan.backbone,
        f'{WHERE}.backbone',
        dtype=common.dtype(config),
        axis_name=devices.axis_name,
    )
    projecting = models.Classifier(backbone, Projection(128))
    naming = models.Classifier(backbone, Linear(plan.classes))
    data = {'image': images.images}
    trainer = functools.partial(_phase, context, plan)
    variables, facts = {}, {}

    variables, facts['pretext'] = trainer('pretext', projecting, {}, data)
    projections = _network(context, projecting, variables).outputs(images)['logits']
    data['near'] = nearest.mine(projections, k=plan.count_neighbours())
    facts['neighbours_alike'] = _alike(data['near'], images.labels)
    for name in ('clustering', 'self_labelling'):
        variables, facts[name] = trainer(name, naming, variables, data)
    return _network(context, naming, variables), facts


def _phase(context, plan, name, model, before, data):
    """One training; it begins with the variables of the one before where they have a place."""
    config, devices, section = context.config, context.devices, plan.phases[name]
    folder, train = context.artefact / name, context.data.id.train
    if artefacts.exists(folder / 'weights'):
        facts = json.loads((folder / 'facts.json').read_text())
        return checkpoint.load_weights(folder / 'weights'), facts
    root = key_for(config.seed, 'pseudo_label', name)
    init = compile_init(functools.partial(model.init, train=False))
    variables = init(key_for(root, 'init'), jnp.zeros((1, *train.shape)))
    variables = _inherit(variables, before)
    tx = configs.build(
        *(state.OPTIMIZERS, section['optimizer'], f'{WHERE}.{name}.optimizer'),
        steps=section['steps'],
    )
    loss = functools.partial(
        _loss,
        equation=functools.partial(PHASES[name], **plan.keywords(name)),
        model=model,
        views={name: plan.see(name) for name in VIEWS},
        look={k: configs.plain(config.preprocessing)[k] for k in ('mean', 'std')},
        axis_name=devices.axis_name,
    )
    resident, feed = common.feed(
        train,
        devices,
        batch_size=section['batch_size'],
        seed=seed_for(config.seed, 'pseudo_label', name, 'batches'),
        limit=np.inf,
    )
    if 'near' in data:
        resident |= devices.replicate({'near': data['near']})
    extra = {k: v for k, v in variables.items() if k != 'params'}
    final, facts = loop.fit(
        state.create(variables['params'], tx, extra, ema=False),
        devices.compile_step(functools.partial(loop.train_step, loss_fn=loss, tx=tx)),
        resident,
        feed,
        key_for(root, 'steps'),
        steps=section['steps'],
        devices=devices,
        folder=folder,
        what=f'{context.what} {name}',
        images_per_step=2 * section['batch_size'],
        where=f'{WHERE}.{name}.batch_size',
        log_every=section['log_every'],
        checkpoint_every=section['checkpoint_every'],
    )
    variables = {'params': final.params, **final.extra}
    artefacts.write(folder / 'facts.json', json.dumps(facts) + '\n')
    checkpoint.save_weights(folder / 'weights', variables)  # last: it says that the phase is done
    return jax.device_get(variables), facts


def _loss(params, extra, data, batch, key, step, *, equation, model, views, look, axis_name):
    """The `loss_fn` of `loop.train_step` for one of the phases."""
    batch = common.rows(data, batch)
    if 'near' in data:
        near = data['near'][batch['index']]
        keys = key_each(key_for(key, 'which'), batch['index'])
        which = jax.vmap(lambda k: jax.random.randint(k, (), 0, near.shape[1]))(keys)
        batch |= {'neighbour': data['image'][near[jnp.arange(len(near)), which]]}

    def see(name, images, keys):
        return augment.normalise(views[name](images.astype(jnp.float32) / 255.0, keys), **look)

    def apply(params, extra, x):
        outputs, extra = model.apply(
            {'params': params, **extra}, x, train=True, mutable=list(extra)
        )
        return outputs['logits'], extra

    def gather(x):
        return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)

    loss, extra, terms = equation(params, extra, batch, key, apply=apply, see=see, gather=gather)
    return loss, (extra, {'loss': loss, **terms})


def _inherit(variables, before):
    """The backbone of the phase before, and its head if that is of the same shape."""
    if not before:
        return variables
    same = jax.tree.structure(variables) == jax.tree.structure(before)
    if same and jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, before):
        return before
    return {
        collection: tree | {'backbone': before[collection]['backbone']}
        for collection, tree in variables.items()
    }


def _network(context, model, variables):
    look = configs.plain(context.config.preprocessing)
    look = {k: look[k] for k in ('mean', 'std')}
    return networks.Network(model, variables, look, '', context.devices, context.num_rows())


def _alike(near, labels):
    """Share of mined neighbours that are of their image's class, where classes are known."""
    if labels is None:
        return None
    return round(float(np.mean(labels[near[:, 1:]] == labels[:, None])), 5)
