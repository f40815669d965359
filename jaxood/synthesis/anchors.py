"""Words near the ID classes, and of these the ones near ID images: DOG's anchors.

DOG (ICLR 2024 submission, OpenReview Go8hf9wKJx), Sec. 3. Embeddings are CLIP's, projected and of
unit length, so that a product is a cosine.
"""

from collections.abc import Iterator

import numpy as np

BLOCK = 64  # classes whose similarities to the whole vocabulary are held at a time
LIMIT = 2**24  # numbers of the table of words x images that is held at a time


def similarities(classes: np.ndarray, words: np.ndarray) -> Iterator[np.ndarray]:
    """cos(T(prompt(s_y)), T(prompt(w))) of every word, float32[W], class after class.

    Args:
        classes: float32[C, D], the prompts of the classes.
        words: float32[W, D], those of the vocabulary, perhaps a memory map.
    """
    for at in range(0, len(classes), BLOCK):
        yield from classes[at : at + BLOCK] @ words.T


def candidates(similarity: np.ndarray, allowed: np.ndarray, k: int) -> np.ndarray:
    """C_y = TopK of the allowed words by similarity, best first: int[min(k, allowed)].

    Of equally similar words the first comes first: in an alphabetical vocabulary, by the alphabet.

    Args:
        similarity: float32[W], of one class.
        allowed: bool[W].
    """
    places = np.flatnonzero(allowed)
    return places[np.argsort(-similarity[places], kind='stable')[:k]]


def near(cosine: np.ndarray) -> np.ndarray:
    """d_c(x) = 1 - cos: an anchor is close to some images of a class. Our reading, the default."""
    return 1.0 - cosine


def literal(cosine: np.ndarray) -> np.ndarray:
    """The similarity itself, as the formula is printed: only words that describe every image go."""
    return cosine


RULES = {'near': near, 'literal': literal}


def values(
    words: np.ndarray, images: np.ndarray, labels: np.ndarray, *, eta: float, rule: str
) -> np.ndarray:
    """v(c) = min_y percentile_η {d_c(x) : x in D_y}, float32[n].

    The paper prints min over (x, y) of a percentile over the same pairs, whose set is empty; this
    is the reading that isn't (`RULES`). The percentile is exact, interpolated between the two
    nearest; it is η = 0.05 in the paper, and the minimum for η = 0. Memory is bounded by `LIMIT`
    and the embeddings of one class.

    Args:
        words: float32[n, D], of the candidates.
        images: float32[N, D], of the ID images, perhaps a memory map.
        labels: int[N].
        eta: in 0..1.
        rule: a key of `RULES`.
    """
    best = np.full(len(words), np.inf, np.float32)
    for label in np.unique(labels):
        own = np.asarray(images[labels == label])
        step = max(1, LIMIT // len(own))
        for at in range(0, len(words), step):
            part = slice(at, at + step)
            distance = RULES[rule](words[part] @ own.T)
            best[part] = np.minimum(best[part], np.quantile(distance, eta, axis=1))
    return best


def threshold(found: np.ndarray, *, keep: float) -> float:
    """λ such that the share `keep` of the values, and one at least, is not above it.

    The paper does not say what λ is. Our choice: by the candidates' own values.
    """
    return float(np.sort(found)[max(int(np.ceil(keep * len(found))), 1) - 1])
