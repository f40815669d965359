"""SD-outliers: detection without labels, with outliers that keep an image's background.

    python -m jaxood.main --config=configs/sd_outlier.py:digits --workdir=runs/sd_outlier

Yoon et al., "Diffusion-based Semantic-Discrepant Outlier Generation for Out-of-Distribution
Detection" (poster; no code is public). Images are clustered (SCAN), a diffusion model learns the
clusters, every image is noised to depth S and taken back as another cluster with guidance w, and a
detector with three heads learns from both. Arms, all scored by distance + votes:

    none      cross-entropy on the clusters alone ("Multi-class AD" is its like in the poster)
    noise     the same detector as ours, with uniform noise as outliers
    mixup     with label mixtures of the same generator
    fake_it   two-way head, fakes of an early snapshot (60 steps) of the generator (2201.12196)
    ours      semantic-discrepant outliers, one an image, S = 100, w = 2
    control   as many images again are led to their own class, and are ID images for the detector
    dn2       the clustering network as it is (for CIFAR the pretrained ViT), distance alone

Where numbers come from: S, w (poster); T, betas, U-Net, its training (DDPM); labels dropped with
probability 0.1 (Ho & Salimans 2022); everything of SCAN's in the CIFAR variants, k = 2, and how the
ViT is fine-tuned (official codes of SCAN and of Fake-it); ancestral sampling, λ = .5, α, normalised
features, sizes, all of the digits' networks and trainings, and their views (slight shifts, turns,
slants, noise, no flips) our choice. The CIFAR variants stretch images to 224 pixels, where Fake-it
resizes to 256 and crops. On digits, chosen by AUROC on digits 5 and 3, each held out in turn, two
seeds, never on 8 and 9: noise added to what detectors see (0, .5), detectors from random weights or
from the clustering network's, WRN-10-1 or the small CNN, share of outliers in a batch (.25, 1),
steps (300, 600), α (.01, .03, .1, .5), k (2, 10). α = .5, right for ViT features, drowns the
distances here, which are small.

`:digits`, measured on 2 CPU cores (x86-64, JAX 0.10.2) with nothing compiled before: 5 min 10 s.
Labels from the images alone: 95.11 % of training and 93.65 % of validation images right (NMI .914,
.901). ID 0-4, 6, 7 without labels; OOD the held-out digits 8 and 9 (354) and photographs (1,000);
seeds 0-2; percent, 95 % intervals:

              AUROC, mean           held-out digits   photographs   accuracy   SD-outliers of test
    none      99.05 (98.65-99.42)   98.20             99.90         93.99      85.54 (82.31-88.34)
    noise     98.73 (98.15-99.18)   97.45             100.00        93.78      85.29 (81.93-87.91)
    mixup     98.96 (98.53-99.36)   98.04             99.89         93.78      95.36 (93.95-96.49)
    fake_it   95.69 (94.42-96.91)   91.39             99.99         -          61.93 (56.39-67.23)
    ours      99.41 (99.06-99.74)   98.82             99.99         93.78      95.15 (93.46-96.58)
    control   99.35 (99.00-99.63)   98.72             99.98         93.88      94.25 (92.51-95.84)
    dn2       98.23 (97.23-98.95)   96.95             99.50         -          82.77 (79.63-85.77)

ours - none +0.35 (0.06 to 0.69), - noise +0.68 (0.26 to 1.16), - mixup +0.44 (0.07 to 0.92),
- fake_it +3.72 (2.72 to 4.90), - dn2 +1.18 (0.45 to 2.02), - control +0.06 (-0.15 to 0.35); no
difference in accuracy is clear. Under ours, distance + votes - distance -0.01 (-0.06 to 0.05), -
votes +8.89 (7.49 to 10.32): here the votes bring nothing on real OOD sets, and 1.8 points against
SD-outliers. The head for "outlier or not" passes 84.1 % of images led to their own class (ID test
images 94.9 %), so part of what it sees is the denoiser; with the control 94.9 %, at no clear cost.

`:digits,ablation` (5.2 minutes of CPU time more, 9.7 passed): mean AUROC of distance + votes /
distance, then of the outliers the Fréchet distance over the features of `none` (floor .21) and the
share that `none` takes for the cluster asked for:

                w = 2                            w = 4
    S = 50      99.31 / 99.25    .64    2.2 %    99.35 / 99.34   1.37   14.2 %
    S = 100     99.41 / 99.42   1.55   46.7 %    99.47 / 99.44   1.12   82.7 %
    S = 200     99.19 / 99.13    .43   97.8 %    99.11 / 99.04    .91   99.6 %

No row or column differs clearly from another (S = 100 and 200 against 50 -0.01, -0.36 to 0.33; w 4
against 2 +0.01, -0.08 to 0.08). As in the poster S = 100 is best, and at w = 2 the distance to ID
images grows up to there; at S = 200, unlike there, edits are whole images of the other cluster,
near the ID images again, and the outlier head, which has to call them foreign, passes only 78.7 %
of ID test images (94.9 % at S = 100).

`:folder,small` on 600 pictures of CIFAR-10 in one flat folder, without labels, one seed: 5 min
50 s. Its sizes say nothing of the method: SCAN's and the generator's trainings are so short that
outliers show the cluster asked for no more often than by chance (6.4 %), and distance + votes
(70.07) is worse than the distance alone (76.10) and than no outliers (76.06). The CIFAR variants at
full size and on a GPU: not measured yet.
"""

import ml_collections
from ml_collections import config_dict

from jaxood.errors import lookup

DEPTHS, WEIGHTS = (50, 100, 200), (2.0, 4.0)  # S and w of the ablation
FULL_CHAIN = dict(name='dpmpp_2m', steps=12, guidance=0.0)  # of arms that sample from pure noise


def get_config(variant: str = 'digits'):
    """The config of a variant, digits, cifar10, cifar100 or folder; behind it perhaps `ablation`,
    for S x w, a backbone (vit, resnet18, wrn; of cifar), and `small`, for sizes that a CPU sees to
    the end: digits,ablation or cifar10,resnet18,small."""
    name, *words = variant.split(',')
    for word in words:
        lookup({'ablation': ablation, 'small': shrink} | BACKBONES, word, 'variant')
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.seeds = (0, 1, 2)
    c.dtype = 'float32'
    c.stages = (
        *('pseudo_label', 'train_diffusion', 'synthesise', 'train_detector', 'score', 'report'),
    )
    c.artefacts_dir = config_dict.placeholder(str)
    c.parallel = dict(mode='jit', num_devices=config_dict.placeholder(int), inference_batch=256)
    c.parallel.shard_state = False  # split large states over the devices
    c.weights = config_dict.placeholder(str)
    c.data = dict(
        root=config_dict.placeholder(str),
        on_error='stop',
        held_out=(),
        held_out_validation=(),
        device_limit=2**30,
        test=0.25,
    )
    c.filter = dict(name='none')
    c.head = dict(name='three')
    c.scores = dict(
        both=dict(name='votes', k=2, alpha=0.5),
        distance=dict(name='votes', k=2, alpha=0.0),
        votes=dict(name='votes', k=2, alpha=1.0, distance=0.0),
    )
    lookup(VARIANTS, name, 'variant')(c)
    for word in words:
        if word in BACKBONES:
            BACKBONES[word](c)
    if 'small' in words:
        shrink(c)
    c.arms = arms(c)
    c.report = dict(
        title=f'SD-outliers, {name}',
        arm='ours',
        score='both',
        judge='none',
        extractor=config_dict.placeholder(str),  # Inception's weights make it FID
        draws=200,
        gallery=64,
        tsne=True,
    )
    if 'ablation' in words:
        ablation(c)
    return c


def arms(c):
    """Ours and what it is compared with: the same detector without outliers or with others, Fake-it
    (two-way head, an early snapshot's fakes), the control; DN2 where a network is at hand."""
    found = dict(
        none=dict(outliers=dict(name='none'), detector=dict(name='plain')),
        noise=dict(outliers=dict(name='uniform_noise')),
        mixup=dict(outliers=dict(name='label_mixup', low=0.3, high=0.7), sampler=FULL_CHAIN),
        fake_it=dict(
            diffusion=dict(steps=60),
            outliers=dict(name='pure_class'),
            sampler=FULL_CHAIN,
            detector=dict(name='two_way'),
        ),
        ours=dict(),
        control=dict(outliers=dict(same=0.5)),
    )
    if c.detector.init == 'weights' or c.backbone == c.pseudo_label.backbone:
        init = c.detector.init or 'pseudo_label'
        found['dn2'] = dict(outliers=dict(name='none'), detector=dict(name='untrained', init=init))
    return found


def ablation(c):
    """S x w as arms and as a grid; `ours` is the cell S = 100, w = 2 of it."""
    rest = {k: v for k, v in c.arms.items() if k != 'ours'}
    c.arms = rest | {
        f'S{depth}_w{guidance:g}': dict(outliers=dict(depth=depth), sampler=dict(guidance=guidance))
        for depth in DEPTHS
        for guidance in WEIGHTS
    }
    c.report.arm = 'S100_w2'
    c.report.grid = dict(
        rows=tuple(f'S{depth}' for depth in DEPTHS), columns=tuple(f'w{w:g}' for w in WEIGHTS)
    )


# ---- digits -----------------------------------------------------------------------------------


def digits(c):
    """The quickstart's digits and networks, a small CNN as in SCAN's part of the detector's."""
    c.data.update(size=8, channels=1, validation=0.15, held_out=(8, 9), held_out_validation=(5,))
    c.data.id = dict(name='digits')
    c.data.ood = dict(photos=dict(name='photos', count=1000))
    c.preprocessing = dict(mean=(0.3,), std=(0.38,))
    backbone = dict(name='cnn', widths=(32, 64, 64))
    view = dict(name='handwriting')
    c.pseudo_label = dict(
        name='scan',
        classes=7,
        smallest=0.1,
        backbone=backbone,
        views=dict(contrast=view, weak=dict(name='plain'), strong=view),
        pretext=phase(400, 256, adam(1e-3), temperature=0.1),
        clustering=phase(200, 256, adam(1e-3), neighbours=10, entropy_weight=5.0),
        self_labelling=phase(100, 256, adam(1e-3), threshold=0.95),
    )
    c.generator = unet(channels=16, multipliers=(1, 2), num_blocks=1, attention_sizes=(4,))
    c.diffusion = diffusion(steps=1500, batch_size=64, learning_rate=1e-3)
    c.diffusion.optimizer.final_learning_rate = 1e-5
    c.sampler = dict(name='ddpm', steps=1000, guidance=2.0)
    c.outliers = outliers()
    c.backbone = backbone
    sgd = dict(name='sgd', learning_rate=0.03, weight_decay=5e-4)
    c.detector = detector(steps=600, batch_size=64, optimizer=sgd, crop=1, flip=False, noise=0.5)
    c.scores.both.alpha = 0.03  # distances are small here: .5 lets the votes drown them


# ---- CIFAR ------------------------------------------------------------------------------------


def cifar(c, name, classes):
    """SCAN's ResNet-18, DDPM's U-Net and a ViT-B/16, at full size; for a GPU. --config.weights is
    the ViT's checkpoint (ImageNet-21k)."""
    c.data.update(size=32, channels=3, validation=0.02)
    c.data.id = dict(name='npz', train=f'{name}_train.npz', test=f'{name}_test.npz')
    c.data.ood = {
        k: dict(name='npz', path=f'ood_{k}.npz', group='far')
        for k in ('svhn', 'lsun9_crop', 'lsun9_resize', 'textures', 'places')
    }
    c.pseudo_label = dict(
        name='scan',
        classes=classes,
        smallest=0.1,
        backbone=RESNET_18,
        views=dict(
            contrast=dict(name='simclr'), weak=dict(name='weak'), strong=dict(name='strong')
        ),
        pretext=phase(
            500 * 97,
            512,
            dict(
                name='sgd',
                learning_rate=0.4,
                final_learning_rate=4e-4,
                weight_decay=1e-4,
                nesterov=False,
            ),
            temperature=0.1,
        ),
        clustering=phase(50 * 390, 128, adam(1e-4), neighbours=20, entropy_weight=5.0),
        self_labelling=phase(200 * 49, 1000, adam(1e-4), threshold=0.99),
    )
    c.generator = unet(channels=128, multipliers=(1, 2, 2, 2), num_blocks=2, attention_sizes=(16,))
    c.generator.dropout = 0.1
    c.diffusion = diffusion(steps=800_000, batch_size=128, learning_rate=2e-4)
    c.diffusion.flip = True
    c.sampler = dict(name='ddpm', steps=1000, guidance=2.0)
    c.outliers = outliers()
    vit(c)


def vit(c):
    """ViT-B/16 at 224 pixels, ImageNet-21k's weights, the first 6 blocks frozen; fine-tuned as
    Fake-it's official code does."""
    c.preprocessing = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size=224)
    c.backbone = dict(name='vit', size=224, patch=16, width=768, depth=12, heads=12, mlp=3072)
    sgd = dict(
        name='sgd',
        learning_rate=4e-4,
        final_learning_rate=4e-4,  # constant
        momentum=0.0,
        nesterov=False,
        weight_decay=5e-5,
    )
    c.detector = detector(steps=30 * 6125, batch_size=8, optimizer=sgd, crop=4, flip=True)
    c.detector.update(init='weights', frozen=6)


def resnet18(c):
    """ResNet-18 at 32 pixels, which goes on from SCAN's."""
    c.preprocessing = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
    c.backbone = RESNET_18
    sgd = dict(name='sgd', learning_rate=0.01, weight_decay=5e-4)
    c.detector = detector(steps=50 * 382, batch_size=128, optimizer=sgd, crop=4, flip=True)
    c.detector.init = 'pseudo_label'
    c.scores.both.alpha = 0.03  # as for the digits: features after a ReLU lie close together


def wrn(c):
    """WRN-40-2 at 32 pixels, from random weights."""
    resnet18(c)
    c.backbone = dict(name='wrn', depth=40, width=2, base=16, dropout=0.3)
    sgd = dict(name='sgd', learning_rate=0.1, weight_decay=5e-4)
    c.detector = detector(steps=100 * 382, batch_size=128, optimizer=sgd, crop=4, flip=True)


def cifar10(c):
    cifar(c, 'cifar10', classes=10)
    c.data.ood.cifar100 = dict(name='npz', path='cifar100_test_half.npz', group='near')


def cifar100(c):
    """SCAN's CIFAR-20: as many clusters as CIFAR-100 has superclasses."""
    cifar(c, 'cifar100', classes=20)
    c.pseudo_label.clustering.update(steps=100 * 97, batch_size=512)
    c.data.id.update(train='cifar100_train_4k.npz', test='cifar100_test_half.npz')
    c.data.ood.cifar10 = dict(name='npz', path='cifar10_test.npz', group='near')


def folder(c):
    """The user's own images, in one folder and without labels: --config.data.id.path=DIR and
    --config.pseudo_label.classes=how many kinds there may be. A start, neither tuned nor timed."""
    cifar(c, '', classes=10)
    resnet18(c)
    c.data.validation = 0.15
    c.data.id = dict(name='folder', path=config_dict.placeholder(str))
    c.data.ood = dict(photos=dict(name='photos', count=1000))
    c.pseudo_label.pretext.update(steps=5000, batch_size=256)
    c.pseudo_label.clustering.update(steps=2000)
    c.pseudo_label.self_labelling.update(steps=1000, batch_size=256)
    c.generator.update(channels=64, multipliers=(1, 2, 2), num_blocks=1)
    c.diffusion.update(steps=20_000, batch_size=64)
    c.detector.update(steps=2000, batch_size=64)


def shrink(c):
    """Networks and trainings of a size for a CPU, to see the whole of it run. Untuned."""
    c.seeds = (0,)
    small = dict(blocks=(1, 1, 1), width=8)
    c.pseudo_label.backbone.update(small)
    for name, steps in (('pretext', 150), ('clustering', 60), ('self_labelling', 30)):
        c.pseudo_label[name].update(steps=steps, batch_size=64)
    c.pseudo_label.smallest = 0.0
    c.generator.update(channels=16, multipliers=(1, 2, 2), num_blocks=1, attention_sizes=(8,))
    c.generator.dropout = 0.0
    c.diffusion.update(steps=300, batch_size=32)
    c.sampler.steps = 100  # 10 of them below S = 100
    if c.backbone.name == 'resnet':
        c.backbone.update(small)
    c.detector.update(steps=150, batch_size=32)


# ---- sections ---------------------------------------------------------------------------------


RESNET_18 = dict(name='resnet', blocks=(2, 2, 2, 2), width=64, stem='cifar')


def phase(steps, batch_size, optimizer, **more):
    own = dict(steps=steps, batch_size=batch_size, log_every=50, checkpoint_every=2000)
    return dict(optimizer=optimizer, **own, **more)


def adam(learning_rate):
    return dict(name='adam', learning_rate=learning_rate, weight_decay=1e-4)


def unet(**sizes):
    return dict(name='unet', dropout=0.0, **sizes)


def diffusion(*, steps, batch_size, learning_rate):
    return ml_collections.ConfigDict(
        dict(
            schedule=dict(name='linear', num_steps=1000),
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
    )


def outliers():
    return dict(name='semantic_discrepant', depth=100, same=0.0, per_image=1, shard_size=1024)


def detector(*, steps, batch_size, optimizer, crop, flip, noise=0.0):
    return ml_collections.ConfigDict(
        dict(
            name='three_head',
            weight=0.5,
            outlier_ratio=1.0,
            steps=steps,
            batch_size=batch_size,
            accumulate=config_dict.placeholder(int),
            crop=crop,
            flip=flip,
            noise=noise,
            init=config_dict.placeholder(str),
            frozen=0,
            optimizer=optimizer,
            log_every=200,
            checkpoint_every=2000,
        )
    )


VARIANTS = {'digits': digits, 'cifar10': cifar10, 'cifar100': cifar100, 'folder': folder}
BACKBONES = {'vit': vit, 'resnet18': resnet18, 'wrn': wrn}
