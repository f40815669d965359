"""Images from a folder of JPEGs, at once or streamed, and from an .npz, beside PyTorch's loader."""

import itertools
import pathlib
import tempfile

import numpy as np
from PIL import Image

from jaxood import data as sources
from jaxood import machine
from jaxood.bench import measure
from jaxood.data import folder, loader

SIDE, SIZE, BATCH = 256, 224, 64  # of the files, of the images, of a streamed batch


def rows(flags):
    count, rng = flags.images, np.random.default_rng(0)
    batch = min(flags.batch or BATCH, count)
    with tempfile.TemporaryDirectory() as place:
        top = pathlib.Path(place)
        (top / 'files').mkdir()
        smooth = rng.integers(0, 256, (16, 8, 8, 3), np.uint8)  # compresses as a photograph does
        for i in range(count):
            image = Image.fromarray(smooth[i % 16]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            image.save(top / f'files/{i:06d}.jpg', quality=90)
        small = rng.integers(0, 256, (10 * count, 32, 32, 3), np.uint8)
        np.savez(top / 'small.npz', images=small, labels=np.zeros(len(small), np.int32))
        peers = {'at once': None, 'streamed': None}
        if measure.has('torch'):
            peers = {'at once': _torch(top, False, batch), 'streamed': _torch(top, True, batch)}

        def at_once():
            return folder.folder(path=str(top / 'files'), size=SIZE)['all'].images

        lazy = folder.folder(path=str(top / 'files'), size=SIZE, memory_limit=0)['all']
        number = count // batch

        def streamed():
            batches = loader.stream(lazy, batch_size=batch, seed=0)
            return sum(len(found['image']) for found in itertools.islice(batches, number))

        of = f'JPEG {SIDE} to {SIZE}'
        peer = f'PyTorch DataLoader, {machine.cores()} processes'
        yield measure.speed(
            f'folder, {of}, in memory', count, at_once, peers['at once'], flags.rounds, peer=peer
        )
        yield measure.speed(
            *(f'folder, {of}, streamed', number * batch, streamed, peers['streamed']),
            flags.rounds,
            peer=f'{peer}, shuffled',
        )
        read = lambda: sources.SOURCES['npz'](path=str(top / 'small.npz'))
        yield measure.speed('.npz of 32 x 32', len(small), read, None, flags.rounds)


class Files:
    """Image files, as PyTorch's loader takes them."""

    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        with Image.open(self.files[i]) as image:
            image = image.convert('RGB').resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            return np.asarray(image).copy()


def _torch(top, shuffle, batch):
    """() -> all images in batches, from processes that stay."""
    import torch

    loader = torch.utils.data.DataLoader(
        Files(sorted((top / 'files').iterdir())),
        batch,
        shuffle=shuffle,
        num_workers=machine.cores(),
        drop_last=shuffle,
        multiprocessing_context='spawn',
        persistent_workers=True,
    )
    return lambda: sum(len(found) for found in loader)
