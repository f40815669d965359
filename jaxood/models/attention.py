"""Scaled dot-product attention, by the fastest kernel that takes the shape."""

import jax


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, is_causal: bool = False) -> jax.Array:
    """softmax(q kᵀ / √c) v for each head. Vaswani et al. 2017 (arXiv:1706.03762), Eq. 1.

    On GPUs cuDNN's fused kernel, where it takes the type (16 bit) and the width of the heads (a
    multiple of 8, up to 128, or 256 from Hopper on); XLA's operations otherwise. Which one it is
    shows when the function is traced. The softmax is float32 at any dtype.

    Args:
        q: [B, N, heads, c].
        k, v: [B, M, heads, c].
        is_causal: whether token n sees only tokens m <= n.

    Returns:
        [B, N, heads, c].
    """
    if jax.default_backend() == 'gpu':
        try:
            return jax.nn.dot_product_attention(
                q, k, v, is_causal=is_causal, implementation='cudnn'
            )
        except (NotImplementedError, RuntimeError, ValueError):
            pass  # what cuDNN says of a type, a width, or a machine that it does not serve
    return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal)
