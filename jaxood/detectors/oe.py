"""Outlier exposure: cross-entropy on ID images, a uniform output on outliers."""

import jax.numpy as jnp

from jaxood.detectors.plain import accuracy, forward, stream
from jaxood.errors import lookup
from jaxood.losses.detection import UNIFORMITY, cross_entropy
from jaxood.rng import key_for


def loss_fn(
    params,
    extra,
    batch,
    key,
    *,
    model,
    step,
    prepare,
    weight: float = 0.5,
    direction: str = 'u_p',
):
    """L = mean_ID CE(z(x), y) + weight · mean_OOD KL(U ‖ softmax z(x')).

    Hendrycks et al. 2019 (arXiv:1812.04606), Eq. 1 and Sec. 3, with weight .5 (official code); its
    loss is this one plus the constant weight · log C. Metric-mixup (arXiv:2405.00631) with γ =
    weight and a head with a margin. Each term is a mean over its own stream. ID rows and outliers
    go through the network in one batch, so BatchNorm sees the mixture (official code); two passes
    make another and worse model.

    Args:
        direction: 'u_p' for KL(U ‖ p), 'p_u' for KL(p ‖ U).
    """
    uniformity = lookup(UNIFORMITY, direction, 'direction')
    logits, extra = forward(params, extra, *mixture(batch, key, prepare), model=model, step=step)
    labels, n = batch['label'], len(batch['label'])
    ce = jnp.mean(cross_entropy(logits[:n], labels))
    kl = jnp.mean(uniformity(logits[n:]))
    loss = ce + weight * kl
    metrics = {'loss': loss, 'ce': ce, 'kl': kl, 'accuracy': accuracy(logits[:n], labels)}
    return loss, (extra, metrics)


def mixture(batch, key, prepare):
    """Both streams as one batch, ID rows first -> (prepared images, dropout's keys, labels).

    Outliers have label -1: no target.
    """
    images, keys = stream(batch['image'], batch['index'], key_for(key, 'id'), prepare)
    outliers, outlier_keys = stream(
        batch['outlier_image'], batch['outlier_index'], key_for(key, 'outliers'), prepare
    )
    no_target = jnp.full(len(outliers), -1, batch['label'].dtype)
    return (
        jnp.concatenate([images, outliers]),
        jnp.concatenate([keys, outlier_keys]),
        jnp.concatenate([batch['label'], no_target]),
    )
