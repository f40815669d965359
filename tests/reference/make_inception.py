"""Writes inception.npz: logits of a narrow Inception-v3 in both variants, computed by PyTorch.

    cd tests && python -m reference.make_inception

As in make_vision.py, the arrays are not stored: names and shapes are written down here as the code
bases have them, and `arrays` fills them by name.
"""

import pathlib

import numpy as np
from reference.make_vision import arrays

LOGITS = pathlib.Path(__file__).with_name('inception.npz')
NARROW = 1 / 16

STEM = (
    ('Conv2d_1a_3x3', 3, 32, 3, 3),
    ('Conv2d_2a_3x3', 32, 32, 3, 3),
    ('Conv2d_2b_3x3', 32, 64, 3, 3),
    ('Conv2d_3b_1x1', 64, 80, 1, 1),
    ('Conv2d_4a_3x3', 80, 192, 3, 3),
)


def block_a(inputs, pooled):
    return (
        ('branch1x1', inputs, 64, 1, 1),
        ('branch5x5_1', inputs, 48, 1, 1),
        ('branch5x5_2', 48, 64, 5, 5),
        ('branch3x3dbl_1', inputs, 64, 1, 1),
        ('branch3x3dbl_2', 64, 96, 3, 3),
        ('branch3x3dbl_3', 96, 96, 3, 3),
        ('branch_pool', inputs, pooled, 1, 1),
    )


def block_b(inputs):
    return (
        ('branch3x3', inputs, 384, 3, 3),
        ('branch3x3dbl_1', inputs, 64, 1, 1),
        ('branch3x3dbl_2', 64, 96, 3, 3),
        ('branch3x3dbl_3', 96, 96, 3, 3),
    )


def block_c(inputs, inner):
    return (
        ('branch1x1', inputs, 192, 1, 1),
        ('branch7x7_1', inputs, inner, 1, 1),
        ('branch7x7_2', inner, inner, 1, 7),
        ('branch7x7_3', inner, 192, 7, 1),
        ('branch7x7dbl_1', inputs, inner, 1, 1),
        ('branch7x7dbl_2', inner, inner, 7, 1),
        ('branch7x7dbl_3', inner, inner, 1, 7),
        ('branch7x7dbl_4', inner, inner, 7, 1),
        ('branch7x7dbl_5', inner, 192, 1, 7),
        ('branch_pool', inputs, 192, 1, 1),
    )


def block_d(inputs):
    return (
        ('branch3x3_1', inputs, 192, 1, 1),
        ('branch3x3_2', 192, 320, 3, 3),
        ('branch7x7x3_1', inputs, 192, 1, 1),
        ('branch7x7x3_2', 192, 192, 1, 7),
        ('branch7x7x3_3', 192, 192, 7, 1),
        ('branch7x7x3_4', 192, 192, 3, 3),
    )


def block_e(inputs):
    return (
        ('branch1x1', inputs, 320, 1, 1),
        ('branch3x3_1', inputs, 384, 1, 1),
        ('branch3x3_2a', 384, 384, 1, 3),
        ('branch3x3_2b', 384, 384, 3, 1),
        ('branch3x3dbl_1', inputs, 448, 1, 1),
        ('branch3x3dbl_2', 448, 384, 3, 3),
        ('branch3x3dbl_3a', 384, 384, 1, 3),
        ('branch3x3dbl_3b', 384, 384, 3, 1),
        ('branch_pool', inputs, 192, 1, 1),
    )


BLOCKS = {
    'Mixed_5b': block_a(192, 32),
    'Mixed_5c': block_a(256, 64),
    'Mixed_5d': block_a(288, 64),
    'Mixed_6a': block_b(288),
    'Mixed_6b': block_c(768, 128),
    'Mixed_6c': block_c(768, 160),
    'Mixed_6d': block_c(768, 160),
    'Mixed_6e': block_c(768, 192),
    'Mixed_7a': block_d(768),
    'Mixed_7b': block_e(1280),
    'Mixed_7c': block_e(2048),
}
AUXILIARY = (('AuxLogits.conv0', 768, 128, 1, 1), ('AuxLogits.conv1', 128, 768, 5, 5))


def inception(*, classes, width=1.0, auxiliary=False):
    """Name -> shape of every array, channels times `width`."""
    layers = list(STEM)
    for block, inner in BLOCKS.items():
        layers += [(f'{block}.{name}', *shape) for name, *shape in inner]
    layers += AUXILIARY if auxiliary else ()
    shapes = {}
    for name, inputs, outputs, *kernel in layers:
        inputs = 3 if inputs == 3 else round(inputs * width)
        outputs = round(outputs * width)
        shapes[f'{name}.conv.weight'] = (outputs, inputs, *kernel)
        parts = ('weight', 'bias', 'running_mean', 'running_var')
        shapes |= {f'{name}.bn.{part}': (outputs,) for part in parts}
        shapes[f'{name}.bn.num_batches_tracked'] = ()
    heads = {'AuxLogits.fc': 768, 'fc': 2048} if auxiliary else {'fc': 2048}
    for name, inputs in heads.items():
        shapes |= {f'{name}.weight': (classes, round(inputs * width)), f'{name}.bias': (classes,)}
    return shapes


# Source -> (names and shapes of its arrays, the keywords that are to be found).
NETWORKS = {
    'torchvision': (
        inception(classes=5, width=NARROW, auxiliary=True),
        dict(variant='torchvision', width=NARROW),
    ),
    'mseitzer/pytorch-fid': (
        inception(classes=1008, width=NARROW),
        dict(variant='fid', width=NARROW),
    ),
}


def images():
    """float32[2, 107, 140, 3]: the last maps are 2 x 3, so that mean and maximum differ."""
    return np.random.RandomState(0).uniform(-1, 1, (2, 107, 140, 3)).astype(np.float32)


def logits(source):
    """float32[2, classes] of one of `NETWORKS`, by PyTorch."""
    import torch

    from jaxood.models.torch_originals import ORIGINALS

    shapes, keywords = NETWORKS[source]
    state = {k: torch.from_numpy(v) for k, v in arrays(shapes).items()}
    x = torch.from_numpy(images()).permute(0, 3, 1, 2)
    return ORIGINALS['inception'](state, keywords, x).numpy()


if __name__ == '__main__':
    np.savez_compressed(LOGITS, **{source: logits(source) for source in NETWORKS})
