"""Rows that are computed once and kept, for all who ask for them."""

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxood import artefacts, console
from jaxood.artefacts import Artefact, Store

Chunks = Callable[[int, int], Iterator[dict[str, np.ndarray]]]


def rows(
    store: Store, kind: str, key: str, count: int, chunks: Chunks, what: str, shard: int
) -> dict[str, np.ndarray]:
    """Arrays of `count` rows, as memory maps: computed unless they are there.

    Args:
        kind: what they are, such as 'latents'.
        key: fingerprint of all that they depend on.
        chunks, what, shard: see `fill`.
    """
    artefact = store.find(kind, key)
    if artefact.done is None:
        with artefacts.lock(artefact.folder):
            if artefact.done is None:
                facts = fill(artefact, count, chunks, what, shard)
                artefact.finish(rows=count, **facts)
    artefacts.remove(artefact.folder, 'shards')  # a kill may have left them
    return {name: artefacts.load_rows(artefact / f'{name}.npy') for name in artefact.done['arrays']}


def fill(artefact: Artefact, count: int, chunks: Chunks, what: str, shard: int) -> dict:
    """Computes rows 0..count-1 of some arrays, each into `<name>.npy`, and leaves `shards/`.

    An interrupted pass goes on with the next shard.

    Args:
        chunks: (start, stop) -> these rows, in order and a chunk at a time, by the arrays' names.
        what: for the progress line.
        shard: rows that are held at a time, and that a kill can cost.

    Returns:
        Facts: `arrays`, their names; `images_per_s` without the first chunks, which compile and
        fill the pipeline.
    """
    starts = range(0, count, shard)
    paths = [artefact / f'shards/{at:09d}.npz' for at in starts]
    progress = console.Progress(what, count)
    times, counts = [], []
    for at, path in zip(starts, paths):
        if artefacts.exists(path):
            continue
        parts, done, started = [], at, time.monotonic()
        for chunk in chunks(at, min(at + shard, count)):
            parts.append(chunk)
            times.append(time.monotonic() - started)
            counts.append(len(next(iter(chunk.values()))))
            done += counts[-1]
            progress.update(done, **_speed(times, counts))
            started = time.monotonic()
        artefacts.save(path, **{k: np.concatenate([p[k] for p in parts]) for k in parts[0]})
    names = list(artefacts.load(paths[0]))
    for name in names:
        artefacts.save_rows(
            artefact / f'{name}.npy', (artefacts.load(path, name)[name] for path in paths), count
        )
    progress.close(**_speed(times, counts))
    return {'arrays': names, **_speed(times, counts)}


def _speed(times: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
    steady = slice(2, None)
    if not times[steady]:
        return {}
    return {'images_per_s': round(sum(counts[steady]) / sum(times[steady]), 1)}
