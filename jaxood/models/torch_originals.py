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


def _conv(state, name, x, stride=1):
    weight = state[f'{name}.weight']
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def _bn(state, name, x):
    mean, var = state[f'{name}.running_mean'], state[f'{name}.running_var']
    return F.batch_norm(x, mean, var, state[f'{name}.weight'], state[f'{name}.bias'], eps=1e-5)


def _bn_relu(state, name, x):
    return F.relu(_bn(state, name, x))


def _pool_and_classify(state, name, x):
    return F.linear(x.mean((2, 3)), state[f'{name}.weight'], state[f'{name}.bias'])


ORIGINALS = {  # backbone -> its restatement
    'wrn': wrn,
    'densenet': densenet,
    'resnet': resnet,
    **torch_vision_originals.ORIGINALS,
}
