"""Published figures, to stand beside ours where they are of the same network and the same sets.

A set is the same if it has the same name and as many images: half of a test set, or another crop of
it, is another set. Figures in percent, as printed; OOD columns FPR95 (ID-positive) / AUROC.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxood.report import tables
from jaxood.report.page import Published


class Source(NamedTuple):
    """One published table.

    Attributes:
        title: paper, table, network.
        fits: (backbone section, source of the weights) -> whether it is this network.
        num_classes, num_id: of the ID test set.
        columns: our names of its OOD sets -> images.
        metrics: what a cell holds.
        rows: our label of a score -> one cell a column.
        note: what to know before comparing.
    """

    title: str
    fits: Callable[[Mapping[str, Any], str], bool]
    num_classes: int
    num_id: int
    columns: Mapping[str, int]
    metrics: Sequence[str]
    rows: Mapping[str, Sequence[tuple[float, ...]]]
    note: str = ''


def beside(summary, arms: Mapping[str, tuple[Mapping, str]], num_classes: int) -> list[Published]:
    """The published tables that share network, ID set and at least one OOD set with ours.

    Args:
        summary: `tables.summary`.
        arms: arm -> (its backbone's section, the source of its weights; '' if trained here).
    """
    found, counts = [], summary['counts']
    for source in SOURCES:
        if (source.num_classes, source.num_id) != (num_classes, counts[tables.TEST]):
            continue
        shared = [k for k, n in source.columns.items() if counts.get(k) == n]
        for arm, network in arms.items():
            methods = [m for m in source.rows if m in summary['cells'][arm]]
            if shared and methods and source.fits(*network):
                found.append(_table(source, summary, arm, shared, methods))
    return found


def _table(source, summary, arm, columns, methods):
    every = list(source.columns)
    ours = lambda method, column: tuple(
        tables.cell(summary, arm, method, column, metric)['mean'] for metric in source.metrics
    )
    rows = [
        {
            'name': method,
            'published': [_fractions(source.rows[method][every.index(k)]) for k in columns],
            'ours': [ours(method, k) for k in columns],
        }
        for method in methods
    ]
    return Published(f'{source.title}; ours: {arm}', columns, source.metrics, rows, source.note)


def sd_outliers() -> tuple[Sequence[str], Sequence[Sequence[str]], str]:
    """Header, rows and title of SD-outliers' ablation as its poster prints it."""
    rows = [(f'S = {depth}', *map(str, cells)) for depth, cells in _SD_ABLATION.items()]
    header = ('paper', 'distance, w = 2', 'with votes, w = 2', 'w = 3', 'w = 4', 'FID')
    title = (
        'The poster’s own figures: AUROC, %, CIFAR-10 against CIFAR-100, ViT-B/16 (against its '
        'SD-outliers: 98.2, Multi-class AD 74.3, Fake-it 81.4)'
    )
    return header, rows, title


def dog_strategies(strategy: str, inverted: bool) -> tuple[str, tuple[tuple[float, float], ...]]:
    """DOG's table 2: what the paper calls a way to make outliers, and the means that it prints for
    it, (FPR95, AUROC) in percent on CIFAR-10 and on CIFAR-100 (WRN-40-2); () if it has none.

    Args:
        strategy: a key of `synthesis.STRATEGIES`, or 'none'.
        inverted: whether the class names were replaced by learned pseudo-words.
    """
    if strategy == 'wordnet_prompts':
        return _DOG_STRATEGIES['dog' if inverted else 'names']
    return _DOG_STRATEGIES.get(strategy, ('', ()))


_DOG_STRATEGIES = {  # their means over SVHN, LSUN, iSUN, Textures and Places365
    'none': ('without outliers, ASH', ((32.98, 91.85), (59.31, 84.46))),
    'latent_noise': ('(a) latents noised to t = 500', ((25.27, 92.76), (40.63, 86.60))),
    'text_noise': ('(b) noise on the text', ((20.17, 95.87), (31.59, 92.95))),
    'latent_mix': ('(c) latents mixed', ((24.25, 93.31), (40.40, 87.68))),
    'text_mix': ('(d) text mixed', ((21.60, 95.83), (33.81, 92.02))),
    'names': ('(e) words near the class name', ((17.30, 96.48), (29.96, 94.09))),
    'dog': ('DOG: words near the pseudo-word', ((2.57, 99.36), (22.87, 95.41))),
}
# S: distance, distance + votes (w = 2), w = 3, w = 4, FID of the outliers; '–' cannot be read there
_SD_ABLATION = {
    50: (97.2, 97.6, '–', '–', 4.45),
    80: (97.5, 97.8, 97.8, 97.7, 5.95),
    100: (97.7, 98.0, 97.9, 98.0, 6.88),
    150: (97.6, 97.8, 98.0, 97.8, 7.85),
    200: (97.3, 97.4, 97.6, 97.6, 7.59),
}


def _fractions(cell):
    return tuple(value / 100 for value in cell)


def _wrn_40_2(backbone, source):
    return (backbone['name'], backbone.get('depth'), backbone.get('width')) == ('wrn', 40, 2)


def _vit_b_16(backbone, source):
    size = (backbone.get('patch', 16), backbone.get('width', 768), backbone.get('depth', 12))
    return backbone['name'] == 'vit' and size == (16, 768, 12)


def _resnet_50(backbone, source):
    return backbone.get('blocks') == (3, 4, 6, 3) and bool(backbone.get('bottleneck'))


def _akamaster(blocks):
    return lambda backbone, source: 'akamaster' in source and backbone['blocks'] == (blocks,) * 3


_DOG = ('fpr95_id', 'auroc')
_DOG_CIFAR = {'svhn': 26_032, 'lsun_crop': 10_000, 'isun': 8_925, 'textures': 5_640} | {
    'places': 10_000
}
_DOG_NOTE = (
    'Published: one network a row, its checkpoint not public; single cells move by 5 to 10 points '
    'of FPR95 between trainings. Which ASH and which Mahalanobis were run is not stated there.'
)
_ID_ACCURACY = ('id_acc',)


def _efficientnet_b4(backbone, source):
    factors = backbone.get('width'), backbone.get('depth')
    return backbone['name'] == 'efficientnet' and factors == (1.4, 1.8)


_DLSR = ('auroc', 'fpr95_id')
_DLSR_CIFAR = {'svhn': 26_032, 'lsun_crop': 10_000, 'lsun_resize': 10_000, 'isun': 8_925}
_DLSR_CIFAR |= {'textures': 5_640, 'places': 10_000}
_DLSR_NOTE = (
    'Published: mean of 3 seeds, images as large as they come (native). How many images of iSUN, '
    'Textures and Places365 were scored is not stated; the usual numbers are taken for them. '
    'CIFAR is enlarged 7 times there and looks blurred, Textures and Places365 are not.'
)

SOURCES = (
    Source(
        'DOG, table 1, CIFAR-10, WRN-40-2',
        *(_wrn_40_2, 10, 10_000, _DOG_CIFAR, _DOG),
        {
            'msp': ((48.89, 91.97), (25.53, 96.49), (56.44, 89.86), (59.68, 88.42), (60.19, 88.36)),
            'energy': (
                (35.21, 91.24),
                (4.42, 99.06),
                (33.84, 92.56),
                (52.46, 85.35),
                (40.11, 90.02),
            ),
            'ash_s': (
                (33.98, 91.79),
                (4.76, 98.98),
                (34.38, 92.64),
                (50.90, 86.07),
                (40.89, 89.79),
            ),
            'mds': ((12.21, 97.70), (57.25, 89.58), (79.74, 77.87), (15.20, 95.40), (68.81, 82.39)),
            'knn': ((26.56, 95.93), (27.52, 95.43), (33.55, 93.15), (37.62, 93.07), (41.67, 91.21)),
        },
        _DOG_NOTE,
    ),
    Source(
        'DOG, table 1, CIFAR-100, WRN-40-2',
        *(_wrn_40_2, 100, 10_000, _DOG_CIFAR, _DOG),
        {
            'msp': ((84.39, 71.18), (60.36, 85.59), (82.63, 75.69), (83.32, 73.59), (82.37, 73.69)),
            'energy': (
                *((85.24, 73.71), (23.05, 95.89), (81.11, 79.02), (79.63, 76.35), (80.18, 75.65)),
            ),
            'ash_s': (
                *((70.09, 83.56), (13.20, 97.71), (69.87, 82.56), (63.69, 83.59), (79.70, 74.87)),
            ),
            'mds': ((51.00, 88.70), (91.60, 69.69), (38.48, 91.86), (47.07, 89.09), (82.70, 74.18)),
            'knn': ((52.10, 88.83), (68.82, 79.00), (42.17, 90.59), (42.79, 89.07), (92.21, 61.08)),
        },
        _DOG_NOTE
        + ' The mean FPR95 printed for Mahalanobis, 72.37, is not that of its cells, 62.17.',
    ),
    Source(
        'DOG, table 3, ImageNet-1K, ResNet-50 of torchvision',
        *(_resnet_50, 1000, 50_000),
        {'textures': 5_640, 'places': 10_000, 'inaturalist': 10_000, 'sun': 10_000},
        _DOG,
        {
            'msp': ((66.58, 80.03), (74.15, 78.97), (72.72, 77.19), (78.70, 75.15)),
            'energy': ((52.84, 86.36), (70.64, 81.67), (73.98, 75.97), (76.92, 78.08)),
            'ash_s': ((15.93, 96.00), (63.08, 82.43), (52.05, 83.67), (71.68, 77.71)),
            'mds': ((40.52, 91.41), (97.10, 53.11), (96.15, 53.62), (96.95, 52.74)),
            'knn': ((26.54, 93.49), (78.64, 76.82), (75.78, 69.51), (74.30, 78.85)),
        },
        'The mean AUROC printed for ASH, 85.35, is not that of its cells, 84.95. '
        'Which ASH and which Mahalanobis were run is not stated there.',
    ),
    Source(
        'DLSR, CIFAR-10, EfficientNet-B4',
        *(_efficientnet_b4, 10, 10_000, _DLSR_CIFAR, _DLSR),
        {
            'mse': (
                *((97.31, 21.15), (97.59, 19.52), (93.93, 39.67), (92.78, 43.76)),
                *((100.0, 0.0), (99.96, 0.42)),
            ),
            'lr': (
                *((98.22, 14.26), (97.84, 18.67), (95.37, 31.62), (94.31, 37.76)),
                *((100.0, 0.06), (99.91, 0.83)),
            ),
            'mfsim': (
                *((98.89, 4.34), (99.83, 0.04), (98.83, 4.42), (98.52, 6.26)),
                *((100.0, 0.0), (100.0, 0.0)),
            ),
        },
        _DLSR_NOTE,
    ),
    Source(
        'DLSR, CIFAR-100, EfficientNet-B4',
        *(_efficientnet_b4, 100, 10_000, _DLSR_CIFAR, _DLSR),
        {
            'mse': (
                *((83.93, 89.05), (86.86, 69.14), (75.38, 69.63), (71.99, 89.79)),
                *((99.99, 0.12), (99.97, 0.0)),
            ),
            'lr': (
                *((88.84, 62.06), (87.60, 72.19), (80.96, 86.67), (77.71, 86.17)),
                *((99.98, 0.42), (99.92, 2.81)),
            ),
            'mfsim': (
                *((93.90, 37.48), (99.14, 1.90), (95.74, 23.05), (94.40, 26.00)),
                *((100.0, 0.0), (100.0, 0.0)),
            ),
        },
        _DLSR_NOTE + ' The mean FPR95 printed for MFsim, 14.78, is not that of its cells, 14.74.',
    ),
    *(
        Source(
            f'DLSR, {name} against {other}, EfficientNet-B4',
            *(_efficientnet_b4, classes, 10_000, {column: 10_000}, metrics),
            {method: (cell,) for method, cell in cells.items()},
            'Published: mean of 3 seeds.',
        )
        for name, classes, column, other, metrics, cells in (
            (
                *('CIFAR-10', 10, 'cifar100', 'CIFAR-100', _DLSR),
                {'mse': (87.54, 48.87), 'lr': (87.24, 49.48), 'mfsim': (85.60, 53.70)},
            ),
            (
                *('CIFAR-100', 100, 'cifar10', 'CIFAR-10', _DLSR[:1]),
                {'mse': (70.52,), 'lr': (72.86,), 'mfsim': (64.58,)},
            ),
        )
    ),
    Source(
        'SD-outliers (poster), CIFAR-10 without labels, ViT-B/16',
        *(_vit_b_16, 10, 10_000),
        {'cifar100': 10_000, 'svhn': 26_032, 'lsun': 10_000},
        ('auroc',),
        {'both': ((98.0,), (99.9,), (99.9,))},
        'The LSUN column of the poster mixes resized LSUN and LSUN(FIX). There too: Fake-it 95.7, '
        '99.9, 99.4; Multi-class AD 96.7, 99.9, 99.3 (both ViT-B/16); CSI (ResNet-18) 89.2, 99.8, '
        '97.5.',
    ),
    *(
        Source(
            f'akamaster/pytorch_resnet_cifar10, README, ResNet-{layers}: test error {error} %',
            *(_akamaster(blocks), 10, 10_000, {tables.TEST: 10_000}, _ID_ACCURACY),
            {'msp': ((100 - error,),)},
        )
        for layers, blocks, error in ((20, 3, 8.27), (56, 9, 6.61))
    ),
)
