"""Energy-bounded outlier exposure: ID images get low energies, outliers high ones."""

import jax.numpy as jnp

from jaxood.detectors.oe import mixture
from jaxood.detectors.plain import accuracy, forward
from jaxood.errors import UserError
from jaxood.losses.detection import cross_entropy, energy_hinge


def loss_fn(
    params,
    extra,
    batch,
    key,
    *,
    model,
    step,
    prepare,
    weight: float = 0.1,
    m_in: float = -23.0,
    m_out: float = -5.0,
):
    """L = mean_ID CE + weight · (mean_ID max(0, E - m_in)² + mean_OOD max(0, m_out - E)²).

    Liu et al. 2020 (arXiv:2010.03759), Eq. 7 and 8; weight, and one pass of both streams, as in its
    official code (wetliu/energy_ood). Meant for a classifier that is trained already.

    Args:
        m_in, m_out: the margins of its CIFAR-10 runs; for CIFAR-100 they are -27 and -5. Energies
            fall with the logits' size, so another network or head may need others.
    """
    if not m_in < m_out:
        raise UserError(
            f'm_in={m_in} must lie below m_out={m_out}: ID energies are to end up under the one, '
            'those of outliers over the other.'
        )
    images, keys, labels = mixture(batch, key, prepare)
    logits, extra = forward(params, extra, images, keys, labels, model=model, step=step)
    n = len(batch['label'])
    ce = jnp.mean(cross_entropy(logits[:n], labels[:n]))
    hinge = energy_hinge(logits, jnp.arange(len(labels)) >= n, m_in=m_in, m_out=m_out)
    inside, outside = jnp.mean(hinge[:n]), jnp.mean(hinge[n:])
    loss = ce + weight * (inside + outside)
    metrics = {'loss': loss, 'ce': ce, 'energy_in': inside, 'energy_out': outside}
    return loss, (extra, metrics | {'accuracy': accuracy(logits[:n], labels[:n])})
