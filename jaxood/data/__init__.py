"""Images and what happens to them before the network: sources, roles, batches, augmentation.
And words: what captions say, and vocabularies (`wordnet`).

`SOURCES` maps a name to a function of keywords only. It returns `{'all': Examples}`, or
`{'train': Examples, 'test': Examples}` where the set comes with its own test images. All that read
pictures take `size` and `channels`; None leaves them as they are.
"""

from jaxood.data import folder, sources, tfds

SOURCES = {
    'digits': sources.digits,
    'photos': sources.photos,
    'npz': sources.npz,
    'folder': folder.folder,
    'tfds': tfds.tfds,
}
