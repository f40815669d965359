"""Cross-entropy on ID images; and the two steps that every detector's loss begins with."""

import jax.numpy as jnp

from jaxood.losses.detection import cross_entropy
from jaxood.rng import key_each, key_for


def init_extra(variables):
    """The model's variables that are no parameters: batch statistics, a head's own state."""
    return {name: value for name, value in variables.items() if name != 'params'}


def loss_fn(params, extra, batch, key, *, model, step, prepare):
    """Mean cross-entropy of the ID rows. Outliers in the batch are not looked at."""
    images, keys = stream(batch['image'], batch['index'], key_for(key, 'id'), prepare)
    labels = batch['label']
    logits, extra = forward(params, extra, images, keys, labels, model=model, step=step)
    ce = jnp.mean(cross_entropy(logits, labels))
    return ce, (extra, {'loss': ce, 'ce': ce, 'accuracy': accuracy(logits, labels)})


def stream(images, index, key, prepare):
    """Prepared images, and dropout's keys: both follow the example's index, not its row."""
    prepared = prepare(images, key_each(key_for(key, 'augment'), index))
    return prepared, key_each(key_for(key, 'dropout'), index)


def forward(params, extra, images, keys, labels, *, model, step):
    """One forward pass in training mode -> (logits, the new extra). Label -1: no target."""
    outputs, extra = apply(params, extra, images, keys, labels, model=model, step=step)
    return outputs['logits'], extra


def apply(params, extra, images, keys, labels, *, model, step):
    """The same -> (all outputs, the new extra)."""
    return model.apply(
        {'params': params, **extra},
        images,
        train=True,
        keys=keys,
        labels=labels,
        step=step,
        mutable=list(extra),
    )


def accuracy(logits, labels):
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)
