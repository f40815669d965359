"""Networks. `Classifier` joins a backbone (`backbones`) and a head (`heads`)."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn


class Classifier(nn.Module):
    """images -> {'logits' [B, K], 'features' [B, D], 'maps' ([B, h, w, c], ...)}.

    Its parameters are `{'backbone': ..., 'head': {'kernel': [D, K], ...}}`; the `head` entry is
    what scores are given. Whatever is neither parameter nor gradient (batch statistics, a head's
    scale) lies in other collections and is a detector's `extra`.

    Attributes:
        backbone: a module `(images, *, train, keys, after) -> (features [B, D], maps)`.
        head: a module `(features, labels, step) -> logits`.
    """

    backbone: nn.Module
    head: nn.Module

    def __call__(
        self,
        images,
        *,
        train: bool,
        keys=None,
        labels=None,
        step: Any = 0,
        after: int | None = None,
    ) -> dict[str, Any]:
        """Logits and what they were made of.

        Args:
            images: float[B, H, W, C], already normalised.
            train: batch statistics of this batch (and dropout), or the running ones.
            keys: keys[B] for dropout, one a row; None drops nothing.
            labels: int32[B] for heads with a margin on the target, -1 on rows without a target
                (outliers). None: inference, no margin.
            step: int32[], for heads whose margin is annealed.
            after: `images` is this stage's map instead (`maps[after]`), and only what comes after
                it is computed.
        """
        features, maps = self.backbone(images, train=train, keys=keys, after=after)
        features = features.astype(jnp.float32)  # heads and losses are float32 at any dtype
        return {'logits': self.head(features, labels, step), 'features': features, 'maps': maps}
