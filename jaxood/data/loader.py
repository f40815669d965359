"""Which rows make a batch, and batches of images that do not fit into the device's memory."""

import functools
import sys
from collections.abc import Callable, Iterator

import numpy as np

from jaxood.data.examples import Examples
from jaxood.errors import UserError


def rows_of(n: int, *, size: int, batch_size: int, seed: int) -> np.ndarray:
    """The rows of training batch n: int64[batch_size], a pure function.

    An epoch is a permutation of all `size` rows, drawn from (seed, epoch), cut into full batches;
    the rest, fewer than a batch, waits for a later epoch.

    Raises:
        UserError: there are fewer rows than a batch takes.
    """
    if size < batch_size:
        raise UserError(
            f'batch_size={batch_size} is more than the {size} images there are. Set batch_size to '
            f'{size} or less.'
        )
    epoch, i = divmod(n, size // batch_size)
    return _permutation(size, seed, epoch)[i * batch_size : (i + 1) * batch_size]


@functools.lru_cache(maxsize=4)  # ID images and outliers take turns, and prefetching runs ahead
def _permutation(size, seed, epoch):
    rows = np.random.Generator(np.random.PCG64((seed, epoch))).permutation(size)
    rows.flags.writeable = False  # all who ask get this very array
    return rows


def stream(
    examples: Examples,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    own: slice = slice(None),
    prefetch: int = 4,
) -> Iterator[dict[str, np.ndarray]]:
    """Training batches n = start, start + 1, ..., of the rows that `rows_of` names, without end.

    For sets that stay in files, or are too large for the device. No more than `prefetch` batches
    are held ahead; any `start` is reached at once.

    Args:
        own: which rows of each batch are read, where several hosts share it.

    Yields:
        `image` uint8[B, H, W, C], `index` int32[B] (the row), and `label` int32[B] if there are
        labels.
    """
    pick = functools.partial(rows_of, size=len(examples), batch_size=batch_size, seed=seed)
    pick(start)  # too few examples are an error here, not in the first batch

    def batch(n):
        rows = pick(n)[own]
        labels = {} if examples.labels is None else {'label': examples.labels[rows]}
        return {'image': examples.take(rows), 'index': rows.astype(np.int32), **labels}

    return _read_ahead(batch, start, sys.maxsize, prefetch)


def chunks(
    examples: Examples, batch_size: int, *, prefetch: int = 4
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All images in order, in chunks of one size, for evaluation in constant memory.

    Yields:
        (images uint8[batch_size, H, W, C], rows int64[n]): the first n images are those rows, the
        others repeat the last one.
    """

    def chunk(i):
        rows = np.arange(i * batch_size, min((i + 1) * batch_size, len(examples)))
        images = examples.take(rows)
        return images[np.minimum(np.arange(batch_size), len(rows) - 1)], rows

    return _read_ahead(chunk, 0, -(-len(examples) // batch_size), prefetch)


def _read_ahead(function: Callable, start: int, stop: int, prefetch: int) -> Iterator:
    """function(start), function(start + 1), ... computed on threads, `prefetch` ahead at most."""
    import grain  # noqa: PLC0415 - heavy

    options = grain.ReadOptions(num_threads=min(prefetch, 2), prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.range(start, stop).map(function).to_iter_dataset(options))
