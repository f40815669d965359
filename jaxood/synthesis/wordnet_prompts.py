"""DOG: images of words that lie near the ID classes."""

import numpy as np

from jaxood.errors import UserError


def build(painter):
    """Candidate i shows a word near class i mod C', the next one of its words each time.

    DOG (ICLR 2024 submission, OpenReview Go8hf9wKJx), Sec. 3: M images an ID class, spread in turn
    over the anchors of that class, C_y ∩ C_λ; each from noise of its own towards prompt(word).
    C' are the classes that have anchors. With `tokens.name='none'`, whose candidates are near the
    class *names*, this is the paper's strategy (e).

    Args:
        painter: `synthesis.painter.Painter`; `shared['contexts']` are the words' prompts.

    Returns:
        rows, which find `arrange`'s result as `shared['anchors']`; beside `image` they give
        `class`, `word` (the prompt's number), `similarity` and `seed` (i, what the noise is of).
    """

    def rows(shared, index, key):
        anchors = shared['anchors']
        which = index % len(anchors['class'])
        slot = (index // len(anchors['class'])) % anchors['count'][which]
        word = anchors['word'][which, slot]
        latents = painter.noise(key, index)
        image = painter.paint(shared, latents, shared['contexts'][word], key, index)
        return {
            'image': image,
            'class': anchors['class'][which],
            'word': word,
            'similarity': anchors['similarity'][which, slot],
            'seed': index,
        }

    return rows


def arrange(anchors) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Anchors as the arrays that `rows` read, and the words they number.

    Args:
        anchors: for each class its (word, similarity) pairs, in the order in which they take turns.

    Returns:
        (`class` int32[C'] of the classes with anchors, `count` int32[C'], `word` int32[C', N],
        `similarity` float32[C', N], padded with what no slot reaches), and every word once.

    Raises:
        UserError: no class has an anchor.
    """
    classes = [y for y, pairs in enumerate(anchors) if pairs]
    if not classes:
        raise UserError('no class has an anchor, so there is no word to paint.')
    words = tuple(dict.fromkeys(word for pairs in anchors for word, _ in pairs))
    number = {word: k for k, word in enumerate(words)}
    shape = (len(classes), max(len(anchors[y]) for y in classes))
    word, similarity = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for row, y in enumerate(classes):
        for slot, (name, value) in enumerate(anchors[y]):
            word[row, slot], similarity[row, slot] = number[name], value
    arrays = {
        'class': np.array(classes, np.int32),
        'count': np.array([len(anchors[y]) for y in classes], np.int32),
        'word': word,
        'similarity': similarity,
    }
    return arrays, words
