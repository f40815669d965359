"""Reverse chains, and guidance of the network that they call.

`sample` walks down a grid of times; an entry of `SAMPLERS` takes one step of it, from level t to
any level s < t. Levels come in as ᾱ, so a step neither knows nor cares how far apart t and s are.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxood.diffusion.process import null_condition, per_row
from jaxood.errors import UserError


class Estimate(NamedTuple):
    """Where the chain stands, and what the network makes of it."""

    x_t: jax.Array  # [B, ...]
    x_0: jax.Array  # x_0_hat, like x_t
    eps: jax.Array  # eps_hat, like x_t
    alpha_bar: jax.Array  # scalar, ᾱ_t


class Multistep(NamedTuple):
    """A sampler that remembers more than what the network made of the step before."""

    step: Callable  # (now, before, alpha_bar_s, draw, **options) -> (x_s, the next step's before)
    start: Callable  # (x_start, alpha_bar_t) -> the first step's before


# One step: (now, before, alpha_bar_s, draw, **options) -> x_s.
#   now, before: the Estimate at t, and the (x_0_hat, alpha_bar) of the step before it; at the first
#     step `before` holds now's own alpha_bar
#   alpha_bar_s: the level to go to, alpha_bar_s > alpha_bar_t
#   draw: () -> standard normal noise like x_t; deterministic steps don't call it


def ddpm(now: Estimate, before, alpha_bar_s, draw) -> jax.Array:
    """Ancestral sampling: x_s ~ q(x_s | x_t, x_0 = x_0_hat).

    Ho et al. 2020 (arXiv:2006.11239), Eq. 6-7. With α = ᾱ_t / ᾱ_s and β = 1 - α, which for
    s = t - 1 are the paper's α_t and β_t:

        mean = √ᾱ_s β / (1 - ᾱ_t) x_0_hat + √α (1 - ᾱ_s) / (1 - ᾱ_t) x_t
        var  = β (1 - ᾱ_s) / (1 - ᾱ_t)

    The paper allows σ² = β as well (Sec. 3.2), which is too much noise when t - s is large; this is
    the exact posterior on any grid.
    """
    a_t, a_s = now.alpha_bar, alpha_bar_s
    alpha = a_t / a_s
    beta = (a_s - a_t) / a_s  # not 1 - alpha: nothing cancels twice
    mean = (jnp.sqrt(a_s) * beta * now.x_0 + jnp.sqrt(alpha) * (1.0 - a_s) * now.x_t) / (1.0 - a_t)
    return mean + jnp.sqrt(beta * (1.0 - a_s) / (1.0 - a_t)) * draw()


def ddim(now: Estimate, before, alpha_bar_s, draw, *, eta: float = 0.0) -> jax.Array:
    """x_s = √ᾱ_s x_0_hat + √(1 - ᾱ_s - σ²) ε_hat + σ ξ.

    Song et al. 2021 (arXiv:2010.02502), Eq. 12, with Eq. 16:

        σ = η √((1 - ᾱ_s) / (1 - ᾱ_t)) √(1 - ᾱ_t / ᾱ_s)

    Args:
        eta: η in [0, 1], a Python number: 0 is deterministic and draws nothing, 1 is `ddpm`.
    """
    a_t, a_s = now.alpha_bar, alpha_bar_s
    if eta == 0.0:
        return jnp.sqrt(a_s) * now.x_0 + jnp.sqrt(1.0 - a_s) * now.eps
    variance = eta**2 * (1.0 - a_s) / (1.0 - a_t) * (a_s - a_t) / a_s
    direction = jnp.sqrt(jnp.maximum(1.0 - a_s - variance, 0.0))  # 0 up to rounding at eta = 1
    return jnp.sqrt(a_s) * now.x_0 + direction * now.eps + jnp.sqrt(variance) * draw()


def dpmpp_2m(now: Estimate, before, alpha_bar_s, draw) -> jax.Array:
    """DPM-Solver++(2M), deterministic. Lu et al. 2022 (arXiv:2211.01095), Alg. 2.

    With λ = log(√ᾱ / √(1 - ᾱ)), half the log signal-to-noise ratio, h = λ_s - λ_t, and h' the h of
    the step before:

        D   = x_0_hat + h / (2 h') (x_0_hat - x_0_hat')
        x_s = √(1 - ᾱ_s) / √(1 - ᾱ_t) x_t - √ᾱ_s (e^{-h} - 1) D

    First order (D = x_0_hat, which is DDIM) at the first step, which has none before it, and on the
    way to clean data, where h is infinite: the last step of a grid that ends on 0, as in the
    official code's `lower_order_final`.
    """
    a_t, a_s = now.alpha_bar, alpha_bar_s
    x_0_before, a_before = before
    h, h_before = _log_snr(a_s) - _log_snr(a_t), _log_snr(a_t) - _log_snr(a_before)
    second_order = (a_before < a_t) & (a_s < 1.0)
    weight = jnp.where(second_order, h / (2.0 * h_before), 0.0)
    data = now.x_0 + weight * (now.x_0 - x_0_before)
    return jnp.sqrt((1.0 - a_s) / (1.0 - a_t)) * now.x_t - jnp.sqrt(a_s) * jnp.expm1(-h) * data


class Past(NamedTuple):
    """What `pndm` remembers of earlier steps."""

    x_t: jax.Array  # where the step before began
    alpha_bar: jax.Array  # its level
    eps: jax.Array  # [3, B, ...], the last estimates, the newest first
    count: jax.Array  # how many there were


ADAMS_BASHFORTH = np.array(  # weights of the newest, the one before ..., for 1 to 4 estimates
    [[24, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]], np.float32
)


def pndm(now: Estimate, before: Past, alpha_bar_s, draw) -> tuple[jax.Array, Past]:
    """Linear multistep on ε_hat, deterministic. Liu et al. 2022 (arXiv:2202.09778), Eq. 11-12.

        e   = (55 ε_t - 59 ε_{t+δ} + 37 ε_{t+2δ} - 9 ε_{t+3δ}) / 24
        x_s = √(ᾱ_s / ᾱ_t) x_t
              - (ᾱ_s - ᾱ_t) e / (√ᾱ_t (√((1 - ᾱ_s) ᾱ_t) + √((1 - ᾱ_t) ᾱ_s)))

    Of lower order where there are fewer estimates, as Stable Diffusion's samplers do it in place of
    the paper's Runge-Kutta steps. A time that the grid repeats (`with_repeat`) repeats the step
    that led there, with the mean of the estimates at both its ends (Heun). The weights are those of
    even steps. (For a network that predicts v, diffusers mixes outputs, not noise estimates.)
    """
    correcting = alpha_bar_s == now.alpha_bar
    weights = jnp.asarray(ADAMS_BASHFORTH / 24)[jnp.minimum(before.count, 3)]
    eps = jnp.concatenate([now.eps[None], before.eps])
    multistep = jnp.tensordot(weights, eps, axes=1)
    mixed = jnp.where(correcting, (eps[0] + eps[1]) / 2, multistep)
    x, a_t = (
        jnp.where(correcting, old, new)
        for old, new in ((before.x_t, now.x_t), (before.alpha_bar, now.alpha_bar))
    )
    a_s = alpha_bar_s
    scale = jnp.sqrt(a_t) * (jnp.sqrt((1.0 - a_s) * a_t) + jnp.sqrt((1.0 - a_t) * a_s))
    x_s = jnp.sqrt(a_s / a_t) * x - (a_s - a_t) / scale * mixed
    past = Past(x, a_t, jnp.where(correcting, before.eps, eps[:3]), before.count + ~correcting)
    return x_s, past


def pndm_start(x_start: jax.Array, alpha_bar_t: jax.Array) -> Past:
    """Nothing to remember yet."""
    return Past(x_start, alpha_bar_t, jnp.zeros((3, *x_start.shape)), jnp.int32(0))


def _log_snr(alpha_bar):
    return 0.5 * (jnp.log(alpha_bar) - jnp.log1p(-alpha_bar))


def strided(num_steps: int, steps: int, start: int | None = None) -> np.ndarray:
    """Evenly spaced times from `start` down to 0: int32[steps + 1], the `timesteps` of `sample`.

    Args:
        num_steps: T.
        steps: network calls on the way, at most `start`; equal to it, the chain visits every level.
        start: where the chain begins: T for pure noise, the edit depth for a half-noised image.
            At 0 there is nothing to undo and the grid is [0], whatever `steps`.
    """
    start = num_steps if start is None else start
    if not 0 <= start <= num_steps:
        raise UserError(f'start={start} is no time of this chain. Give one in 0..{num_steps}.')
    if start == 0:
        return np.zeros(1, np.int32)
    if not 1 <= steps <= start:
        raise UserError(
            f'steps={steps} cannot be taken from time {start} down to 0. Give steps in 1..{start}.'
        )
    return np.linspace(start, 0, steps + 1).round().astype(np.int32)


def leading(num_steps: int, steps: int, *, end: int = 1, start: int | None = None) -> np.ndarray:
    """Stable Diffusion's times: T = 1000 and 50 steps give 982, 962 ... 22, 2 and 1.

    The official samplers, and diffusers with "leading" spacing and an offset of 1, count from 0:
    981, 961 ... 21, 1, and then go to their ᾱ_0, our `alpha_bar[1]`.

    Args:
        num_steps: T.
        steps: network calls from the top down.
        end: where the chain ends: 1, or 0 for clean data.
        start: where it begins, if not at the top: at exactly this time, followed by those of the
            grid below it. At `end` or below there is nothing to undo.

    Returns:
        int32[steps + 1], descending, the `timesteps` of `sample`; shorter with `start`.
    """
    if not 1 <= steps <= num_steps // 2:
        raise UserError(f'steps={steps} must be in 1..{num_steps // 2} on this grid.')
    return _walk(np.arange(steps)[::-1] * (num_steps // steps) + 2, end, start, num_steps)


def spread(num_steps: int, steps: int, *, end: int = 0, start: int | None = None) -> np.ndarray:
    """The times of diffusers' DPM-Solver ("linspace" spacing): 1000, 950 ... 51 and 0 for 20 steps.

    From 999 down in its count, without the lowest, and then to clean data. Arguments and result as
    in `leading`.
    """
    if not 1 <= steps < num_steps:
        raise UserError(f'steps={steps} must be in 1..{num_steps - 1} on this grid.')
    return _walk(np.linspace(0, num_steps - 1, steps + 1).round()[:0:-1] + 1, end, start, num_steps)


def _walk(times, end, start, num_steps):
    if start is not None:
        if not 0 <= start <= num_steps:
            raise UserError(f'start={start} is no time of this chain. Give one in 0..{num_steps}.')
        times = np.array([start, *times[times < start]])
    return np.array([*times[times > end], min(end, times[0])], np.int32)


def with_repeat(timesteps: np.ndarray) -> np.ndarray:
    """A grid whose second time comes twice, as `pndm` begins in Stable Diffusion: one call more."""
    return timesteps if len(timesteps) < 3 else np.insert(timesteps, 1, timesteps[1])


def sample(
    denoise: Callable,
    x_start: jax.Array,
    keys: jax.Array | None,
    *,
    alpha_bar: jax.Array,
    timesteps: jax.Array,
    sampler: Callable,
    clip: tuple[float, float] | None = None,
    **options,
) -> jax.Array:
    """Walks x_start down `timesteps`; one `lax.scan`, one call of `denoise` a step.

    Args:
        denoise: (x_t, t int32[B]) -> (x_0_hat, eps_hat); see `process.denoiser`.
        x_start: float32[B, ...], standing at level timesteps[0].
        keys: keys [B], one a row: step t of row i draws from (keys[i], t), so neither the rest of
            the batch nor the grid changes its noise. None will do for a deterministic sampler.
        alpha_bar: float32[T + 1].
        timesteps: int32[S + 1], descending. The last entry is where the chain ends: 0, or above it
            (Stable Diffusion's ends at 1). With one entry x_start comes back untouched.
        sampler: an entry of `SAMPLERS`.
        clip: bounds for x_0_hat, (-1, 1) for pixels; eps_hat then follows from x_t and the clipped
            x_0_hat. None for data without bounds.
        **options: the sampler's own keywords (`eta` of ddim).

    Returns:
        float32[B, ...], standing at level timesteps[-1].
    """
    alpha_bar, timesteps = jnp.asarray(alpha_bar), jnp.asarray(timesteps)
    x_start = jnp.asarray(x_start, jnp.float32)
    take, begin = sampler if isinstance(sampler, Multistep) else _one_before(sampler)

    def step(carry, times):
        (x_t, before), (t, s) = carry, times
        a_t, a_s = alpha_bar[t], alpha_bar[s]
        x_0_hat, eps_hat = denoise(x_t, jnp.full(x_t.shape[:1], t))
        if clip is not None:
            x_0_hat = jnp.clip(x_0_hat, *clip)
            eps_hat = (x_t - jnp.sqrt(a_t) * x_0_hat) / jnp.sqrt(1.0 - a_t)

        def draw():
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
            return jax.vmap(lambda key: jax.random.normal(key, x_t.shape[1:]))(step_keys)

        return take(Estimate(x_t, x_0_hat, eps_hat, a_t), before, a_s, draw, **options), None

    before = begin(x_start, alpha_bar[timesteps[0]])
    (x, _), _ = jax.lax.scan(step, (x_start, before), (timesteps[:-1], timesteps[1:]))
    return x


def _one_before(sampler: Callable) -> Multistep:
    """A plain step, which remembers (x_0_hat, alpha_bar) of the step before."""

    def step(now, before, alpha_bar_s, draw, **options):
        return sampler(now, before, alpha_bar_s, draw, **options), (now.x_0, now.alpha_bar)

    return Multistep(step, lambda x_start, alpha_bar_t: (jnp.zeros_like(x_start), alpha_bar_t))


def guided(
    network: Callable,
    condition: jax.Array,
    guidance: jax.Array | float | None = None,
    null: jax.Array | None = None,
) -> Callable:
    """Classifier-free guidance. Ho & Salimans 2022 (arXiv:2207.12598), Eq. 6.

        ε_hat = (1 + w) ε(x_t, t, c) - w ε(x_t, t, ∅)

    applied to the raw output, which says the same for every prediction type (see `Prediction`).
    w = 0 is the conditional branch, w = -1 the null branch; guidance_scale elsewhere is 1 + w.

    Args:
        network: (x, t, condition) -> raw output.
        condition: float32[B, K + 1], a label, or a mixture of labels; or any other array [B, ...]
            that the network takes, such as a prompt's token embeddings.
        guidance: w, a scalar or [B]; it may be traced. None (not 0, which is a value like others)
            leaves the null branch out and halves the cost.
        null: the condition ∅, like `condition`; by default its null token.

    Returns:
        (x, t) -> raw output. Both branches go through the network in one batch.
    """
    if guidance is None:
        return lambda x, t: network(x, t, condition)
    null = null_condition(condition) if null is None else null
    return _combined(network, [condition, null], [1.0 + guidance, -guidance])


def label_mixed(
    network: Callable,
    condition_i: jax.Array,
    condition_j: jax.Array,
    ratio: jax.Array | float,
    guidance: jax.Array | float | None = None,
) -> Callable:
    """`guided` by the mixed label π = λ e_i + (1 - λ) e_j. Metric-mixup (arXiv:2405.00631).

    Args:
        network: (x, t, condition) -> raw output.
        condition_i: float32[B, K + 1], rows e_i.
        condition_j: float32[B, K + 1], rows e_j.
        ratio: λ in [0, 1], [B] or a scalar.
        guidance: as in `guided`.
    """
    ratio = per_row(ratio, condition_i)
    return guided(network, ratio * condition_i + (1.0 - ratio) * condition_j, guidance)


def score_mixed(
    network: Callable,
    condition_i: jax.Array,
    condition_j: jax.Array,
    ratio: jax.Array | float,
    guidance: jax.Array | float | None = None,
) -> Callable:
    """Mixes noise estimates where `label_mixed` mixes labels; arguments as there. Our choice.

        ε(x_t, t, π) := λ ε(x_t, t, e_i) + (1 - λ) ε(x_t, t, e_j)

    At each level this is the score of the geometric mixture p_i^λ p_j^(1-λ) of the two noised class
    densities: images that both classes find likely. Two network rows an image, three with guidance.
    """
    conditions, weights = [condition_i, condition_j], [ratio, 1.0 - ratio]
    if guidance is not None:
        conditions = [*conditions, null_condition(condition_i)]
        weights = [(1.0 + guidance) * ratio, (1.0 + guidance) * (1.0 - ratio), -guidance]
    return _combined(network, conditions, weights)


def _combined(network: Callable, conditions: list, weights: list) -> Callable:
    """(x, t) -> Σ_m w_m network(x, t, c_m), all M branches of a row side by side in one batch.

    Side by side, [row 0: M branches, row 1: ...], a batch sharded over devices stays where it is;
    stacking the branches end to end would move half of it.
    """
    branches = len(conditions)
    stacked = jnp.stack(conditions, axis=1)
    stacked = stacked.reshape(-1, *stacked.shape[2:])

    def network_of_all(x, t):
        output = network(jnp.repeat(x, branches, axis=0), jnp.repeat(t, branches, axis=0), stacked)
        output = output.reshape(-1, branches, *output.shape[1:])
        return sum(per_row(w, x) * output[:, m] for m, w in enumerate(weights))

    return network_of_all
