"""From a picture to uint8[H, W, C]: the one resize of the library, and reading many at a time."""

import concurrent.futures
import functools
import itertools
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from jaxood.errors import UserError, unknown

ON_ERROR = ('stop', 'skip')  # what to do with an image that cannot be read

STRETCH = 'stretch'  # a resize that keeps the whole picture and not its aspect ratio

INTERPOLATIONS = ('bilinear', 'bicubic')

_MODES = {1: 'L', 3: 'RGB'}
_GREY = ('1', 'L', 'LA', 'La')
_COLOUR = ('P', 'PA', 'RGB', 'RGBA', 'RGBa', 'RGBX', 'CMYK', 'YCbCr', 'LAB', 'HSV')

log = logging.getLogger(__name__)


def check(
    *,
    size: int | None,
    channels: int | None,
    resize: int | str | None = None,
    interpolation: str = 'bilinear',
    on_error: str = 'stop',
) -> None:
    """Raises UserError unless the keywords that all sources share are such as they can take."""
    if size is not None and (not isinstance(size, int) or size < 1):
        raise UserError(f'size={size!r} must be a whole number of pixels, or None for no resizing.')
    stretched = resize == STRETCH and size is not None
    whole = isinstance(resize, int) and size is not None and resize >= size
    if resize is not None and not stretched and not whole:
        raise UserError(
            f'resize={resize!r} must be a whole number of at least size={size}: the short side is '
            'brought to it, then size pixels are cut out. Leave it unset for size itself, or set '
            f'it to {STRETCH!r} and set size, for the whole picture at any aspect ratio.'
        )
    if interpolation not in INTERPOLATIONS:
        raise UserError(unknown(f'interpolation={interpolation!r}', interpolation, INTERPOLATIONS))
    if channels not in (None, *_MODES):
        raise UserError(f'channels={channels!r} must be 1 (grey), 3 (RGB), or None (as it is).')
    if on_error not in ON_ERROR:
        raise UserError(unknown(f'on_error={on_error!r}', on_error, ON_ERROR))


def resolve(path: str, root: str | None) -> str:
    """A path of the config: `~` expanded, and relative to `root` if it is not absolute."""
    return os.path.join(os.path.expanduser(root or ''), os.path.expanduser(path))


def fit(
    image,
    size: int | None,
    channels: int | None,
    *,
    resize: int | str | None = None,
    interpolation: str = 'bilinear',
) -> np.ndarray:
    """A Pillow image as uint8[H, W, C], brought to `size` x `size` pixels and `channels`.

    The short side to `resize` (None: to `size`), antialiased, then the middle `size` x `size`. That
    is `Resize(resize)` and `CenterCrop(size)` of torchvision, with which the literature makes its
    OOD test sets; `resize='stretch'` is the whole picture, each side brought to `size`. Grey is
    ITU-R 601 luma; transparency is dropped.

    Raises:
        UserError: 16-bit and float images, which have no agreed range.
    """
    from PIL import Image  # noqa: PLC0415 - only where pictures are read

    found = channels_of(image)
    mode = _MODES[channels or found]
    if image.mode != mode:
        with warnings.catch_warnings():  # Pillow would rather keep a palette's transparency
            warnings.simplefilter('ignore', UserWarning)
            image = image.convert(mode)
    if size is not None and not _fits(image.size, size, resize):
        short = min(image.size)
        width, height = (size, size)
        if resize != STRETCH:
            width, height = ((resize or size) * side // short for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.resize((width, height), Image.Resampling[interpolation.upper()])
        image = image.crop((left, top, left + size, top + size))
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def _fits(shape, size, resize):
    """Whether an image of this height and width is left as it is."""
    return size is None or (shape[0] == shape[1] == size and resize in (None, size, STRETCH))


def fit_all(
    images: np.ndarray,
    size: int | None,
    channels: int | None,
    *,
    resize: int | str | None = None,
    interpolation: str = 'bilinear',
) -> np.ndarray:
    """`fit` for each row of uint8[N, H, W, C], C = 1 or 3."""
    from PIL import Image  # noqa: PLC0415

    height, width, found = images.shape[1:]
    if _fits((height, width), size, resize) and channels in (None, found):
        return images
    pixels = images[..., 0] if found == 1 else images
    shape = (size or height, size or width, channels or found)
    how = dict(resize=resize, interpolation=interpolation)
    row = lambda i: fit(Image.fromarray(pixels[i]), size, channels, **how)
    fitted = each(row, range(len(images)))
    return stack(enumerate(fitted), len(images), shape)[1]


def channels_of(image) -> int:
    """1 or 3, what a Pillow image has when it is left as it is (its pixels need not be loaded).

    Raises:
        UserError: 16-bit and float images.
    """
    if image.mode in _GREY:
        return 1
    if image.mode in _COLOUR:
        return 3
    raise UserError(
        f'its pixels are of Pillow mode {image.mode!r}; only 8-bit grey and colour images have an '
        'agreed range. Convert it to 8 bits'
    )


def read(path: str, use: Callable):
    """`use(image)` of the picture in a file.

    Raises:
        UserError: that names the file, whatever is wrong with it.
    """
    from PIL import Image  # noqa: PLC0415

    try:
        with Image.open(path) as image:
            return use(image)
    except Exception as e:  # Pillow's decoders raise all kinds for files that are cut short
        reason = 'it is not a picture, or cut short' if 'cannot identify' in str(e) else str(e)
        raise UserError(
            f'{path} cannot be read: {reason.rstrip(".")}. Replace or remove it, or set '
            "on_error='skip' to leave such images out."
        ) from e


def each(function: Callable, items: Iterable) -> Iterator:
    """`map` on several threads, in order, a thousand items ahead at the most."""
    items = iter(items)
    while block := tuple(itertools.islice(items, 1024)):
        yield from _threads().map(function, block)


def readable(
    function: Callable[[int], Any], rows: Iterable[int], on_error: str
) -> Iterator[tuple[int, Any]]:
    """(row, function(row)) for each row, on several threads; under 'skip' without the unreadable.

    Raises:
        UserError: the first that the function raises, under 'stop'.
    """
    for row, result in each(lambda row: (row, attempt(function, row)), rows):
        if not isinstance(result, UserError):
            yield row, result
        elif on_error == 'stop':
            raise result
        else:
            log.warning('left out: %s', result)


def stack(
    keyed: Iterable[tuple[Any, np.ndarray]], limit: int, shape: tuple[int, int, int]
) -> tuple[list, np.ndarray]:
    """(keys, images uint8[n, H, W, C]) of n <= limit pairs (key, image), held in memory once."""
    keys, images = [], np.empty((limit, *shape), np.uint8)
    for key, image in keyed:
        images[len(keys)] = image
        keys.append(key)
    return keys, images[: len(keys)]


def attempt(function: Callable, row: int):
    """function(row), or the UserError that it raised."""
    try:
        return function(row)
    except UserError as e:
        return e


@functools.cache
def _threads():
    # Pillow lets other threads run while it decodes; more than the cores hide a slow disk.
    return concurrent.futures.ThreadPoolExecutor(
        min(32, 4 * (os.cpu_count() or 1)), thread_name_prefix='jaxood-images'
    )
