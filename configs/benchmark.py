"""Every post-hoc score on every OOD set, for pretrained classifiers.

    python -m jaxood.main --config=configs/benchmark.py:cifar10 --workdir=runs/benchmark \\
        --config.data.root=DIR --config.weights=CHECKPOINT[,CHECKPOINT ...]

`weights` is a folder that `python -m jaxood.convert classifier` wrote, or an original checkpoint;
several make an arm each. DIR holds NPZ files (`images` uint8[N, 32, 32, 3], `labels`) of the names
below; any path of `config.data` can be set. Paper rows: none for these sets, which are halves of
the usual ones or stand-ins (lsun9_*); where network and sets are those of a paper, the page shows
its figures beside ours.

Measured with JAX 0.10.2 on 2 CPU cores (x86-64), no GPU, on CIFAR-10 whole, 3,161 SVHN digits, 600
Textures, 4,998 Places, 2 x 2,002 LSUN-like scenes and half of CIFAR-100's test set; one network
each, no seeds. ID accuracy, mean AUROC over the six OOD sets in percent (settings as below, and
chosen on 1,000 training images against distorted ones where a sweep is given):

                        accuracy  msp    energy  knn    vim    fdbd   react           ash_s
    DenseNet-BC (dice)     94.54  90.40  92.47   93.65  93.61  94.35  78.18 -> 93.59  93.83 -> 93.52
    ResNet-56 (akamaster)  93.39  87.83  89.85   91.44  89.90  91.02  87.92 -> 89.92  59.81 -> 89.54
    ResNet-20 (akamaster)  91.73  88.13  90.77   91.81  89.70  91.37  90.94 -> 90.87  60.03 -> 91.67

Accuracies, and FPR95 and AUROC of msp, maxlogit and energy on each set, are those of PyTorch to
rounding: AUROC within 0.01 points, MSP within 0.08 (the reference took a float32 softmax, where a
quarter of the ID images tie). So they are for DenseNet-BC-100 on half of CIFAR-100's test set
(75.94), in all 72 cells.

Inside the network, ResNet-20, mean AUROC: combood 92.73, odin 90.53 (chosen: 90.84), adascale_l
86.93, adascale_a 81.56, mds_ensemble 75.74, gram 72.48, nac 69.22, rankfeat 45.99.

Time: `cifar10,features` for ResNet-20 with its features there 132 s and 1.1 GiB (28 scores, 11
sweeps, report, compilation; other work on the machine). A pass over the 78,763 images (training
set, both validation sets and tests) took DenseNet about 18 min, ResNet-56 4 min, ResNet-20 2 min.
`cifar10` took ResNet-20 another 25 min and 1.6 GiB, most of it ODIN's sweep, on a machine that was
also doing other things.
"""

import ml_collections
from ml_collections import config_dict

from jaxood.errors import UserError, lookup


def get_config(variant: str = 'cifar10'):
    """The config of a variant: cifar10, cifar100 or imagenet, and ',features' behind it for the
    scores that read logits and features alone."""
    name, _, which = variant.partition(',')
    if which not in ('', 'features'):
        raise UserError(f"variant {variant!r}: behind the comma stands 'features', or nothing.")
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.seeds = (0,)
    c.dtype = 'float32'
    c.stages = ('load_weights', 'score', 'report')
    c.artefacts_dir = config_dict.placeholder(str)
    c.parallel = dict(mode='jit', num_devices=config_dict.placeholder(int), inference_batch=256)
    c.parallel.shard_state = False  # split large states over the devices
    c.weights = config_dict.placeholder(str)
    c.preprocessing = dict(  # of the weights, unless set
        mean=config_dict.placeholder(tuple), std=config_dict.placeholder(tuple)
    )
    c.data = dict(
        root=config_dict.placeholder(str),
        on_error='stop',
        size=config_dict.placeholder(int),
        resize=config_dict.placeholder(int),
        interpolation=config_dict.placeholder(str),
        channels=3,
        validation=0.02,
        validation_from='train',
        test=0.2,
        device_limit=2**30,
        validation_ood=outside(config_dict.placeholder(str), name=config_dict.placeholder(str)),
    )
    lookup(VARIANTS, name, 'variant')(c)
    c.scores = OF_OUTPUTS if which == 'features' else OF_OUTPUTS | INSIDE
    if name == 'imagenet':
        c.scores.update(ON_IMAGENET)
    c.report = dict(
        title=f'Post-hoc scores, {name}',
        arm=config_dict.placeholder(str),
        score='msp',
        draws=200,
        gallery=1,
        tsne=True,
        every_score=True,
        openood=False,
    )
    return c


def outside(path, *, name='npz', group=None):
    """A set besides the ID set: an NPZ file or a folder by `path`, TFDS by `dataset`."""
    section = dict(name=name, path=path, dataset=config_dict.placeholder(str))
    return section if group is None else section | dict(group=group)


def small_pictures(c):
    """What the two CIFARs have in common, each near-OOD of the other."""
    c.data.ood = {
        name: outside(f'ood_{name}.npz', group='far')
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


def imagenet(c):
    c.data.update(size=224, resize=256, interpolation='bilinear')
    c.data.id = dict(name='folder', path='imagenet')
    c.data.ood = {
        name: outside(name, name='folder', group='far')
        for name in ('textures', 'places', 'inaturalist', 'sun')
    }


# Settings are the authors' for CIFAR, or OpenOOD's where those say nothing; sweeps are OpenOOD's.
PERCENTILES = (65.0, 70.0, 75.0, 80.0, 85.0, 90.0, 95.0)
OF_OUTPUTS = dict(
    msp={},
    maxlogit={},
    energy=dict(temperature=1.0),
    tempscale={},
    entropy={},
    gen=dict(gamma=0.1, top=10, sweep=dict(gamma=(0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0))),
    klm={},
    react=dict(quantile=90.0, sweep=dict(quantile=(85.0, 90.0, 95.0, 99.0))),
    vra=dict(low=10.0, high=90.0),
    dice=dict(quantile=90.0, sweep=dict(quantile=(10.0, 30.0, 50.0, 70.0, 90.0))),
    ash_p=dict(name='ash', variant='p', percentile=90.0, sweep=dict(percentile=PERCENTILES)),
    ash_b=dict(name='ash', variant='b', percentile=90.0, sweep=dict(percentile=PERCENTILES)),
    ash_s=dict(name='ash', variant='s', percentile=90.0, sweep=dict(percentile=PERCENTILES)),
    scale=dict(percentile=85.0, sweep=dict(percentile=PERCENTILES)),
    mds=dict(ridge=1e-6),
    mdspp=dict(name='mds', ridge=1e-6, normalise=True),
    rmds=dict(ridge=1e-6),
    rmdspp=dict(name='rmds', ridge=1e-6, normalise=True),
    knn=dict(k=50, sweep=dict(k=(1, 5, 10, 20, 50, 100, 200))),
    vim=dict(dim=config_dict.placeholder(int)),
    residual=dict(dim=config_dict.placeholder(int)),
    gradnorm=dict(temperature=1.0),
    she={},
    nnguide=dict(k=100, fraction=1.0, sweep=dict(k=(1, 5, 10, 100))),
    fdbd={},
    nci=dict(alpha=1e-4, sweep=dict(alpha=(1e-4, 1e-3, 1e-2, 1e-1))),
    relation=dict(cut=0.03, power=1, sweep=dict(power=(1, 2, 4, 6, 8))),
    weiper={},
)
INSIDE = dict(
    odin=dict(
        temperature=1000.0,
        epsilon=0.0014,
        sweep=dict(temperature=(1.0, 10.0, 100.0, 1000.0), epsilon=(0.0014, 0.0028)),
    ),
    adascale_a=dict(name='adascale', variant='a', low=80.0, high=85.0),
    adascale_l=dict(name='adascale', variant='l', low=80.0, high=85.0),
    nac={},
    rankfeat=dict(iterations=20),
    gram=dict(powers=5),
    mds_ensemble=dict(epsilon=0.0),
    combood=dict(k=50, ridge=1.0),
)
ON_IMAGENET = dict(
    gen=dict(top=100), dice=dict(quantile=70.0), knn=dict(k=1000), nnguide=dict(k=10)
)

VARIANTS = {'cifar10': cifar10, 'cifar100': cifar100, 'imagenet': imagenet}
