"""A small Stable Diffusion of our own, in diffusers' layout: CLIP, autoencoder and U-Net.

    python -m jaxood.main --config=configs/small_sd.py:digits --workdir=runs/small_sd

leaves `runs/small_sd/pipeline`, which everything that speaks Stable Diffusion reads, and in it
`clip`, the same text encoder with its projection and the image encoder. So methods on top of Stable
Diffusion can be run, tested and shown from end to end without a download.

Its world: scikit-learn's digits 0 to 7, "a photo of a three", and by composition what else can be
said of them: mirrored, upside down, inverted, one over another. The digits 8 and 9 are held out; it
never sees them, so they stay honest test classes.

    :digits    8 x 8 pixels, latents 4 x 4
    :folder    --config.data.id.path=DIR, one sub-folder a class, 32 x 32; not measured yet
    :cifar10   --config.data.root=DIR with cifar10_train.npz and cifar10_test.npz; not measured yet

Measured with that command on 2 CPU cores that other work shared (no GPU; JAX 0.10.2): 17 min 40 s,
11 CPU-minutes. 256 samples, guidance scale 3, 50 DDIM steps: all were read as asked by a support
vector machine on pixels, which reads 98.6 % of real test digits. With 200, 400 and 600 training
steps, 16 samples a class and 20 sampling steps: 96.9 % of 128, 4 CPU-minutes. 1.4 M parameters,
5.5 MB. Paper row: none.

All sizes and numbers of steps are our choice; the noise schedule, ε prediction and the share of
captions dropped (0.1) are Stable Diffusion's.
"""

import ml_collections
from ml_collections import config_dict

from jaxood.errors import lookup


def get_config(variant: str = 'digits'):
    """The config of a variant: digits, folder or cifar10."""
    c = digits()
    lookup(VARIANTS, variant, 'variant')(c)
    return c


def digits():
    """Scikit-learn's digits, embedded: nothing is downloaded."""
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.seeds = (0,)
    c.dtype = 'float32'
    c.stages = ('train_pipeline',)
    c.artefacts_dir = config_dict.placeholder(str)
    c.parallel = dict(mode='jit', num_devices=config_dict.placeholder(int), inference_batch=128)
    c.parallel.shard_state = False  # split large states over the devices
    c.data = dict(
        root=config_dict.placeholder(str),
        on_error='stop',
        size=8,
        channels=3,
        held_out=(8, 9),
        validation=0.1,
        test=0.1,
        memory_limit=config_dict.placeholder(int),
        device_limit=2**30,
        id=dict(name='digits'),
    )
    c.preprocessing = dict(mean=0.5, std=0.5)
    c.pipeline = dict(
        names=('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven'),
        template='a photo of a {}',
        positions=32,  # tokens of a prompt; words that no caption has are spelt
        plain=0.5,  # share of training images that stay as they are
        clip=dict(
            width=64,
            layers=2,
            heads=4,
            projection=64,
            patch=2,
            training=training(steps=500, batch_size=64, learning_rate=1e-3),
        ),
        autoencoder=dict(
            channels=(16, 32),
            layers=1,
            groups=8,
            kl=1e-3,
            training=training(steps=1200, batch_size=64, learning_rate=2e-3),
        ),
        unet=dict(
            channels=(32, 64),
            layers=1,
            heads=4,
            groups=8,
            label_dropout=0.1,
            training=training(steps=3000, batch_size=64, learning_rate=2e-3),
        ),
        guidance=2.0,  # w; guidance_scale 3
        sampling_steps=50,
        samples=32,  # of each class, for the reader
    )
    return c


def training(*, steps, batch_size, learning_rate):
    """Adam, cosine to 0."""
    return dict(
        steps=steps,
        batch_size=batch_size,
        optimizer=dict(
            name='adam',
            learning_rate=learning_rate,
            warmup=100,
            final_learning_rate=0.0,
            clip=1.0,
        ),
        ema_decay=0.995,
        log_every=100,
        checkpoint_every=500,
    )


def photographs(c):
    """32 x 32 pixels in colour, latents 8 x 8, wider networks."""
    c.data.size = 32
    c.data.held_out = ()
    c.pipeline.names = ()  # the classes' own
    c.pipeline.plain = 0.8
    c.pipeline.clip.update(width=192, layers=6, projection=128, patch=4)
    c.pipeline.clip.training.steps = 20_000
    c.pipeline.autoencoder.update(channels=(64, 128, 128), layers=2, kl=1e-6)
    c.pipeline.autoencoder.training.steps = 30_000
    c.pipeline.unet.update(channels=(128, 256, 256), layers=2)
    c.pipeline.unet.training.steps = 100_000
    for part in ('clip', 'autoencoder', 'unet'):
        c.pipeline[part].training.optimizer.learning_rate = 2e-4


def folder(c):
    """`--config.data.id.path=DIR`, with one sub-folder a class."""
    photographs(c)
    c.data.on_error = 'skip'
    c.data.id = dict(name='folder', path=config_dict.placeholder(str))


def cifar10(c):
    """Arrays below `--config.data.root=DIR`."""
    photographs(c)
    c.data.id = dict(name='npz', train='cifar10_train.npz', test='cifar10_test.npz')


VARIANTS = {'digits': lambda c: None, 'folder': folder, 'cifar10': cifar10}
