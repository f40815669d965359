"""OOD scores: larger = more outlying. `SCORES` is the table of contents.

An entry is `Score(fit, score, needs)`:

    fit(bank, head, **keywords) -> params     once, on the training set's outputs, on the host
    score(params, outputs, head) -> float32[B]    pure and jittable, nothing else to say

The config's keywords (`knn200=dict(name='knn', k=200)`) are `fit`'s, and what `score` needs of them
travels in `params`, any pytree: a traced value where changing it should compile nothing (energy's
temperature), a static field of a `flax.struct` where it sets a shape (KNN's k). A keyword that
`fit` lacks does not exist for that score.

`bank` and `outputs` are dicts: `logits` [B, K], `features` [B, D] (penultimate, pooled), `maps`?,
`labels`?, `is_outlier`?, `index`. `head` is a dict with `kernel` [D, K] and `bias` [K]; entries
with `needs='network'` also find `images -> outputs` and `maps -> outputs` in it as functions.
`needs` is one of logits, features, maps, network: what must have been computed.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxood.scores import distance, logit


class Score(NamedTuple):
    fit: Callable
    score: Callable
    needs: str


def no_fit(bank, head):
    """For scores with nothing to fit and nothing to set."""
    return {}


def of_logits(equation: Callable) -> Callable:
    """`equation(logits, **params)` as a score."""
    return lambda params, outputs, head: equation(outputs['logits'], **params)


SCORES = {
    'msp': Score(no_fit, of_logits(logit.msp), needs='logits'),
    'maxlogit': Score(no_fit, of_logits(logit.maxlogit), needs='logits'),
    'energy': Score(logit.fit_energy, of_logits(logit.energy), needs='logits'),
    'knn': Score(distance.fit_knn, distance.knn, needs='features'),
}
