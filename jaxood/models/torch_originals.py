"""The public classifiers restated in PyTorch: what `convert --verify` and the tests compare with.

Each is `(state, keywords, images) -> logits`: a checkpoint's tensors by their own names, the
backbone's keywords as `Layout.recognise` finds them, images [B, C, H, W]; logits [B, K], in
evaluation mode. Only this needs PyTorch (the `parity` extra).
"""

import torch
from torch.nn import functional as F

from jaxood.models import torch_vision_originals


def wrn(state, keywords, images):
    """Wide ResNet; CIFAR/models/wrn.py of hendrycks/outlier-exposure."""
    x = _conv(state, 'conv1', images)
    for block, first_stride in (('block1', 1), ('block2', 2), ('block3', 2)):
        for i in range((keywords['depth'] - 4) // 6):
            name, stride = f'{block}.layer.{i}', first_stride if i == 0 else 1
            h = _bn_relu(state, f'{name}.bn1', x)
            if f'{name}.convShortcut.weight' in state:
                x = _conv(state, f'{name}.convShortcut', h, stride)
            h = _bn_relu(state, f'{name}.bn2', _conv(state, f'{name}.conv1', h, stride))
            x = x + _conv(state, f'{name}.conv2', h)
    return _pool_and_classify(state, 'fc', _bn_relu(state, 'bn1', x))


def densenet(state, keywords, images):
    """DenseNet-BC; models/densenet.py of deeplearning-wisc/dice."""
    x = _conv(state, 'conv1', images)
    for block in (1, 2, 3):
        for i in range((keywords['depth'] - 4) // 6):
            name = f'block{block}.layer.{i}'
            h = _conv(state, f'{name}.conv1', _bn_relu(state, f'{name}.bn1', x))
            h = _conv(state, f'{name}.conv2', _bn_relu(state, f'{name}.bn2', h))
            x = torch.cat([x, h], dim=1)
        if block < 3:
            x = _conv(state, f'trans{block}.conv1', _bn_relu(state, f'trans{block}.bn1', x))
            x = F.avg_pool2d(x, 2)
    return _pool_and_classify(state, 'fc', _bn_relu(state, 'bn1', x))


def resnet(state, keywords, images):
    """ResNet of akamaster, OpenOOD, kuangliu (3x3 stem), and torchvision (7x7), which name the
    shortcut 'shortcut' or 'downsample' and the last layer 'linear' or 'fc'."""
    large = state['conv1.weight'].shape[-1] == 7
    x = _bn_relu(state, 'bn1', _conv(state, 'conv1', images, 2 if large else 1))
    if large:
        x = F.max_pool2d(x, 3, stride=2, padding=1)
    for stage, number in enumerate(keywords['blocks'], 1):
        for i in range(number):
            x = _residual(state, f'layer{stage}.{i}', x, 2 if stage > 1 and i == 0 else 1)
    return _pool_and_classify(state, 'linear' if 'linear.weight' in state else 'fc', x)


def _residual(state, name, x, stride):
    if f'{name}.conv3.weight' in state:
        h = _bn_relu(state, f'{name}.bn1', _conv(state, f'{name}.conv1', x))
        h = _bn_relu(state, f'{name}.bn2', _conv(state, f'{name}.conv2', h, stride))
        h = _bn(state, f'{name}.bn3', _conv(state, f'{name}.conv3', h))
    else:
        h = _bn_relu(state, f'{name}.bn1', _conv(state, f'{name}.conv1', x, stride))
        h = _bn(state, f'{name}.bn2', _conv(state, f'{name}.conv2', h))
    for shortcut in ('shortcut', 'downsample'):
        if f'{name}.{shortcut}.0.weight' in state:
            x = _bn(state, f'{name}.{shortcut}.1', _conv(state, f'{name}.{shortcut}.0', x, stride))
    if x.shape[1] < h.shape[1]:  # akamaster, option A
        quarter = h.shape[1] // 4
        x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
    return F.relu(h + x)


def inception(state, keywords, images):
    """Inception-v3; models/inception.py of torchvision, and its changes in mseitzer/pytorch-fid."""
    fid = keywords['variant'] == 'fid'

    def layer(x, name, stride=1, pad=True):
        weight = state[f'{name}.conv.weight']
        padding = [size // 2 if pad else 0 for size in weight.shape[2:]]
        x = F.conv2d(x, weight, stride=stride, padding=padding)
        return F.relu(_bn(state, f'{name}.bn', x, eps=1e-3))

    def branch(x, block, *names, halves=False):
        for name in names:
            last = halves and name == names[-1]
            x = layer(x, f'{block}.{name}', stride=2 if last else 1, pad=not last)
        return x

    def numbered(name, count):
        return [f'{name}_{n}' for n in range(1, count + 1)]

    def pooled(x, block):
        if fid and block == 'Mixed_7c':
            x = F.max_pool2d(x, 3, stride=1, padding=1)
        else:
            x = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=not fid)
        return branch(x, block, 'branch_pool')

    x = layer(images, 'Conv2d_1a_3x3', stride=2, pad=False)
    x = layer(layer(x, 'Conv2d_2a_3x3', pad=False), 'Conv2d_2b_3x3')
    x = layer(F.max_pool2d(x, 3, stride=2), 'Conv2d_3b_1x1')
    x = F.max_pool2d(layer(x, 'Conv2d_4a_3x3', pad=False), 3, stride=2)
    for block in ('Mixed_5b', 'Mixed_5c', 'Mixed_5d'):
        found = [
            branch(x, block, 'branch1x1'),
            branch(x, block, *numbered('branch5x5', 2)),
            branch(x, block, *numbered('branch3x3dbl', 3)),
            pooled(x, block),
        ]
        x = torch.cat(found, dim=1)
    found = [
        branch(x, 'Mixed_6a', 'branch3x3', halves=True),
        branch(x, 'Mixed_6a', *numbered('branch3x3dbl', 3), halves=True),
        F.max_pool2d(x, 3, stride=2),
    ]
    x = torch.cat(found, dim=1)
    for block in ('Mixed_6b', 'Mixed_6c', 'Mixed_6d', 'Mixed_6e'):
        found = [
            branch(x, block, 'branch1x1'),
            branch(x, block, *numbered('branch7x7', 3)),
            branch(x, block, *numbered('branch7x7dbl', 5)),
            pooled(x, block),
        ]
        x = torch.cat(found, dim=1)
    found = [
        branch(x, 'Mixed_7a', *numbered('branch3x3', 2), halves=True),
        branch(x, 'Mixed_7a', *numbered('branch7x7x3', 4), halves=True),
        F.max_pool2d(x, 3, stride=2),
    ]
    x = torch.cat(found, dim=1)
    for block in ('Mixed_7b', 'Mixed_7c'):
        single = branch(x, block, 'branch3x3_1')
        double = branch(x, block, *numbered('branch3x3dbl', 2))
        found = [
            branch(x, block, 'branch1x1'),
            *(branch(single, block, f'branch3x3_2{side}') for side in 'ab'),
            *(branch(double, block, f'branch3x3dbl_3{side}') for side in 'ab'),
            pooled(x, block),
        ]
        x = torch.cat(found, dim=1)
    return _pool_and_classify(state, 'fc', x)


def _conv(state, name, x, stride=1):
    weight = state[f'{name}.weight']
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def _bn(state, name, x, eps=1e-5):
    mean, var = state[f'{name}.running_mean'], state[f'{name}.running_var']
    return F.batch_norm(x, mean, var, state[f'{name}.weight'], state[f'{name}.bias'], eps=eps)


def _bn_relu(state, name, x):
    return F.relu(_bn(state, name, x))


def _pool_and_classify(state, name, x):
    return F.linear(x.mean((2, 3)), state[f'{name}.weight'], state[f'{name}.bias'])


ORIGINALS = {  # backbone -> its restatement
    'wrn': wrn,
    'densenet': densenet,
    'resnet': resnet,
    'inception': inception,
    **torch_vision_originals.ORIGINALS,
}
