"""The train state, and the optimisers that update it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxood.errors import UserError


class TrainState(NamedTuple):
    """Everything a training step changes. A pytree."""

    step: Any  # int32[], updates done
    params: Any
    ema: Any  # moving average of params, or None
    opt_state: Any
    extra: Any  # what is neither parameter nor gradient: batch statistics, AdaCos's scale, ...


def create(params: Any, tx: optax.GradientTransformation, extra: Any, *, ema: bool) -> TrainState:
    """The state before the first step. The average starts at the initial weights."""
    average = jax.tree.map(jnp.copy, params) if ema else None  # a step reuses both buffers
    return TrainState(jnp.zeros((), jnp.int32), params, average, tx.init(params), extra)


def ema_decay(step: Any, *, limit: float) -> Any:
    """min(limit, (1 + n) / (10 + n)): a short run's average is not its initial weights.

    Official code of DLSR and of guided diffusion's descendants; n counts updates from 0.
    """
    return jnp.minimum(limit, (1.0 + step) / (10.0 + step))


def sgd(
    *,
    steps: int,
    learning_rate: float = 0.1,
    final_learning_rate: float = 1e-6,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    nesterov: bool = True,
    clip: float | None = None,
) -> optax.GradientTransformation:
    """SGD with Nesterov momentum, cosine to `final_learning_rate` over `steps`, coupled decay.

    The recipe of the outlier-exposure family (official code, hendrycks/outlier-exposure): weight
    decay is added to the gradient of every parameter before the momentum.

    Args:
        clip: the largest global norm of the loss's gradient (DOE's official code: 1); None does not
            clip.
    """
    _check_rate(learning_rate)
    schedule = optax.cosine_decay_schedule(
        learning_rate, steps, alpha=final_learning_rate / learning_rate
    )
    return optax.chain(
        *_clipping(clip),
        optax.add_decayed_weights(weight_decay),
        optax.sgd(schedule, momentum, nesterov=nesterov),
    )


def adam(
    *,
    steps: int,
    learning_rate: float = 2e-4,
    warmup: int = 0,
    final_learning_rate: float | None = None,
    clip: float | None = None,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Adam, constant (DDPM's official recipe: 2e-4) or cosine to `final_learning_rate`.

    Args:
        steps: of the whole training; the cosine ends there.
        warmup: steps of linear warm-up from 0.
        clip: the largest global gradient norm; None does not clip.
        weight_decay: added to the gradient times the parameter, as PyTorch's Adam does.
    """
    _check_rate(learning_rate)
    if not 0 <= warmup < steps:
        raise UserError(f'warmup={warmup} must be less than the {steps} steps there are.')
    final = learning_rate if final_learning_rate is None else final_learning_rate
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else learning_rate, learning_rate, warmup, steps, end_value=final
    )
    before = _clipping(clip)
    before += [optax.add_decayed_weights(weight_decay)] if weight_decay else []
    return optax.chain(*before, optax.adam(schedule))


def adamw(
    *, steps: int, learning_rate: float = 1e-4, weight_decay: float = 1e-4
) -> optax.GradientTransformation:
    """AdamW (β .9, .999) at a constant rate: DLSR's, whose paper has these defaults (its official
    code 1e-5 and 0.02)."""
    _check_rate(learning_rate)
    return optax.adamw(learning_rate, weight_decay=weight_decay)


def _clipping(clip):
    if clip is None:
        return []
    if not clip > 0.0:
        raise UserError(f'clip={clip} must be above 0, or None for no clipping.')
    return [optax.clip_by_global_norm(clip)]


def _check_rate(learning_rate):
    if not learning_rate > 0.0:
        raise UserError(f'learning_rate={learning_rate} must be above 0.')


OPTIMIZERS = {'sgd': sgd, 'adam': adam, 'adamw': adamw}
