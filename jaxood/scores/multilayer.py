"""Scores that look at several layers, with Gaussians for what they find there."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxood.errors import UserError
from jaxood.scores import distance, gaussian


@struct.dataclass
class Layers:
    """A Gaussian for each stage, and the line that makes one score of their distances."""

    layers: tuple[gaussian.Gaussian, ...]
    mean: jax.Array  # float32[L], of the distances on ID images
    std: jax.Array
    weights: jax.Array
    epsilon: float = struct.field(pytree_node=False)


def fit_mds_ensemble(bank, head, *, epsilon: float = 0.0, ridge: float = 1e-6) -> Layers:
    """Class means and a tied covariance of each stage's spatial means, then weights of the layers.

    The weights are those of a logistic regression on z-scored distances of held-out ID images
    against a validation OOD set where the bank has both; else all equal. (The paper fits them, and
    ε, on the very test sets: its figures are not comparable.)

    Args:
        epsilon: input step, in units of pixels in [0, 1]. The paper chooses from 0, .0005, .001,
            .0014, .002, .005, .01. With 0 no gradient is taken.
        ridge: as for `mds`.
    """
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - takes a second
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415

    gaussian.check_labels(bank)
    moments, at = None, 0
    for means in bank['map'](lambda outputs, head: _pooled(outputs['maps'])):
        if moments is None:
            classes = head['kernel'].shape[1]
            moments = [gaussian.Moments(classes, h.shape[1]) for h in means]
        labels = bank['labels'][at : at + len(means[0])]
        at += len(labels)
        for layer, h in zip(moments, means):
            layer.add(h, labels)
    gaussian.check_classes(moments[0].counts, 'they are left out of the nearest mean')
    layers = tuple(
        gaussian.gaussian(m.means(), m.tied(), ridge, f"Stage {i}'s covariance")
        for i, m in enumerate(moments)
    )
    params = Layers(layers, *3 * [jnp.ones(len(layers))], epsilon)

    distances = lambda *args: _distances(params, *args)  # one object, compiled once

    def distances_of(some):
        return np.concatenate(list(some['map'](distances)))

    held_out = distances_of(bank.get('validation', bank))
    scaler = StandardScaler().fit(held_out)
    weights = np.ones(len(layers))
    if 'validation' in bank and 'validation_ood' in bank:
        outlying = distances_of(bank['validation_ood'])
        is_ood = np.repeat([0, 1], [len(held_out), len(outlying)])
        rows = scaler.transform(np.concatenate([held_out, outlying]))
        balanced = LogisticRegression(class_weight='balanced', max_iter=1000)
        weights = balanced.fit(rows, is_ood).coef_[0]
    line = (jnp.asarray(x, jnp.float32) for x in (scaler.mean_, scaler.scale_, weights))
    return Layers(layers, *line, epsilon)


def mds_ensemble(params: Layers, outputs, head):
    """Σ_l w_l M^l(x̃_l), M^l = min_c (f_l - μ_c^l)ᵀ Σ_l⁻¹ (f_l - μ_c^l), z-scored by ID images.

    Lee et al. 2018 (arXiv:1807.03888), Algorithm 1; f_l is the spatial mean of stage l's map. Each
    layer has its own step towards higher confidence, x̃_l = x - ε sign(∇_x M^l) / σ.
    """
    distances = _distances(params, outputs, head)
    return jnp.sum(params.weights * (distances - params.mean) / params.std, axis=1)


def _distances(params, outputs, head):
    """M^l(x̃_l), float32[B, L]."""
    if params.epsilon == 0:
        means = _pooled(outputs['maps'])
        found = [gaussian.squared_distance(g, h) for g, h in zip(params.layers, means)]
        return jnp.stack(found, axis=1)
    network, images = head['network'], outputs['images']

    def distance_at(l, images):
        h = _pooled(network.forward(images)['maps'])[l]
        return gaussian.squared_distance(params.layers[l], h)

    def stepped(l):
        slope = jax.grad(lambda x: jnp.sum(distance_at(l, x)))(images)
        return distance_at(l, images - params.epsilon * jnp.sign(slope) / network.std)

    return jnp.stack([stepped(l) for l in range(len(params.layers))], axis=1)


def _pooled(maps):
    return tuple(jnp.mean(m.astype(jnp.float32), axis=(1, 2)) for m in maps)


# ---- CombOOD ----------------------------------------------------------------------------------


@struct.dataclass
class Combined:
    """KNN's bank, and the extremes' way to their Gaussian: z-score, Yeo-Johnson, z-score."""

    neighbours: distance.Neighbours
    mean: jax.Array  # float32[E], as what follows
    std: jax.Array
    power: jax.Array  # λ
    mean_after: jax.Array
    std_after: jax.Array
    extremes: gaussian.Gaussian


def fit_combood(bank, head, *, k: int = 50, ridge: float = 1.0) -> Combined:
    """KNN's bank, and a Gaussian of the extremes: min and max of what enters each ReLU, of logits.

    Like KNN's, its memory grows with the training set.

    Args:
        k: which neighbour (50 in the official code).
        ridge: added to the covariance, whose diagonal is 1 (official code).
    """
    from sklearn.preprocessing import PowerTransformer, StandardScaler  # noqa: PLC0415

    if ridge < 0:
        raise UserError(f'ridge={ridge} must not be negative (1 in the official code).')
    neighbours = distance.fit_knn(bank, head, k=k)
    extremes = np.concatenate(list(bank['map'](_extremes))).astype(np.float64)
    if 'is_outlier' in bank:
        extremes = extremes[~np.asarray(bank['is_outlier'], bool)]
    before, after = StandardScaler(), StandardScaler()
    yeo_johnson = PowerTransformer(standardize=False)
    x = after.fit_transform(yeo_johnson.fit_transform(before.fit_transform(extremes)))
    covariance = np.cov(x, rowvar=False)
    relative = ridge * len(covariance) / np.trace(covariance)
    origin = np.zeros((1, len(covariance)))
    fitted = gaussian.gaussian(origin, covariance, relative, "The extremes' covariance")
    steps = before.mean_, before.scale_, yeo_johnson.lambdas_, after.mean_, after.scale_
    return Combined(neighbours, *(jnp.asarray(a, jnp.float32) for a in steps), fitted)


def combood(params: Combined, outputs, head):
    """d log r_k + M², r_k KNN's distance, d the number of features, M² that of the extremes.

    Rajasekaran et al. 2024 (CombOOD): log-densities of a nearest-neighbour and of a Gaussian model,
    the latter of one number pair a ReLU and the logits' extremes. (The official code gives faiss's
    squared distance to the logarithm, which doubles the first term.)
    """
    r = distance.knn(params.neighbours, outputs, head)
    d = outputs['features'].shape[1]
    x = (_extremes(outputs, head) - params.mean) / params.std
    x = (_yeo_johnson(x, params.power) - params.mean_after) / params.std_after
    return d * jnp.log(jnp.maximum(r, 1e-12)) + gaussian.squared_distance(params.extremes, x)


def _extremes(outputs, head):
    """float32[B, 2 R + 2]: minimum and maximum of what enters each ReLU, and of the logits."""
    entering = head['network'].forward(outputs['images'])['relus']
    if not entering:
        raise UserError('CombOOD reads what enters the ReLUs, and this network has none.')
    flat = [x.reshape(len(x), -1) for x in (*entering, outputs['logits'])]
    return jnp.stack([f(x, axis=1) for x in flat for f in (jnp.min, jnp.max)], axis=1)


def _yeo_johnson(x, power):
    """((1 + x)^λ - 1) / λ for x >= 0, -((1 - x)^(2 - λ) - 1) / (2 - λ) below; Yeo & Johnson 2000.

    The limits at λ = 0 and 2 are logarithms.
    """
    exponent = jnp.where(x >= 0, power, 2.0 - power)
    log = jnp.log1p(jnp.abs(x))
    straight = jnp.abs(exponent) < 1e-6
    size = jnp.where(straight, log, jnp.expm1(exponent * log) / jnp.where(straight, 1.0, exponent))
    return jnp.sign(x) * size
