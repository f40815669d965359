"""Pixels on the device: their ranges, and the random crop and flip of the CIFAR recipe.

Pure functions of a batch, made to run inside the compiled step. Each row is changed by its own key
alone, so the rest of the batch makes no difference to it.
"""

import jax
import jax.numpy as jnp


def to_unit(images: jax.Array) -> jax.Array:
    """uint8 levels 0..255 to float32 in [-1, 1], as diffusion models see them (DDPM, Sec. 3.3)."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def from_unit(x: jax.Array) -> jax.Array:
    """[-1, 1] to the nearest uint8 level; what lies outside is clipped. Undoes `to_unit`."""
    levels = (x.astype(jnp.float32) + 1.0) * 127.5
    return jnp.round(jnp.clip(levels, 0.0, 255.0)).astype(jnp.uint8)


def standardise(
    images: jax.Array, mean, std, size: int | None = None, matched: int | None = None
) -> jax.Array:
    """uint8[B, H, W, C] to float32 (x / 255 - mean) / std; `mean` and `std` have C entries, or one.

    Args:
        size: stretches the images to `size` x `size` pixels first: bilinear between pixel centres,
            antialiased where it shrinks, not rounded. None leaves them as they are.
        matched: shrinks images that are larger than this to `matched` x `matched` before that. With
            the ID images' own size, resolution no longer tells the sets apart.
    """
    x = images.astype(jnp.float32) / 255.0
    for side in (matched if matched is not None and matched < max(x.shape[1:3]) else None, size):
        if side is not None:
            shape = (x.shape[0], side, side, x.shape[-1])
            x = jax.image.resize(x, shape, 'bilinear', antialias=True)
    return normalise(x, mean, std)


def normalise(x: jax.Array, mean, std) -> jax.Array:
    """(x - mean) / std of levels in [0, 1]; `mean` and `std` have C entries, or one."""
    return (x - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def mark(images: jax.Array) -> jax.Array:
    """A number that follows from an image's pixels alone: uint8[B, H, W, C] -> uint32[B].

    Exact on every device, and practically different for different images: what is random about
    scoring an image draws from it, so that its score is the same in any set, batch or place.
    """
    pixels = images.reshape(len(images), -1).astype(jnp.uint32)
    weight = jnp.arange(1, pixels.shape[1] + 1, dtype=jnp.uint32) * jnp.uint32(0x9E3779B1)
    weight = (weight ^ (weight >> 15)) * jnp.uint32(0x85EBCA77)
    weight = weight ^ (weight >> 13)
    return jnp.sum((pixels + 1) * weight, axis=1, dtype=jnp.uint32)


def random_noise(x: jax.Array, keys: jax.Array, *, largest: float) -> jax.Array:
    """x + sigma n with n ~ N(0, I) and sigma ~ U[0, largest], both drawn for each row.

    Our choice, for ID images and outliers alike: what a generator leaves of its noise, or smooths
    away, no longer tells the two apart, so a detector has to look at what is shown.

    Args:
        x: float [B, H, W, C], as the network sees it.
        keys: a key for each row.
    """

    def add(image, key):
        key_sigma, key_noise = jax.random.split(key)
        sigma = jax.random.uniform(key_sigma, maxval=largest)
        return image + sigma * jax.random.normal(key_noise, image.shape)

    return jax.vmap(add)(x, keys)


def random_crop(x: jax.Array, keys: jax.Array, *, pad: int = 4) -> jax.Array:
    """Pads each image with `pad` zeros on all sides, and cuts its own size out again, anywhere.

    `RandomCrop(32, padding=4)` of the CIFAR recipe (official code of OE, VOS, ...; He et al. 2015,
    arXiv:1512.03385, Sec. 4.2). There pixels are levels that have not been standardised yet, so
    give uint8 images, or [0, 1]: zero is black.

    Args:
        x: [B, H, W, C] of any type.
        keys: a key for each row.
    """

    def crop(image, key):
        padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        top, left = jax.random.randint(key, (2,), 0, 2 * pad + 1)
        return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)

    return jax.vmap(crop)(x, keys)


def random_flip(x: jax.Array, keys: jax.Array) -> jax.Array:
    """Mirrors each image [B, H, W, C] left to right with probability 1/2; a key for each row."""
    flipped = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flipped[:, None, None, None], x[:, :, ::-1], x)
