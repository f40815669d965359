"""The leak filter: candidates that are really ID images in disguise don't become outliers.

A generator that learned the ID images often renders one when asked for something between two
classes. A detector that must be unsure about such an image unlearns its class. Judges, a small
ensemble trained on the ID images alone, tell: what they are as sure of as of ID images they have
never seen is rejected. Of images that were painted from words, CLIP tells without any training
whether they show the word, or an ID class. (Our choice; off in variants that reproduce a paper.)
"""

import jax
import jax.numpy as jnp
import numpy as np


def uncertainty(logits):
    """u(x) = -log max_c mean_j softmax(z_j(x))_c in [0, log C]; small where the judges are sure.

    logits float32[J, B, C] of J judges -> float32[B].
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    mean = jax.nn.logsumexp(log_p, axis=0) - jnp.log(logits.shape[0])
    return -jnp.max(mean, axis=-1)


def threshold(id_uncertainty: np.ndarray, *, quantile: float) -> float:
    """Candidates above this are kept: less sure than on all but a share `quantile` of ID images.

    Args:
        id_uncertainty: of ID validation images, which the judges were not trained on.
        quantile: in (0, 1). At 0.1 the judges must be less sure of a candidate than of 90 % of
            ID images; 1 rejects nothing but the images they are surest of.
    """
    return float(np.quantile(id_uncertainty.astype(np.float64), 1.0 - quantile))


def margin(images: np.ndarray, words: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """cos(E'(x), T(prompt(w))) - max_y cos(E'(x), T(prompt(y))), float32[B]: above 0, CLIP would
    rather say that the image shows its word than any ID class.

    Args:
        images: float32[B, D], CLIP's embeddings of length 1.
        words: float32[B, D], of each image's prompt.
        classes: float32[C, D], of the class names' prompts.
    """
    return np.sum(images * words, axis=1) - np.max(images @ classes.T, axis=1)


FILTERS = ('none', 'judges', 'clip')
