"""Scores that reshape the penultimate vector h ≥ 0 and take the energy of its new logits, T = 1.

All act on what enters the linear head, after pooling, and assume the entries to be post-ReLU.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxood.errors import UserError, lookup
from jaxood.scores import logit, streaming

_LARGEST = 80.0  # e^80 is still a float32


def head_energy(h, head):
    """-LSE(W h + b) of float32[B, D]."""
    z = jnp.dot(h, head['kernel'], precision=jax.lax.Precision.HIGHEST) + head['bias']
    return logit.energy(z)


def check_percentile(**percentiles: float) -> None:
    for name, value in percentiles.items():
        if not 0 <= value <= 100:
            raise UserError(f'{name}={value} is a percentile: set it from 0 to 100.')


def fit_react(bank, head, *, quantile: float = 90.0):
    """The cut: a percentile over all entries of the training features.

    The authors fit on the training set, as here; OpenOOD on held-out ID images.

    Args:
        quantile: in percent. The paper has 90; what that cuts depends on how many units are active:
            on a CIFAR-10 DenseNet 90 costs 15 points of AUROC and 99 gains one.
    """
    check_percentile(quantile=quantile)
    return {'cut': streaming.quantile(bank['features'], quantile / 100)}


def react(params, outputs, head):
    """-LSE(W min(h, c) + b). Sun, Guo & Li 2021 (arXiv:2111.12797), Eq. 2-4. c = ∞: energy."""
    return head_energy(jnp.minimum(outputs['features'], params['cut']), head)


def fit_vra(bank, head, *, low: float = 10.0, high: float = 90.0):
    """Two percentiles over all entries of the training features (OpenOOD's 10 and 90)."""
    check_percentile(low=low, high=high)
    if low > high:
        raise UserError(f'low={low} must not be above high={high}.')
    return {
        name: streaming.quantile(bank['features'], q / 100)
        for name, q in (('low', low), ('high', high))
    }


def vra(params, outputs, head):
    """-LSE(W clip(h, l, u) + b). Xu et al. 2023 (arXiv:2302.11941), as OpenOOD has it.

    (The paper's piecewise form sets entries below l to 0.) l = -∞, u = ∞: energy.
    """
    return head_energy(jnp.clip(outputs['features'], params['low'], params['high']), head)


def fit_dice(bank, head, *, quantile: float = 90.0):
    """Keeps the weights whose mean contribution h̄_j W_cj on the training set is among the largest.

    Args:
        quantile: in percent, over all classes and units together and of signed values; what is
            above is kept, and with 0 everything. Official code: 90 for CIFAR, 70 for ImageNet.
    """
    check_percentile(quantile=quantile)
    total = sum(np.sum(h, axis=0, dtype=np.float64) for (h,) in streaming.chunks(bank['features']))
    contribution = (total / len(bank['features']))[:, None] * np.asarray(head['kernel'], np.float64)
    least = np.percentile(contribution, quantile) if quantile > 0 else -np.inf
    return {'kernel': np.where(contribution > least, head['kernel'], 0).astype(np.float32)}


def dice(params, outputs, head):
    """-LSE((W ⊙ mask) h + b). Sun & Li 2022 (arXiv:2111.09805), Eq. 3-6."""
    return head_energy(outputs['features'], head | params)


def kept(units: int, percentile: float) -> int:
    """How many of the units pruning at a percentile leaves: n - round(n p / 100)."""
    k = units - round(units * percentile / 100)
    if k < 1:
        raise UserError(
            f'percentile={percentile} leaves none of {units} units. The largest that leaves one is '
            f'about {100 * (units - 1) / units:.4g}.'
        )
    return k


@struct.dataclass
class Ash:
    """Which form of ASH, and how many units it keeps."""

    variant: str = struct.field(pytree_node=False)
    k: int = struct.field(pytree_node=False)


def fit_ash(bank, head, *, variant: str = 's', percentile: float = 90.0) -> Ash:
    """Nothing to fit.

    Args:
        variant: 'p' prunes, 'b' makes what is left equal, 's' scales it. OpenOOD's "ASH" is 'b'.
        percentile: of units pruned. Official code for 's': 95 for CIFAR DenseNets, 90 for ImageNet
            ResNets; of 128 units 90 keeps 13, 95 keeps 6.
    """
    lookup(_ASH, variant, 'variant')
    check_percentile(percentile=percentile)
    return Ash(variant, kept(len(head['kernel']), percentile))


def ash(params: Ash, outputs, head):
    """-LSE(W h' + b), with the k largest entries of h kept and all others 0.

    Djurisic et al. 2023 (arXiv:2209.09858), Alg. 1-3. With s_1 the sum of h and s_2 that of the
    kept entries, h'_j is h_j (P), s_1 / k (B), h_j e^(s_1/s_2) (S). Exactly k are kept: of equal
    entries the first. P with percentile 0 is energy.
    """
    h = outputs['features'].astype(jnp.float32)
    largest, places = jax.lax.top_k(h, params.k)
    shaped = _ASH[params.variant](largest, jnp.sum(h, axis=1, keepdims=True))
    return head_energy(
        jnp.put_along_axis(jnp.zeros_like(h), places, shaped, 1, inplace=False), head
    )


_ASH = {
    'p': lambda largest, s_1: largest,
    'b': lambda largest, s_1: jnp.broadcast_to(s_1 / largest.shape[1], largest.shape),
    's': lambda largest, s_1: largest * jnp.exp(ratio(s_1, jnp.sum(largest, 1, keepdims=True))),
}


def ratio(s_1, s_2):
    """s_1 / s_2, and 0 where nothing is active: e^0 leaves h as it is."""
    active = s_2 > 0
    return jnp.where(active, jnp.minimum(s_1 / jnp.where(active, s_2, 1.0), _LARGEST), 0.0)


@struct.dataclass
class Scale:
    """How many units count as the largest."""

    k: int = struct.field(pytree_node=False)


def fit_scale(bank, head, *, percentile: float = 85.0) -> Scale:
    """Nothing to fit.

    Args:
        percentile: of units left out of s_2. The paper has 85.
    """
    check_percentile(percentile=percentile)
    return Scale(kept(len(head['kernel']), percentile))


def scale(params: Scale, outputs, head):
    """-LSE(W h e^(s_1/s_2) + b): the sharpening of ASH-S, and nothing pruned.

    Xu et al. 2024 (arXiv:2310.00227), Eq. 3-6. s_1 is the sum of h, s_2 of its k largest entries.
    """
    h = outputs['features'].astype(jnp.float32)
    largest, _ = jax.lax.top_k(h, params.k)
    r = ratio(jnp.sum(h, axis=1, keepdims=True), jnp.sum(largest, axis=1, keepdims=True))
    return head_energy(h * jnp.exp(r), head)
