"""Sources that fit into memory: scikit-learn's digits and photographs, and NPZ files."""

import os
import zipfile
import zlib

import numpy as np

from jaxood.data import decoding
from jaxood.data.examples import Examples
from jaxood.errors import UserError


def digits(*, size: int | None = None, channels: int | None = None) -> dict[str, Examples]:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey; they come with scikit-learn.

    Alpaydin & Kaynak 1998, UCI "Optical Recognition of Handwritten Digits", the test part. Levels
    0..16 become round(255 · level / 16).
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415 - takes a second

    decoding.check(size=size, channels=channels)
    scans = load_digits()
    images = np.round(scans.images * (255 / 16)).astype(np.uint8)[..., None]
    images = decoding.fit_all(images, size, channels)
    names = tuple(str(name) for name in scans.target_names)
    return {'all': Examples(images, scans.target.astype(np.int32), names)}


def photos(
    *, count: int = 1000, size: int = 32, channels: int | None = None
) -> dict[str, Examples]:
    """Square patches of scikit-learn's two photographs (a temple in China, a flower); no labels.

    A patch's side is log-uniform from `size` pixels to the whole height, its place uniform, its
    photograph each in turn; always the same patches. Our choice, for a far-OOD set that needs no
    download.
    """
    from PIL import Image  # noqa: PLC0415
    from sklearn.datasets import load_sample_images  # noqa: PLC0415

    decoding.check(size=size, channels=channels)
    if count < 1:
        raise UserError(f'count={count} must be at least 1.')
    pictures = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    whole = min(min(picture.size) for picture in pictures)
    if size > whole:
        raise UserError(f'size={size}: the photographs are {whole} pixels high, no more.')
    draws = np.random.Generator(np.random.PCG64(0)).random((count, 3))
    patches = []
    for i, (scale, across, down) in enumerate(draws):
        picture = pictures[i % len(pictures)]
        side = round(size * (whole / size) ** scale)
        left = round(across * (picture.width - side))
        top = round(down * (picture.height - side))
        patch = picture.crop((left, top, left + side, top + side))
        patches.append(decoding.fit(patch, size, channels))
    return {'all': Examples(np.stack(patches))}


def npz(
    *,
    path: str | None = None,
    train: str | None = None,
    test: str | None = None,
    root: str | None = None,
    size: int | None = None,
    resize: int | str | None = None,
    interpolation: str = 'bilinear',
    channels: int | None = None,
) -> dict[str, Examples]:
    """Arrays in one NPZ file (`path`), or in two (`train` and `test`).

    A file holds `images` uint8[N, H, W, C] or [N, H, W] with C = 1 or 3, and may hold `labels`
    int[N] and `class_names`, K strings (the labels' own numbers without). Nothing in it is
    unpickled.

    Raises:
        UserError: a file that is missing, damaged or holds anything else, with how to mend it.
    """
    look = dict(size=size, resize=resize, interpolation=interpolation, channels=channels)
    decoding.check(**look)
    if path is not None and train is None and test is None:
        paths = {'all': path}
    elif path is None and train is not None and test is not None:
        paths = {'train': train, 'test': test}
    else:
        raise UserError('name either one file, path=..., or two, train=... and test=...')
    files = {split: decoding.resolve(p, root) for split, p in paths.items()}
    arrays = {split: _arrays(file) for split, file in files.items()}

    labelled = {split: labels is not None for split, (_, labels, _) in arrays.items()}
    if len(set(labelled.values())) > 1:
        bare = next(split for split, has in labelled.items() if not has)
        raise UserError(f"{files[bare]} has no 'labels', the other file has. Add them there.")
    names = {split: names for split, (_, _, names) in arrays.items()}
    if len(set(names.values())) > 1:
        a, b = names.values()
        raise UserError(
            f"'class_names' differ: {files['train']} has {_short(a)}, {files['test']} {_short(b)}. "
            'Write the same ones, in the same order, into both.'
        )
    class_names = next(iter(names.values())) or ()
    if not class_names and all(labelled.values()):
        highest = max(labels.max() for _, labels, _ in arrays.values())
        class_names = tuple(str(k) for k in range(highest + 1))
    return {
        split: Examples(decoding.fit_all(images, **look), labels, class_names)
        for split, (images, labels, _) in arrays.items()
    }


def _arrays(file):
    """(images uint8[N, H, W, C], labels int32[N] or None, class names or None) of one NPZ file."""
    if not os.path.isfile(file):
        raise UserError(f'{file} is not there (or is no file). Check path, and data.root.')
    if not zipfile.is_zipfile(file):
        raise UserError(
            f'{file} is no NPZ file, is cut short, or may not be read. Write it again with '
            'np.savez.'
        )
    try:
        with np.load(file, allow_pickle=False) as archive:
            found = list(archive)
            if 'images' not in found:
                raise UserError(
                    f"{file} has no array 'images' (it has: {', '.join(found) or 'none'}). Write "
                    'it as np.savez(file, images=..., labels=..., class_names=...).'
                )
            wanted = ('images', 'labels', 'class_names')
            images, labels, names = (archive[k] if k in found else None for k in wanted)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as e:
        if 'allow_pickle' in str(e):
            raise UserError(
                f'{file} holds arrays of Python objects, which could run code when they are '
                "loaded, so they are not. Save plain arrays: images.astype('uint8'), "
                "labels.astype('int64'), np.array(class_names, dtype=str)."
            ) from e
        raise UserError(f'{file} is damaged: {e}. Write it again with np.savez.') from e
    return _checked_images(images, file), *_checked_labels(labels, names, len(images), file)


def _checked_images(images, file):
    if images.dtype != np.uint8:
        mend = 'levels 0..255: images.astype(np.uint8)'
        if images.dtype.kind == 'f':
            mend = 'np.round(images * 255).astype(np.uint8) if they lie in [0, 1]'
        raise UserError(f"{file}: 'images' are {images.dtype}, not uint8. Convert them, {mend}.")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape[1:]:
        hint = ''
        if images.ndim == 4 and images.shape[1] in (1, 3):
            hint = ' The channels seem to come first: images.transpose(0, 2, 3, 1).'
        raise UserError(
            f"{file}: 'images' has shape {images.shape}, not [N, H, W] or [N, H, W, C] with C = 1 "
            f'or 3.{hint}'
        )
    if len(images) == 0:
        raise UserError(f"{file}: 'images' is empty.")
    return images


def _checked_labels(labels, names, count, file):
    if labels is None:
        return None, None
    if labels.dtype.kind not in 'iu' or labels.shape != (count,):
        raise UserError(
            f"{file}: 'labels' is {labels.dtype} of shape {labels.shape}; {count} images need "
            f'whole numbers of shape ({count},).'
        )
    if names is not None:
        if names.dtype.kind != 'U' or names.ndim != 1 or len(set(names.tolist())) != len(names):
            raise UserError(
                f"{file}: 'class_names' must be different strings: np.array(['cat', ...])."
            )
        names = tuple(names.tolist())
    bad = np.flatnonzero((labels < 0) | (labels >= (len(names) if names else np.inf)))
    if bad.size:
        known = f'0..{len(names) - 1}, as there are {len(names)} class_names' if names else '0...'
        raise UserError(
            f'{file}: labels[{bad[0]}] = {labels[bad[0]]}, but labels count from {known} '
            f'({bad.size} such in all).'
        )
    return labels.astype(np.int32), names


def _short(names):
    return 'none' if names is None else f'{", ".join(names[:4])}{", ..." * (len(names) > 4)}'
