"""Learns a pseudo-word for every class: textual inversion, one vector a class, nothing else moves.

Gal et al. 2022 (arXiv:2208.01618; official code rinongal/textual_inversion), as DOG uses it. What a
class is called, which the stages after it ask, too, is told by `names`.
"""

import collections
import functools
import itertools
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxood import artefacts, console, parallel
from jaxood import config as configs
from jaxood.artefacts import Artefact
from jaxood.data import augment, loader
from jaxood.diffusion import PREDICTIONS, process
from jaxood.errors import ConfigError
from jaxood.models.clip.tokenizer import Tokenizer
from jaxood.models.stable_diffusion import pipeline
from jaxood.rng import key_for, seed_for
from jaxood.stages import common
from jaxood.stages.common import Context
from jaxood.stages.parts import memo, networks, texts
from jaxood.synthesis.painter import resize
from jaxood.train import loop, state

VERSION = 1
LATENTS = 1  # raised when the same autoencoder says something else
SEES = 'id'
ACROSS = False
NEEDS = ('tokens',)
PUBLISHED = ()
WHERE = 'config.tokens'
METHODS = ('inversion', 'none')  # 'none': the class names as they are, DOG's strategy (e)
NAME = 'name'  # of `config.tokens.initial`: start at the class name's own vector
LAYOUT = ('at_once', 'remat')  # of config.tokens: change no result
SHARD = 1024  # latents that a kill can cost
SAID = 8  # names in a message
TEMPLATES = {
    'plain': ('a photo of a {}',),
    # official code (ldm/data/personalized.py), imagenet_templates_small
    'objects': (
        *('a photo of a {}', 'a rendering of a {}', 'a cropped photo of the {}'),
        *('the photo of a {}', 'a photo of a clean {}', 'a photo of a dirty {}'),
        *('a dark photo of the {}', 'a photo of my {}', 'a photo of the cool {}'),
        *('a close-up photo of a {}', 'a bright photo of the {}', 'a cropped photo of a {}'),
        *('a photo of the {}', 'a good photo of the {}', 'a photo of one {}'),
        *('a close-up photo of the {}', 'a rendition of the {}', 'a photo of the clean {}'),
        *('a rendition of a {}', 'a photo of a nice {}', 'a good photo of a {}'),
        *('a photo of the nice {}', 'a photo of the small {}', 'a photo of the weird {}'),
        *('a photo of the large {}', 'a photo of a cool {}', 'a photo of a small {}'),
    ),
}
_NUMBER = re.compile(r'(n|class|label|cluster)?[ _-]*\d+', re.IGNORECASE)


# ---- what classes are called ------------------------------------------------------------------


def names(config, data: common.Data) -> tuple[str, ...]:
    """What prompts call the classes: `config.tokens.names`, those of a file, or the classes' own.

    Raises:
        ConfigError: not a name for each class, two alike, or numbers.
    """
    c, classes = config.tokens, data.class_names
    given, file = configs.plain(c.get('names')), c.get('names_file')
    if given and file:
        raise ConfigError(f'{WHERE}.names and {WHERE}.names_file are both set. Keep one.')
    found = given or classes
    where = f'{WHERE}.names' if given else 'config.data.id'
    if file:
        where = f'{WHERE}.names_file={file!r}'
        found = read_names(file, classes, where)
    if len(found) != len(classes):
        raise ConfigError(f'{where} has {len(found)} names for {len(classes)} classes.')
    found = tuple(' '.join(name.replace('_', ' ').split()) for name in found)
    numbers = [name for name in found if not name or _NUMBER.fullmatch(name)]
    if numbers:
        raise ConfigError(
            f'{where}: classes are called {_listed(numbers)}. Those are numbers, not words that a '
            f"generator knows. Set {WHERE}.names=('cat', 'dog', ...) in the order of the classes, "
            f'or {WHERE}.names_file=FILE with a name, or a class and its name, on each line.'
        )
    twice = [name for name, count in collections.Counter(found).items() if count > 1]
    if twice:
        raise ConfigError(f'{where}: two classes are called {twice[0]!r}. Tell them apart.')
    return found


def called(config) -> dict:
    """What `names` depends on beside the data, for fingerprints: a file by its contents."""
    file = config.tokens.get('names_file')
    return {'names': config.tokens.get('names'), 'names_file': file and _lines(file)}


def read_names(path: str, classes: Sequence[str], where: str) -> tuple[str, ...]:
    """The names in a file: one on each line, in the order of the classes; or rows with tabs, of
    which each class takes the one with its own cell, and the first word behind that.

    Raises:
        ConfigError: there is no such file, or a class that it doesn't name.
    """
    lines = _lines(path)
    rows = [line.split('\t') for line in lines]
    if all(len(row) == 1 for row in rows):
        return lines
    named = {}
    for row in rows:
        for place, cell in enumerate(row):
            words = (other for other in row[place + 1 :] if not _NUMBER.fullmatch(other))
            named.setdefault(cell, next(words, None))
    missing = [name for name in classes if named.get(name) is None]
    if missing:
        raise ConfigError(f'{where} names no class {missing[0]!r} ({len(missing)} such in all).')
    return tuple(named[name] for name in classes)


def _lines(path):
    try:
        text = pathlib.Path(path).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as e:
        where = f'{WHERE}.names_file={path!r}'
        raise ConfigError(f'{where} cannot be read ({e}). Check the path.') from e
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _listed(found):
    more = f' and {len(found) - SAID} more' if len(found) > SAID else ''
    return ', '.join(repr(name) for name in found[:SAID]) + more


# ---- the stage --------------------------------------------------------------------------------


def applies(config) -> bool:
    return config.tokens.name != 'none'


def inputs(config) -> tuple[str, ...]:
    return common.labelling(config) + texts.inputs(config)


def needs_labels(config) -> bool:
    return True


def settings(config) -> dict:
    used = common.settings(config, 'seed', 'dtype', 'tokens')
    tokens = {k: v for k, v in used['tokens'].items() if k not in LAYOUT}
    return used | {'tokens': tokens | called(config)} | texts.settings(config)


def check(config) -> None:
    c = config.tokens
    common.check_name(METHODS, c.name, f'{WHERE}.name')
    texts.check(config)
    common.check_name(TEMPLATES, c.templates, f'{WHERE}.templates')
    configs.whole(c, WHERE, 'steps', 'batch_size', 'at_once', 'log_every', 'checkpoint_every')
    configs.true_or_false(c, WHERE, 'draw', 'flip', 'remat')
    if c.get('per_class') is not None:
        configs.whole(c, WHERE, 'per_class')
    if not isinstance(c.initial, str) or not c.initial.strip():
        raise ConfigError(f"{WHERE}.initial={c.initial!r} must be '{NAME}', or a word or several.")
    if c.optimizer.get('clip') is not None:
        raise ConfigError(
            f'{WHERE}.optimizer.clip={c.optimizer.clip}: it would tie together the classes that '
            f'are trained at once. Leave it unset.'
        )
    if c.optimizer.get('name') == 'adamw' and c.optimizer.get('weight_decay') is None:
        raise ConfigError(
            f"{WHERE}.optimizer: 'adamw' decays by default, and that pulls every vector towards 0, "
            "where no word is. Set weight_decay=0.0, or name='adam'."
        )
    configs.build(state.OPTIMIZERS, c.optimizer, f'{WHERE}.optimizer', steps=c.steps)


def fits(config, data, devices) -> None:
    c = config.tokens
    names(config, data)
    common.check_split(c.batch_size, devices, f'{WHERE}.batch_size={c.batch_size}')
    if data.shape[-1] != 3:
        raise ConfigError(
            f'config.data: images of {data.shape[-1]} channel(s), the generator sees 3. Set '
            'config.data.channels=3.'
        )


def run(context: Context) -> dict:
    config, data = context.config, context.data
    c = config.tokens
    sd, classes = texts.load(config, context.inputs), names(config, data)
    sd = sd._replace(networks=sd.networks._replace(unet=sd.networks.unet.clone(remat=c.remat)))
    table = np.asarray(embeddings(sd.params['text_encoder']))
    start = np.stack([initial(table, sd.tokenizer, name, c.initial) for name in classes])
    _say_several(sd.tokenizer, classes if c.initial == NAME else [c.initial])
    chosen = choose(data.id.train.labels, c.get('per_class'))
    examples = data.id.train.subset(chosen)
    latents = encoded(context, sd, examples)
    shared = context.devices.replicate(
        {'params': {k: sd.params[k] for k in ('text_encoder', 'unet')}}
    )
    tx = configs.build(state.OPTIMIZERS, c.optimizer, f'{WHERE}.optimizer', steps=c.steps)
    loss = functools.partial(loss_fn, networks=sd.networks)
    step = context.devices.compile_step(functools.partial(loop.train_step, loss_fn=loss, tx=tx))
    vectors, facts = [], {}
    for at in range(0, len(classes), c.at_once):
        numbers = np.arange(at, min(at + c.at_once, len(classes)))
        folder = context.artefact / f'classes-{at:04d}'
        if not artefacts.exists(folder / 'vectors.npz'):
            found, facts = invert(
                context, sd, step, tx, shared, latents, examples.labels, numbers, start[numbers]
            )
            artefacts.save(folder / 'vectors.npz', vectors=found)
        vectors.append(artefacts.load(folder / 'vectors.npz')['vectors'])
    vectors = np.concatenate(vectors)
    artefacts.save(context.artefact / 'tokens.npz', vectors=vectors, initial=start)
    length = np.linalg.norm(vectors, axis=1) * np.linalg.norm(start, axis=1)
    moved = np.sum(vectors * start, axis=1) / np.maximum(length, 1e-12)
    return facts | {'classes': classes, 'cosine_to_initial': np.round(moved, 4).tolist()}


def invert(context, sd, step, tx, shared, latents, labels, numbers, start):
    """Trains the vectors of some classes together -> (float32[A, D], facts of the loop)."""
    c, devices = context.config.tokens, context.devices
    words, ids = prompts(sd.tokenizer, len(numbers), TEMPLATES[c.templates])
    resident, batches = feed(
        latents,
        [np.flatnonzero(labels == number) for number in numbers],
        numbers,
        batch_size=c.batch_size,
        seed=context.config.seed,
        limit=context.config.data.device_limit,
    )
    final, facts = loop.fit(
        state.create({'vectors': jnp.asarray(start)}, tx, {}, ema=False),
        step,
        shared | devices.replicate({'ids': ids, 'latents': resident}),
        batches,
        key_for(context.config.seed, 'tokens', 'steps'),
        steps=c.steps,
        devices=devices,
        folder=context.artefact / f'classes-{numbers[0]:04d}',
        what=f'{context.what} {numbers[0]}-{numbers[-1]}',
        images_per_step=len(numbers) * c.batch_size,
        where=f'{WHERE}.batch_size',
        log_every=c.log_every,
        checkpoint_every=c.checkpoint_every,
    )
    return np.asarray(final.params['vectors']), facts


def loss_fn(params, extra, data, batch, key, step, *, networks):
    """Σ_y E ‖ε - D(√ᾱ_t z_0 + √(1 - ᾱ_t) ε, t, T_seq(prompt(s_y)))‖² of the classes of a batch.

    Latent diffusion's loss, of which only the vectors s_y see a gradient (Gal et al., Eq. 2); the
    mean over the latents' numbers where the paper has their sum, which Adam doesn't tell apart. A
    class's vector has the gradient of its own rows alone. A row draws from (key, its class, its
    place in the class), so neither the classes trained beside it nor their number matter.

    Args:
        params: `vectors` float32[A, D].
        data: `params` of text encoder and U-Net; `ids` int32[A, templates, N]; `latents`, or None
            where the batch brings its own.
        batch: `slot` (which vector), `number` (of the class), `place`, `row` (of the latents).
    """
    of = lambda k, number, place: jax.random.fold_in(jax.random.fold_in(k, number), place)
    keys = lambda purpose: jax.vmap(functools.partial(of, key_for(key, purpose)))(
        batch['number'], batch['place']
    )
    if data['latents'] is None:
        q = batch['latents']
    else:
        q = jax.tree.map(lambda x: x[batch['row']], data['latents'])
    z_0 = draw(q, keys, scale=networks.vae.scale)
    templates = data['ids'].shape[1]
    which = jax.vmap(lambda k: jax.random.randint(k, (), 0, templates))(keys('template'))
    context = contexts(networks, data, params['vectors'], batch['slot'], which)
    alpha_bar = networks.schedule.alpha_bar
    t, eps = process.draw_noise(keys('noise'), z_0.shape[1:], len(alpha_bar) - 1)
    network = lambda x, t: networks.unet.apply(data['params']['unet'], x, t, context)
    prediction = PREDICTIONS[networks.schedule.prediction]
    rows = process.loss(network, z_0, t, eps, alpha_bar=alpha_bar, prediction=prediction)
    loss = jnp.mean(rows)
    return len(params['vectors']) * loss, (extra, {'loss': loss})


def contexts(networks, data, vectors, slot, which):
    """T_seq(prompt(s_y)) of each row, float32[B, N, D]: template `which` with vector `slot`."""
    encode = lambda ids: pipeline.encode_prompts(networks, data['params'], ids, vectors)
    ids = data['ids']
    if ids.shape[0] * ids.shape[1] > len(slot):
        return encode(ids[slot, which])
    hidden = encode(ids.reshape(-1, ids.shape[-1]))  # fewer prompts than rows: each once
    return hidden.reshape(*ids.shape[:2], *hidden.shape[1:])[slot, which]


def draw(q, keys, *, scale):
    """z_0 of each row: scale · E(x), of the image or, if there is that, its mirror image.

    Args:
        q: `mean` float32[B, F, h, w, 4] and, where q(z | x) is drawn from, `log_variance`; F is 2
            with mirror images.
        keys: purpose -> keys[B].
    """
    views = q['mean'].shape[1]
    side = jax.vmap(lambda k: jax.random.randint(k, (), 0, views))(keys('flip'))
    q = jax.tree.map(lambda x: jax.vmap(lambda row, s: row[s])(x, side), q)
    z = q['mean']
    if 'log_variance' in q:
        noise = jax.vmap(lambda k: jax.random.normal(k, z.shape[1:]))(keys('latents'))
        z = z + jnp.exp(0.5 * q['log_variance']) * noise
    return scale * z


def feed(latents, groups, numbers, *, batch_size: int, seed: int, limit: int):
    """How training reads latents: from the devices if those of the classes fit, else row by row.

    Args:
        latents: name -> float32[N, ...], perhaps memory maps.
        groups: the rows of each class. Fewer images than a batch takes are dealt more than once.
        numbers: of the classes.
        limit: bytes that may lie on each device.

    Returns:
        (latents of these classes or None, batches from number n on); see `loss_fn`.
    """
    rows = np.sort(np.concatenate(groups))
    size = sum(x[:1].nbytes for x in latents.values()) * len(rows)
    resident = size <= limit
    groups = [np.searchsorted(rows, group) for group in groups]
    every = {'slot': np.arange(len(groups)), 'number': numbers}
    every = {k: np.repeat(v, batch_size).astype(np.int32) for k, v in every.items()}

    def batches(n) -> Iterator[Mapping[str, np.ndarray]]:
        for m in itertools.count(n):
            places = [
                loader.rows_of(
                    m,
                    size=len(group) * -(-batch_size // len(group)),
                    batch_size=batch_size,
                    seed=seed_for(seed, 'tokens', 'batches', int(number)),
                )
                for group, number in zip(groups, numbers)
            ]
            row = np.concatenate([group[p % len(group)] for group, p in zip(groups, places)])
            batch = every | {'place': np.concatenate(places).astype(np.int32)}
            if resident:
                yield batch | {'row': row.astype(np.int32)}
            else:
                yield batch | {'latents': {k: v[rows[row]] for k, v in latents.items()}}

    return {k: np.asarray(v[rows]) for k, v in latents.items()} if resident else None, batches


def encoded(context: Context, sd, examples) -> dict[str, np.ndarray]:
    """q(z | x) of images at the generator's size, and of their mirror images: computed once.

    Returns:
        `mean` and, where it is drawn from, `log_variance`, float32[N, F, h, w, 4], as `draw` takes
        them, as memory maps; not scaled.
    """
    c, devices = context.config.tokens, context.devices
    compiled = _encoder(devices, sd.networks.vae.clone(dtype=jnp.float32), sd.size, c.flip)
    shared = devices.replicate(
        jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), sd.params['vae'])
    )
    size = devices.batch_size(networks.rows_of(context.num_rows(), {'size': sd.size}))
    names = ('mean', 'log_variance') if c.draw else ('mean',)

    def chunks(start, stop):
        part = examples.subset(np.arange(start, stop))
        each = ((images, len(real)) for images, real in loader.chunks(part, size))
        for found in parallel.map_rows(devices, compiled, shared, each):
            yield {name: found[name] for name in names}

    of = texts.digest_of(texts.pipeline_folder(context.config, context.inputs))
    key = configs.fingerprint(LATENTS, of, examples.digest, c.flip, c.draw)
    what = f'latents, {context.what}'
    return memo.rows(context.store, 'latents', key, len(examples), chunks, what, SHARD)


@functools.cache
def _encoder(devices, vae, size, flip):
    def encode(variables, images):
        x = resize(augment.to_unit(images), size, size)
        views = [x, x[:, :, ::-1]] if flip else [x]
        found = [vae.apply(variables, view, method='encode') for view in views]
        mean, log_variance = (jnp.stack(parts, axis=1) for parts in zip(*found))
        return {'mean': mean, 'log_variance': log_variance}

    return devices.compile_rows(encode)


def choose(labels: np.ndarray, per_class: int | None) -> np.ndarray:
    """The rows of the first `per_class` images of each class, in order; None for all."""
    if per_class is None:
        return np.arange(len(labels))
    firsts = [np.flatnonzero(labels == k)[:per_class] for k in np.unique(labels)]
    return np.sort(np.concatenate(firsts))


# ---- pseudo-words -----------------------------------------------------------------------------


def prompts(
    tokenizer: Tokenizer, count: int, templates: Sequence[str]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Pseudo-words for `count` vectors, and every template with each: int32[count, templates, N].

    The i-th stands for row i of the vectors that a text encoder is given as `extra`.
    """
    own, words = tokenizer.copy(), tuple(f'<class-{i}>' for i in range(count))
    own.add(words)
    ids = own([template.format(word) for word in words for template in templates])
    return words, ids.reshape(count, len(templates), -1)


def initial(table: np.ndarray, tokenizer: Tokenizer, name: str, start: str) -> np.ndarray:
    """Where a class's vector starts: the token vector of its name, or the mean of several (ours).

    Args:
        table: float32[V, D], of the tokens.
        start: 'name' (the paper's), or other words for all classes.
    """
    return table[tokenizer.ids(name if start == NAME else start)].mean(axis=0, dtype=np.float32)


def embeddings(variables):
    """The table of token vectors of a text encoder."""
    return variables['params']['embeddings']['token_embedding']['embedding']


def vectors(artefact: Artefact) -> np.ndarray:
    """The learned vectors of a finished stage, float32[C, D], in the order of the classes."""
    return artefacts.load(artefact / 'tokens.npz')['vectors']


def _say_several(tokenizer, called):
    several = {name: len(ids) for name in called if len(ids := tokenizer.ids(name)) > 1}
    if several:
        said = ', '.join(f'{name} ({count})' for name, count in list(several.items())[:SAID])
        more = f' and {len(several) - SAID} more' if len(several) > SAID else ''
        console.say(f'start at the mean of several tokens: {said}{more}')
