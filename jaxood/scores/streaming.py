"""Passes over a bank in constant memory: its arrays may be memory maps of any length."""

from collections.abc import Iterator

import numpy as np

ROWS = 4096


def chunks(*arrays: np.ndarray, rows: int = ROWS) -> Iterator[tuple[np.ndarray, ...]]:
    """The same `rows` rows of each array at a time, in order, in memory; fewer at the end."""
    for at in range(0, len(arrays[0]), rows):
        yield tuple(np.asarray(a[at : at + rows]) for a in arrays)


def quantile(array: np.ndarray, q: float) -> float:
    """`np.quantile(array, q)` over all entries of a float32 array, exact, in constant memory.

    Values are counted by the upper half of their bits (as integers that sort like the values), then
    by the lower half within the bucket that holds the wanted order statistic.

    Args:
        q: in [0, 1]; linear interpolation between order statistics, NumPy's default.
    """
    place = q * (array.size - 1)
    low = int(place)
    a = _order_statistic(array, low)
    b = a if low == place else _order_statistic(array, low + 1)
    return a + (b - a) * (place - low)


def _order_statistic(array, k):
    """The k-th smallest entry, from 0."""
    upper, k = _bucket((_bits(part) >> 16 for (part,) in chunks(array)), k)
    bits = (_bits(part) for (part,) in chunks(array))
    lower, _ = _bucket((b[b >> 16 == upper] & 0xFFFF for b in bits), k)
    bits = np.uint32(upper << 16 | lower)
    return float((bits & np.uint32(2**31 - 1) if bits >> 31 else ~bits).view(np.float32))


def _bucket(parts, k):
    """Which of 2**16 values the k-th smallest has, and how many of its like come before it."""
    counts = sum(np.bincount(part, minlength=2**16) for part in parts)
    ends = np.cumsum(counts)
    bucket = int(np.searchsorted(ends, k, side='right'))
    return bucket, k - int(ends[bucket] - counts[bucket])


def _bits(part):
    """float32 -> uint32 in the same order: flips all bits of negatives, the sign of others."""
    bits = np.ascontiguousarray(part, np.float32).ravel().view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(2**31))
