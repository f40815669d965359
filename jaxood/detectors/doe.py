"""Outlier exposure at the worst of nearby weights: DOE, and DOG's fine-tuning.

Wang et al. 2023 (DOE, arXiv:2303.05033) and its official code (QizhouWang/DOE); DOG (OpenReview
Go8hf9wKJx), Eq. 9. P, the direction of the worst weights, is the entry 'perturbation' of `extra`;
it ends with the training.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxood.detectors import plain
from jaxood.detectors.oe import mixture
from jaxood.errors import UserError, lookup
from jaxood.losses import perturb
from jaxood.losses.detection import cross_entropy, kl_uniform_p

P = 'perturbation'


def init_extra(variables):
    """The plain method's, and P = 0."""
    return plain.init_extra(variables) | {P: perturb.nothing(variables['params'])}


def loss_fn(
    params,
    extra,
    batch,
    key,
    *,
    model,
    step,
    prepare,
    weight: float = 1.0,
    sign: str = '+',
    warmup: int = 0,
    alphas: Sequence[float] = perturb.ALPHAS,
):
    """L = mean_ID CE(f_θ) + weight · mean_OOD KL(U ‖ softmax f_{θ + αP}), as one update.

    DOG, Eq. 9, whose L_OE is this KL plus the constant log C. P follows the regret's gradient at θ
    (`losses.perturb`) and is a constant here; α is drawn for each batch. Every pass sees the same
    images, ID rows and outliers together, so that BatchNorm sees the mixture (official code);
    running statistics come from the pass at θ alone (our choice). The pass that P comes from drops
    nothing (official code); the other two drop the same units, so that α → 0 is plain outlier
    exposure (our choice). Three passes, in the warm-up too: a step takes about three times as long.
    With `accumulate`, P moves once for each part of a batch.

    Args:
        weight: γ, 1 in the paper.
        sign: of P, '+' or '-': `perturb.direction`.
        warmup: steps that begin with the KL at θ itself; 5 of 10 epochs in the official code.
        alphas: what α is drawn from.
    """
    _check(sign, warmup, alphas)
    model_extra, p = _apart(extra)
    rows = mixture(batch, key, prepare)
    terms, new_extra = _terms(params, model_extra, batch, rows, model=model, step=step)

    # Computed in the warm-up, too: XLA's convolutions inside a conditional are 40 x slower on a CPU
    moved = _next(p, params, model_extra, batch, rows, model, step, step == warmup, sign)
    p = jax.tree.map(lambda new, old: jnp.where(step >= warmup, new, old), moved, p)
    kl = _kl_at(p, params, model_extra, batch, rows, model, step, key, alphas)
    loss = terms['ce'] + weight * kl
    return loss, (new_extra | {P: p}, terms | {'loss': loss, 'kl_worst': kl})


def alternating(
    params,
    extra,
    batch,
    key,
    *,
    model,
    step,
    prepare,
    weight: float = 1.0,
    sign: str = '+',
    warmup: int = 0,
    alphas: Sequence[float] = perturb.ALPHAS,
):
    """The same as two updates on each batch, as the official code has it: `first`'s, then this one.

    L = mean_ID CE(f_θ) at the weights that `first` has led to; in the warm-up, in which there is no
    first, + weight · KL at the same weights.
    """
    _check(sign, warmup, alphas)
    model_extra, p = _apart(extra)
    rows = mixture(batch, key, prepare)
    terms, new_extra = _terms(params, model_extra, batch, rows, model=model, step=step)
    loss = terms['ce'] + jnp.where(step < warmup, weight, 0.0) * terms['kl']
    return loss, (new_extra | {P: p}, terms | {'loss': loss})


def first(
    *,
    weight: float = 1.0,
    sign: str = '+',
    warmup: int = 0,
    alphas: Sequence[float] = perturb.ALPHAS,
):
    """weight · mean_OOD KL(U ‖ softmax f_{θ + αP}), an update of its own -> (loss, its first step).

    Its gradient is that at θ + αP, applied to θ. (In the official code the weight decay of this
    update is that of θ + αP, too; here of θ.)
    """

    def loss_fn(params, extra, batch, key, *, model, step, prepare):
        model_extra, p = _apart(extra)
        rows = mixture(batch, key, prepare)
        p = _next(p, params, model_extra, batch, rows, model, step, step == warmup, sign)
        kl = _kl_at(p, params, model_extra, batch, rows, model, step, key, alphas)
        return weight * kl, (model_extra | {P: p}, {})

    return loss_fn, warmup


def _terms(params, extra, batch, rows, *, model, step):
    """The pass at θ -> (its losses and the regret, what the model keeps)."""
    logits, extra = plain.forward(params, extra, *rows, model=model, step=step)
    labels, n = batch['label'], len(batch['label'])
    terms = {
        'ce': jnp.mean(cross_entropy(logits[:n], labels)),
        'kl': jnp.mean(kl_uniform_p(logits[n:])),
        'regret': perturb.regret(logits[n:]),
        'accuracy': plain.accuracy(logits[:n], labels),
    }
    return terms, extra


def _next(p, params, extra, batch, rows, model, step, begins, sign):
    """P after this batch: its ∇R = 2 G ∇G at θ, over the rows of all devices, averaged into it."""
    images, _, labels = rows
    params = jax.lax.stop_gradient(params)

    def excess(params):
        logits, _ = plain.forward(params, extra, images, None, labels, model=model, step=step)
        return perturb.excess(logits[len(batch['label']) :])

    g, slope = jax.value_and_grad(excess)(params)
    if model.backbone.axis_name is not None:
        g, slope = jax.lax.pmean((g, slope), model.backbone.axis_name)
    p_new = perturb.direction(params, jax.tree.map(lambda x: 2.0 * g * x, slope), sign=sign)
    return perturb.average(p, p_new, first=begins)


def _kl_at(p, params, extra, batch, rows, model, step, key, alphas):
    """mean_OOD KL(U ‖ softmax f_{θ + αP}). BatchNorm's running statistics stay out of it."""
    moved = perturb.shifted(params, p, perturb.draw_alpha(key, alphas))
    logits, _ = plain.forward(moved, extra, *rows, model=model, step=step)
    return jnp.mean(kl_uniform_p(logits[len(batch['label']) :]))


def _apart(extra):
    """(what the model keeps, P)."""
    return {name: value for name, value in extra.items() if name != P}, extra[P]


def _check(sign, warmup, alphas):
    lookup(perturb.SIGNS, sign, 'sign')
    if warmup < 0:
        raise UserError(f'warmup={warmup} steps: give 0 or more.')
    if not alphas or min(alphas) < 0.0:
        raise UserError(
            f'alphas={alphas}: give the lengths that α is drawn from, as shares of each kernel '
            'from 0 on. The official code has (0.1, 0.01, 0.001, 0.0001).'
        )
