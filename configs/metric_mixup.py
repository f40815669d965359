"""Metric-mixup: angular-margin detectors, and outliers with two labels at once.

    python -m jaxood.main --config=configs/metric_mixup.py:digits --workdir=runs/metric_mixup

Wahd 2024 (arXiv:2405.00631), of which only the abstract was at hand: no setting and no figure below
is the paper's, and nothing here reproduces its tables. Its three claims are put to the test as a
grid, one arm for each head and each kind of outliers:

    none   cross-entropy alone
    mixup  + label mixtures of a class-conditional diffusion model (the method)
    real   + averages of two training images (a control: what does the generator add?)
    pure   + images of single classes as generated (a control: what if they show no outlier at all?)

The generator and each kind's outliers are made once for all heads and seeds. A head behind the
variant (`:digits,arcface`) runs that head's four arms alone.

Every head is read by MSP, energy, max-cosine and SphereFace's norm-weighted cosine. The table takes
MSP for softmax and max-cosine for the angular heads (their angular output), and says beside it what
is left of a difference under one score for all.

Where numbers come from: heads' scales and margins are those of the spec's defaults (official codes'
margins, scale 30 our choice), the weight 0.5 of the KL term and the optimiser those of outlier
exposure's official code, w ~ U[0.3, 0.7] and everything about sizes our choice. The digits'
learning rate 0.03 was chosen among .003, .01, .03 and .1, one for all heads, by AUROC and accuracy
on the digits 5 (two seeds) and 3 (one seed, without .003), each held out in turn, which are never
test classes; heads of scale 30 are unstable at the usual 0.1 (accuracy of normalised SphereFace
falls to 85 %).

`:digits`, the whole grid (7 heads x 4 kinds x 3 seeds = 84 detectors, 28 compilations), measured on
2 CPU cores (x86-64, JAX 0.10.2) that other work shared: 9 min 12 s. ID 0-4, 6, 7; OOD the held-out
digits 8 and 9 (354) and photographs (1,000); each head's own score, mean AUROC / ID accuracy in
percent over seeds 0-2:

                none            mixup           real            pure
    softmax     89.87 / 99.47   97.74 / 98.95   96.47 / 99.05   96.18 / 99.37
    NormFace    86.02 / 98.73   87.53 / 99.16   94.11 / 98.84   73.74 / 98.95
    CosFace     92.42 / 99.79   98.05 / 99.47   94.05 / 99.37   97.94 / 99.37
    ArcFace     88.80 / 99.37   91.73 / 98.73   89.81 / 99.16   88.34 / 98.95
    SphereFace  95.53 / 99.37   96.61 / 99.47   95.41 / 99.16   93.74 / 99.37
      normal.   82.98 / 99.26   93.58 / 98.73   86.94 / 99.05   94.25 / 98.63
    AdaCos      90.71 / 98.84   94.33 / 99.16   96.63 / 99.05   93.65 / 99.05

The claims (points, 95 % intervals over images and seeds):

    outliers help every head?    mixup - none, mean of the heads +4.75 (3.83 to 5.88): clearly in 4
                                 of 7 (softmax, CosFace, normalised SphereFace, AdaCos), no clear
                                 difference in 3. Under MSP for all +5.68 (4.71 to 6.92).
    ID accuracy is kept?         -0.17 (-0.66 to 0.42); no clear difference in any head.
    angular heads beat softmax?  No. Mean of the six minus softmax: -0.46 (-6.68 to 4.35) without
                                 outliers, -4.10 (-6.44 to -1.64) with mixtures; under max-cosine
                                 for all +1.16 (-5.62 to 9.96), under MSP for all -1.23 (-2.25 to
                                 0.15), under energy -16.77. Best cell: CosFace with mixtures.

Controls: averages of two training images bring +3.87 (2.67 to 5.02), images of single classes
+1.64 (-0.61 to 3.79) and cost no accuracy (-0.17, -0.54 to 0.27). They need not: where a detector
cannot tell generated from real, p_y = (1 + weight/C) / (1 + weight) is still the largest. The judge
(softmax without outliers; entropy .052 nats on ID test images): mixtures .301, above an ID image's
in 78.0 % (75.7 to 80.3), both classes on top in 22.3 % (chance 4.8); pure .146 and 89.6 % (14.3);
averages .441 and 43.6 %. Fréchet distances over its features 1.58, .38, 3.88 (floor .09).

`:cifar10` at full size and on a GPU: not measured yet. `small` makes networks and trainings of a
size for a CPU, to see all of it run on few images (untuned): 2,000 training images of CIFAR-10 and
500 of each OOD set, 28 detectors, 14 min 18 s on 2 shared cores. It shows that the chain runs, and
nothing of the methods: accuracies are 10 to 39 %, and a judge sees in the mixtures of so short a
training (500 steps) what was asked for as often as by chance (2.2 %).
"""

import ml_collections
from ml_collections import config_dict

from jaxood.errors import lookup

HEADS = {
    'softmax': dict(name='linear'),
    'normface': dict(name='normface', scale=30.0),
    'cosface': dict(name='cosface', scale=30.0, margin=0.35),
    'arcface': dict(name='arcface', scale=30.0, margin=0.5, easy=False),
    'sphereface': dict(name='sphereface', margin=4),
    'sphereface_norm': dict(name='sphereface_norm', scale=30.0, margin=1.35),
    'adacos': dict(name='adacos', dynamic=True),
}
KINDS = {
    'none': dict(outliers=dict(name='none'), detector=dict(name='plain')),
    'mixup': dict(),
    'real': dict(outliers=dict(name='real_mixup', low=0.3, high=0.7)),
    'pure': dict(outliers=dict(name='pure_class')),
}


def get_config(variant: str = 'digits'):
    """The config of a variant, digits, cifar10 or cifar100; behind it perhaps a head, and `small`
    for sizes that a CPU can train: cifar10,small or cifar10,arcface,small."""
    name, *words = variant.split(',')
    chosen = [word for word in words if word != 'small']
    for head in chosen:
        lookup(HEADS, head, 'head')
    chosen = chosen or list(HEADS)
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.seeds = (0, 1, 2)
    c.dtype = 'float32'
    c.stages = ('train_diffusion', 'synthesise', 'train_detector', 'score', 'report')
    c.artefacts_dir = config_dict.placeholder(str)
    c.parallel = dict(mode='jit', num_devices=config_dict.placeholder(int), inference_batch=256)
    c.parallel.shard_state = False  # split large states over the devices
    c.data = dict(
        root=config_dict.placeholder(str),
        on_error='stop',
        held_out=(),
        held_out_validation=(),
        device_limit=2**30,
        test=0.25,
    )
    lookup(VARIANTS, name, 'variant')(c)
    if 'small' in words:
        shrink(c)
    c.filter = dict(name='none')
    c.head = dict(name='linear')
    c.scores = dict(msp={}, energy=dict(temperature=1.0), maxcos={}, normcos={})
    c.arms = {
        f'{head}_{kind}': dict(head=HEADS[head], **overrides)
        for head in chosen
        for kind, overrides in KINDS.items()
    }
    c.report = dict(
        title=f'Metric-mixup, {name}',
        arm=f'{"arcface" if "arcface" in chosen else chosen[0]}_mixup',
        score='maxcos',
        grid=dict(rows=tuple(chosen), columns=tuple(KINDS)),
        judge=f'{chosen[0]}_none',
        extractor=config_dict.placeholder(str),  # Inception's weights make it FID
        draws=200,
        gallery=64,
        tsne=True,
    )
    if 'softmax' in chosen:
        c.report.grid.scores = dict(softmax='msp')
    return c


def digits(c):
    """The quickstart's digits and networks."""
    c.data.update(size=8, channels=1, validation=0.15, held_out=(8, 9), held_out_validation=(5,))
    c.data.id = dict(name='digits')
    c.data.ood = dict(photos=dict(name='photos', count=1000))
    c.preprocessing = dict(mean=(0.3,), std=(0.38,))
    c.generator = dict(
        name='unet',
        channels=16,
        multipliers=(1, 2),
        num_blocks=1,
        attention_sizes=(4,),
        dropout=0.0,
    )
    c.diffusion = diffusion('cosine', steps=800, batch_size=64, learning_rate=1e-3)
    c.sampler = dict(name='dpmpp_2m', steps=12, guidance=0.0)
    c.outliers = outliers(2000)
    c.backbone = dict(name='wrn', depth=10, width=1, base=8, dropout=0.0)
    c.detector = detector(
        steps=600, batch_size=64, learning_rate=0.03, crop=1, flip=False, noise=0.5
    )


def cifar(c, name):
    """WRN-40-2 and DDPM's U-Net, at full size; for a GPU."""
    c.data.update(size=32, channels=3, validation=0.02)
    c.data.id = dict(name='npz', train=f'{name}_train.npz', test=f'{name}_test.npz')
    c.data.ood = {
        k: dict(name='npz', path=f'ood_{k}.npz', group='far')
        for k in ('svhn', 'lsun9_crop', 'lsun9_resize', 'textures', 'places')
    }
    mean, std = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)  # outlier exposure's official code
    c.preprocessing = dict(mean=tuple(m / 255 for m in mean), std=tuple(s / 255 for s in std))
    c.generator = dict(  # DDPM's, 35.7 M parameters
        name='unet',
        channels=128,
        multipliers=(1, 2, 2, 2),
        num_blocks=2,
        attention_sizes=(16,),
        dropout=0.1,
    )
    c.diffusion = diffusion('linear', steps=800_000, batch_size=128, learning_rate=2e-4)
    c.diffusion.flip = True
    c.sampler = dict(name='ddim', steps=100, guidance=0.0)
    c.outliers = outliers(50_000)
    c.backbone = dict(name='wrn', depth=40, width=2, base=16, dropout=0.3)
    steps = 100 * 390  # epochs of batches of 128
    c.detector = detector(
        steps=steps, batch_size=128, learning_rate=0.1, crop=4, flip=True, noise=0.0
    )


def shrink(c):
    """Networks and trainings of a size for a CPU, to see the whole of it run. Untuned."""
    c.seeds = (0,)
    c.generator.update(channels=16, multipliers=(1, 2, 2), num_blocks=1, attention_sizes=(8,))
    c.generator.dropout = 0.0
    c.diffusion.update(steps=500, batch_size=32, log_every=50, checkpoint_every=250)
    c.sampler = dict(name='dpmpp_2m', steps=12, guidance=0.0)
    c.outliers.update(count=1000, max_candidates=1000)
    c.backbone.update(depth=10, width=1, base=8, dropout=0.0)
    c.detector.update(steps=200, batch_size=64, log_every=50)


def cifar10(c):
    cifar(c, 'cifar10')
    c.data.ood.cifar100 = dict(name='npz', path='cifar100_test_half.npz', group='near')


def cifar100(c):
    cifar(c, 'cifar100')
    c.data.id.update(train='cifar100_train_4k.npz', test='cifar100_test_half.npz')
    c.data.ood.cifar10 = dict(name='npz', path='cifar10_test.npz', group='near')


def diffusion(schedule, *, steps, batch_size, learning_rate):
    return dict(
        schedule=dict(name=schedule, num_steps=1000),
        prediction='eps',
        label_dropout=0.1,
        flip=False,
        steps=steps,
        batch_size=batch_size,
        accumulate=config_dict.placeholder(int),
        optimizer=dict(
            name='adam',
            learning_rate=learning_rate,
            final_learning_rate=config_dict.placeholder(float),
            warmup=50,
        ),
        ema_decay=0.9999,
        log_every=50,
        checkpoint_every=2000,
    )


def outliers(count):
    return dict(
        name='label_mixup',
        mix='label',
        low=0.3,
        high=0.7,
        renoise=0.0,
        count=count,
        max_candidates=count,
        shard_size=1024,
    )


def detector(*, steps, batch_size, learning_rate, crop, flip, noise):
    return dict(
        name='oe',
        weight=0.5,
        direction='u_p',
        outlier_ratio=1.0,
        steps=steps,
        batch_size=batch_size,
        accumulate=config_dict.placeholder(int),
        crop=crop,
        flip=flip,
        noise=noise,
        optimizer=dict(name='sgd', learning_rate=learning_rate, weight_decay=5e-4),
        log_every=200,
        checkpoint_every=2000,
    )


VARIANTS = {'digits': digits, 'cifar10': cifar10, 'cifar100': cifar100}
