"""Writes vision.npz: logits of tiny ViTs and EfficientNets, computed by PyTorch.

    python tests/reference/make_vision.py

The networks' arrays are not stored: `arrays` makes them from their names and shapes, which are
written down here as the code bases have them. Each entry of vision.npz is the logits of one of
`NETWORKS` for `images`.
"""

import math
import pathlib
import zlib

import numpy as np

CLASSES = 5
LOGITS = pathlib.Path(__file__).with_name('vision.npz')


def timm_vit(*, size, patch, width, depth, mlp, classes=CLASSES):
    shapes = {
        'cls_token': (1, 1, width),
        'pos_embed': (1, (size // patch) ** 2 + 1, width),
        'patch_embed.proj.weight': (width, 3, patch, patch),
        'patch_embed.proj.bias': (width,),
    }
    for i in range(depth):
        shapes |= {f'blocks.{i}.{n}.{a}': (width,) for n in ('norm1', 'norm2') for a in BOTH}
        shapes |= _linear(f'blocks.{i}.attn.qkv', width, 3 * width)
        shapes |= _linear(f'blocks.{i}.attn.proj', width, width)
        shapes |= _linear(f'blocks.{i}.mlp.fc1', width, mlp)
        shapes |= _linear(f'blocks.{i}.mlp.fc2', mlp, width)
    shapes |= {f'norm.{a}': (width,) for a in BOTH}
    return shapes | _linear('head', width, classes)


def transformers_vit(*, size, patch, width, depth, mlp, classes=CLASSES):
    """The names in its files."""
    shapes = {
        'vit.embeddings.cls_token': (1, 1, width),
        'vit.embeddings.position_embeddings': (1, (size // patch) ** 2 + 1, width),
        'vit.embeddings.patch_embeddings.projection.weight': (width, 3, patch, patch),
        'vit.embeddings.patch_embeddings.projection.bias': (width,),
    }
    for i in range(depth):
        block = f'vit.encoder.layer.{i}'
        for name in ('query', 'key', 'value'):
            shapes |= _linear(f'{block}.attention.attention.{name}', width, width)
        shapes |= _linear(f'{block}.attention.output.dense', width, width)
        shapes |= _linear(f'{block}.intermediate.dense', width, mlp)
        shapes |= _linear(f'{block}.output.dense', mlp, width)
        for name in ('layernorm_before', 'layernorm_after'):
            shapes |= {f'{block}.{name}.{a}': (width,) for a in BOTH}
    shapes |= {f'vit.layernorm.{a}': (width,) for a in BOTH}
    return shapes | _linear('classifier', width, classes)


def transformers_5_vit(**keywords):
    """The names of its modules since version 5."""
    renamed = (
        ('encoder.layer', 'layers'),
        ('attention.attention.query', 'attention.q_proj'),
        ('attention.attention.key', 'attention.k_proj'),
        ('attention.attention.value', 'attention.v_proj'),
        ('attention.output.dense', 'attention.o_proj'),
        ('intermediate.dense', 'mlp.fc1'),
        ('output.dense', 'mlp.fc2'),
    )
    shapes = {}
    for name, shape in transformers_vit(**keywords).items():
        for old, new in renamed:
            name = name.replace(old, new)
        shapes[name] = shape
    return shapes


def google_vit(*, size, patch, width, depth, mlp, heads, classes=CLASSES):
    shapes = {
        'cls': (1, 1, width),
        'embedding/kernel': (patch, patch, 3, width),
        'embedding/bias': (width,),
        'Transformer/posembed_input/pos_embedding': (1, (size // patch) ** 2 + 1, width),
        'Transformer/encoder_norm/scale': (width,),
        'Transformer/encoder_norm/bias': (width,),
        'head/kernel': (width, classes),
        'head/bias': (classes,),
    }
    for i in range(depth):
        block = f'Transformer/encoderblock_{i}'
        attention = f'{block}/MultiHeadDotProductAttention_1'
        for name in ('query', 'key', 'value'):
            shapes[f'{attention}/{name}/kernel'] = (width, heads, width // heads)
            shapes[f'{attention}/{name}/bias'] = (heads, width // heads)
        shapes |= {
            f'{attention}/out/kernel': (heads, width // heads, width),
            f'{attention}/out/bias': (width,),
            f'{block}/MlpBlock_3/Dense_0/kernel': (width, mlp),
            f'{block}/MlpBlock_3/Dense_0/bias': (mlp,),
            f'{block}/MlpBlock_3/Dense_1/kernel': (mlp, width),
            f'{block}/MlpBlock_3/Dense_1/bias': (width,),
        }
        for name in ('LayerNorm_0', 'LayerNorm_2'):
            shapes |= {f'{block}/{name}/{a}': (width,) for a in ('scale', 'bias')}
    return shapes


def efficientnet(name, *, width, depth, classes=CLASSES):
    """Arrays of an EfficientNet, if `name(stage, layer, part)` is the name of a part.

    Stage 0 is the stem, 8 the head convolution, 9 the classifier; the parts are those of `PARTS`.
    """

    def scaled(channels):  # to a multiple of 8, but losing no more than a tenth
        rounded = max(8, math.floor(channels * width / 8 + 0.5) * 8)
        return rounded + 8 if rounded < 0.9 * channels * width else rounded

    def conv_norm(where, part, outputs, inputs, kernel):
        shapes = {f'{name(*where, part)}.weight': (outputs, inputs, kernel, kernel)}
        norm = name(*where, f'{part} norm')
        arrays = ('weight', 'bias', 'running_mean', 'running_var')
        return shapes | {f'{norm}.{a}': (outputs,) for a in arrays}

    inputs = scaled(32)
    shapes = conv_norm((0, 0), 'conv', inputs, 3, 3)
    for stage, (expansion, kernel, channels, layers) in enumerate(TABLE, start=1):
        for layer in range(math.ceil(layers * depth)):
            where, wide, outputs = (stage, layer), expansion * inputs, scaled(channels)
            if expansion > 1:
                shapes |= conv_norm(where, 'expand', wide, inputs, 1)
            shapes |= conv_norm(where, 'depthwise', wide, 1, kernel)
            shapes |= _linear(name(*where, 'squeeze'), wide, inputs // 4, 1, 1)
            shapes |= _linear(name(*where, 'excite'), inputs // 4, wide, 1, 1)
            shapes |= conv_norm(where, 'project', outputs, wide, 1)
            inputs = outputs
    shapes |= conv_norm((8, 0), 'conv', 4 * inputs, inputs, 1)
    return shapes | _linear(name(9, 0, 'classifier'), 4 * inputs, classes)


TABLE = (  # expansion, kernel, channels, layers
    (1, 3, 16, 1),
    (6, 3, 24, 2),
    (6, 5, 40, 2),
    (6, 3, 80, 3),
    (6, 5, 112, 3),
    (6, 5, 192, 4),
    (6, 3, 320, 1),
)
PARTS = (
    *('expand', 'expand norm', 'depthwise', 'depthwise norm', 'squeeze', 'excite'),
    *('project', 'project norm'),
)


def torchvision_efficientnet(**keywords):
    def name(stage, layer, part):
        if stage == 9:
            return 'classifier.1'
        if stage in (0, 8):
            return f'features.{stage}.{1 if part.endswith("norm") else 0}'
        inner = ('0.0', '0.1', '1.0', '1.1', '2.fc1', '2.fc2', '3.0', '3.1')[PARTS.index(part)]
        if stage == 1:
            inner = f'{int(inner[0]) - 1}{inner[1:]}'
        return f'features.{stage}.{layer}.block.{inner}'

    return efficientnet(name, **keywords)


def timm_efficientnet(**keywords):
    def name(stage, layer, part):
        if stage == 9:
            return 'classifier'
        if stage in (0, 8):
            conv, norm = ('conv_stem', 'bn1') if stage == 0 else ('conv_head', 'bn2')
            return norm if part.endswith('norm') else conv
        first = (None, None, 'conv_dw', 'bn1', 'se.conv_reduce', 'se.conv_expand', 'conv_pw', 'bn2')
        later = ('conv_pw', 'bn1', 'conv_dw', 'bn2', *first[4:6], 'conv_pwl', 'bn3')
        inner = (first if stage == 1 else later)[PARTS.index(part)]
        return f'blocks.{stage - 1}.{layer}.{inner}'

    return efficientnet(name, **keywords)


BOTH = ('weight', 'bias')


def _linear(name, inputs, outputs, *kernel):
    return {f'{name}.weight': (outputs, inputs, *kernel), f'{name}.bias': (outputs,)}


# Name -> (backbone, names and shapes of its arrays, what of its keywords no array shows).
VIT = dict(size=224, patch=32, width=128, depth=2, mlp=40)
GELU, TANH = (dict(approximate_gelu=approximate) for approximate in (False, True))
SMALL = dict(width=0.25, depth=0.4)
TORCH, TF = dict(padding='torch', epsilon=1e-5), dict(padding='tf', epsilon=1e-3)
NETWORKS = {
    'timm vit': ('vit', timm_vit(**VIT), GELU | dict(heads=2, epsilon=1e-6)),
    'transformers vit': ('vit', transformers_vit(**VIT), GELU | dict(heads=2, epsilon=1e-12)),
    'transformers 5 vit': ('vit', transformers_5_vit(**VIT), GELU | dict(heads=2, epsilon=1e-12)),
    'google vit': ('vit', google_vit(**VIT, heads=4), TANH | dict(heads=4, epsilon=1e-6)),
    'torchvision efficientnet': ('efficientnet', torchvision_efficientnet(**SMALL), TORCH),
    'timm efficientnet': ('efficientnet', timm_efficientnet(**SMALL), TORCH),
    'timm tf_efficientnet': ('efficientnet', timm_efficientnet(**SMALL), TF),
}
SIZES = {'vit': 224, 'efficientnet': 40}  # pixels; of an even number 'SAME' pads one side only


def arrays(shapes):
    """Random arrays, each by its name (RandomState's stream is frozen), of order 1 in effect."""
    found = {}
    for name, shape in shapes.items():
        draw = np.random.RandomState(zlib.crc32(name.encode())).uniform(-1, 1, shape)
        if len(shape) > 1 and name.endswith(('weight', 'kernel')):
            draw *= math.sqrt(3 * max(shape) / draw.size)
        elif name.endswith(('weight', 'scale', 'running_var')):
            draw = 1 + draw / 2
        found[name] = draw.astype(np.float32)
    return found


def images(backbone):
    """float32[2, H, W, 3]."""
    size = SIZES[backbone]
    return np.random.RandomState(0).uniform(-2, 2, (2, size, size, 3)).astype(np.float32)


def logits(name):
    """float32[2, CLASSES] of one of `NETWORKS`, by PyTorch."""
    import torch

    from jaxood.models.torch_vision_originals import ORIGINALS

    backbone, shapes, keywords = NETWORKS[name]
    state = {k: torch.from_numpy(v) for k, v in arrays(shapes).items()}
    x = torch.from_numpy(images(backbone)).permute(0, 3, 1, 2)
    return ORIGINALS[backbone](state, keywords, x).numpy()


if __name__ == '__main__':
    np.savez_compressed(LOGITS, **{name: logits(name) for name in NETWORKS})
