"""ViT and EfficientNet restated in PyTorch, to compare ours with.

What `torch_originals` says of its networks holds of these: plain `torch.nn.functional` on a state
dict in the names of whoever published it, none of our code. ViT is written in timm's names and
EfficientNet in torchvision's; the other code bases' arrays are renamed to those first.
"""

import itertools
import re

import torch
import torch.nn.functional as F


def vit(state, keywords, images):
    """timm's `VisionTransformer.forward`; Google's and transformers' differ in `keywords` alone.

    Args:
        state: name -> tensor, a whole checkpoint.
        keywords: of our backbone; heads, epsilon and the form of GELU show in no array.
        images: float[B, C, H, W], standardised.

    Returns:
        Logits, float[B, K].
    """
    state = _timm_vit(state)
    heads, gelu = keywords['heads'], 'tanh' if keywords['approximate_gelu'] else 'none'

    def linear(x, name):
        return F.linear(x, state[f'{name}.weight'], state[f'{name}.bias'])

    def norm(x, name):
        weight, bias = state[f'{name}.weight'], state[f'{name}.bias']
        return F.layer_norm(x, x.shape[-1:], weight, bias, keywords['epsilon'])

    kernel = state['patch_embed.proj.weight']
    x = F.conv2d(images, kernel, state['patch_embed.proj.bias'], stride=kernel.shape[-1])
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state['cls_token'].expand(len(x), -1, -1), x], dim=1) + state['pos_embed']
    for i in itertools.count():
        block = f'blocks.{i}'
        if f'{block}.norm1.weight' not in state:
            break
        qkv = linear(norm(x, f'{block}.norm1'), f'{block}.attn.qkv')
        q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in qkv.chunk(3, dim=-1))
        attention = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), f'{block}.attn.proj')
        h = linear(norm(x, f'{block}.norm2'), f'{block}.mlp.fc1')
        x = x + linear(F.gelu(h, approximate=gelu), f'{block}.mlp.fc2')
    return linear(norm(x, 'norm')[:, 0], 'head')


# Theirs -> timm's, applied one after the other.
GOOGLE = (
    (r'^cls$', 'cls_token'),
    (r'^Transformer/posembed_input/pos_embedding$', 'pos_embed'),
    (r'^embedding/', 'patch_embed.proj/'),
    (r'^Transformer/encoder_norm/', 'norm/'),
    (r'^Transformer/encoderblock_(\d+)/', r'blocks.\1.'),
    (r'MultiHeadDotProductAttention_1/(query|key|value)/', r'attn.\1/'),
    (r'MultiHeadDotProductAttention_1/out/', 'attn.proj/'),
    (r'LayerNorm_0/', 'norm1/'),
    (r'LayerNorm_2/', 'norm2/'),
    (r'MlpBlock_3/Dense_0/', 'mlp.fc1/'),
    (r'MlpBlock_3/Dense_1/', 'mlp.fc2/'),
    (r'/(kernel|scale)$', '.weight'),
    (r'/bias$', '.bias'),
)
TRANSFORMERS = (
    (r'^classifier\.', 'head.'),
    (r'^vit\.embeddings\.patch_embeddings\.projection\.', 'patch_embed.proj.'),
    (r'^vit\.embeddings\.cls_token$', 'cls_token'),
    (r'^vit\.embeddings\.position_embeddings$', 'pos_embed'),
    (r'^vit\.layernorm\.', 'norm.'),
    (r'^vit\.(encoder\.layer|layers)\.(\d+)\.', r'blocks.\2.'),
    (r'\.layernorm_before\.', '.norm1.'),
    (r'\.layernorm_after\.', '.norm2.'),
    (r'\.attention\.attention\.(query|key|value)\.', r'.attn.\1.'),
    (r'\.attention\.q_proj\.', '.attn.query.'),
    (r'\.attention\.k_proj\.', '.attn.key.'),
    (r'\.attention\.v_proj\.', '.attn.value.'),
    (r'\.attention\.(output\.dense|o_proj)\.', '.attn.proj.'),
    (r'\.intermediate\.dense\.', '.mlp.fc1.'),
    (r'\.output\.dense\.', '.mlp.fc2.'),
)


def _timm_vit(state):
    if 'cls_token' in state:
        return state
    google = 'cls' in state
    if google:
        state = {name: _from_flax(name, array) for name, array in state.items()}
    state = {_renamed(name, GOOGLE if google else TRANSFORMERS): a for name, a in state.items()}
    for name in [name for name in state if '.attn.query.' in name]:
        parts = [state.pop(name.replace('query', part)) for part in ('query', 'key', 'value')]
        state[name.replace('query', 'qkv')] = torch.cat(parts)
    return state


def _renamed(name, patterns):
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


def _from_flax(name, array):
    """HWIO -> OIHW, [in, out] -> [out, in]; the heads' axis goes into its neighbour."""
    if array.ndim == 4:
        return array.permute(3, 2, 0, 1)
    if name.endswith('out/kernel'):
        return array.flatten(0, 1).T
    if name.endswith(('query/bias', 'key/bias', 'value/bias')):
        return array.flatten()
    if name.endswith('/kernel'):
        return array.flatten(1).T
    return array


def efficientnet(state, keywords, images):
    """torchvision's `EfficientNet.forward` in evaluation mode; arguments and result as of `vit`."""
    state = {_torchvision_name(name): array for name, array in state.items()}

    def conv(x, name, stride=1):
        kernel = state[f'{name}.weight']
        size, groups = kernel.shape[-1], x.shape[1] // kernel.shape[1]
        if keywords['padding'] == 'tf':
            needed = [max((-(-n // stride) - 1) * stride + size - n, 0) for n in x.shape[2:]]
            (top, left), padding = (n // 2 for n in needed), 0
            x = F.pad(x, (left, needed[1] - left, top, needed[0] - top))
        else:
            padding = size // 2
        bias = state.get(f'{name}.bias')
        return F.conv2d(x, kernel, bias, stride=stride, padding=padding, groups=groups)

    def conv_norm(x, name, stride=1):
        mean, var, weight, bias = (
            state[f'{name}.1.{array}']
            for array in ('running_mean', 'running_var', 'weight', 'bias')
        )
        x = conv(x, f'{name}.0', stride)
        return F.batch_norm(x, mean, var, weight, bias, eps=keywords['epsilon'])

    x = F.silu(conv_norm(images, 'features.0', stride=2))
    for stage, first in enumerate((1, 2, 2, 2, 1, 2, 1), start=1):
        for layer in itertools.count():
            block = f'features.{stage}.{layer}.block'
            if f'{block}.0.0.weight' not in state:
                break
            h, i = x, 0
            if f'{block}.3.0.weight' in state:  # it expands
                h, i = F.silu(conv_norm(h, f'{block}.0')), 1
            h = F.silu(conv_norm(h, f'{block}.{i}', stride=first if layer == 0 else 1))
            gate = F.silu(conv(h.mean((2, 3), keepdim=True), f'{block}.{i + 1}.fc1'))
            h = h * torch.sigmoid(conv(gate, f'{block}.{i + 1}.fc2'))
            h = conv_norm(h, f'{block}.{i + 2}')
            x = h + x if h.shape == x.shape else h
    x = F.silu(conv_norm(x, 'features.8')).mean((2, 3))
    return F.linear(x, state['classifier.1.weight'], state['classifier.1.bias'])


# timm's -> torchvision's. In timm's first stage, without expansion, the layers count from 1 too.
OUTER = {
    'conv_stem': 'features.0.0',
    'bn1': 'features.0.1',
    'conv_head': 'features.8.0',
    'bn2': 'features.8.1',
    'classifier': 'classifier.1',
}
FIRST = {
    'conv_dw': '0.0',
    'bn1': '0.1',
    'se.conv_reduce': '1.fc1',
    'se.conv_expand': '1.fc2',
    'conv_pw': '2.0',
    'bn2': '2.1',
}
LATER = {
    'conv_pw': '0.0',
    'bn1': '0.1',
    'conv_dw': '1.0',
    'bn2': '1.1',
    'se.conv_reduce': '2.fc1',
    'se.conv_expand': '2.fc2',
    'conv_pwl': '3.0',
    'bn3': '3.1',
}


def _torchvision_name(name):
    layer, _, array = name.rpartition('.')
    if layer in OUTER:
        return f'{OUTER[layer]}.{array}'
    found = re.fullmatch(r'blocks\.(\d)\.(\d+)\.(.*)', layer)
    if not found:
        return name
    stage, block, inner = found.groups()
    inner = (FIRST if stage == '0' else LATER)[inner]
    return f'features.{int(stage) + 1}.{block}.block.{inner}.{array}'


ORIGINALS = {'vit': vit, 'efficientnet': efficientnet}
