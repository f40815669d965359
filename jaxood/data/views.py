"""Random views of an image that leave its class alone: what self-supervised learning compares.

A view is `(images float32[B, H, W, C] in [0, 1], keys, **keywords) -> the same shape and range`,
pure; each row is changed by its own key alone. C may be anything: what is about colour leaves grey
images as they are. `VIEWS` is the table of contents.
"""

import inspect

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from jaxood.errors import UserError

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's grey


# ---- views ------------------------------------------------------------------------------------


def simclr(images, keys, *, scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), flip: bool = True):
    """Crop and resize, flip, jitter of colours with probability .8, grey with .2.

    Chen et al. 2020 (arXiv:2002.05709), App. A, with the strengths of SCAN's official code; its
    order of the jitter's parts is ours.

    Args:
        scale: range of the crop's share of the area; its aspect lies in [3/4, 4/3].
        jitter: of brightness, contrast, saturation, and hue (a share of the circle).
        flip: mirror half of the images left to right.
    """

    def view(x, key):
        crop, mirror, colour, whether, grey = jax.random.split(key, 5)
        x = _random_crop(x, crop, scale, jax.random.bernoulli(mirror) if flip else False)
        x = jnp.where(jax.random.bernoulli(whether, 0.8), _jitter(x, colour, jitter), x)
        return jnp.where(jax.random.bernoulli(grey, 0.2), _grey(x), x)

    return jax.vmap(view)(images, keys)


def strong(images, keys, *, operations: int = 4, cutout: int = 16, flip: bool = True):
    """Flip, some random operations of RandAugment at random strengths, one cut-out.

    Cubuk et al. 2019 (arXiv:1909.13719) as SCAN uses it (arXiv:2005.12320, App. B; official code):
    4 of 14 operations, each at a strength drawn anew; then a grey square of side 1..`cutout`, its
    centre anywhere.
    """

    def view(x, key):
        mirror, hole, *each = jax.random.split(key, 2 + operations)
        if flip:
            x = jnp.where(jax.random.bernoulli(mirror), x[:, ::-1], x)
        for operation in each:
            which, how = jax.random.split(operation)
            at = jax.random.randint(which, (), 0, len(OPERATIONS))
            x = jax.lax.switch(at, OPERATIONS, x, jax.random.uniform(how))
        return _cut_out(jnp.clip(x, 0.0, 1.0), hole, cutout)

    return jax.vmap(view)(images, keys)


def handwriting(
    images,
    keys,
    *,
    shift: float = 1.0,
    rotation: float = 15.0,
    stretch: float = 0.15,
    shear: float = 0.2,
    noise: float = 0.1,
):
    """A slight shift, turn, stretch and slant, and noise: what keeps a digit that digit.

    Our choice, for small grey scans; a mirrored 2 is no 2.

    Args:
        shift: pixels at most, along each axis.
        rotation: degrees at most.
        stretch: of each axis on its own, at most by this share.
        shear: pixels across for a pixel down, at most.
        noise: largest standard deviation of N(0, σ²), σ uniform, of levels in [0, 1].
    """

    def view(x, key):
        place, deviation, dots = jax.random.split(key, 3)
        move_y, move_x, turn, grow_y, grow_x, slant = jax.random.uniform(
            place, (6,), minval=-1.0, maxval=1.0
        )
        angle = jnp.deg2rad(rotation * turn)
        c, s = jnp.cos(angle), jnp.sin(angle)
        turned = jnp.array([[c, -s], [s, c]]) @ jnp.array([[1.0, 0.0], [shear * slant, 1.0]])
        grown = turned * jnp.exp(stretch * jnp.stack([grow_y, grow_x]))
        x = warp(x, grown, shift * jnp.stack([move_y, move_x]))
        sigma = jax.random.uniform(deviation, maxval=noise)
        return jnp.clip(x + sigma * jax.random.normal(dots, x.shape), 0.0, 1.0)

    return jax.vmap(view)(images, keys)


def weak(images, keys, *, pad: int = 4, flip: bool = True):
    """The CIFAR recipe: flip, then a window of the image padded with black."""

    def view(x, key):
        mirror, place = jax.random.split(key)
        if flip:
            x = jnp.where(jax.random.bernoulli(mirror), x[:, ::-1], x)
        padded = jnp.pad(x, ((pad, pad), (pad, pad), (0, 0)))
        top, left = jax.random.randint(place, (2,), 0, 2 * pad + 1)
        return jax.lax.dynamic_slice(padded, (top, left, 0), x.shape)

    return jax.vmap(view)(images, keys)


def plain(images, keys):
    """The image itself."""
    return images


VIEWS = {
    'simclr': simclr,
    'strong': strong,
    'handwriting': handwriting,
    'weak': weak,
    'plain': plain,
}


# ---- geometry ---------------------------------------------------------------------------------


def warp(x, matrix, shift, *, mode: str = 'constant'):
    """out(p) = x(M (p - c) + c + shift), bilinear; p = (row, column), c the image's centre.

    Args:
        x: float[H, W, C].
        matrix: M, float[2, 2]; the identity leaves the image as it is.
        shift: float[2], pixels.
        mode: of what lies outside: 'constant' is black, 'nearest' repeats the border.
    """
    size = jnp.array(x.shape[:2], jnp.float32)
    centre = (size - 1.0) / 2.0
    grid = jnp.stack(jnp.meshgrid(*(jnp.arange(n) for n in x.shape[:2]), indexing='ij'), axis=-1)
    at = (grid - centre) @ matrix.T + centre + shift
    places = (at[..., 0], at[..., 1])
    sample = lambda channel: map_coordinates(channel, places, order=1, mode=mode)
    return jax.vmap(sample, in_axes=-1, out_axes=-1)(x)


def _random_crop(x, key, scale, mirrored):
    """A window of a random share of the area and aspect, stretched to the whole image."""
    area, aspect, place = jax.random.split(key, 3)
    share = jax.random.uniform(area, minval=scale[0], maxval=scale[1])
    ratio = jnp.exp(jax.random.uniform(aspect, minval=-1.0, maxval=1.0) * jnp.log(4.0 / 3.0))
    sides = jnp.minimum(jnp.sqrt(share * jnp.stack([1.0 / ratio, ratio])), 1.0)
    room = (1.0 - sides) * jnp.array(x.shape[:2], jnp.float32) / 2.0
    shift = jax.random.uniform(place, (2,), minval=-1.0, maxval=1.0) * room
    signs = jnp.stack([1.0, jnp.where(mirrored, -1.0, 1.0)])
    return warp(x, jnp.diag(sides * signs), shift, mode='nearest')


def _cut_out(x, key, largest):
    """A square of side 1..largest becomes grey; what of it lies outside is lost."""
    side_key, place = jax.random.split(key)
    side = jax.random.randint(side_key, (), 1, largest + 1)
    height, width = x.shape[:2]
    centre_y, centre_x = (jax.random.uniform(place, (2,)) * jnp.array([height, width])).astype(int)
    inside = lambda n, centre: (
        (jnp.arange(n) >= centre - side // 2) & (jnp.arange(n) < centre - side // 2 + side)
    )
    hole = inside(height, centre_y)[:, None] & inside(width, centre_x)
    return jnp.where(hole[..., None], 0.5, x)


# ---- colours ----------------------------------------------------------------------------------


def _luma(x):
    """float[H, W, 1]"""
    return jnp.dot(x, jnp.array(LUMA))[..., None] if x.shape[-1] == 3 else x


def _grey(x):
    return jnp.broadcast_to(_luma(x), x.shape)


def _blend(x, other, amount):
    """1 is x, 0 the other image; beyond 1 away from it."""
    return jnp.clip(other + amount * (x - other), 0.0, 1.0)


def _jitter(x, key, strengths):
    keys = jax.random.split(key, 4)
    brightness, contrast, saturation, hue = (
        jax.random.uniform(k, minval=-s, maxval=s) for k, s in zip(keys, strengths)
    )
    x = _blend(x, 0.0, 1.0 + brightness)
    x = _blend(x, jnp.mean(_luma(x)), 1.0 + contrast)
    if x.shape[-1] != 3:
        return x
    return jnp.clip(_turn_hue(_blend(x, _grey(x), 1.0 + saturation), hue), 0.0, 1.0)


def _turn_hue(x, share):
    """Turns colours around the grey axis by a share of the circle (in YIQ, our choice)."""
    to = jnp.array([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
    angle = 2.0 * jnp.pi * share
    c, s = jnp.cos(angle), jnp.sin(angle)
    turn = jnp.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])
    return x @ (jnp.linalg.inv(to) @ turn @ to).T


# ---- the operations of `strong`: (x, strength in [0, 1]) -> x -----------------------------------


def _between(low, high):
    """An operation that takes its strength from a range."""
    return lambda operation: lambda x, u: operation(x, low + u * (high - low))


def _auto_contrast(x, u):
    low, high = (f(x, axis=(0, 1), keepdims=True) for f in (jnp.min, jnp.max))
    return jnp.where(high > low, (x - low) / jnp.maximum(high - low, 1e-6), x)


def _equalize(x, u):
    """Levels by their rank: every channel's histogram becomes flat."""
    flat = x.reshape(-1, x.shape[-1])
    rank = jax.vmap(lambda c: jnp.searchsorted(jnp.sort(c), c, side='right'), -1, -1)(flat)
    return (rank.astype(jnp.float32) / len(flat)).reshape(x.shape)


def _sharpness(x, amount):
    kernel = jnp.array([[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]]) / 13.0  # Pillow's
    smooth = lambda c: jax.scipy.signal.convolve2d(jnp.pad(c, 1, 'edge'), kernel, 'valid')
    return _blend(x, jax.vmap(smooth, -1, -1)(x), amount)


def _rotate(x, degrees):
    c, s = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
    return warp(x, jnp.array([[c, -s], [s, c]]), jnp.zeros(2))


def _moved(axis):
    return lambda x, share: warp(
        x, jnp.eye(2), jnp.zeros(2).at[axis].set(share * x.shape[axis]).astype(jnp.float32)
    )


def _sheared(row, column):
    return lambda x, amount: warp(x, jnp.eye(2).at[row, column].set(amount), jnp.zeros(2))


def _posterize(x, bits):
    levels = 2.0 ** jnp.floor(bits)
    return jnp.floor(x * 255.0 / (256.0 / levels)) * (256.0 / levels) / 255.0


OPERATIONS = (
    lambda x, u: x,
    _auto_contrast,
    _equalize,
    _between(-30.0, 30.0)(_rotate),
    _between(0.0, 1.0)(lambda x, level: jnp.where(x < level, x, 1.0 - x)),  # solarize
    _between(0.05, 0.95)(lambda x, amount: _blend(x, _grey(x), amount)),  # colour
    _between(0.05, 0.95)(lambda x, amount: _blend(x, jnp.mean(_luma(x)), amount)),  # contrast
    _between(0.05, 0.95)(lambda x, amount: _blend(x, 0.0, amount)),  # brightness
    _between(0.05, 0.95)(_sharpness),
    _between(-0.1, 0.1)(_sheared(0, 1)),
    _between(-0.1, 0.1)(_sheared(1, 0)),
    _between(-0.1, 0.1)(_moved(0)),
    _between(-0.1, 0.1)(_moved(1)),
    _between(4.0, 8.0)(_posterize),
)


def check(name: str, size: int, **keywords) -> None:
    """Raises UserError for keywords that a view of `size` pixels cannot have."""
    parameters = inspect.signature(VIEWS[name]).parameters.items()
    settings = {k: p.default for k, p in parameters if p.default is not p.empty} | keywords
    for key, value in settings.items():
        values = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(v, bool) or v >= 0 for v in values):
            raise UserError(f'{key}={value} of the view {name!r} must not be negative.')
    low, high = settings.get('scale', (1.0, 1.0))
    if not 0.0 < low <= high <= 1.0:
        raise UserError(f'scale={low, high} must be shares of the area, as (0.2, 1.0).')
    cutout = settings.get('cutout', 1)
    if not 1 <= cutout <= size:
        raise UserError(f'cutout={cutout} must be from 1 to {size}, the size of the images.')
