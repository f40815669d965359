"""CLIP's image encoder."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxood.errors import UserError
from jaxood.models.clip.text import Table
from jaxood.models.clip.transformer import Encoder, settings, sizes

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of pixels in [0, 1], as OpenAI's weights expect them
STD = (0.26862954, 0.26130258, 0.27577711)


def normalised(pixels: jax.Array) -> jax.Array:
    """RGB in [0, 1], [B, H, W, 3], as the encoder sees it."""
    return (pixels - jnp.array(MEAN)) / jnp.array(STD)


def fitted(pixels: jax.Array, size: int) -> jax.Array:
    """Images in [0, 1], [B, H, W, C], as OpenAI's code prepares them: [B, size, size, C].

    The shorter side becomes `size`, bicubic and antialiased, of the longer one the middle is cut
    out. Images of that size stay as they are.
    """
    height, width = pixels.shape[1:3]
    if (height, width) == (size, size):
        return pixels
    sides = [round(size * side / min(height, width)) for side in (height, width)]
    shape = (pixels.shape[0], *sides, pixels.shape[3])
    large = jnp.clip(jax.image.resize(pixels, shape, 'cubic', antialias=True), 0.0, 1.0)
    top, left = ((side - size) // 2 for side in sides)
    return large[:, top : top + size, left : left + size]


class Patches(nn.Module):
    """A class token and the patches, each with its position."""

    patch: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, images):
        patch = (self.patch, self.patch)
        x = nn.Conv(
            *(self.width, patch, patch),
            padding='VALID',
            use_bias=False,
            dtype=self.dtype,
            name='patch_embedding',
        )(images)
        x = x.reshape(len(images), -1, self.width)
        token = self.param('class_embedding', nn.initializers.normal(0.02), (self.width,))
        token = jnp.broadcast_to(token, (len(images), 1, self.width)).astype(self.dtype)
        places = Table(x.shape[1] + 1, self.width, name='position_embedding')()
        return jnp.concatenate([token, x], axis=1) + places.astype(self.dtype)


class Vision(nn.Module):
    """Radford et al. 2021 (arXiv:2103.00020), Sec. 2.4: a ViT; the defaults are ViT-L/14's.

    Attributes:
        size: pixels a side of the images.
        patch: of the patches.
        width, layers, heads, mlp, activation, epsilon: of the transformer.
        projection: width of the space shared with texts, or None.
        image_channels: of images.
        dtype: compute type; results are float32.
    """

    size: int = 224
    patch: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    activation: str = 'quick_gelu'
    epsilon: float = 1e-5
    projection: int | None = 768
    image_channels: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Encodes images float [B, size, size, C], normalised by `MEAN` and `STD`.

        Returns:
            float32 arrays: `hidden` [B, 1 + patches, width] before the last normalisation; `pooled`
            [B, width], its class token after it; `projected` [B, projection], where there is one,
            not normalised.
        """
        if images.shape[1:3] != (self.size, self.size):
            raise UserError(
                f'This image encoder has positions for {self.size} x {self.size} pixels, these '
                f'images have {images.shape[1]} x {images.shape[2]}. Resize them.'
            )
        x = Patches(self.patch, self.width, self.dtype, name='embeddings')(images)
        x = nn.LayerNorm(self.epsilon, self.dtype, name='pre_layrnorm')(x)  # so in transformers
        x = Encoder(
            self.layers,
            self.heads,
            self.mlp,
            self.activation,
            self.epsilon,
            is_causal=False,
            dtype=self.dtype,
            name='encoder',
        )(x)
        pooled = nn.LayerNorm(self.epsilon, name='post_layernorm')(x[:, 0])  # float32
        outputs = {'hidden': x.astype(jnp.float32), 'pooled': pooled}
        if self.projection is not None:
            project = nn.Dense(self.projection, use_bias=False, name='visual_projection')
            outputs['projected'] = project(pooled)
        return outputs


def from_config(config: Mapping[str, Any], *, projection: bool, **keywords) -> Vision:
    """The image encoder of a `config.json`, or of its `vision_config`. Keywords: dtype.

    Args:
        projection: whether it has one. (The file has `projection_dim` in either case.)

    Raises:
        UserError: a network that we don't have.
    """
    c = settings(config, TAKES, 'the image encoder')
    return Vision(
        size=c['image_size'],
        patch=c['patch_size'],
        **sizes(c),
        projection=c['projection_dim'] if projection else None,
        image_channels=c['num_channels'],
        **keywords,
    )


TAKES = {  # transformers' defaults
    'image_size': 224,
    'patch_size': 32,
    'hidden_size': 768,
    'intermediate_size': 3072,
    'num_hidden_layers': 12,
    'num_attention_heads': 12,
    'num_channels': 3,
    'hidden_act': 'quick_gelu',
    'layer_norm_eps': 1e-5,
    'projection_dim': 512,
}
