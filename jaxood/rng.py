"""Random keys by purpose and index, never by order of drawing.

Two draws that must differ have different purposes or indices; two that must agree (the same outlier
on one device or eight, before or after a restart) have the same. Names are hashed with SHA-256:
Python's own `hash` of a string differs from process to process.
"""

import hashlib

import jax


def key_for(root: jax.Array | int, *purpose: str | int) -> jax.Array:
    """The key for one purpose, e.g. `key_for(seed, 'outliers', 'noise')`.

    Args:
        root: a typed key (`jax.random.key`), or a seed.
        purpose: names and static integers, folded in one after the other.

    Returns:
        A typed key. Pure: the same arguments give the same key in every process.
    """
    key = jax.random.key(root) if isinstance(root, int) else root
    for name in purpose:
        key = jax.random.fold_in(key, name if isinstance(name, int) else _word(name))
    return key


def key_each(key: jax.Array, index: jax.Array) -> jax.Array:
    """One key for each row: `index` int[B] (the example's number, not its row) -> keys[B]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def seed_for(seed: int, *purpose: str | int) -> int:
    """A NumPy seed for one purpose, for what is drawn on the host (the order of the examples)."""
    text = '/'.join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'little')


def _word(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], 'little')
