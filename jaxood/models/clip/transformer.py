"""The transformer of CLIP's encoders; modules are named as in transformers."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from flax import linen as nn

from jaxood.errors import UserError, lookup
from jaxood.models.attention import attention

ACTIVATIONS = {
    'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's weights
    'gelu': partial(nn.gelu, approximate=False),
}


class SelfAttention(nn.Module):
    """Tokens [B, N, C] look at each other."""

    heads: int
    is_causal: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        batch, tokens, width = x.shape
        dense = partial(nn.Dense, width, dtype=self.dtype)
        split = lambda h: h.reshape(batch, tokens, self.heads, width // self.heads)
        q, k, v = (split(dense(name=f'{name}_proj')(x)) for name in 'qkv')
        h = attention(q, k, v, is_causal=self.is_causal)
        return dense(name='out_proj')(h.reshape(x.shape))


class MLP(nn.Module):
    """linear(activation(linear(x)))."""

    width: int
    activation: str
    dtype: Any

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(self.width, dtype=self.dtype, name='fc1')(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name='fc2')(ACTIVATIONS[self.activation](h))


class Layer(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x))."""

    heads: int
    mlp: int
    activation: str
    epsilon: float
    is_causal: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        norm = partial(nn.LayerNorm, self.epsilon, self.dtype)
        attend = SelfAttention(self.heads, self.is_causal, self.dtype, name='self_attn')
        x = x + attend(norm(name='layer_norm1')(x))
        mlp = MLP(self.mlp, self.activation, self.dtype, name='mlp')
        return x + mlp(norm(name='layer_norm2')(x))


class Encoder(nn.Module):
    """Layers one after the other."""

    layers: int
    heads: int
    mlp: int
    activation: str
    epsilon: float
    is_causal: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        for i in range(self.layers):
            layer = Layer(
                self.heads,
                self.mlp,
                self.activation,
                self.epsilon,
                self.is_causal,
                self.dtype,
                name=f'layers_{i}',
            )
            x = layer(x)
        return x


def sizes(c: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that both encoders have, of what `settings` found."""
    return {
        'width': c['hidden_size'],
        'layers': c['num_hidden_layers'],
        'heads': c['num_attention_heads'],
        'mlp': c['intermediate_size'],
        'activation': c['hidden_act'],
        'epsilon': c['layer_norm_eps'],
    }


def settings(config: Mapping[str, Any], takes: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The entries of a `config.json` that a network is built from, or transformers' defaults.

    Raises:
        UserError: an activation that we don't have, or a width that the heads don't divide.
    """
    found = {key: config.get(key, default) for key, default in takes.items()}
    lookup(ACTIVATIONS, found['hidden_act'], f'the activation of {what},')
    if found['hidden_size'] % found['num_attention_heads']:
        width, heads = found['hidden_size'], found['num_attention_heads']
        raise UserError(f'{what} has hidden_size={width}, which its {heads} heads do not divide.')
    return found
