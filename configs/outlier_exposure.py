"""Fine-tuning on given outlier images: outlier exposure, its energy form, and DOE's worst case.

    python -m jaxood.main --config=configs/outlier_exposure.py:digits --workdir=runs/outliers
    python -m jaxood.main --config=configs/outlier_exposure.py:cifar10,resnet20 \\
        --workdir=runs/outliers --config.data.root=DIR --config.weights=CHECKPOINT

Nothing is invented here: `outliers.source` names a set of images as `data.ood` does, e.g.
--config.outliers.source.name=folder --config.outliers.source.path=PICTURES with
--config.outliers.count=how many of them. All arms go on from one classifier, trained here once a
seed (`pretraining`) or given (`weights`):

    none          that classifier as it is
    tuned         fine-tuned on ID images alone: what does going on do by itself?
    oe            outlier exposure (arXiv:1812.04606), weight .5
    energy_oe     energies beyond two margins cost a square (arXiv:2010.03759), weight .1
    doe           outlier exposure at perturbed weights, one update a batch, P up the regret's
                  gradient (DOG, Eq. 9; DOE, arXiv:2303.05033), the first half without P
    doe_minus     the same with P down that gradient, as DOE's official code has it
    doe_released  the same as two updates a batch, as DOE's official code has it

Where numbers come from: 10 epochs at rate .001, γ = 1 (DOG); SGD, cosine to 1e-6, 128 ID images and
256 outliers, gradients clipped at 1, half of the training without P (official code of DOE, whose
rate is .01); weights and CIFAR-10's margins (official codes); the digits' sizes, rate and margins
our choice. Outliers of `cifar10` are 8,000 pictures of TinyImageNet of 80 classes that are none of
CIFAR-10's; those of `digits` patches of photographs, and its OOD set digits held out.

`:digits`, three training seeds, 2 CPU cores (x86-64, JAX 0.10.2, no GPU), nothing else running, few
programs compiled before: 2 min 23 s, 3.7 CPU-minutes. ID 0-4, 6, 7; OOD the digits 8 and 9 (354);
AUROC in percent by energy, MSP, and ASH-S with its percentile chosen on validation images (of 32
units 90 % leaves 3: ASH-S at once is 49 to 62), FPR95 by energy, ID accuracy:

                    energy   MSP     ASH-S   FPR95   accuracy
    none            96.46    96.10   95.26   19.59   99.58
    tuned           96.67    96.31   95.48   18.17   99.58
    oe              97.50    97.33   95.08   14.22   99.58
    energy_oe       97.95    96.41   96.37   10.64   99.58
    doe             97.50    97.58   95.05   11.77   99.37
    doe_minus       97.58    97.50   95.00   11.68   99.58
    doe_released    97.62    97.48   95.08   11.86   99.47

By energy doe - none +1.04 (95 % interval over seeds and images 0.00 to 2.23), - tuned +0.83 (-0.11
to 1.92), - oe 0.00 (-0.30 to 0.21), - energy_oe -0.45 (-1.25 to 0.22), - doe_minus -0.08 (-0.25 to
0.12), - doe_released -0.12 (-0.31 to 0.08): no difference is clear; all kinds of outliers are above
none, and the perturbation, its sign and the two updates change little.

`:cifar10,resnet20` (akamaster's weights) on small sets, to see it run: 1,800 training images of
CIFAR-10, 500 of TinyImageNet as outliers, 1,000 test images and 500 of each of six OOD sets, seed
0, 8 steps of 32 + 64 images at rate .01 (--config.detector.steps=8, .batch_size=32,
.optimizer.learning_rate=0.01, --config.outliers.count=500, --config.data.validation=0.1). Same
machine, busy: 34 s of CPU time for `doe`, 12 to 18 s for the others, compilation included. Mean
AUROC by energy, near (CIFAR-100), far, ID accuracy:

                    mean    near    far     accuracy
    none            90.82   88.00   91.38   91.40
    tuned           90.75   87.80   91.33   91.20
    oe              91.09   88.33   91.64   92.10
    energy_oe       91.03   88.26   91.58   91.80
    doe             91.11   88.36   91.66   92.10

doe - none +0.29 (0.09 to 0.50), - tuned +0.36 (0.10 to 0.63), - oe +0.02 (0.00 to 0.04),
- energy_oe +0.08 (-0.01 to 0.17); no difference in accuracy is clear. The last two arms were not
run here. The whole set: not measured yet.

Paper, not comparable (WRN-40-2, the usual five OOD sets whole, other outliers), FPR95-ID / mean
AUROC on CIFAR-10 by DOG's table 1: energy 33.21 / 91.64, OE 4.67 / 98.88, DOE 3.97 / 98.88.
WRN-40-2, 10 epochs, and a GPU: not measured yet.
"""

import ml_collections
from ml_collections import config_dict

from jaxood.errors import UserError, lookup

PERCENTILES = (65.0, 80.0, 90.0, 95.0)  # of ASH, chosen among on ID validation images


def get_config(variant: str = 'digits'):
    """The config of a variant, digits or cifar10; behind cifar10 perhaps the network: resnet20,
    resnet56 or densenet, whose weights are given (--config.weights), or wrn, which is trained."""
    name, _, network = variant.partition(',')
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.seeds = (0, 1, 2)
    c.dtype = 'float32'
    c.stages = ('pretrain_detector', 'synthesise', 'train_detector', 'score', 'report')
    c.artefacts_dir = config_dict.placeholder(str)
    c.parallel = dict(mode='jit', num_devices=config_dict.placeholder(int), inference_batch=256)
    c.weights = config_dict.placeholder(str)
    c.data = dict(
        root=config_dict.placeholder(str),
        on_error='stop',
        held_out=(),
        held_out_validation=(),
        device_limit=2**30,
        test=0.25,
    )
    c.outliers = dict(
        name='images',
        source=dict(
            name=config_dict.placeholder(str),
            path=config_dict.placeholder(str),
            dataset=config_dict.placeholder(str),
        ),
        count=config_dict.placeholder(int),
        shard_size=1024,
    )
    c.filter = dict(name='none')
    c.head = dict(name='linear')
    lookup(VARIANTS, name, 'variant')(c)
    if network and name != 'cifar10':
        raise UserError(f'variant {variant!r}: only cifar10 has a choice of networks.')
    if network:
        lookup(NETWORKS, network, 'network')(c)
    c.scores = dict(
        msp={},
        energy=dict(temperature=1.0),
        ash_s=dict(name='ash', variant='s', percentile=90.0, sweep=dict(percentile=PERCENTILES)),
    )
    c.arms = arms(c)
    c.report = dict(
        title=f'Outlier exposure, {name}',
        arm='doe',
        score='energy',
        draws=1000,
        gallery=64,
        tsne=True,
    )
    return c


def arms(c):
    """The network as it is, fine-tuned on ID images alone, and on the outliers in five ways."""
    warmup = c.detector.get_ref('warmup')
    released = dict(name='doe_alternating', weight=1.0, sign='-', warmup=warmup)
    return dict(
        none=dict(outliers=dict(name='none'), detector=dict(name='untrained')),
        tuned=dict(outliers=dict(name='none'), detector=dict(name='plain')),
        oe=dict(detector=dict(name='oe', weight=0.5)),
        energy_oe=dict(detector=dict(name='energy_oe', weight=0.1, **MARGINS[c.data.id.name])),
        doe=dict(),
        doe_minus=dict(detector=dict(sign='-')),
        doe_released=dict(detector=released),
    )


# Of ID energies and of outliers'. CIFAR-10: official code. Digits: our choice, see above.
MARGINS = {'npz': dict(m_in=-23.0, m_out=-5.0), 'digits': dict(m_in=-10.0, m_out=-4.0)}


def digits(c):
    """The quickstart's digits and network; patches of photographs are the outliers."""
    c.data.update(size=8, channels=1, validation=0.15, held_out=(8, 9), held_out_validation=(5,))
    c.data.id = dict(name='digits')
    c.outliers.source = dict(name='photos', count=1000)
    c.outliers.count = 1000
    c.preprocessing = dict(mean=(0.3,), std=(0.38,))
    c.backbone = dict(name='wrn', depth=10, width=1, base=8, dropout=0.0)
    look = dict(crop=1, flip=False, noise=0.5)
    c.pretraining = training('plain', steps=600, batch_size=64, **look)
    c.pretraining.optimizer = dict(name='sgd', learning_rate=0.1, weight_decay=5e-4)
    c.detector = fine_tuning(steps=200, batch_size=64, learning_rate=0.01, **look)
    c.detector.init = 'pretrained'


def cifar10(c):
    """The recipe of DOG and DOE: 10 epochs of 382 steps, 128 ID images and 256 outliers in each."""
    c.data.update(size=32, channels=3, validation=0.02)
    c.data.id = dict(name='npz', train='cifar10_train.npz', test='cifar10_test.npz')
    c.data.ood = {
        name: dict(name='npz', path=f'ood_{name}.npz', group='far')
        for name in ('svhn', 'lsun9_crop', 'lsun9_resize', 'textures', 'places')
    }
    c.data.ood.cifar100 = dict(name='npz', path='cifar100_test_half.npz', group='near')
    c.outliers.source.update(name='npz', path='aux_tinyimagenet80.npz')
    c.outliers.count = 8000
    look = dict(crop=4, flip=True, noise=0.0)
    c.pretraining = training('plain', steps=100 * 382, batch_size=128, **look)
    c.pretraining.optimizer = dict(name='sgd', learning_rate=0.1, weight_decay=5e-4)
    c.detector = fine_tuning(steps=10 * 382, batch_size=128, learning_rate=1e-3, **look)
    wrn(c)


# ---- networks ---------------------------------------------------------------------------------


def wrn(c):
    """WRN-40-2 of outlier exposure's official code, trained here for 100 epochs."""
    c.preprocessing = dict(
        mean=(125.3 / 255, 123.0 / 255, 113.9 / 255), std=(63.0 / 255, 62.1 / 255, 66.7 / 255)
    )
    c.backbone = dict(name='wrn', depth=40, width=2, base=16, dropout=0.3)
    c.detector.init = 'pretrained'


def given(c, backbone, mean, std):
    """A converted network: --config.weights."""
    c.stages = tuple(stage for stage in c.stages if stage != 'pretrain_detector')
    del c.pretraining
    c.preprocessing = dict(mean=mean, std=std)
    c.backbone = backbone
    c.detector.init = 'weights'


def resnet(c, blocks):
    """akamaster/pytorch_resnet_cifar10."""
    backbone = dict(name='resnet', blocks=(blocks,) * 3, width=16, bottleneck=False)
    backbone.update(stem='cifar', shortcut='pad')
    given(c, backbone, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def densenet(c):
    """DenseNet-BC-100-12 of deeplearning-wisc/dice."""
    backbone = dict(name='densenet')
    given(c, backbone, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


# ---- sections ---------------------------------------------------------------------------------


def training(name, *, steps, batch_size, **look):
    return ml_collections.ConfigDict(
        dict(
            name=name,
            steps=steps,
            batch_size=batch_size,
            accumulate=config_dict.placeholder(int),
            log_every=100,
            checkpoint_every=1000,
            **look,
        )
    )


def fine_tuning(*, steps, batch_size, learning_rate, **look):
    """DOE in one update a batch, the first half of it without perturbation."""
    steps = config_dict.FieldReference(steps)
    c = training('doe', steps=steps, batch_size=batch_size, **look)
    c.update(outlier_ratio=2.0, weight=1.0, sign='+', warmup=steps // 2)
    c.init = config_dict.placeholder(str)
    c.optimizer = dict(
        name='sgd',
        learning_rate=learning_rate,
        final_learning_rate=1e-6,
        weight_decay=5e-4,
        clip=1.0,
    )
    return c


VARIANTS = {'digits': digits, 'cifar10': cifar10}
NETWORKS = {
    'wrn': wrn,
    'resnet20': lambda c: resnet(c, 3),
    'resnet56': lambda c: resnet(c, 9),
    'densenet': densenet,
}
