"""Ways to invent outliers. Adding one is one file, one function and one line here.

A strategy is `build(..., **keywords) -> rows`, and `rows(shared, index, key)` makes candidate
number i from (key, i) alone: a dict with `image` float32[B, H, W, C] in [-1, 1] and whatever is
worth knowing about each candidate. It runs inside `jit`. `needs` names what `build` takes beside
its keywords: `shape` (H, W, C), `num_classes`, `generate` (`synthesis.generator`) or `edit` (the
same from the strategy's own `depth` on), `alpha_bar`, `labels` (int[N] of the ID training images;
`rows` then finds those in `shared['images']`), `given` (how many images the user gives; `rows` then
finds those in `shared['given']`, and there are no more candidates than that), or `painter`
(`synthesis.painter`), for generators that read text; `prompts` then says whose embeddings `rows`
find in `shared['contexts']`: the `classes`' or those of the `words` near them.

Facts that later stages read: `first` and `second`, the classes asked for; `label`, the class of the
training image that a candidate is made of; `discrepant`, false for one that shows no outlier;
`class`, near which the painted `word` lies.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxood.synthesis import (
    images,
    label_mixup,
    latent_mix,
    latent_noise,
    noise,
    pure,
    real_mixup,
    semantic_discrepant,
    text_mix,
    text_noise,
    wordnet_prompts,
)


class Strategy(NamedTuple):
    build: Callable
    needs: tuple[str, ...]
    prompts: str = ''


STRATEGIES = {
    'label_mixup': Strategy(label_mixup.build, ('shape', 'num_classes', 'generate', 'alpha_bar')),
    'pure_class': Strategy(pure.build, ('shape', 'num_classes', 'generate')),
    'real_mixup': Strategy(real_mixup.build, ('labels', 'num_classes')),
    'semantic_discrepant': Strategy(
        semantic_discrepant.build, ('labels', 'num_classes', 'alpha_bar', 'edit')
    ),
    'images': Strategy(images.build, ('given',)),
    'uniform_noise': Strategy(noise.uniform, ('shape',)),
    'wordnet_prompts': Strategy(wordnet_prompts.build, ('painter',), 'words'),
    'latent_noise': Strategy(latent_noise.build, ('painter', 'labels'), 'classes'),
    'text_noise': Strategy(text_noise.build, ('painter', 'num_classes'), 'classes'),
    'latent_mix': Strategy(latent_mix.build, ('painter', 'labels', 'num_classes')),
    'text_mix': Strategy(text_mix.build, ('painter', 'num_classes'), 'classes'),
}
