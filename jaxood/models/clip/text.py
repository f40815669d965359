"""CLIP's text encoder."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxood.models.clip.transformer import Encoder, settings, sizes


class Embeddings(nn.Module):
    """Token plus position."""

    vocab_size: int
    positions: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, ids, extra):
        table = Table(self.vocab_size, self.width, name='token_embedding')()
        if extra is not None:
            table = jnp.concatenate([table, extra.astype(table.dtype)])
        places = Table(self.positions, self.width, name='position_embedding')()
        return (table[ids] + places[: ids.shape[1]]).astype(self.dtype)


class Table(nn.Module):
    """A table of vectors, as a parameter `embedding`."""

    rows: int
    width: int

    @nn.compact
    def __call__(self):
        init = nn.initializers.normal(0.02)
        return self.param('embedding', init, (self.rows, self.width))


class Text(nn.Module):
    """Radford et al. 2021 (arXiv:2103.00020), Sec. 2.4: a causal transformer; defaults ViT-L/14's.

    Attributes:
        vocab_size: rows of the token table. Ids from there on are pseudo-words (`extra`).
        width, layers, heads, mlp, activation, epsilon: of the transformer.
        positions: tokens of the longest text.
        projection: width of the space shared with images, or None where there is none, as in
            Stable Diffusion's text encoder.
        end: id of the token that ends a text. None, as in older `config.json`s: the largest of the
            vocabulary's ids in the text is taken for it.
        dtype: compute type; results are float32.
    """

    vocab_size: int = 49_408
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    activation: str = 'quick_gelu'
    epsilon: float = 1e-5
    positions: int = 77
    projection: int | None = None
    end: int | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array, extra: jax.Array | None = None) -> dict[str, jax.Array]:
        """Encodes texts.

        Args:
            ids: int32[B, N], N <= positions; see `tokenizer`.
            extra: float32[n, width], input embeddings of pseudo-words: id `vocab_size + i` is row
                i. (Other ids beyond the vocabulary read the last row.)

        Returns:
            float32 arrays: `hidden` [B, N, width] after the last normalisation, what the U-Net
            sees; `pooled` [B, width], its row at the first end token; `projected` [B, projection],
            where there is one, not normalised.
        """
        x = Embeddings(self.vocab_size, self.positions, self.width, self.dtype, name='embeddings')(
            ids, extra
        )
        x = Encoder(
            self.layers,
            self.heads,
            self.mlp,
            self.activation,
            self.epsilon,
            is_causal=True,
            dtype=self.dtype,
            name='encoder',
        )(x)
        hidden = nn.LayerNorm(self.epsilon, name='final_layer_norm')(x)  # float32
        own = jnp.where(ids < self.vocab_size, ids, -1)
        where = jnp.argmax(own if self.end is None else own == self.end, axis=1)
        pooled = jnp.take_along_axis(hidden, where[:, None, None], axis=1)[:, 0]
        outputs = {'hidden': hidden, 'pooled': pooled}
        if self.projection is not None:
            project = nn.Dense(self.projection, use_bias=False, name='text_projection')
            outputs['projected'] = project(pooled)
        return outputs


def from_config(config: Mapping[str, Any], *, projection: bool, **keywords) -> Text:
    """The text encoder of a `config.json`, or of its `text_config`. Keywords: dtype.

    Args:
        projection: whether it has one. (The file has `projection_dim` in either case.)

    Raises:
        UserError: a network that we don't have.
    """
    c = settings(config, TAKES, 'the text encoder')
    end = c['eos_token_id']
    return Text(
        vocab_size=c['vocab_size'],
        **sizes(c),
        positions=c['max_position_embeddings'],
        projection=c['projection_dim'] if projection else None,
        end=None if end == 2 else end,  # 2 stood there before the file was told the true one
        **keywords,
    )


TAKES = {  # transformers' defaults
    'vocab_size': 49_408,
    'hidden_size': 512,
    'intermediate_size': 2048,
    'num_hidden_layers': 12,
    'num_attention_heads': 8,
    'max_position_embeddings': 77,
    'hidden_act': 'quick_gelu',
    'layer_norm_eps': 1e-5,
    'projection_dim': 512,
    'eos_token_id': 49_407,
}
