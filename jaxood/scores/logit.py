"""Scores that read the logits alone: float32[B, C] -> float32[B], larger = more outlying."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from scipy import optimize, special

from jaxood.errors import UserError
from jaxood.scores import streaming

_T = (0.05, 20.0)  # TempScale's T stays between; most networks have it between 1 and 3
_FLOOR = 1e-12  # of a template's probabilities


def msp(logits):
    """log(1 + Σ_{c≠ŷ} e^{z_c - z_ŷ}) = LSE(z) - max z = -log max_c p_c, in [0, log C].

    Hendrycks & Gimpel 2017 (arXiv:1610.02136): the order of 1 - max p, in a form that never
    saturates. In float32, max p is exactly 1 from margins of 17 on, and LSE(z) - max z exactly 0:
    a quarter of the ID images would tie. Here the largest logit is left out of the sum, so margins
    up to 80 keep their order.
    """
    z = logits.astype(jnp.float32)
    top = jnp.argmax(z, axis=-1, keepdims=True)
    margin = z - jnp.take_along_axis(z, top, axis=-1)
    others = jnp.where(jnp.arange(z.shape[-1]) == top, 0.0, jnp.exp(margin))
    return jnp.log1p(jnp.sum(others, axis=-1))


def maxlogit(logits):
    """-max_c z_c. Hendrycks et al. 2022 (arXiv:1911.11132)."""
    return -jnp.max(logits.astype(jnp.float32), axis=-1)


def energy(logits, *, temperature=1.0):
    """E(x) = -T log Σ_c e^{z_c / T}. Liu et al. 2020 (arXiv:2010.03759), Eq. 4.

    The paper thresholds -E. Not invariant to a constant added to z: E(z + a) = E(z) - a.
    """
    z = logits.astype(jnp.float32)
    return -temperature * jax.nn.logsumexp(z / temperature, axis=-1)


def fit_temperature(bank, head, *, temperature: float = 1.0):
    """Nothing to fit. The temperature is traced, so another one compiles nothing."""
    check_temperature(temperature)
    return {'temperature': temperature}


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise UserError(f'temperature={temperature} must be above 0 (1 is usual).')


def fit_tempscale(bank, head):
    """The T of least negative log-likelihood on held-out ID images.

    Guo et al. 2017 (arXiv:1706.04599), Eq. 9-10. In β = 1/T the loss is convex with slope
    Σ_i (E_p[z_i] - z_iy), so T is where that vanishes, found over log T to 1e-10 in float64. (The
    L-BFGS of the official code and of OpenOOD stops on the way.) Where all images are classified
    right by any margin T would be 0, at chance infinite: it stays within 1/20 and 20 (our choice).
    """
    held_out = bank.get('validation', bank)

    def slope(log_T):
        total = 0.0
        for z, y in streaming.chunks(held_out['logits'], held_out['labels']):
            z = z.astype(np.float64)
            expected = np.sum(special.softmax(z / np.exp(log_T), axis=1) * z, axis=1)
            total += np.sum(expected - z[np.arange(len(z)), y])
        return total

    low, high = np.log(_T)
    if slope(low) <= 0.0:  # β should be larger still
        log_T = low
    elif slope(high) >= 0.0:
        log_T = high
    else:
        log_T = optimize.brentq(slope, low, high, xtol=1e-10)
    return {'temperature': np.float32(np.exp(log_T))}


def tempscale(logits, *, temperature):
    """`msp` of z / T. Guo et al. 2017 (arXiv:1706.04599), Sec. 4.2; T = 1 is MSP."""
    return msp(logits.astype(jnp.float32) / temperature)


def log_softmax(logits):
    """log p_c in a form whose largest entry keeps its distance from 0: float32[B, K]."""
    z = logits.astype(jnp.float32)
    return z - jnp.max(z, axis=-1, keepdims=True) - msp(z)[:, None]


def entropy(logits):
    """H(p) = -Σ_c p_c log p_c, in [0, log K]. All terms are positive, and none is rounded to 0."""
    log_p = log_softmax(logits)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


@struct.dataclass
class Gen:
    """GEN's exponent, and how many classes it sums over."""

    gamma: float
    top: int = struct.field(pytree_node=False)


def fit_gen(bank, head, *, gamma: float = 0.1, top: int = 10) -> Gen:
    """Nothing to fit.

    Args:
        gamma: γ in (0, 1) in the paper, which has .1.
        top: M, all classes if there are fewer. The paper has a tenth of 1,000 classes, so 100.
    """
    if not gamma > 0:
        raise UserError(f'gamma={gamma} must be above 0 (the paper has 0.1).')
    if top < 1:
        raise UserError(f'top={top} must be at least 1 (the paper has 100 of 1,000 classes).')
    return Gen(gamma, top)


def gen(params: Gen, outputs, head):
    """Σ p^γ (1 - p)^γ over the M largest p: the generalised entropy, in [0, M 4^-γ].

    Liu, Lochman & Zach 2023 (CVPR), Eq. 4-5, without their sign. In logarithms throughout: at small
    γ the score lives on 1 - p_max, which 1 - softmax rounds to 0 from margins of 17 on.
    """
    log_p = log_softmax(outputs['logits'])
    log_p, _ = jax.lax.top_k(log_p, min(params.top, log_p.shape[-1]))
    log_rest = jnp.log(-jnp.expm1(log_p))  # log(1 - p), -inf where p is 1
    return jnp.sum(jnp.exp(params.gamma * (log_p + log_rest)), axis=-1)


def fit_klm(bank, head):
    """Templates d_k: the mean softmax of the held-out ID images that are predicted as k.

    A class never predicted gets the one-hot vector (OpenOOD); every entry is at least 1e-12.
    """
    held_out = bank.get('validation', bank)
    K = held_out['logits'].shape[1]
    sums, counts = np.zeros((K, K)), np.zeros(K)
    for (z,) in streaming.chunks(held_out['logits']):
        predicted = np.argmax(z, axis=1)
        order = np.argsort(predicted, kind='stable')
        classes, starts = np.unique(predicted[order], return_index=True)
        p = special.softmax(z[order].astype(np.float64), axis=1)
        sums[classes] += np.add.reduceat(p, starts, axis=0)
        counts[classes] += np.diff([*starts, len(z)])
    d = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], np.eye(K))
    return {'log_templates': np.log(np.maximum(d, _FLOOR)).astype(np.float32)}


def klm(logits, *, log_templates):
    """min_k KL(p ‖ d_k) = min_k Σ_c p_c log(p_c / d_kc). Hendrycks et al. 2022 (arXiv:1911.11132).

    The paper's templates are of held-out images by *prediction*, and the minimum is over all.
    """
    log_p = log_softmax(logits)
    p = jnp.exp(log_p)
    cross = jnp.dot(p, log_templates.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(p * log_p, axis=-1) - jnp.max(cross, axis=-1)
