"""A classifier that is no longer trained, as functions of images and of its own maps."""

from typing import Any

import jax
from flax import linen as nn
from flax import struct

from jaxood.models.layers import ReLU


@struct.dataclass
class Frozen:
    """What scores with `needs='maps'` or `'network'` find as `head['network']`.

    Attributes:
        variables: the classifier's.
        std: float32[C] or [1], the channels' standard deviation that images were divided by: a step
            of epsilon / std on standardised images is one of epsilon on pixels in [0, 1].
        model: `models.Classifier`.
    """

    variables: Any
    std: jax.Array
    model: nn.Module = struct.field(pytree_node=False)

    def forward(self, images) -> dict[str, Any]:
        """Standardised images [B, H, W, C] -> logits, features, maps, and `relus`: what enters
        each ReLU, in order of computation. Differentiable; what nobody uses costs nothing."""
        return self._apply(images)

    def resume(self, stage: int, stage_map) -> dict[str, Any]:
        """The same from `maps[stage]` on; `maps` and `relus` then hold the later ones."""
        return self._apply(stage_map, after=stage)

    def _apply(self, x, **keywords):
        relus = []

        def note(method, args, kwargs, context):
            if isinstance(context.module, ReLU) and context.method_name == '__call__':
                relus.append(args[0])
            return method(*args, **kwargs)

        with nn.intercept_methods(note):
            outputs = self.model.apply(self.variables, x, train=False, **keywords)
        return outputs | {'relus': tuple(relus)}
