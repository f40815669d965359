"""A folder of image files: the class is the sub-folder."""

import functools
import os
from typing import NamedTuple

import numpy as np

from jaxood.data import decoding
from jaxood.data.examples import Examples, Lazy
from jaxood.errors import UserError, unknown

# What Pillow reads of what people keep pictures in.
ENDINGS = (
    *('.png', '.jpg', '.jpeg', '.jpe', '.jfif', '.webp', '.bmp', '.gif', '.tif', '.tiff'),
    *('.ppm', '.pgm', '.pbm', '.pnm'),
)


class _Files(NamedTuple):
    """The image files of one split; `names` are relative to `top`."""

    top: str
    names: tuple[str, ...]
    labels: np.ndarray | None
    class_names: tuple[str, ...]

    def path(self, row):
        return os.path.join(self.top, self.names[row])

    def keep(self, rows):
        if not rows:
            raise UserError(f'{self.top}: none of its {len(self.names)} images can be read.')
        names = tuple(self.names[row] for row in rows)
        labels = None if self.labels is None else self.labels[rows]
        return self._replace(names=names, labels=labels)


def folder(
    *,
    path: str,
    root: str | None = None,
    size: int | None = None,
    resize: int | str | None = None,
    interpolation: str = 'bilinear',
    channels: int | None = None,
    on_error: str = 'stop',
    memory_limit: int = 2 * 2**30,
) -> dict[str, Examples]:
    """Image files below a folder, in the order of their sorted paths.

    `path` holds `train/` and `test/` (or `val/`), which are the splits, or is all there is. Each
    holds images (no labels), or a sub-folder for each class with the images at any depth. Hidden
    files, and files whose ending is not a picture's, are passed over.

    Args:
        on_error: 'stop' at an image that cannot be read, or 'skip' it with a warning.
        memory_limit: bytes that the decoded images may take; a larger set is read as it is needed.
            Then only headers are read here. When an image turns out to be cut short as its turn
            comes, the run stops, or another of its class stands in for it.

    Raises:
        UserError: no such folder, no images, an unreadable one, shapes that differ while `size` or
            `channels` does not make them agree; with the file's name and how to mend it.
    """
    look = dict(size=size, resize=resize, interpolation=interpolation, channels=channels)
    decoding.check(**look, on_error=on_error)
    splits = _splits(decoding.resolve(path, root))
    shapes = {}
    for split, files in splits.items():
        headers = dict(decoding.readable(_header(files), range(len(files.names)), on_error))
        splits[split] = files.keep(list(headers))
        shapes |= {files.path(row): shape for row, shape in headers.items()}
    shape = _common_shape(shapes, size, channels)
    lazy = len(shapes) * int(np.prod(shape)) > memory_limit

    examples = {}
    for split, files in splits.items():
        decode = _decode(files, look)
        if lazy:
            marks = tuple(
                f'{n} {os.path.getsize(files.path(i))}' for i, n in enumerate(files.names)
            )
            rows = np.arange(len(marks))
            store = Lazy(decode, marks, rows, shape, on_error, repr(look))
        else:
            decoded = decoding.readable(decode, range(len(files.names)), on_error)
            rows, store = decoding.stack(decoded, len(files.names), shape)
            files = files.keep(rows)
        examples[split] = Examples(store, files.labels, files.class_names, files.names)
    return examples


def _header(files):
    """row -> (H, W, C) of the file, without reading its pixels."""

    def shape(image):
        return image.height, image.width, decoding.channels_of(image)

    return lambda row: decoding.read(files.path(row), shape)


def _decode(files, look):
    """row -> uint8[H, W, C]"""
    pixels = functools.partial(decoding.fit, **look)
    return lambda row: decoding.read(files.path(row), pixels)


def _splits(top):
    """'train' and 'test', or 'all': `_Files`. ImageNet's `val` tests where there is no `test`."""
    named = [name for name in ('train', 'test') if os.path.isdir(os.path.join(top, name))]
    if named == ['train'] and os.path.isdir(os.path.join(top, 'val')):
        named.append('val')
    if len(named) == 2:
        train = _list(os.path.join(top, 'train'))
        return {'train': train, 'test': _list(os.path.join(top, named[1]), like=train)}
    for name in named:  # a class may have such a name, but has no folders of images in it
        if _scan(os.path.join(top, name))[0]:
            other = 'test' if name == 'train' else 'train'
            raise UserError(
                f'{top} has {name}/ with folders in it, but no {other}/ beside it. Add that one, '
                f'or let path name {os.path.join(top, name)} itself.'
            )
    return {'all': _list(top)}


def _list(top, like=None):
    """`_Files` of one folder. With `like`, classes are numbered as there, and no others allowed."""
    folders, pictures = _scan(top)
    by_class = {name: _pictures_below(top, name) for name in folders}
    full = [name for name in folders if by_class[name]]
    if pictures and full:
        raise UserError(
            f'{top} holds images ({pictures[0]}) beside folders of images ({full[0]}/). Sort all '
            'into folders, one for each class, or keep all in one place.'
        )
    if not pictures and not full:
        raise UserError(
            f'{top} holds no images. It should hold image files ({", ".join(ENDINGS[:6])}, ...), '
            'or a folder of them for each class.'
        )
    if like is not None and (like.labels is None) != bool(pictures):
        raise UserError(f'{top} and {like.top}: one is sorted into class folders, the other not.')
    if pictures:
        return _Files(top, tuple(pictures), None, ())
    for name in folders:
        if not by_class[name]:
            raise UserError(f'{os.path.join(top, name)} holds no images. Fill or remove it.')
        if like is not None and name not in like.class_names:
            where = f'{os.path.join(top, name)}: the class {name!r}'
            raise UserError(unknown(where, name, like.class_names))
    classes = tuple(folders) if like is None else like.class_names
    names = tuple(file for name in folders for file in by_class[name])
    labels = [classes.index(name) for name in folders for _ in by_class[name]]
    return _Files(top, names, np.array(labels, np.int32), classes)


def _scan(top):
    """(names of sub-folders, names of pictures) in a folder, both sorted."""
    try:
        with os.scandir(top) as entries:
            entries = sorted((e for e in entries if e.name[0] != '.'), key=lambda e: e.name)
    except OSError as e:
        raise UserError(
            f'{top} cannot be listed: {e.strerror}. Check path (and data.root): it must be a '
            'folder, and one that you may read.'
        ) from e
    folders = [e.name for e in entries if e.is_dir()]
    pictures = [e.name for e in entries if e.name.lower().endswith(ENDINGS) and not e.is_dir()]
    return folders, pictures


def _pictures_below(top, name):
    """Paths, relative to `top`, of the pictures at any depth below one of its folders."""
    folders, pictures = _scan(os.path.join(top, name))
    paths = [os.path.join(name, picture) for picture in pictures]
    for folder in folders:
        paths += _pictures_below(top, os.path.join(name, folder))
    return sorted(paths)


def _common_shape(shapes, size, channels):
    """(H, W, C) of all images once they are fitted; `shapes` is path -> (H, W, C) before that."""

    def fitted(shape):
        return tuple(new or old for new, old in zip((size, size, channels), shape))

    first, *others = shapes
    wanted = fitted(shapes[first])
    for other in others:
        shape = fitted(shapes[other])
        if shape != wanted:
            mend = ['size (such as size=32)'] if shape[:2] != wanted[:2] else []
            mend += ['channels (1 or 3)'] if shape[2] != wanted[2] else []
            raise UserError(
                f'the images differ in shape: {first} is {_words(shapes[first])}, {other} is '
                f'{_words(shapes[other])}. Set {" and ".join(mend)} to bring them to one.'
            )
    return wanted


def _words(shape):
    return f'{shape[1]} x {shape[0]} pixels in {"colour" if shape[2] == 3 else "grey"}'
