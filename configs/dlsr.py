"""DLSR."""

import ml_collections
from ml_collections import config_dict

from jaxood.errors import UserError, lookup

STAGES = ('load_weights', 'train_restorer', 'score', 'report')


def get_config(variant: str = 'digits'):
    """The config of a variant, digits, cifar10, cifar100, celeba, imagenet100 or folder; behind it
    perhaps `full`, and perhaps one of `ABLATIONS`: cifar10,full,width."""
    name, *words = variant.split(',')
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.seeds = (0,)
    c.dtype = 'float32'
    c.stages = STAGES
    c.artefacts_dir = config_dict.placeholder(str)
    c.parallel = dict(mode='jit', num_devices=config_dict.placeholder(int), inference_batch=256)
    c.weights = config_dict.placeholder(str)
    c.preprocessing = dict(  # of the weights, unless set
        mean=config_dict.placeholder(tuple),
        std=config_dict.placeholder(tuple),
        size=config_dict.placeholder(int),
        matched=config_dict.placeholder(int),
    )
    c.data = dict(
        root=config_dict.placeholder(str),
        on_error='stop',
        size=config_dict.placeholder(int),
        resize=config_dict.placeholder(int),
        interpolation=config_dict.placeholder(str),
        channels=3,
        labels=True,
        validation=0.02,
        test=0.2,
        device_limit=2**30,
    )
    c.taps = dict(at=config_dict.placeholder(tuple), pool='avg')
    c.restorer = restorer(width=224, epochs=20, learning_rate=1e-3)
    c.restoration = dict(stride=1, eta=1.0)
    lookup(VARIANTS, name, 'variant')(c)
    if 'full' in words:
        words.remove('full')
        full(c)
    c.scores = dict(OWN, **ON_LOGITS, **ON_FEATURES)
    if c.data.labels:
        c.scores.mds = dict(ridge=1e-6)
    c.arms = dict(dlsr=dict())
    c.report = dict(
        title=f'DLSR, {name}',
        arm='dlsr',
        score='mfsim',
        draws=200,
        gallery=1,
        tsne=True,
        every_score=True,
    )
    if len(words) > 1:
        raise UserError(f'variant {variant!r}: one ablation at a time, of {", ".join(ABLATIONS)}.')
    for word in words:
        lookup(ABLATIONS, word, 'ablation')(c)
        c.report.title += f', {word}'
    return c


def restorer(*, width, epochs, learning_rate, num_blocks=16):
    return dict(
        name='lfdn',
        width=width,
        num_blocks=num_blocks,
        time_width=config_dict.placeholder(int),
        taps=config_dict.placeholder(tuple),
        schedule=dict(name='scaled_linear', num_steps=100, beta_start=0.0015, beta_end=0.0195),
        epochs=epochs,
        batch_size=128,
        optimizer=dict(name='adamw', learning_rate=learning_rate, weight_decay=1e-4),
        ema_decay=0.9999,
        log_every=100,
        checkpoint_every=5000,
    )


def outside(path, *, name='npz', group='far', **more):
    """A set besides the ID set: an NPZ file or a folder by `path`, TFDS by `dataset`."""
    return dict(name=name, path=path, dataset=config_dict.placeholder(str), group=group, **more)


def digits(c):
    """The quickstart's digits, and a small network that is trained on their labels in the run."""
    c.seeds = (0, 1, 2)
    c.stages = ('train_detector', *STAGES[1:])
    c.data.update(size=8, channels=1, validation=0.15, test=0.25, held_out=(8, 9))
    c.data.held_out_validation = (5,)
    c.data.id = dict(name='digits')
    c.data.ood = dict(photos=dict(name='photos', count=1000))
    c.preprocessing.update(mean=(0.3,), std=(0.38,))
    c.outliers = dict(name='none')
    c.backbone = dict(name='cnn', widths=(16, 32, 64))
    c.head = dict(name='linear')
    c.detector = dict(
        name='plain',
        steps=400,
        batch_size=64,
        crop=1,
        flip=False,
        noise=0.0,
        optimizer=dict(name='sgd', learning_rate=0.1, weight_decay=5e-4),
        log_every=100,
        checkpoint_every=1000,
    )
    c.restorer.update(num_blocks=4, epochs=150)


def small_pictures(c):
    """What the two CIFARs have in common, each near-OOD of the other."""
    c.data.ood = {
        name: outside(f'ood_{name}.npz')
        for name in ('svhn', 'lsun9_crop', 'lsun9_resize', 'textures', 'places')
    }


def cifar10(c):
    small_pictures(c)
    c.data.id = dict(name='npz', train='cifar10_train.npz', test='cifar10_test.npz')
    c.data.ood.cifar100 = outside('cifar100_test_half.npz', group='near')


OWN = dict(
    mse=dict(depth=3),
    mse_first=dict(name='mse', depth=3, snapshot='initial'),
    lr=dict(depth=3),
    mfsim=dict(depth=3, skip_first=False),
)
ON_LOGITS = dict(msp={}, energy=dict(temperature=1.0), knn=dict(k=50))
ON_FEATURES = dict(
    knn_taps=dict(name='knn', k=50, on='taps'),
    mds_taps=dict(name='mds', ridge=1e-6, on='taps'),
)
VARIANTS = {'digits': digits, 'cifar10': cifar10}
ABLATIONS = {}
