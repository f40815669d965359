"""The baseline of restoring features: restoring the pixels, by a diffusion model of ID images.

Graham et al. 2023 (arXiv:2211.07740): images are noised to many depths, restored from each, and
scored by how much the restoration misses. It calls the network some 400 times as often as features
are restored from t = 3, and the network is a U-Net, so it is measured on a few images of each set,
and so is the pace of restoring the features of the same images.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxood import artefacts, console, diffusion, parallel
from jaxood import config as configs
from jaxood.data import augment
from jaxood.diffusion import process, samplers
from jaxood.errors import ConfigError
from jaxood.rng import key_each, key_for
from jaxood.stages import common, score, train_diffusion
from jaxood.stages.common import TEST, VALIDATION, Context
from jaxood.stages.parts import scorers
from jaxood.train import checkpoint

VERSION = 1
SEES = 'all'
ACROSS = False
NEEDS = ('generator', 'diffusion', 'pixels')
PUBLISHED = ()
SLOWEST = 2048  # images of which the pace of features is taken, at most
SHORT = 2  # calls of the shallowest chain; the others have a multiple of `every` more


def applies(config) -> bool:
    return True


def inputs(config) -> tuple[str, ...]:
    return ('train_diffusion', *score.parts(config))


def needs_labels(config) -> bool:
    return False


def settings(config) -> dict:
    return common.settings(config, 'seeds', 'diffusion', 'generator', 'restoration', 'pixels')


def check(config) -> None:
    c, where = config.pixels, 'config.pixels'
    configs.whole(c, where, 'count', minimum=2)
    configs.whole(c, where, 'every', 'batch_size')
    T = config.diffusion.schedule.num_steps
    configs.whole(c, where, 'steps', minimum=SHORT, maximum=T)
    if c.single not in calls(config):
        raise ConfigError(
            f'{where}.single={c.single!r} is none of the chains, which call the network '
            f'{", ".join(map(str, calls(config)))} times.'
        )
    if config.diffusion.label_dropout != 1.0:
        raise ConfigError(
            'config.diffusion.label_dropout must be 1.0 for config.stages with '
            "'reconstruct_pixels', whose diffusion model is told no class."
        )
    if not score.restores(config):
        raise ConfigError(
            "config.stages has 'reconstruct_pixels', the baseline of 'train_restorer': add that."
        )


def fits(config, data, devices) -> None:
    for name, examples in data.ood.items():
        if examples.shape != data.shape:
            raise ConfigError(
                f'config.data.ood.{name} has images of shape {examples.shape}, and a diffusion '
                f'model of pixels takes those of the ID set, {data.shape}. Set config.data.size.'
            )


def calls(config) -> range:
    """How often each chain calls the network. With 100 steps and every 4th, 2, 6, ..., 98: 25
    chains, 1250 calls in all (official code, marksgraham/ddpm-ood)."""
    return range(SHORT, config.pixels.steps, config.pixels.every)


def run(context: Context) -> dict:
    config, data, devices = context.config, context.data, context.devices
    c = config.pixels
    model = train_diffusion.build(config, data.num_classes)
    weights = checkpoint.load_weights(context.inputs['train_diffusion'] / 'weights')
    params, key = devices.replicate(weights['params']), key_for(config.seeds[0], 'pixels')
    alpha_bar, grid = train_diffusion.schedule(config), times(config)
    compiled = functions(devices, model, tuple(alpha_bar.tolist()), config.diffusion.prediction)
    how = dict(every=c.every, rows=devices.batch_size(c.batch_size))

    def missed(images, number):
        levels = grid[len(grid) - 1 - number :]
        return errors(devices, compiled, params, key, images, levels, **how)

    sets = {TEST: data.id.test, VALIDATION: data.id.validation, **data.ood}
    rows = {k: chosen(len(v), c.count) for k, v in sets.items()}
    images = {k: v.take(rows[k]) for k, v in sets.items()}
    missed(images[TEST][:1], SHORT + c.every)  # compiles
    progress = console.Progress(context.what, len(sets) * len(calls(config)))
    seconds = dict.fromkeys(calls(config), 0.0)
    for j, (name, some) in enumerate(images.items()):
        found = []
        for number in calls(config):
            started = time.monotonic()
            found.append(missed(some, number))
            seconds[number] += time.monotonic() - started
            progress.update(j * len(calls(config)) + len(found))
        artefacts.save(
            context.artefact / f'{name}.npz', errors=np.stack(found, axis=1), rows=rows[name]
        )
    progress.close()
    total = sum(map(len, images.values()))
    return {
        'calls': sum(calls(config)),
        'images': total,
        'pixels_s': sum(seconds.values()) / total,
        'single_s': seconds[c.single] / total,
        'features_s': pace(context),
    }


def errors(
    devices, compiled, params, key, images: np.ndarray, levels: np.ndarray, *, every: int, rows: int
) -> np.ndarray:
    """Mean squared error of each image's restoration, pixels in [-1, 1]: float32[N].

    Args:
        compiled: `functions`.
        params: replicated.
        images: uint8[N, H, W, C].
        levels: int32[S + 1], the times of the chain down to 0, S = `SHORT` + a multiple of `every`.
            It is walked in parts of these two lengths, so that chains of all depths share programs.
        rows: images of one call.
    """
    noise, walk, compare = compiled
    stops = [*range(0, len(levels) - SHORT, every), len(levels) - 1]
    found = []
    for at in range(0, len(images), rows):
        some, real = parallel.pad_rows(images[at : at + rows], rows)
        some = devices.shard(some)
        x = noise({'key': devices.replicate(key), 't': devices.replicate(levels[0])}, some)
        for a, b in zip(stops[:-1], stops[1:]):
            part = devices.replicate(levels[a : b + 1])
            x = walk({'params': params, 'timesteps': part}, x)
        found.append(devices.gather(compare(None, {'x': x, 'images': some}))[:real])
    return np.concatenate(found)


def times(config) -> np.ndarray:
    """The grid of all chains, T down to 0; one of n calls walks its last n + 1 entries."""
    return samplers.strided(config.diffusion.schedule.num_steps, config.pixels.steps)


def chosen(size: int, count: int) -> np.ndarray:
    """Which rows of a set are looked at: `count`, evenly spaced."""
    return np.unique(np.linspace(0, size - 1, min(size, count)).round().astype(int))


def pace(context: Context) -> float:
    """Seconds an image from pixels to a restoration score, on the ID test images; nothing of it is
    read from what is kept."""
    config = context.config
    network = score.load(context.inputs, config, context.devices, context.num_rows())
    depths = scorers.depths(config)[:1]
    some = context.data.id.test
    some = some.subset(np.arange(min(len(some), SLOWEST)))

    def through(chunks):
        for out in network.stream(chunks):
            network.restorer.restore(out, depths, network.rows)

    through(network.chunks(some.subset([0])))  # compiles
    started = time.monotonic()
    through(network.chunks(some))
    return (time.monotonic() - started) / len(some)


def scores(errors: np.ndarray, validation: np.ndarray) -> np.ndarray:
    """Mean over depths of errors z-scored by held-out ID images: float[N, J] -> float[N].

    Graham et al. 2023; squared errors alone, as in the official code (the paper adds LPIPS, whose
    weights are not at hand). The mean over `validation` itself is 0.
    """
    mean, std = validation.mean(axis=0), validation.std(axis=0)
    return ((errors - mean) / np.maximum(std, 1e-12)).mean(axis=1)


@functools.lru_cache(maxsize=4)
def functions(devices, model, alpha_bar, prediction):
    """(noise an image to t, walk a part of a chain by DDIM with η = 0, compare), compiled once."""
    levels = np.asarray(alpha_bar, np.float32)

    def noise(shared, images):
        keys = key_each(shared['key'], augment.mark(images))
        eps = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(keys)
        return process.add_noise(augment.to_unit(images), eps, jnp.asarray(levels)[shared['t']])

    def walk(shared, x):
        none = jnp.zeros((len(x), model.num_classes + 1))
        condition = process.null_condition(none)
        network = lambda x, t: model.apply({'params': shared['params']}, x, t, condition)
        how = diffusion.PREDICTIONS[prediction]
        denoise = process.denoiser(network, alpha_bar=levels, prediction=how)
        return samplers.sample(
            denoise,
            x,
            None,
            alpha_bar=levels,
            timesteps=shared['timesteps'],
            sampler=samplers.ddim,
            clip=(-1.0, 1.0),
        )

    def compare(shared, rows):
        difference = rows['x'] - augment.to_unit(rows['images'])
        return jnp.mean(jnp.square(difference), axis=(1, 2, 3))

    return tuple(devices.compile_rows(f) for f in (noise, walk, compare))
