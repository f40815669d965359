"""DLSR: OOD detection by what of a frozen network's features a small diffusion model restores.

    python -m jaxood.main --config=configs/dlsr.py:digits --workdir=runs/dlsr
    python -m jaxood.main --config=configs/dlsr.py:cifar10 --workdir=runs/dlsr \\
        --config.data.root=DIR --config.weights=CHECKPOINT
    python -m jaxood.main --config=configs/dlsr.py:folder --workdir=runs/mine \\
        --config.data.id.path=PICTURES --config.weights=CHECKPOINT
    python -m jaxood.predict --workdir=runs/mine OTHERS > decisions.csv

Yang et al. 2024 (arXiv:2411.10701); official code xbyym/DLSR. Maps of several layers are pooled,
normalised block by block and laid end to end; an LFDN learns to restore those of ID images from a
little noise; scored is what it fails to restore: `mse`, `mfsim` (the mean over blocks of the
cosine), `lr` (by how much training improved the error; larger for ID, hence the sign). It needs no
label and makes no pixel. Beside it on the same network: KNN and Mahalanobis on the features that it
restores (`..._taps`, without labels), MSP, energy, KNN and Mahalanobis (with labels) on the
penultimate ones.

A word behind the variant is an ablation, arms (or depths) of one run: `:digits,depth` (figure 4),
`width`, `blocks` (of the LFDN), `last` (the last block's features alone), `resize` (sets as large
as they come, or shrunk to the ID images' size first), `pixels` (against restoring pixels by a
diffusion model of those, on few images). `full` makes cifar10 and cifar100 the paper's size:
`:cifar10,full` with EfficientNet-B4's or ResNet-50's ImageNet weights.

Where numbers come from: T, the schedule, depth 3 in unit steps, η = 1, two snapshots, EMA, the
LFDN and B4's and ResNet-50's taps the official code; batch 128, weight decay 1e-4 (`full`: width
1440, 16 blocks, 150 epochs, rate 1e-4) the paper; other taps, and width 224, rate 1e-3 and fewer
epochs on small features, our choice, made before any test figure was seen and not tuned.

The paper's network was trained on ImageNet and saw no ID label. The small ones below have learned
the ID classes: the figures are not those of its setting, and MSP's are of a classifier at home.

`:digits` (a CNN of 3 layers trained in the run, 112 features, seeds 0-2), 2 CPU cores (x86-64, JAX
0.10.2) that other work shared: 1 min 27 s. ID 0-4, 6, 7; AUROC / FPR95-ID in percent:

                 mean            held-out 8, 9   photographs
    mse          98.88 /  8.00   97.86 / 16.01    99.90 / 0.00
    mfsim        98.68 /  8.66   97.37 / 17.33    99.99 / 0.00
    mds_taps     98.41 / 10.78   96.83 / 21.56   100.00 / 0.00
    mfsim_skip   97.96 / 13.09   96.93 / 22.50    98.98 / 3.67
    mds          97.71 / 12.18   95.56 / 24.29    99.86 / 0.07
    lr           95.55 / 19.41   92.92 / 28.63    98.19 / 10.20
    knn          92.91 / 30.44   94.78 / 32.11    91.03 / 28.77
    knn_taps     92.67 / 38.67   89.78 / 53.67    95.55 / 23.67
    mse_first    90.92 / 41.94   84.50 / 65.82    97.34 / 18.07   (after one epoch)
    msp          83.27 / 46.80   93.47 / 35.59    73.08 / 58.00

    depth t      1      2      3      5      10     20     50     100
    mse          98.97  98.93  98.88  98.79  98.69  98.46  97.91  94.27
    mfsim        98.73  98.72  98.68  98.61  98.49  98.29  97.75  94.06
    lr           91.21  94.92  95.55  95.98  96.34  96.37  95.39  89.05

So mse and mfsim fall with the depth, as in the paper's figure, but do not fail at t = 1, as they do
there; lr does. mfsim by width 224, 112, 56: 98.68, 98.65, 98.11; by 4, 2, 1 residual blocks: 98.68,
98.73, 98.66; last block alone: 96.99 (all three minus it +1.70, -0.55 to 4.56).

`resize` (seen at 32 pixels; photographs of 32, or shrunk to 8 first): mfsim 97.93 both ways, 100.00
on photographs; no resolution is needed to tell those apart.

`:digits,pixels` (seed 0, an unconditional U-Net of 16 channels, 128 images of each set):

                          mean AUROC   images/s
    mfsim                 97.95        1,171
    pixels, 25 depths     87.16        3.37 (features 347 times faster)
    pixels, one depth     93.22        98.8 (12 times)
    mfsim - 25 depths     +10.79 (7.51 to 14.08); - one depth +4.73 (2.12 to 7.06)

`:cifar10`, ResNet-56 (akamaster; 112 features of 49,000 images, LFDN of 2.1 M parameters, 20
epochs, seed 0), the table included: 20 min 12 s and 1.65 GB, while other work took most of both
cores (12 min of CPU time): 8 min features of the training set, 7.5 min training, 4 min features of
all other sets. AUROC / FPR95-ID in percent:

                 mean            cifar100        lsun9_crop      lsun9_resize
    knn          91.44 / 44.71   88.14 / 56.10   93.54 / 36.06   89.67 / 55.00
    knn_taps     89.88 / 48.99   86.91 / 57.24   92.72 / 39.01   88.47 / 55.09
    energy       89.85 / 47.13   87.38 / 55.22   93.27 / 35.66   90.33 / 48.45
    msp          87.83 / 65.75   86.39 / 68.48   89.91 / 59.19   88.19 / 66.23
    mds_taps     87.15 / 50.38   81.70 / 64.92   88.69 / 50.50   82.33 / 69.18
    mse_first    85.25 / 58.33   81.45 / 67.08   86.13 / 59.74   82.37 / 70.68
    mse          84.74 / 59.80   81.50 / 67.44   85.41 / 59.89   84.44 / 66.83
    mds          84.71 / 62.36   78.16 / 76.94   86.02 / 60.09   80.78 / 79.57
    mfsim        82.46 / 64.04   79.21 / 69.64   83.02 / 65.28   82.55 / 71.13
    lr           18.62 / 99.71   22.92 / 99.62   18.14 / 99.85   24.33 / 99.75

                 places          svhn            textures
    knn          89.31 / 51.64   95.26 / 31.13   92.73 / 38.33
    knn_taps     86.89 / 53.80   92.33 / 48.66   91.94 / 40.17
    energy       90.28 / 45.00   92.88 / 39.45   84.98 / 59.00
    msp          87.58 / 65.45   89.44 / 67.13   85.45 / 68.00
    mds_taps     81.68 / 66.41   96.69 / 16.96   91.81 / 34.33
    mse_first    81.43 / 68.15   91.97 / 40.81   88.18 / 43.50
    mse          82.93 / 65.55   88.95 / 48.56   85.22 / 50.50
    mds          79.06 / 78.99   92.04 / 43.40   92.22 / 35.17
    mfsim        79.99 / 71.07   85.21 / 58.15   84.81 / 49.00
    lr           24.43 / 99.18    9.13 / 100.0   12.74 / 99.83

On these features restoring is no match for KNN on the very same: the LFDN restores OOD features
nearly as well, and its training after the first epoch helped them more than ID ones, which turns
likelihood regret around. Depth changes little: t = 1, 3, 10 give mse 84.72, 84.74, 84.34, mfsim
82.31, 82.46, 81.64, lr 16.35, 18.62, 20.94.

`:cifar10,pixels` on the same features, for the pace alone: a U-Net of 32 channels hardly trained
(--config.diffusion.steps=150), 4 images of each set and 4 a call (--config.pixels.count=4
--config.pixels.batch_size=4). Features 223 images/s, pixels from 25 depths (1,250 calls) 0.134,
1,661 times slower, from one depth (26 calls) 5.67, 39 times; 8 min. Four images say nothing of
AUROC.

`:cifar10`, DenseNet-BC (dice) on 2,000 training and 1,000 test images and 500 of each OOD set
(858 features, 200 epochs), 11 min 35 s, shared likewise: mean AUROC energy 92.00, knn 91.00, msp
89.45, mds_taps 87.41, mfsim_skip 86.58, mse 86.11, mfsim 85.43, knn_taps 82.46, mds 70.42, lr
44.82.

`:folder`, ResNet-56 over 2,000 pictures (CIFAR-10 as PNG files of 48 x 40 in ten sub-folders, no
label read): 3 min 18 s, AUROC against patches of photographs mfsim 98.71, mse 98.05, knn_taps
93.06. `predict` then sorted a folder of 400 other files in 15 s: of 200 CIFAR test images 180 were
kept, of 200 SVHN digits 53 rejected.

`full`, celeba, imagenet100, and anything on a GPU (the 86.7 M LFDN for 150 epochs, images/s): not
measured yet; no such weights, sets or device here. The page shows the paper's figures beside ours
where network and sets are its own.
"""

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
    c.parallel.shard_state = False  # split large states over the devices
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
        batch_size=64 if tiny else 32,
        optimizer=dict(name='adam', learning_rate=1e-3, warmup=50, final_learning_rate=1e-5),
        ema_decay=0.9999,
        log_every=100,
        checkpoint_every=1000,
    )
    some = 128 if tiny else 8  # images of each set
    c.pixels = dict(count=some, steps=100, every=4, single=26, batch_size=some)
    c.seeds = c.seeds[:1]


ABLATIONS = {
    'depth': depth,
    'width': width,
    'blocks': blocks,
    'last': last,
    'resize': resize,
    'pixels': pixels,
}
