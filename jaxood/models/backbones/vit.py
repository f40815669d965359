"""Vision transformers."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxood.errors import UserError
from jaxood.models.layouts import Layout, Preprocessing, Shapes, Target, conv, linear, same


class Block(nn.Module):
    """x + MSA(LN(x)), then x + MLP(LN(x)): Dosovitskiy et al. 2021, Eq. 2 and 3."""

    heads: int
    mlp: int
    epsilon: float
    approximate_gelu: bool
    fused: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        batch, tokens, width = x.shape
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
        norm = partial(layer_norm, self.epsilon, self.dtype)

        h = norm('norm1')(x)
        if self.fused:
            qkv = jnp.split(dense(3 * width, name='qkv')(h), 3, axis=-1)
        else:
            qkv = (dense(width, name=name)(h) for name in ('query', 'key', 'value'))
        qkv = (y.reshape(batch, tokens, self.heads, width // self.heads) for y in qkv)
        h = jax.nn.dot_product_attention(*qkv)  # its softmax is float32 at any dtype
        x = x + dense(width, name='out')(h.reshape(x.shape))

        h = dense(self.mlp, name='fc1')(norm('norm2')(x))
        h = nn.gelu(h, approximate=self.approximate_gelu)
        return x + dense(width, name='fc2')(h)


class ViT(nn.Module):
    """ViT. Dosovitskiy et al. 2021 (arXiv:2010.11929), Eq. 1-4; the defaults are ViT-B/16 at 224.

    Patches and a class token, learned positions, pre-LN blocks. `features` [B, D] is the class
    token after the last layer normalisation; `maps` holds the patches' tokens after each block,
    [B, size/patch, size/patch, D], before that normalisation. They lack the class token, hence
    `after` is refused. There are no batch statistics, so `train` changes nothing and `axis_name`
    has nothing to average; and no dropout, so `keys` is not used (our choice: frozen networks need
    none).
    Attributes:
        size: pixels a side of the images, a multiple of `patch`; the table of positions has
            (size/patch)² + 1 rows.
        mlp: width of the blocks' hidden layer.
        epsilon: of all layer normalisations; 1e-6 in google-research's and timm's code, 1e-12 in
            transformers'.
        approximate_gelu: the tanh formula, as google-research's code (Flax's default); False: erf.
        fused: one array for query, key and value, as timm keeps them, or three. The same numbers.
    """

    size: int = 224
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    epsilon: float = 1e-6
    approximate_gelu: bool = False
    fused: bool = True
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def __post_init__(self):
        for whole, part in (('size', 'patch'), ('width', 'heads')):
            if getattr(self, whole) % getattr(self, part):
                raise UserError(
                    f'A ViT with {whole}={getattr(self, whole)} and {part}={getattr(self, part)}: '
                    f'{part} must divide {whole}.'
                )
        super().__post_init__()

    @property
    def map_names(self) -> tuple[str, ...]:
        return tuple(f'block{i}' for i in range(self.depth))

    def first(self, number: int) -> tuple[str, ...]:
        """Names of the parts up to block number `number`: those to freeze for fine-tuning."""
        if not 0 <= number <= self.depth:
            raise UserError(f'number={number}: this ViT has {self.depth} blocks.')
        blocks = (f'block{i}' for i in range(number))
        return ('patches', 'class_token', 'positions', *blocks) if number else ()

    @nn.compact
    def __call__(self, images, *, train: bool, keys=None, after: int | None = None):
        if after is not None:
            raise ValueError(
                f"A ViT cannot go on from a map (after={after}): features are the class token's, "
                'which the maps, grids of patch tokens, do not hold.'
            )
        if images.shape[1:3] != (self.size, self.size):
            raise UserError(
                f'This ViT has positions for images of {self.size} x {self.size} pixels, these '
                f'have {images.shape[1]} x {images.shape[2]}. Resize them, or set size.'
            )
        batch, side = len(images), self.size // self.patch
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, patch, padding='VALID', dtype=self.dtype, name='patches')(
            images
        )
        x = x.reshape(batch, side * side, self.width)
        token = self.param('class_token', nn.initializers.zeros, (1, 1, self.width))
        positions = self.param(
            'positions', nn.initializers.normal(0.02), (1, side * side + 1, self.width)
        )
        token = jnp.broadcast_to(token, (batch, 1, self.width)).astype(self.dtype)
        x = jnp.concatenate([token, x], axis=1) + positions.astype(self.dtype)

        maps = []
        for i in range(self.depth):
            x = Block(
                heads=self.heads,
                mlp=self.mlp,
                epsilon=self.epsilon,
                approximate_gelu=self.approximate_gelu,
                fused=self.fused,
                dtype=self.dtype,
                name=f'block{i}',
            )(x)
            maps.append(x[:, 1:].reshape(batch, side, side, self.width))
        features = layer_norm(self.epsilon, jnp.float32, 'norm')(x[:, 0])
        return features, tuple(maps)


def layer_norm(epsilon: float, dtype: Any, name: str) -> nn.LayerNorm:
    """LayerNorm, float32 inside at any dtype; the two-pass variance, for epsilon may be 1e-12."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


class Naming(NamedTuple):
    """One code base's names: ours -> theirs, without the array's own name ('.weight', '/kernel').

    Attributes:
        source: whose.
        outer: what stands outside the blocks.
        block: prefix of a block's names, with its number to be filled in.
        inner: what stands in a block.
        flax: arrays as Flax lays them out, the heads an axis of their own; else PyTorch's.
        epsilon: of the layer normalisations, which no array shows.
    """

    source: str
    outer: dict[str, str]
    block: str
    inner: dict[str, str]
    flax: bool = False
    epsilon: float = 1e-6


GOOGLE = Naming(
    source='google-research/vision_transformer',
    outer={
        'class_token': 'cls',
        'positions': 'Transformer/posembed_input/pos_embedding',
        'patches': 'embedding',
        'norm': 'Transformer/encoder_norm',
        'head': 'head',
    },
    block='Transformer/encoderblock_{}/',
    inner={
        'norm1': 'LayerNorm_0',
        'query': 'MultiHeadDotProductAttention_1/query',
        'key': 'MultiHeadDotProductAttention_1/key',
        'value': 'MultiHeadDotProductAttention_1/value',
        'out': 'MultiHeadDotProductAttention_1/out',
        'norm2': 'LayerNorm_2',
        'fc1': 'MlpBlock_3/Dense_0',
        'fc2': 'MlpBlock_3/Dense_1',
    },
    flax=True,
)

TIMM = Naming(
    source='timm',
    outer={
        'class_token': 'cls_token',
        'positions': 'pos_embed',
        'patches': 'patch_embed.proj',
        'norm': 'norm',
        'head': 'head',
    },
    block='blocks.{}.',
    inner={
        'norm1': 'norm1',
        'qkv': 'attn.qkv',
        'out': 'attn.proj',
        'norm2': 'norm2',
        'fc1': 'mlp.fc1',
        'fc2': 'mlp.fc2',
    },
)

TRANSFORMERS = Naming(
    source='transformers',  # its files; before version 5 its modules too
    outer={
        'class_token': 'vit.embeddings.cls_token',
        'positions': 'vit.embeddings.position_embeddings',
        'patches': 'vit.embeddings.patch_embeddings.projection',
        'norm': 'vit.layernorm',
        'head': 'classifier',
    },
    block='vit.encoder.layer.{}.',
    inner={
        'norm1': 'layernorm_before',
        'query': 'attention.attention.query',
        'key': 'attention.attention.key',
        'value': 'attention.attention.value',
        'out': 'attention.output.dense',
        'norm2': 'layernorm_after',
        'fc1': 'intermediate.dense',
        'fc2': 'output.dense',
    },
    epsilon=1e-12,
)

TRANSFORMERS_5 = TRANSFORMERS._replace(
    source='transformers 5',  # its modules; `save_pretrained` writes the names above
    block='vit.layers.{}.',
    inner={
        'norm1': 'layernorm_before',
        'query': 'attention.q_proj',
        'key': 'attention.k_proj',
        'value': 'attention.v_proj',
        'out': 'attention.o_proj',
        'norm2': 'layernorm_after',
        'fc1': 'mlp.fc1',
        'fc2': 'mlp.fc2',
    },
)

DEIT = TIMM._replace(source='timm deit')

# Of those with the same names, the first is taken for granted.
NAMINGS = (GOOGLE, TIMM, DEIT, TRANSFORMERS, TRANSFORMERS_5)


def recognise(naming: Naming, size: int, shapes: Shapes) -> dict[str, Any] | None:
    """A ViT's keywords from its arrays' shapes, or None if it is no such ViT at `size`.

    How many heads there are shows in Google's arrays only. Elsewhere a head has 64 entries, as in
    every published size but H, which has 16 heads of 80.
    """
    weight, first = '/kernel' if naming.flax else '.weight', naming.block.format(0)
    patches = shapes.get(naming.outer['patches'] + weight, ())
    positions = shapes.get(naming.outer['positions'], ())
    hidden = shapes.get(first + naming.inner['fc1'] + weight, ())
    if (len(patches), len(positions), len(hidden)) != (4, 3, 2):
        return None
    patch, width = patches[0 if naming.flax else -1], positions[-1]
    side = math.isqrt(positions[1] - 1)
    if side * side + 1 != positions[1] or side * patch != size:
        return None
    if naming.flax:
        query = shapes.get(first + naming.inner['query'] + weight, ())
        heads = query[1] if len(query) == 3 else 0
    else:
        heads = 16 if width == 1280 else width // 64
    if not heads or width % heads:
        return None
    depth = 0
    while naming.block.format(depth) + naming.inner['fc1'] + weight in shapes:
        depth += 1
    return {
        'size': size,
        'patch': patch,
        'width': width,
        'depth': depth,
        'heads': heads,
        'mlp': hidden[-1 if naming.flax else 0],
        'epsilon': naming.epsilon,
        'approximate_gelu': naming.flax,
        'fused': 'qkv' in naming.inner,
    }


def targets(naming: Naming, keywords: Mapping[str, Any], shapes: Shapes) -> dict[str, Target]:
    """Every array of a ViT in this naming."""
    names = dict(naming.outer)
    for i in range(keywords['depth']):
        block = naming.block.format(i)
        names |= {f'block{i}/{ours}': block + theirs for ours, theirs in naming.inner.items()}
    found = {}
    for ours, theirs in names.items():
        found |= _arrays(naming.flax, ours, theirs)
    return found


def _arrays(flax: bool, ours: str, theirs: str) -> dict[str, Target]:
    """What goes by one name: a single array, or a weight and a bias."""
    layer = ours.rpartition('/')[2]
    path = 'params/head' if layer == 'head' else f'params/backbone/{ours}'
    if layer in ('class_token', 'positions'):
        return {theirs: Target(path, same)}
    weight = 'scale' if layer.startswith('norm') else 'kernel'
    if flax:
        return {
            f'{theirs}/{weight}': Target(f'{path}/{weight}', _MERGE.get(layer, same)),
            f'{theirs}/bias': Target(f'{path}/bias', np.ravel),  # [heads, D / heads], or [D]
        }
    convert = {'norm': same, 'norm1': same, 'norm2': same, 'patches': conv}.get(layer, linear)
    return {
        f'{theirs}.weight': Target(f'{path}/{weight}', convert),
        f'{theirs}.bias': Target(f'{path}/bias', same),
    }


def _merge_out(array: np.ndarray) -> np.ndarray:
    """[D, heads, D / heads] -> [D, D]."""
    return array.reshape(len(array), -1)


def _merge_in(array: np.ndarray) -> np.ndarray:
    """[heads, D / heads, D] -> [D, D]."""
    return array.reshape(-1, array.shape[-1])


_MERGE = {'query': _merge_out, 'key': _merge_out, 'value': _merge_out, 'out': _merge_in}


def preprocessing(naming: Naming, size: int, num_classes: int) -> Preprocessing:
    """The same at any number of classes; mean and standard deviation .5, but ImageNet's in DeiT.

    timm: its default settings: bicubic, crop_pct .9 at 224 (so 248 first) and 1 at 384. Google's
    input pipeline and transformers' image processor (of google/vit-base-patch16-224) stretch the
    whole picture to `size` x `size`, bilinearly; here its short side is brought to `size` and the
    middle cut out, which differs for oblong pictures.
    """
    timm = naming in (TIMM, DEIT)
    return Preprocessing(
        size=size,
        resize=248 if timm and size == 224 else None,
        interpolation='bicubic' if timm else 'bilinear',
        mean=(0.485, 0.456, 0.406) if naming is DEIT else (0.5, 0.5, 0.5),
        std=(0.229, 0.224, 0.225) if naming is DEIT else (0.5, 0.5, 0.5),
    )


def layouts(size: int) -> tuple[Layout, ...]:
    """All namings, of networks for images of size x size."""
    return tuple(
        Layout(
            source=naming.source,
            backbone='vit',
            recognise=partial(recognise, naming, size),
            targets=partial(targets, naming),
            preprocessing=partial(preprocessing, naming, size),
        )
        for naming in NAMINGS
    )


LAYOUTS = (*layouts(224), *layouts(384))  # the sizes of the published ImageNet networks
