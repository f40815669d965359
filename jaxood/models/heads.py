"""Classification heads: `(features [B, D], labels int32[B] or None, step) -> logits [B, K]`.

With `labels`, a head may put its margin on the target's logit; a row with label -1 has no target
and hence no margin (outliers, which share the ID rows' forward pass). Without, the logits are those
of inference. State that is not a parameter goes into a variable of another collection.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn


class Linear(nn.Module):
    """z = Wᵀh + b: the plain softmax head, without a margin.

    W ~ U(±1/√D), PyTorch's default; b = 0, as hendrycks/outlier-exposure (official code) sets it.
    """

    num_classes: int

    @nn.compact
    def __call__(self, features, labels=None, step=0):
        shape = (features.shape[-1], self.num_classes)
        uniform = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
        kernel = self.param('kernel', uniform, shape, jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, shape[1:], jnp.float32)
        return jnp.dot(features, kernel, precision=jax.lax.Precision.HIGHEST) + bias


HEADS = {'linear': Linear}
