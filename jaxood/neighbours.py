"""Nearest neighbours in a bank of vectors: exact, in bounded memory, and fast on CPUs too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

QUERIES = 128  # rows looked up at a time: the table of similarities is never more than 128 x N
BLOCK = 32  # columns; `lax.top_k` over a whole row of 50,000 is 20 times slower on a CPU
HIGHEST = jax.lax.Precision.HIGHEST


def padded(rows: np.ndarray) -> np.ndarray:
    """Rows [N, ...] and zeros up to full blocks, as `largest` takes what is computed of them."""
    return np.pad(rows, ((0, -len(rows) % BLOCK), *((0, 0),) * (rows.ndim - 1)))


def products(bank, row):
    """⟨row, b⟩ for each b of the bank: float32[D], float32[N', D] -> float32[N']."""
    return jnp.dot(row, bank.T, precision=HIGHEST)  # bank @ row: one more pass over the table


def largest(row, k, count):
    """(values, places) of the k largest of row[:count], best first; exact.

    They lie in the k blocks of columns with the largest bests, so two short selections replace a
    long one. The zeros that fill the last block up may have brought it in: one block more.
    """
    table = row.reshape(-1, BLOCK)
    _, near = jax.lax.top_k(jnp.max(table, axis=1), min(k + 1, len(table)))
    places = near[:, None] * BLOCK + jnp.arange(BLOCK)
    best, at = jax.lax.top_k(jnp.where(places < count, table[near], -jnp.inf).ravel(), k)
    return best, places.ravel()[at]


def mine(vectors: np.ndarray, *, k: int) -> np.ndarray:
    """Each row's k nearest others by cosine, best first, behind the row itself: int32[N, k + 1].

    SCAN's lists (Van Gansbeke et al. 2020, arXiv:2005.12320, Sec. 2.1; official code, where they
    contain the image itself as well).

    Args:
        vectors: float[N, D]; lengths do not matter.
        k: from 1 to N - 1.
    """
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    places = _mine(jnp.asarray(padded(unit.astype(np.float32))), k=k, count=len(unit))
    return np.asarray(places)[: len(unit)]


@functools.partial(jax.jit, static_argnames=('k', 'count'))
def _mine(bank, *, k, count):
    def near(query):
        row, number = query
        similarity = products(bank, row).at[number].set(jnp.inf)  # itself, whoever is as near
        return largest(similarity, k + 1, count)[1]

    return jax.lax.map(near, (bank, jnp.arange(len(bank))), batch_size=QUERIES).astype(jnp.int32)
