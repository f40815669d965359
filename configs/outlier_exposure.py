"""Fine-tuning on given outlier images: outlier exposure, its energy form, and DOE's worst case."""

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
