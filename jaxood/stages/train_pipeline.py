"""Trains a small Stable Diffusion on captioned images: CLIP, then the autoencoder, then the U-Net.

What comes out lies in `pipeline/`, a folder in diffusers' layout (and `pipeline/clip/`, the whole
CLIP), which everything that speaks Stable Diffusion reads. Where it is a means to an end, its
images may be others than the run's: `config.pipeline.data` has the keys of `config.data` that
differ, such as fewer classes held out.
"""

import dataclasses
import functools
import io
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxood import artefacts, console, hosts
from jaxood import config as configs
from jaxood.data import augment, captions
from jaxood.diffusion import PREDICTIONS, process
from jaxood.errors import ConfigError, UserError, unknown
from jaxood.losses import contrastive
from jaxood.models.clip import tokenizer, vision
from jaxood.models.components import COMPONENTS
from jaxood.models.initial import compile_init
from jaxood.models.stable_diffusion import folder as folders
from jaxood.models.stable_diffusion import fresh, pipeline
from jaxood.rng import key_each, key_for, seed_for
from jaxood.stages import common
from jaxood.stages.common import Context
from jaxood.stages.parts import texts as generators
from jaxood.train import checkpoint, loop, state

VERSION = 1
SEES = 'none'  # of the run's images; its own are among the settings
ACROSS = False
NEEDS = ('pipeline',)
PUBLISHED = ('pipeline/*.json', 'pipeline/*/*.*', 'samples.png', 'samples.json')
PARTS = ('clip', 'autoencoder', 'unet')
SAMPLES = 8  # columns of the contact sheet


def applies(config) -> bool:
    return not generators.reads(config) or generators.trained_here(config)


def inputs(config) -> tuple[str, ...]:
    return ()


def needs_labels(config) -> bool:
    return True


def settings(config) -> dict:
    used = common.settings(config, 'seed', 'dtype', 'pipeline')
    used['pipeline'].pop('data', None)
    return used | {'images': own_data(config).digest('id')}


def own_data(config) -> common.Data:
    """What it learns from: the run's images, unless `config.pipeline.data` says otherwise."""
    return common.load_data(config, config.pipeline.get('data'))


def check(config) -> None:
    c, where = config.pipeline, 'config.pipeline'
    for key in c.get('data') or ():
        if key not in configs.SECTIONS['data']:
            raise ConfigError(unknown(f'{where}.data.{key}', key, configs.SECTIONS['data']))
    configs.whole(c, where, 'positions', 'samples', 'sampling_steps')
    configs.within(c, where, 'guidance', -np.inf, np.inf)
    configs.within(c, where, 'plain', 0.0, 1.0)
    if not isinstance(c.template, str) or c.template.count('{}') != 1:
        raise ConfigError(
            f"{where}.template={c.template!r} must have one {{}}: 'a photo of a {{}}'."
        )
    for part in PARTS:
        training = c[part].training
        at = f'{where}.{part}.training'
        configs.whole(training, at, 'steps', 'batch_size', 'log_every', 'checkpoint_every')
        configs.within(training, at, 'ema_decay', 0.0, 1.0)
        configs.build(state.OPTIMIZERS, training.optimizer, f'{at}.optimizer', steps=training.steps)
    configs.within(c.unet, f'{where}.unet', 'label_dropout', 0.0, 1.0)
    configs.within(c.autoencoder, f'{where}.autoencoder', 'kl', 0.0, np.inf)


def fits(config, data, devices) -> None:
    c, where, data = config.pipeline, 'config.pipeline', own_data(config)
    height, width, channels = data.shape
    factor = 2 ** (len(c.autoencoder.channels) - 1)
    if height != width or height % factor or channels != 3:
        raise ConfigError(
            f'{where}: images of {height} x {width} pixels and {channels} channels. They must be '
            f'square, a multiple of {factor} and in colour: set config.data.size and channels=3.'
        )
    train = data.id.train.images
    if train is None or train.nbytes > config.data.device_limit:
        raise ConfigError(
            'config.data.device_limit: the images must fit on the device, for compositions look at '
            'two of them. Raise it, or give fewer or smaller images.'
        )
    given = configs.plain(c.get('names'))
    if given and len(given) != data.num_classes:
        raise ConfigError(f'{where}.names has {len(given)} names for {data.num_classes} classes.')
    for part in PARTS:
        at = f'{where}.{part}.training.batch_size'
        common.check_batch(c[part].training.batch_size, len(data.id.train), devices, at)
    with common.rehearsal(where):
        described = describe(config, data)
        for name in ('text_encoder', 'unet', 'vae', 'clip'):
            COMPONENTS[name].targets(COMPONENTS[name].build(described[name]))


def names(config, data) -> tuple[str, ...]:
    """What captions call the classes."""
    given = configs.plain(config.pipeline.get('names'))
    return given or tuple(name.replace('_', ' ') for name in data.class_names)


def texts(config, data) -> list[str]:
    """All captions, by their numbers."""
    return captions.captions(names(config, data), config.pipeline.template)


def describe(config, data) -> dict[str, dict]:
    """The `config.json` of every component."""
    c = configs.plain(config.pipeline)
    own = {part: {k: v for k, v in c[part].items() if k != 'training'} for part in PARTS}
    size, channels = data.shape[0], data.shape[-1]
    vocabulary, _ = tokenizer.learn(texts(config, data))
    patch, projection = own['clip'].pop('patch'), own['clip'].pop('projection')
    both = own['clip'] | {'projection': projection}
    text = fresh.text_config(vocab_size=len(vocabulary), positions=c['positions'], **both)
    image = fresh.vision_config(size=size, patch=patch, image_channels=channels, **both)
    own['autoencoder'].pop('kl')
    own['unet'].pop('label_dropout')
    latents = size // 2 ** (len(own['autoencoder']['channels']) - 1)
    return {
        'text_encoder': text,
        'clip': fresh.clip_config(text, image),
        'vae': fresh.vae_config(size=size, image_channels=channels, **own['autoencoder']),
        'unet': fresh.unet_config(size=latents, width=text['hidden_size'], **own['unet']),
    }


def run(context: Context) -> dict:
    if '://' in str(context.artefact.folder):
        raise UserError(
            f'{context.artefact.folder}: a Stable Diffusion is trained into a folder that other '
            'programs read as files. Give a --workdir on a disk, one that all hosts share, and '
            'copy it afterwards.'
        )
    context = dataclasses.replace(context, data=own_data(context.config))
    config, data = context.config, context.data
    described, words = describe(config, data), tokenizer.learn(texts(config, data))
    make = tokenizer.Tokenizer(tokenizer.build(*words), length=config.pipeline.positions)
    ids = make(['', *texts(config, data)])  # row 0 is the empty prompt
    built = lambda name: COMPONENTS[name].build(described[name], dtype=common.dtype(config))
    clip, (vae,), (unet,) = built('clip'), built('vae').values(), built('unet').values()
    root = key_for(config.seed, 'pipeline')
    blank = jnp.zeros((1, *data.shape))

    def initial():
        keys = {name: key_for(root, 'init', name) for name in ('text', 'vision')}
        text = compile_init(clip['text'].init)(keys['text'], ids[:1])['params']
        image = compile_init(clip['vision'].init)(keys['vision'], blank)['params']
        return {'text': text, 'vision': image, 'logit_scale': jnp.log(jnp.float32(1 / 0.07))}

    trained, facts = {}, {}
    trained['clip'], facts['clip'] = fit(
        context, 'clip', initial, functools.partial(clip_loss, clip=clip, ids=ids)
    )
    trained['autoencoder'], facts['autoencoder'] = fit(
        context,
        'autoencoder',
        lambda: compile_init(vae.init)(key_for(root, 'init', 'vae'), blank)['params'],
        functools.partial(autoencoder_loss, vae=vae, kl=config.pipeline.autoencoder.kl),
    )
    described['vae']['scaling_factor'] = scale = latent_scale(
        vae, trained['autoencoder'], data.id.train.images[:1000]
    )
    text = {k: v for k, v in trained['clip']['text'].items() if k != 'text_projection'}
    (encoder,) = built('text_encoder').values()
    hidden = jax.jit(encoder.apply)({'params': text}, ids)['hidden']
    vae = vae.clone(scale=scale)
    side = described['unet']['sample_size']
    start = jnp.zeros((1, side, side, 4)), jnp.ones(1, jnp.int32), hidden[:1]
    trained['unet'], facts['unet'] = fit(
        context,
        'unet',
        lambda: compile_init(unet.init)(key_for(root, 'init', 'unet'), *start)['params'],
        functools.partial(
            unet_loss, unet=unet, vae=vae, label_dropout=config.pipeline.unet.label_dropout
        ),
        frozen={'vae': trained['autoencoder'], 'hidden': np.asarray(hidden)},
    )
    place = pathlib.Path(context.artefact / 'pipeline')
    params = {'clip': trained['clip'], 'text_encoder': text, 'unet': trained['unet']}
    params['vae'] = trained['autoencoder']
    if hosts.first():
        fresh.write(place, described, params, words, length=config.pipeline.positions)
    hosts.barrier()
    return facts | {'parameters': parameters(params)} | examine(context, place)


def parameters(params) -> dict[str, int]:
    return {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params.items()}


def fit(context: Context, part: str, initial, loss_fn, frozen=None):
    """Trains one part -> (the average of its weights, facts), or takes what was trained before.

    Args:
        initial: () -> params.
        loss_fn: (params, frozen, images, captions, keys) -> (loss of each row, metrics), keys being
            purpose -> keys[B].
        frozen: arrays of networks that stay as they are.
    """
    config, data, devices = context.config, context.data, context.devices
    training, where = config.pipeline[part].training, f'config.pipeline.{part}.training'
    folder = context.artefact / part
    if artefacts.exists(folder / 'facts.json'):
        weights = checkpoint.load_weights(folder / 'weights')
        return weights, json.loads((folder / 'facts.json').read_text())
    tx = configs.build(
        state.OPTIMIZERS, training.optimizer, f'{where}.optimizer', steps=training.steps
    )
    loss = functools.partial(
        composed, loss_fn=loss_fn, num_classes=data.num_classes, plain=config.pipeline.plain
    )
    step = functools.partial(loop.train_step, loss_fn=loss, tx=tx, ema_limit=training.ema_decay)
    resident, feed = common.feed(
        data.id.train,
        devices,
        batch_size=training.batch_size,
        seed=seed_for(config.seed, 'pipeline', part, 'batches'),
        limit=config.data.device_limit,
    )
    final, facts = loop.fit(
        state.create(initial(), tx, {}, ema=True),
        devices.compile_step(step),
        resident | {'frozen': devices.replicate(frozen or {})},
        feed,
        key_for(config.seed, 'pipeline', part, 'steps'),
        steps=training.steps,
        devices=devices,
        folder=folder,
        what=f'{part} {context.what}',
        images_per_step=training.batch_size,
        where=f'{where}.batch_size',
        log_every=training.log_every,
        checkpoint_every=training.checkpoint_every,
    )
    checkpoint.save_weights(folder / 'weights', final.ema)
    artefacts.write(folder / 'facts.json', json.dumps(facts))
    return jax.device_get(final.ema), facts


def composed(params, extra, data, batch, key, step, *, loss_fn, num_classes, plain):
    """The mean loss of a batch of compositions; every row draws from (key, its index)."""
    batch = common.rows(data, batch)
    keys = lambda purpose: key_each(key_for(key, purpose), batch['index'])
    draw = lambda k: jax.random.randint(k, (), 0, len(data['label']))
    other = jax.vmap(draw)(keys('other'))
    images, number = captions.compose(
        augment.to_unit(batch['image']),
        batch['label'],
        augment.to_unit(data['image'][other]),
        data['label'][other],
        keys('composition'),
        num_classes=num_classes,
        plain=plain,
    )
    rows, metrics = loss_fn(params, data['frozen'], images, number, keys)
    loss = jnp.mean(rows)
    return loss, (extra, {'loss': loss} | metrics)


def clip_loss(params, frozen, images, number, keys, *, clip, ids):
    """Images and captions, each other's nearest."""
    seen = vision.normalised((images + 1.0) / 2.0)
    image = clip['vision'].apply({'params': params['vision']}, seen)['projected']
    text = clip['text'].apply({'params': params['text']}, jnp.asarray(ids)[number + 1])['projected']
    return contrastive.clip(image, text, params['logit_scale'], number), {}


def autoencoder_loss(params, frozen, images, number, keys, *, vae, kl):
    """Squared error per pixel + kl · KL(q(z | x), N(0, 1)) per number of the latents."""
    mean, log_variance = vae.apply({'params': params}, images, method='encode')
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys('latents'))
    latents = mean + jnp.exp(0.5 * log_variance) * noise
    error = vae.apply({'params': params}, latents, method='decode') - images
    divergence = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
    axes = (1, 2, 3)
    error = jnp.mean(jnp.square(error), axes)
    return error + kl * jnp.mean(divergence, axes), {'error': jnp.mean(error)}


def latent_scale(vae, params, images) -> float:
    """1 / the standard deviation of the latents, as Stable Diffusion's 0.18215 was found."""
    encode = lambda x: vae.apply({'params': params}, augment.to_unit(x), method='encode')[0]
    return round(float(1.0 / np.std(jax.jit(encode)(images))), 5)


def unet_loss(params, frozen, images, number, keys, *, unet, vae, label_dropout):
    """The denoising loss in latents, the caption dropped now and then."""
    networks = pipeline.Networks(None, unet, vae)
    own = {'vae': {'params': frozen['vae']}}
    latents = pipeline.encode_images(networks, own, images, keys('latents'))
    drop = jax.vmap(lambda key: jax.random.bernoulli(key, label_dropout))(keys('drop'))
    context = frozen['hidden'][jnp.where(drop, 0, number + 1)]
    alpha_bar = networks.schedule.alpha_bar
    t, eps = process.draw_noise(keys('noise'), latents.shape[1:], len(alpha_bar) - 1)
    network = lambda x, t: unet.apply({'params': params}, x, t, context)
    rows = process.loss(
        network, latents, t, eps, alpha_bar=alpha_bar, prediction=PREDICTIONS['eps']
    )
    return rows, {}


def examine(context: Context, place: pathlib.Path) -> dict:
    """Samples every class, has a classifier read them, draws the contact sheet -> facts."""
    config, data = context.config, context.data
    c = config.pipeline
    sd = folders.load(place)
    asked = names(config, data)
    plain = [c.template.format(name) for name in asked for _ in range(c.samples)]
    shown = chosen(texts(config, data), len(asked))
    prompts = plain + [prompt for prompt in shown for _ in range(SAMPLES)]
    seeds = [*range(len(plain)), *list(range(SAMPLES)) * len(shown)]
    images = np.concatenate(
        list(
            pipeline.render(
                *(sd, context.devices, prompts, seeds),
                guidance=c.guidance,
                steps=c.sampling_steps,
                batch_size=context.num_rows(),
            )
        )
    )
    images, pictures = images[: len(plain)], images[len(plain) :]
    read = reader(data.id.train)
    wanted = np.repeat(np.arange(len(asked)), c.samples)
    as_asked = read(images) == wanted
    held = float(np.mean(read(data.id.test.images) == data.id.test.labels))
    found = {
        'read_as_asked': round(float(as_asked.mean()), 4),
        'read_as_asked_each': {
            name: round(float(as_asked[wanted == k].mean()), 4) for k, name in enumerate(asked)
        },
        'reader_accuracy': round(held, 4),
    }
    sheet(context.artefact / 'samples.png', shown, pictures)
    artefacts.write(context.artefact / 'samples.json', json.dumps(found, indent=2) + '\n')
    return found


def reader(examples):
    """A classifier of pixels: a support vector machine; images uint8 [N, H, W, C] -> labels."""
    from sklearn.svm import SVC  # noqa: PLC0415 - takes a second

    flat = lambda images: images.reshape(len(images), -1) / 255.0
    machine = SVC(C=10.0).fit(flat(examples.images), examples.labels)
    return lambda images: machine.predict(flat(images))


def chosen(prompts, count) -> list[str]:
    """Captions for the contact sheet: all classes, and one or two of every composition."""
    views = len(captions.VIEWS)
    picked = [*range(count), *(count * v + v % count for v in range(1, views))]
    picked += [count * views + count - 1, count * (views + 1) + min(3, count - 1)]
    return [prompts[i] for i in dict.fromkeys(picked) if i < len(prompts)]


def sheet(path, prompts, images) -> None:
    """Draws the images uint8 [N · SAMPLES, H, W, C] of prompts, a row for each."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    rows = images.reshape(len(prompts), SAMPLES, *images.shape[1:])
    figure = Figure(figsize=(0.5 * SAMPLES + 3.5, 0.5 * len(prompts)), dpi=100)
    axes = figure.subplots(len(prompts), SAMPLES, squeeze=False)
    for prompt, row, places in zip(prompts, rows, axes):
        places[0].set_ylabel(prompt, rotation=0, ha='right', va='center', fontsize=8)
        for image, ax in zip(row, places):
            ax.imshow(image, interpolation='nearest')
            ax.set_xticks([])
            ax.set_yticks([])
    figure.subplots_adjust(left=3.4 / (0.5 * SAMPLES + 3.5), right=1, top=1, bottom=0, wspace=0.05)
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', metadata={'Software': None})
    artefacts.write(path, buffer.getvalue())


def show(artefact, config) -> None:
    """Says what the samples look like, on the terminal."""
    found = json.loads((artefact / 'samples.json').read_text())
    console.say(
        f'samples read as asked: {found["read_as_asked"]:.1%} (the reader itself: '
        f'{found["reader_accuracy"]:.1%} of real test images)'
    )
