"""Ways to invent outliers. Adding one is one file, one function and one line here.

A strategy is `build(..., **keywords) -> rows`, and `rows(shared, index, key)` makes candidate
number i from (key, i) alone: a dict with `image` float32[B, H, W, C] in [-1, 1] and whatever is
worth knowing about each candidate. It runs inside `jit`. `needs` names what `build` takes beside
its keywords: `shape` (H, W, C), `num_classes`, `generate` (`synthesis.generator`) or `edit` (the
same from the strategy's own `depth` on), `alpha_bar`, `labels` (int[N] of the ID training images;
`rows` then finds those in `shared['images']`), `given` (how many images the user gives; `rows` then
finds those in `shared['given']`, and there are no more candidates than that).

Facts that later stages read: `first` and `second`, the classes asked for; `label`, the class of the
training image that a candidate is made of; `discrepant`, false for one that shows no outlier.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxood.synthesis import images, label_mixup, noise, pure, real_mixup, semantic_discrepant


class Strategy(NamedTuple):
    build: Callable
    needs: tuple[str, ...]


STRATEGIES = {
    'label_mixup': Strategy(label_mixup.build, ('shape', 'num_classes', 'generate', 'alpha_bar')),
    'pure_class': Strategy(pure.build, ('shape', 'num_classes', 'generate')),
    'real_mixup': Strategy(real_mixup.build, ('labels', 'num_classes')),
    'semantic_discrepant': Strategy(
        semantic_discrepant.build, ('labels', 'num_classes', 'alpha_bar', 'edit')
    ),
    'images': Strategy(images.build, ('given',)),
    'uniform_noise': Strategy(noise.uniform, ('shape',)),
}
