"""OOD scores: larger = more outlying. `SCORES` is the table of contents.

An entry is `Score(fit, score, needs)`:

    fit(bank, head, **keywords) -> params     once, on the training set's outputs, on the host
    score(params, outputs, head) -> float32[B]    pure and jittable, nothing else to say

The config's keywords (`knn200=dict(name='knn', k=200)`) are `fit`'s, and what `score` needs of them
travels in `params`, any pytree: a traced value where changing it should compile nothing (energy's
temperature), a static field of a `flax.struct` where it sets a shape (KNN's k). A keyword that
`fit` lacks does not exist for that score.

`bank` and `outputs` are dicts: `logits` float32[B, K], `features` float32[B, D] (penultimate,
pooled), `labels`?, `is_outlier`?, `index`. `head` has `kernel` [D, K] and `bias` [K]. A bank's
arrays may be memory maps of any length (`streaming`); `bank['validation']`? is the same for
held-out ID images, `bank['validation_ood']`? for validation outliers, `bank['outliers']`? for
those that the detector was trained on. Fits that belong on held-out
images read `bank.get('validation', bank)`.

`needs` is what must have been computed: 'logits', 'features', 'restored' (these run from cached
outputs; the last from what a restorer makes of the features, see `reconstruction`), 'maps' or
'network'. With the last two

    outputs['images']     standardised float32[B, H, W, C];  outputs['maps']: each stage's
    head['network']       forward(images) and resume(stage, map) -> outputs, pure; std, float32[C]
    bank['map'](f, rows=None)    f(outputs, head) over the bank's images (or some), chunk by chunk
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxood.scores import (
    angular,
    distance,
    gaussian,
    gradient,
    logit,
    maps,
    multilayer,
    reconstruction,
    shaping,
    votes,
    weiper,
)


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
    # logit.py
    'msp': Score(no_fit, of_logits(logit.msp), needs='logits'),
    'maxlogit': Score(no_fit, of_logits(logit.maxlogit), needs='logits'),
    'energy': Score(logit.fit_temperature, of_logits(logit.energy), needs='logits'),
    'tempscale': Score(logit.fit_tempscale, of_logits(logit.tempscale), needs='logits'),
    'entropy': Score(no_fit, of_logits(logit.entropy), needs='logits'),
    'gen': Score(logit.fit_gen, logit.gen, needs='logits'),
    'klm': Score(logit.fit_klm, of_logits(logit.klm), needs='logits'),
    # angular.py
    'maxcos': Score(no_fit, angular.maxcos, needs='features'),
    'normcos': Score(no_fit, angular.normcos, needs='features'),
    # shaping.py
    'react': Score(shaping.fit_react, shaping.react, needs='features'),
    'vra': Score(shaping.fit_vra, shaping.vra, needs='features'),
    'dice': Score(shaping.fit_dice, shaping.dice, needs='features'),
    'ash': Score(shaping.fit_ash, shaping.ash, needs='features'),
    'scale': Score(shaping.fit_scale, shaping.scale, needs='features'),
    # gradient.py
    'gradnorm': Score(logit.fit_temperature, gradient.gradnorm, needs='features'),
    'odin': Score(gradient.fit_odin, gradient.odin, needs='network'),
    'adascale': Score(gradient.fit_adascale, gradient.adascale, needs='network'),
    'nac': Score(gradient.fit_nac, gradient.nac, needs='network'),
    # maps.py
    'rankfeat': Score(maps.fit_rankfeat, maps.rankfeat, needs='network'),
    'gram': Score(maps.fit_gram, maps.gram, needs='maps'),
    # distance.py
    'knn': Score(distance.fit_knn, distance.knn, needs='features'),
    'nnguide': Score(distance.fit_nnguide, distance.nnguide, needs='features'),
    'relation': Score(distance.fit_relation, distance.relation, needs='features'),
    'fdbd': Score(distance.fit_fdbd, distance.fdbd, needs='features'),
    'nci': Score(distance.fit_nci, distance.nci, needs='features'),
    'she': Score(distance.fit_she, distance.she, needs='features'),
    # votes.py
    'votes': Score(votes.fit_votes, votes.votes, needs='features'),
    # gaussian.py
    'mds': Score(gaussian.fit_mds, gaussian.mds, needs='features'),
    'rmds': Score(gaussian.fit_rmds, gaussian.rmds, needs='features'),
    'vim': Score(gaussian.fit_vim, gaussian.vim, needs='features'),
    'residual': Score(gaussian.fit_residual, gaussian.residual, needs='features'),
    # multilayer.py
    'mds_ensemble': Score(multilayer.fit_mds_ensemble, multilayer.mds_ensemble, needs='network'),
    'combood': Score(multilayer.fit_combood, multilayer.combood, needs='network'),
    # reconstruction.py
    'mse': Score(reconstruction.fit_mse, reconstruction.mse, needs='restored'),
    'lr': Score(reconstruction.fit_lr, reconstruction.lr, needs='restored'),
    'mfsim': Score(reconstruction.fit_mfsim, reconstruction.mfsim, needs='restored'),
    # weiper.py
    'weiper': Score(weiper.fit_weiper, weiper.weiper, needs='features'),
}
