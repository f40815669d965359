"""What DLSR diffuses instead of pixels: maps of several layers, pooled, normalised, end to end.

Yang et al. 2024 (arXiv:2411.10701) and the official code (xbyym/DLSR). With maps F_m of
c_m channels, m = 1..M,

    f^m = pool(F_m)   z_0 = [f̄^1, ..., f̄^M],   f̄^m = (f^m - mean f^m) / (std f^m + 1e-5)

with mean and (unbiased) std over the channels of one image's block, so that z_0 does not see the
scale that a network gives its layers: each block has mean 0 and ‖f̄^m‖² = c_m - 1.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxood.errors import UserError, unknown
from jaxood.models.backbones import TAPS

EPSILON = 1e-5  # official code; the paper has sqrt(Var + delta)


def choose(backbone: str, known: Sequence[str], wanted: Sequence[str] | None) -> tuple[int, ...]:
    """Positions among a backbone's maps of those that are tapped.

    Args:
        backbone: its name in `BACKBONES`.
        known: its `map_names`.
        wanted: some of them; None for those in `backbones.TAPS`, or all.

    Raises:
        UserError: a map that this backbone does not have; the message lists its own.
    """
    if wanted is None:
        wanted = TAPS.get(backbone, tuple)(tuple(known))
    for name in wanted:
        if name not in known:
            raise UserError(unknown(f'the tap {name!r} of {backbone!r}', name, known))
    if not wanted or len({*wanted}) < len(wanted):
        raise UserError(f'taps={tuple(wanted)!r}: give one or more different names of {known}.')
    return tuple(sorted(known.index(name) for name in wanted))


def average(size: int, grid: int) -> np.ndarray:
    """Weights float64[size] of a plain mean along one axis (the paper's pooling)."""
    return np.full(size, 1.0 / size)


def on_grid(size: int, grid: int) -> np.ndarray:
    """Weights of the mean over `grid` points, evenly spaced with both ends on the outer pixels.

    The official code first resizes every map bilinearly, corners aligned, to the grid of stride 16
    (14 x 14 of 224 x 224 pixels), then averages. A map larger than that is only sampled, a smaller
    one repeated: the mean of that is a mean with these weights. For parity with its weights.
    """
    at = np.linspace(0.0, size - 1.0, grid) if grid > 1 else np.zeros(1)
    low = np.minimum(at.astype(int), size - 1)
    weights = np.zeros(size)
    np.add.at(weights, low, 1.0 - (at - low))
    np.add.at(weights, np.minimum(low + 1, size - 1), at - low)
    return weights / grid


POOLS = {'avg': average, 'grid16': on_grid}  # (pixels of a map, points of the grid) -> weights


def pooled(stage_map: jax.Array, pool: str, image_size: tuple[int, int]) -> jax.Array:
    """f^m, a weighted mean over space: [B, h, w, c_m] -> float32[B, c_m].

    Args:
        pool: a key of `POOLS`.
        image_size: (H, W) of what the network saw; the grid has a point for each 16 pixels.
    """
    sizes, grids = stage_map.shape[1:3], [max(1, side // 16) for side in image_size]
    rows, columns = (POOLS[pool](s, g).astype(np.float32) for s, g in zip(sizes, grids))
    exact = jax.lax.Precision.HIGHEST
    x = stage_map.astype(jnp.float32)
    return jnp.einsum('bhwc,h,w->bc', x, rows, columns, precision=exact)


def normalised(block: jax.Array) -> jax.Array:
    """f̄^m of each row: float32[B, c_m] -> mean 0 and unbiased standard deviation 1 over c_m."""
    centred = block - jnp.mean(block, axis=-1, keepdims=True)
    return centred / (jnp.std(centred, axis=-1, ddof=1, keepdims=True) + EPSILON)


def semantics(
    maps: Sequence[jax.Array], positions: Sequence[int], pool: str, image_size: tuple[int, int]
) -> jax.Array:
    """z_0: the tapped maps, pooled, normalised and laid end to end, float32[B, Σ c_m]."""
    blocks = [normalised(pooled(maps[i], pool, image_size)) for i in positions]
    return jnp.concatenate(blocks, axis=-1)
