"""A set of images that can be read in any order: in memory, or from files when it is too large."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from jaxood.data import decoding
from jaxood.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Lazy:
    """Images that are decoded when they are asked for.

    Attributes:
        decode: `decode(i) -> uint8[H, W, C]`, or a UserError that names the image.
        marks: what tells image i's contents from others', without reading it (path and bytes).
        rows: int64[N], the i of each row.
        image_shape: (H, W, C).
        on_error: 'stop' raises decode's error; 'skip' takes the next readable image of the class.
        look: how a file's pixels become the image's (size, interpolation ...), as text.
    """

    decode: Callable[[int], np.ndarray]
    marks: Sequence[str]
    rows: np.ndarray
    image_shape: tuple[int, int, int]
    on_error: str = 'stop'
    look: str = ''

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.rows), *self.image_shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """N images of one shape, with or without labels.

    Attributes:
        store: the images, uint8[N, H, W, C], or `Lazy`.
        labels: int32[N] in 0..K-1, always in memory; None if there are none.
        class_names: K names; empty without labels.
        names: of the files, for whoever wants to look at one; None if there are none.
    """

    store: np.ndarray | Lazy
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    names: Sequence[str] | None = None

    def __len__(self) -> int:
        return self.store.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)"""
        return self.store.shape[1:]

    @property
    def images(self) -> np.ndarray | None:
        """All images, uint8[N, H, W, C], if they are in memory."""
        return self.store if isinstance(self.store, np.ndarray) else None

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the contents, in hex; of lazily read images, of their paths, sizes
        and fitting."""
        sha = hashlib.sha256(repr((self.store.shape, self.class_names)).encode())
        if self.images is not None:
            sha.update(np.ascontiguousarray(self.images))
        else:
            sha.update(self.store.look.encode() + b'\n')
            for row in self.store.rows:
                sha.update(self.store.marks[row].encode() + b'\n')
        if self.labels is not None:
            sha.update(np.ascontiguousarray(self.labels))
        return sha.hexdigest()

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The images of some rows: int[n] -> uint8[n, H, W, C], on the host.

        Raises:
            UserError: a file that turns out unreadable now, under 'stop'.
        """
        if self.images is not None:
            return self.images[rows]
        out = np.empty((len(rows), *self.shape), np.uint8)
        for i, image in enumerate(decoding.each(self._decode, rows)):
            out[i] = image
        return out

    def subset(self, rows: np.ndarray) -> 'Examples':
        """Some rows as a set of their own; labels and class names stay as they are."""
        rows = np.asarray(rows, np.int64)
        if isinstance(self.store, Lazy):
            store = dataclasses.replace(self.store, rows=self.store.rows[rows])
        else:
            store = self.store[rows]
        return Examples(
            store,
            None if self.labels is None else self.labels[rows],
            self.class_names,
            None if self.names is None else tuple(self.names[row] for row in rows),
        )

    def of_classes(self, classes: Sequence[int]) -> 'Examples':
        """The examples of some classes, labelled 0..len(classes)-1 in that order."""
        position = np.full(len(self.class_names), -1, np.int32)
        position[list(classes)] = np.arange(len(classes))
        new = position[self.labels]
        rows = np.flatnonzero(new >= 0)
        return dataclasses.replace(
            self.subset(rows),
            labels=new[rows],
            class_names=tuple(self.class_names[c] for c in classes),
        )

    def _decode(self, row):
        image = decoding.attempt(self.store.decode, self.store.rows[row])
        if not isinstance(image, UserError):
            return image
        if self.store.on_error == 'stop':
            raise image
        for other in self._after(row):
            stand_in = decoding.attempt(self.store.decode, self.store.rows[other])
            if not isinstance(stand_in, UserError):
                decoding.log.warning('another image stands in: %s', image)
                return stand_in
        raise image

    def _after(self, row):
        """Rows that may stand in for one: of this set and its class, in order, from it on."""
        if self.labels is None:
            same = np.arange(len(self))
        else:
            same = np.flatnonzero(self.labels == self.labels[row])
        start = np.searchsorted(same, row)
        return np.concatenate([same[start + 1 :], same[:start]])
