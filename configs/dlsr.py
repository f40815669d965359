"""DLSR."""

import ml_collections
from ml_collections import config_dict

from jaxood.errors import UserError, lookup

STAGES = ('load_weights', 'train_restorer', 'score', 'report')
DEPTHS = (1, 2, 3, 5, 10, 20, 50, 100)


def get_config(variant: str = 'digits'):
    """The config of a variant, digits, cifar10, cifar100, celeba, imagenet100 or folder; behind it
    perhaps `full` (cifar10, cifar100), and perhaps one of `ABLATIONS`: cifar10,full,width."""
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
        interpolation=config_dict.placeholder(str),
        channels=3,
        labels=True,  # for accuracy and the scores beside; the restorer reads none
        validation=0.02,
        test=0.2,
        device_limit=2**30,
    )
    c.taps = dict(at=config_dict.placeholder(tuple), pool='avg')
    c.restorer = restorer(width=224, num_blocks=16, epochs=20, learning_rate=1e-3)
    c.restoration = dict(stride=1, eta=1.0)  # official code
    lookup(VARIANTS, name, 'variant')(c)
    if 'full' in words:
        words.remove('full')
        full(c)
    c.scores = OWN | ON_FEATURES
    if c.data.labels:
        c.scores.update(ON_LABELS)
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


def restorer(*, width, num_blocks, epochs, learning_rate):
    return dict(
        name='lfdn',
        width=width,
        num_blocks=num_blocks,
        time_width=config_dict.placeholder(int),
        last=config_dict.placeholder(int),
        schedule=dict(  # official code
            name='scaled_linear', num_steps=100, beta_start=0.0015, beta_end=0.0195
        ),
        epochs=epochs,
        batch_size=128,  # paper (official code: 256)
        optimizer=dict(name='adamw', learning_rate=learning_rate, weight_decay=1e-4),
        ema_decay=0.9999,
        log_every=100,
        checkpoint_every=5000,
    )


# ---- variants ---------------------------------------------------------------------------------


def digits(c):
    """The quickstart's digits, and a small network that is trained on their labels in the run."""
    c.seeds = (0, 1, 2)
    c.stages = ('train_detector', *STAGES[1:])
    c.data.update(size=8, channels=1, validation=0.15, test=0.25, held_out=(8, 9))
    c.data.held_out_validation = (5,)
    c.data.id = dict(name='digits')
    c.data.ood = dict(photos=dict(name='photos', count=1000, size=8))
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


def cifar100(c):
    small_pictures(c)
    c.data.validation = 0.1
    c.data.id = dict(name='npz', train='cifar100_train_4k.npz', test='cifar100_test_half.npz')
    c.data.ood.cifar10 = outside('cifar10_test.npz', group='near')


def celeba(c):
    """Folders below --config.data.root=DIR: `celeba/train`, `celeba/test`, and the OOD sets."""
    c.data.id = dict(name='folder', path='celeba')
    c.data.ood = folders('textures', 'places', 'inaturalist', 'sun')
    c.data.labels = False
    full(c)


def imagenet100(c):
    """Folders below --config.data.root=DIR: `imagenet100/train`, `imagenet100/val`, OOD sets."""
    c.data.id = dict(name='folder', path='imagenet100')
    c.data.ood = folders('textures', 'places', 'inaturalist', 'sun')
    c.data.labels = False
    full(c)


def folder(c):
    """Pictures of one's own below --config.data.id.path=DIR, in any sub-folders, no labels; the OOD
    set is patches of photographs unless --config.data.ood.outside.name=folder and .path=DIR."""
    c.data.update(size=32, validation=0.1, labels=False)
    c.data.id = dict(name='folder', path=config_dict.placeholder(str))
    c.data.ood = dict(
        outside=dict(
            name='photos', path=config_dict.placeholder(str), count=config_dict.placeholder(int)
        )
    )
    c.restorer.update(epochs=100)


def full(c):
    """The paper's sizes, for ImageNet weights (EfficientNet-B4, ResNet-50) and a GPU."""
    c.seeds = (0, 1, 2)
    c.preprocessing.size = 224
    if not any(k in c.data.id for k in ('train', 'dataset')):  # pictures of all sizes
        c.data.size, c.data.resize = 224, 'stretch'
    c.restorer = restorer(width=1440, num_blocks=16, epochs=150, learning_rate=1e-4)
    c.restorer.checkpoint_every = 10_000


def outside(path, *, name='npz', group='far'):
    """A set besides the ID set: an NPZ file or a folder by `path`, TFDS by `dataset`."""
    return dict(name=name, path=path, dataset=config_dict.placeholder(str), group=group)


def folders(*names):
    return {name: outside(name, name='folder') for name in names}


VARIANTS = {
    'digits': digits,
    'cifar10': cifar10,
    'cifar100': cifar100,
    'celeba': celeba,
    'imagenet100': imagenet100,
    'folder': folder,
}

# ---- scores -----------------------------------------------------------------------------------

OWN = dict(
    mse=dict(depth=3),
    mse_first=dict(name='mse', depth=3, snapshot='initial'),  # figure 3
    lr=dict(depth=3),
    mfsim=dict(depth=3, skip_first=False),
    mfsim_skip=dict(name='mfsim', depth=3, skip_first=True),  # official code
)
ON_FEATURES = dict(  # what a restorer sees, and no labels
    knn_taps=dict(name='knn', k=50, on='taps'),
    mds_taps=dict(name='mds', ridge=1e-6, on='taps'),
    msp={},
    energy=dict(temperature=1.0),
    knn=dict(k=50),
)
ON_LABELS = dict(mds=dict(ridge=1e-6))

# ---- ablations --------------------------------------------------------------------------------


def depth(c):
    """From where features are restored (figure 4)."""
    c.scores = {
        f'{name}_t{t}': dict(name=name, depth=t) for name in ('mse', 'lr', 'mfsim') for t in DEPTHS
    }
    c.report.score = 'mfsim_t3'


def width(c):
    c.arms = {
        f'width{w}': dict(restorer=dict(width=w))
        for w in (c.restorer.width // share for share in (1, 2, 4))
    }
    c.report.arm = f'width{c.restorer.width}'


def blocks(c):
    number = c.restorer.num_blocks
    c.arms = {
        f'blocks{n}': dict(restorer=dict(num_blocks=n)) for n in (number, number // 2, number // 4)
    }
    c.report.arm = f'blocks{number}'


def last(c):
    """The last block's features alone."""
    c.arms = dict(all={}, last=dict(restorer=dict(last=1)))
    c.report.arm = 'all'
    del c.scores['mfsim_skip']  # of one block nothing would be left


def resize(c):
    """Every set as large as it comes, or shrunk to the ID images' size before it is enlarged."""
    if 'digits' in c.data.id.name:
        c.data.ood.photos.size = 32
        c.preprocessing.size, small = 32, 8
    else:
        c.preprocessing.size, small = c.preprocessing.size or 32, 32
    c.arms = dict(native={}, matched=dict(preprocessing=dict(matched=small)))
    c.report.arm = 'native'


def pixels(c):
    """Beside restoring pixels by a diffusion model of them; on few images."""
    c.stages = ('train_diffusion', *c.stages[:-1], 'reconstruct_pixels', 'report')
    tiny = c.data.size == 8
    c.generator = dict(
        name='unet',
        channels=16 if tiny else 32,
        multipliers=(1, 2) if tiny else (1, 2, 2),
        num_blocks=1,
        attention_sizes=(4,) if tiny else (8,),
        dropout=0.0,
    )
    c.diffusion = dict(
        schedule=dict(  # official code of the baseline (marksgraham/ddpm-ood)
            name='scaled_linear', num_steps=1000, beta_start=0.0015, beta_end=0.0195
        ),
        prediction='eps',
        label_dropout=1.0,  # unconditional
        flip=False,
        steps=1500 if tiny else 500,
        batch_size=64,
        optimizer=dict(name='adam', learning_rate=1e-3, warmup=50, final_learning_rate=1e-5),
        ema_decay=0.9999,
        log_every=100,
        checkpoint_every=1000,
    )
    c.pixels = dict(count=128 if tiny else 16, steps=100, every=4, single=26, batch_size=64)
    c.seeds = c.seeds[:1]


ABLATIONS = {
    'depth': depth,
    'width': width,
    'blocks': blocks,
    'last': last,
    'resize': resize,
    'pixels': pixels,
}
