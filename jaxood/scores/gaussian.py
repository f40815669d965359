"""Scores from means and covariances of the penultimate features h, float64 up to the scoring.

Moments are summed chunk by chunk on the host, so a fit's memory does not depend on the number of
training images.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from scipy import linalg, sparse

from jaxood import console
from jaxood.errors import UserError
from jaxood.scores import logit, streaming

_RIDGE = 1e-6  # what a singular covariance gets where none was asked for
_ROUNDING = 1e-10  # a pivot this small beside tr(Σ)/d is rounding, not a variance
_HIGHEST = jax.lax.Precision.HIGHEST


class Moments:
    """Counts, class sums Σ h and raw second moments Σ h hᵀ, in float64."""

    def __init__(self, classes: int, dim: int):
        self.counts = np.zeros(classes, np.int64)
        self.sums = np.zeros((classes, dim))
        self.second = np.zeros((dim, dim))

    def add(self, h: np.ndarray, labels: np.ndarray) -> None:
        h = np.asarray(h, np.float64)
        self.second += h.T @ h
        add_by_class(self.counts, self.sums, h, labels)

    def means(self) -> np.ndarray:
        """float64[C', D] of the C' classes that have examples."""
        there = self.counts > 0
        return self.sums[there] / self.counts[there, None]

    def tied(self) -> np.ndarray:
        """Σ = 1/N Σ_i (h_i - μ_{y_i})(h_i - μ_{y_i})ᵀ, one covariance of class-centred features."""
        means, weights = self.means(), self.counts[self.counts > 0, None]
        return (self.second - means.T @ (weights * means)) / self.counts.sum()

    def background(self) -> tuple[np.ndarray, np.ndarray]:
        """(h̄, Σ_0), mean and covariance of all features, the same 1/N."""
        mean = self.sums.sum(axis=0) / self.counts.sum()
        return mean, self.second / self.counts.sum() - np.outer(mean, mean)


def add_by_class(counts: np.ndarray, sums: np.ndarray, h: np.ndarray, labels: np.ndarray) -> None:
    """Adds float64[N, D] to `sums` [C, D] and `counts` [C], in place."""
    labels = np.asarray(labels)
    if len(h) and not 0 <= labels.min() <= labels.max() < len(counts):
        raise UserError(
            f'Labels go from {labels.min()} to {labels.max()}, but the head has {len(counts)} '
            'classes. The training set is not the one that this network was trained on.'
        )
    at = labels, np.arange(len(h))
    sums += sparse.csr_array((np.ones(len(h)), at), shape=(len(counts), len(h))) @ h
    counts += np.bincount(labels, minlength=len(counts))


def check_classes(counts: np.ndarray, consequence: str) -> None:
    """Says which classes have no example, and what follows."""
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        shown = ', '.join(map(str, empty[:10])) + (', ...' if len(empty) > 10 else '')
        console.say(f'No training image of {len(empty)} classes ({shown}): {consequence}.')


def check_labels(bank) -> None:
    if 'labels' not in bank:
        raise UserError('This score needs the labels of its training images, and has none.')


def check_head(bank, head) -> None:
    """Features must be what enters the head."""
    D, D_head = bank['features'].shape[1], len(head['kernel'])
    if D_head != D:
        raise UserError(
            f"The features have {D} entries, but the head's kernel takes {D_head}: features and "
            'head are of two networks. Compute the features again with these weights.'
        )


@struct.dataclass
class Gaussian:
    """A covariance as its whitening, h -> (h - centre) L⁻ᵀ with Σ = L Lᵀ, and whitened means."""

    centre: jax.Array  # float32[D]
    whiten: jax.Array  # float32[D, D]
    means: jax.Array  # float32[C, D]


def gaussian(means: np.ndarray, covariance: np.ndarray, ridge: float, what: str) -> Gaussian:
    """float64[C, D], [D, D] -> Gaussian, with ridge · tr(Σ)/d · I added to Σ."""
    if ridge < 0:
        raise UserError(f'ridge={ridge} must not be negative (1e-6 is usual, 0 for none).')
    centre = means.mean(axis=0)
    whiten = _whitening(covariance, ridge, what)
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), Gaussian(centre, whiten, (means - centre) @ whiten)
    )


def _whitening(covariance, ridge, what):
    """L⁻ᵀ. Whoever asked for less ridge than a singular covariance needs is told what it got."""
    scale = np.trace(covariance) / len(covariance)
    if not scale > 0:
        raise UserError(f'{what} is zero: all its features are the same. Nothing can be fitted.')
    lower = _cholesky(covariance, ridge * scale, scale)
    if lower is None:
        console.say(
            f'{what} is singular (dead or dependent units, or fewer images than units): '
            f'{_RIDGE} of the mean variance, {_RIDGE * scale:.3g}, was added to its diagonal.'
        )
        lower = _cholesky(covariance, _RIDGE * scale, scale)
    return linalg.solve_triangular(lower, np.eye(len(lower)), lower=True).T


def _cholesky(covariance, ridge, scale):
    try:
        lower = np.linalg.cholesky(covariance + ridge * np.eye(len(covariance)))
    except np.linalg.LinAlgError:
        return None
    return lower if np.min(np.diag(lower)) ** 2 > _ROUNDING * scale else None


def squared_distance(gaussian: Gaussian, h):
    """min_c (h - μ_c)ᵀ Σ⁻¹ (h - μ_c) of float32[B, D]: one whitening, not C quadratic forms.

    The nearest mean is found by a product, and the distance then taken from that mean itself:
    ‖w‖² - 2 w·m + ‖m‖² loses what is small beside ‖m‖².
    """
    w = jnp.dot(h - gaussian.centre, gaussian.whiten, precision=_HIGHEST)
    m = gaussian.means
    further = jnp.sum(m**2, axis=1) - 2.0 * jnp.dot(w, m.T, precision=_HIGHEST)
    return jnp.sum((w - m[jnp.argmin(further, axis=1)]) ** 2, axis=1)


# ---- Mahalanobis ------------------------------------------------------------------------------


@struct.dataclass
class Mahalanobis:
    """Class Gaussians with one covariance; for RMDS the Gaussian of all features as well."""

    classes: Gaussian
    background: Gaussian | None
    normalise: bool = struct.field(pytree_node=False)


def fit_mds(bank, head, *, ridge: float = 1e-6, normalise: bool = False) -> Mahalanobis:
    """Class means and one tied covariance of class-centred features, 1/N, by label.

    Args:
        ridge: added to the diagonal, in units of the mean variance tr(Σ)/d. Our choice: features
            after a ReLU are often rank-deficient. Not neutral for a collapsed network; 0 is what
            OpenOOD and pytorch-ood 0.4.0 amount to.
        normalise: True is MDS++, the same on h/‖h‖ (Mueller & Hein 2025).
    """
    return _fit(bank, head, ridge, normalise, relative=False)


def fit_rmds(bank, head, *, ridge: float = 1e-6, normalise: bool = False) -> Mahalanobis:
    """As `fit_mds`, and one Gaussian of all features. normalise=True is RMDS++."""
    return _fit(bank, head, ridge, normalise, relative=True)


def _fit(bank, head, ridge, normalise, relative):
    check_labels(bank)
    check_head(bank, head)
    D, K = head['kernel'].shape
    moments = Moments(K, D)
    for h, labels in streaming.chunks(bank['features'], bank['labels']):
        moments.add(_unit(h.astype(np.float64), np) if normalise else h, labels)
    check_classes(moments.counts, 'they are left out of the nearest mean')
    classes = gaussian(moments.means(), moments.tied(), ridge, "The classes' covariance")
    if not relative:
        return Mahalanobis(classes, None, normalise)
    mean, covariance = moments.background()
    background = gaussian(mean[None], covariance, ridge, 'The covariance of all features')
    return Mahalanobis(classes, background, normalise)


def mds(params: Mahalanobis, outputs, head):
    """min_c M_c, M_c(h) = (h - μ_c)ᵀ Σ⁻¹ (h - μ_c). Lee et al. 2018 (arXiv:1807.03888), Eq. 2.

    In [0, ∞). Penultimate layer, no input step (`mds_ensemble` has both). Without ridge invariant
    under every invertible linear map of h, and the mean of M_y over the training set is D.
    """
    return squared_distance(params.classes, _features(params, outputs))


def rmds(params: Mahalanobis, outputs, head):
    """min_c (M_c - M_0), M_0 of one Gaussian over all features. Ren et al. 2021 (arXiv:2106.09022).

    With one class exactly 0 for every h.
    """
    h = _features(params, outputs)
    return squared_distance(params.classes, h) - squared_distance(params.background, h)


def _features(params, outputs):
    h = outputs['features'].astype(jnp.float32)
    return _unit(h, jnp) if params.normalise else h


def _unit(h, xp):
    return h / xp.maximum(xp.linalg.norm(h, axis=-1, keepdims=True), 1e-12)


# ---- ViM --------------------------------------------------------------------------------------


@struct.dataclass
class Principal:
    """Where the head's logits vanish, the directions that the features do not use, and ViM's α."""

    origin: jax.Array  # u, float32[D]
    unused: jax.Array  # orthonormal columns, float32[D, D - dim]
    alpha: float


def fit_residual(bank, head, *, dim: int | None = None) -> Principal:
    """u = -W⁺ b and the eigenvectors of 1/N Σ (h - u)(h - u)ᵀ, which is not mean-centred.

    By `eigh` in float64: float32 loses what lies below 1e-7 of the largest eigenvalue, and a
    collapsed network keeps half its spectrum there.

    Args:
        dim: of the principal space. Default as in the official code: 1000 for D >= 2048, 512 for
            D >= 768, else D / 2.
    """
    check_head(bank, head)
    W, b = np.asarray(head['kernel'], np.float64).T, np.asarray(head['bias'], np.float64)
    D = W.shape[1]
    if dim is None:
        dim = 1000 if D >= 2048 else 512 if D >= 768 else D // 2
    if not 1 <= dim < D:
        raise UserError(
            f'dim={dim} of {D} leaves no residual to score. Set dim from 1 to {D - 1} '
            f'(usual: 1000 for 2048 or more features, 512 from 768 on, else half of them).'
        )
    origin = -np.linalg.pinv(W) @ b
    second = np.zeros((D, D))
    for (h,) in streaming.chunks(bank['features']):
        h = h - origin
        second += h.T @ h
    _, vectors = np.linalg.eigh(second / len(bank['features']))  # ascending
    unused = vectors[:, : D - dim]
    return Principal(jnp.asarray(origin, jnp.float32), jnp.asarray(unused, jnp.float32), 1.0)


def fit_vim(bank, head, *, dim: int | None = None) -> Principal:
    """As `fit_residual`, and α = mean of max z over mean of ‖P^⊥ (h - u)‖ on the training set.

    Args:
        dim: as there. OpenOOD tries 256 and 1000 on validation data.
    """
    params = fit_residual(bank, head, dim=dim)
    origin, unused = (np.asarray(x, np.float64) for x in (params.origin, params.unused))
    length = top = 0.0
    for h, z in streaming.chunks(bank['features'], bank['logits']):
        length += np.linalg.norm((h - origin) @ unused, axis=1).sum()
        top += z.max(axis=1).sum(dtype=np.float64)
    if not length > 0:
        raise UserError(
            f'All training features lie in {unused.shape[0] - unused.shape[1]} dimensions or '
            'fewer: no residual is left to compare with the logits. Set a smaller dim.'
        )
    return params.replace(alpha=top / length)


def residual(params: Principal, outputs, head):
    """‖P^⊥ (h - u)‖₂, P^⊥ the projector on all but the top `dim` eigenvectors, in [0, ∞).

    Wang et al. 2022 (arXiv:2203.10807), Sec. 4.1.
    """
    h = outputs['features'].astype(jnp.float32) - params.origin
    return jnp.linalg.norm(jnp.dot(h, params.unused, precision=_HIGHEST), axis=1)


def vim(params: Principal, outputs, head):
    """α ‖P^⊥ (h - u)‖₂ - LSE(z). Wang et al. 2022 (arXiv:2203.10807), Eq. 8.

    The same order as the paper's softmax probability of the virtual logit α ‖P^⊥ (h - u)‖. Energy
    for an h in the principal space.
    """
    return params.alpha * residual(params, outputs, head) + logit.energy(outputs['logits'])
