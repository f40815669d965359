"""A head of its own says "outlier or not": SD-outliers' three heads, Fake-it's one."""

import jax
import jax.numpy as jnp

from jaxood.detectors.plain import accuracy, apply, stream
from jaxood.errors import UserError
from jaxood.losses.detection import three_head
from jaxood.models.heads import branch
from jaxood.rng import key_for


def loss_fn(params, extra, batch, key, *, model, step, prepare, weight: float = 0.5):
    """L = mean over all rows of CE(g_bin, I) + (1 - I) CE(g_in, ỹ) + I λ CE(g_out, ỹ).

    Yoon et al., SD-outliers (poster): I = 1 for outliers. The third term asks a head of its own for
    the class of the image that an outlier was made of: the features must still tell it, but less
    loudly. Outliers that come from no image (label -1: noise, label mixtures) have no such term. A
    row of the outliers' stream with `outlier_is_id`, an image led to its own class, is an ID row.

    Args:
        weight: λ in (0, 1); .5 is our choice, the poster has no number.
    """
    if not 0.0 <= weight <= 1.0:
        raise UserError(f'weight={weight} (λ) must lie between 0 and 1.')
    rows, extra = _forward(params, extra, batch, key, model=model, step=step, prepare=prepare)
    terms = three_head(rows['bin'], rows['in'], rows['out'], rows['label'], rows['outlier'])
    losses = terms['bin'] + terms['in'] + weight * terms['out']
    loss = jnp.mean(losses)
    metrics = {name: jnp.mean(term) for name, term in terms.items()}
    n = len(batch['label'])
    metrics |= {'loss': loss, 'accuracy': accuracy(rows['in'][:n], batch['label'])}
    return loss, (extra, metrics | _binary(rows))


def two_way(params, extra, batch, key, *, model, step, prepare):
    """L = mean CE(g_bin, I): real or not, and no classes at all.

    Mirzaei et al. 2022, "Fake It Until You Make It" (arXiv:2201.12196), Sec. 3, whose fakes come
    from an early snapshot of the generator; the score is a distance of features.
    """
    rows, extra = _forward(params, extra, batch, key, model=model, step=step, prepare=prepare)
    loss = jnp.mean(three_head(rows['bin'], None, None, rows['label'], rows['outlier'])['bin'])
    return loss, (extra, {'loss': loss} | _binary(rows))


def _forward(params, extra, batch, key, *, model, step, prepare):
    """Both streams in one batch -> logits `bin`, `in`, `out`, and each row's `label`, `outlier`."""
    images, keys = stream(batch['image'], batch['index'], key_for(key, 'id'), prepare)
    outliers, outlier_keys = stream(
        batch['outlier_image'], batch['outlier_index'], key_for(key, 'outliers'), prepare
    )
    none = jnp.zeros(len(outliers), bool)
    labels = jnp.concatenate([batch['label'], batch.get('outlier_label', none - 1)])
    is_id = jnp.concatenate([jnp.ones(len(images), bool), batch.get('outlier_is_id', none)])
    outputs, extra = apply(
        params,
        extra,
        jnp.concatenate([images, outliers]),
        jnp.concatenate([keys, outlier_keys]),
        jnp.where(is_id, labels, -1),  # a margin is for ID rows
        model=model,
        step=step,
    )
    heads = {k: branch(params['head'], k, outputs['features']) for k in ('bin', 'out')}
    return heads | {'in': outputs['logits'], 'label': labels, 'outlier': ~is_id}, extra


def _binary(rows):
    right = jnp.argmax(rows['bin'], axis=-1) == rows['outlier']
    return {'bin_accuracy': jnp.mean(jax.lax.stop_gradient(right.astype(jnp.float32)))}
