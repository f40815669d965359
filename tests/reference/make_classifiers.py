"""Writes classifiers.npz: logits of tiny WRNs, DenseNets and ResNets, computed by PyTorch.

    cd tests && python -m reference.make_classifiers

As in make_vision.py, the arrays are not stored: names and shapes are written down here as the code
bases have them, and `arrays` fills them by name.
"""

import pathlib

import numpy as np
from reference.make_vision import arrays

CLASSES = 5
LOGITS = pathlib.Path(__file__).with_name('classifiers.npz')


def wrn(*, layers, base, width):
    """hendrycks/outlier-exposure, wetliu/energy_ood, pytorch-ood, OpenOOD."""
    shapes, inputs = {'conv1.weight': (base, 3, 3, 3)}, base
    for block in (1, 2, 3):
        outputs = base * width * 2 ** (block - 1)
        for layer in range(layers):
            name = f'block{block}.layer.{layer}'
            shapes |= _norm(f'{name}.bn1', inputs)
            shapes[f'{name}.conv1.weight'] = (outputs, inputs, 3, 3)
            shapes |= _norm(f'{name}.bn2', outputs)
            shapes[f'{name}.conv2.weight'] = (outputs, outputs, 3, 3)
            if inputs != outputs:
                shapes[f'{name}.convShortcut.weight'] = (outputs, inputs, 1, 1)
            inputs = outputs
    return shapes | _norm('bn1', inputs) | _linear('fc', inputs)


def densenet(*, layers, growth):
    """deeplearning-wisc/dice, OpenOOD."""
    channels = 2 * growth
    shapes = {'conv1.weight': (channels, 3, 3, 3)}
    for block in (1, 2, 3):
        for layer in range(layers):
            name = f'block{block}.layer.{layer}'
            shapes |= _norm(f'{name}.bn1', channels)
            shapes[f'{name}.conv1.weight'] = (4 * growth, channels, 1, 1)
            shapes |= _norm(f'{name}.bn2', 4 * growth)
            shapes[f'{name}.conv2.weight'] = (growth, 4 * growth, 3, 3)
            channels += growth
        if block < 3:
            shapes |= _norm(f'trans{block}.bn1', channels)
            shapes[f'trans{block}.conv1.weight'] = (channels // 2, channels, 1, 1)
            channels //= 2
    return shapes | _norm('bn1', channels) | _linear('fc', channels)


def resnet(*, blocks, width, head, shortcut, stem=3, bottleneck=False):
    """akamaster (shortcut=None: it has no arrays), OpenOOD, kuangliu, torchvision, timm."""
    shapes = {'conv1.weight': (width, 3, stem, stem)} | _norm('bn1', width)
    inputs = width
    for stage, number in enumerate(blocks, 1):
        inner = width * 2 ** (stage - 1)
        outputs = 4 * inner if bottleneck else inner
        for i in range(number):
            name = f'layer{stage}.{i}'
            if bottleneck:
                convolutions = [(inner, inputs, 1), (inner, inner, 3), (outputs, inner, 1)]
            else:
                convolutions = [(outputs, inputs, 3), (outputs, outputs, 3)]
            for n, (rows, columns, kernel) in enumerate(convolutions, 1):
                shapes[f'{name}.conv{n}.weight'] = (rows, columns, kernel, kernel)
                shapes |= _norm(f'{name}.bn{n}', rows)
            if shortcut and inputs != outputs:
                shapes[f'{name}.{shortcut}.0.weight'] = (outputs, inputs, 1, 1)
                shapes |= _norm(f'{name}.{shortcut}.1', outputs)
            inputs = outputs
    return shapes | _linear(head, inputs)


def _norm(name, channels):
    parts = ('weight', 'bias', 'running_mean', 'running_var')
    return {f'{name}.{p}': (channels,) for p in parts} | {f'{name}.num_batches_tracked': ()}


def _linear(name, inputs):
    return {f'{name}.weight': (CLASSES, inputs), f'{name}.bias': (CLASSES,)}


# Source -> (backbone, names and shapes of its arrays, the keywords that are to be found).
OPENOOD = dict(head='fc', shortcut='shortcut')
KUANGLIU = dict(head='linear', shortcut='shortcut', bottleneck=True)
TORCHVISION = dict(head='fc', shortcut='downsample', stem=7)
THREE, FOUR = dict(blocks=(2, 1, 2), width=4), dict(blocks=(1, 2, 1, 1), width=4)
CIFAR, PLAIN = dict(stem='cifar', shortcut='conv'), dict(bottleneck=False)
NETWORKS = {
    'hendrycks/outlier-exposure': (
        'wrn',
        wrn(layers=2, base=4, width=2),
        dict(depth=16, width=2, base=4),
    ),
    'deeplearning-wisc/dice': (
        'densenet',
        densenet(layers=3, growth=4),
        dict(depth=22, growth=4, reduction=0.5),
    ),
    'akamaster/pytorch_resnet_cifar10': (
        'resnet',
        resnet(**THREE, head='linear', shortcut=None),
        THREE | PLAIN | dict(stem='cifar', shortcut='pad'),
    ),
    'OpenOOD': ('resnet', resnet(**FOUR, **OPENOOD), FOUR | PLAIN | CIFAR),
    'kuangliu/pytorch-cifar': (
        'resnet',
        resnet(**FOUR, **KUANGLIU),
        FOUR | CIFAR | dict(bottleneck=True),
    ),
    'torchvision': (
        'resnet',
        resnet(**FOUR, **TORCHVISION),
        FOUR | PLAIN | dict(stem='imagenet', shortcut='conv'),
    ),
}


def images():
    """float32[2, 65, 65, 3]: an odd number of pixels tells paddings apart."""
    return np.random.RandomState(0).uniform(-2, 2, (2, 65, 65, 3)).astype(np.float32)


def logits(source):
    """float32[2, CLASSES] of one of `NETWORKS`, by PyTorch."""
    import torch

    from jaxood.models.torch_originals import ORIGINALS

    backbone, shapes, keywords = NETWORKS[source]
    state = {k: torch.from_numpy(v) for k, v in arrays(shapes).items()}
    x = torch.from_numpy(images()).permute(0, 3, 1, 2)
    return ORIGINALS[backbone](state, keywords, x).numpy()


if __name__ == '__main__':
    np.savez_compressed(LOGITS, **{source: logits(source) for source in NETWORKS})
