"""Scores that follow a gradient: of the loss in weights, images or maps."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxood.errors import UserError, lookup
from jaxood.scores import logit, shaping

_ECDF_IMAGES = 5000  # OpenOOD's number for AdaSCALE: its passes are dear, its ECDF soon settled
_NAC_IMAGES = 1000


def gradnorm(params, outputs, head):
    """-‖h‖₁ Σ_c |K p_c - 1| / T with p = softmax(z / T). Huang, Geng & Li 2021 (arXiv:2110.00218).

    The L1 norm of ∂/∂W Σ_c -log p_c in closed form (Sec. 4), so no backward pass and no batch of
    one; uniform p gives 0. (The paper's mean over classes divides by K.)
    """
    z = outputs['logits'].astype(jnp.float32) / params['temperature']
    # K p_c - 1 = (e_c - ē) / (1 + ē) with e_c = expm1(z_c - max z): exact for large T too.
    e = jnp.expm1(z - jnp.max(z, axis=-1, keepdims=True))
    mean = jnp.mean(e, axis=-1, keepdims=True)
    uneven = jnp.sum(jnp.abs(e - mean) / (1.0 + mean), axis=-1)
    length = jnp.sum(jnp.abs(outputs['features'].astype(jnp.float32)), axis=-1)
    return -length * uneven / params['temperature']


@struct.dataclass
class Odin:
    """ODIN's settings; `single` is i-ODIN."""

    temperature: float
    epsilon: float
    single: bool = struct.field(pytree_node=False)


def fit_odin(
    bank, head, *, temperature: float = 1000.0, epsilon: float = 0.0014, single: bool = False
) -> Odin:
    """Nothing to fit.

    Args:
        epsilon: step in units of pixels in [0, 1]. The paper's DenseNet has .0014 for CIFAR-10,
            tuned on each OOD test set, which is not done here.
        single: i-ODIN (OpenOOD): step only at the image entry with the largest gradient.
    """
    logit.check_temperature(temperature)
    return Odin(temperature, epsilon, single)


def odin(params: Odin, outputs, head):
    """-log max_c p_c(x̃) - log K at x̃ = x - ε sign(∇_x CE(z(x) / T, ŷ)) / σ, p = softmax(z / T).

    Liang, Li & Srikant 2018 (arXiv:1706.02690), Eq. 1-2, in [-log K, 0]. The step is taken on
    standardised images, so ε / σ is ε on pixels; where the gradient is 0 there is none. At T = 1000
    max p differs from 1/K by some 1e-3/K for each unit of a logit: 1 - max p would tie, and the
    score is log1p(mean_c expm1((z_c - max z) / T)). T = 1, ε = 0: MSP - log K.
    """
    network, T = head['network'], params.temperature

    def loss(images):
        return jnp.sum(logit.msp(network.forward(images)['logits'] / T))  # CE to the prediction

    images = outputs['images']
    gradient = jax.grad(loss)(images)
    step = jnp.sign(gradient)
    if params.single:
        flat = jnp.abs(gradient).reshape(len(images), -1)
        only = jax.nn.one_hot(jnp.argmax(flat, axis=1), flat.shape[1], dtype=images.dtype)
        step *= only.reshape(images.shape)
    z = network.forward(images - params.epsilon * step / network.std)['logits'] / T
    z = z.astype(jnp.float32)
    return jnp.log1p(jnp.mean(jnp.expm1(z - jnp.max(z, axis=-1, keepdims=True)), axis=-1))


@struct.dataclass
class AdaScale:
    """AdaSCALE's percentiles, and its shifts on held-out ID images, sorted."""

    shifts: jax.Array
    low: float
    high: float
    variant: str = struct.field(pytree_node=False)


def fit_adascale(
    bank, head, *, variant: str = 'a', low: float = 80.0, high: float = 85.0
) -> AdaScale:
    """The empirical distribution of Q' on held-out ID images, 5,000 at most (as OpenOOD).

    Args:
        variant: 'a' scales the features, 'l' the logits.
        low, high: percentiles between which an image's own lies. 80 and 85 are for an ImageNet
            ResNet-50; OpenOOD chooses for CIFAR on validation data, between 60 and 99.
    """
    lookup(_ADASCALE, variant, 'variant')
    shaping.check_percentile(low=low, high=high)
    if low > high:
        raise UserError(f'low={low} must not be above high={high}.')
    shaping.kept(len(head['kernel']), high)
    held_out = bank.get('validation', bank)
    n = len(held_out['logits'])
    rows = np.unique(np.linspace(0, n - 1, min(n, _ECDF_IMAGES)).astype(int))
    return AdaScale(
        np.sort(np.concatenate(list(held_out['map'](_shift, rows=rows)))), low, high, variant
    )


def adascale(params: AdaScale, outputs, head):
    """SCALE with each image's own percentile p = low + (1 - F(Q')) (high - low).

    Regmi 2025 (arXiv:2503.08023), constants as in OpenOOD. F is the distribution of the shift Q'
    (`_shift`) on ID images: features that a small push moves far get a low percentile, so little
    scaling. A: -LSE(W h e^r + b), L: -LSE(r² z), with r = s_1/s_2 of max(h, 0) at p. With
    low = high the first is SCALE.
    """
    h = outputs['features'].astype(jnp.float32)
    D = h.shape[1]
    F = jnp.searchsorted(params.shifts, _shift(outputs, head), side='right') / len(params.shifts)
    p = params.low + (1.0 - F) * (params.high - params.low)
    k = D - jnp.round(D * p / 100.0).astype(int)
    sums = jnp.cumsum(-jnp.sort(-jax.nn.relu(h), axis=1), axis=1)  # [:, k - 1]: of the k largest
    s_2 = jnp.take_along_axis(sums, k[:, None] - 1, axis=1)
    return _ADASCALE[params.variant](outputs, head, shaping.ratio(sums[:, -1:], s_2))


_ADASCALE = {
    'a': lambda outputs, head, r: shaping.head_energy(outputs['features'] * jnp.exp(r), head),
    'l': lambda outputs, head, r: logit.energy(outputs['logits'] * r**2),
}


def _shift(outputs, head):
    """Q' = Σ_{top 5 % of h} max(h^ε, 0) + 10 Σ_{top 1 %} |h - h^ε|: float32[B].

    h^ε are the features after .5 sign(g) is added to the 5 % of image entries with the smallest
    |g|, g = ∇_x z_ŷ. Shares of a number are rounded down, to no less than one.
    """
    network, images = head['network'], outputs['images']
    predicted = jnp.argmax(outputs['logits'], axis=1)[:, None]

    def logit_of_predicted(images):
        z = network.forward(images)['logits']
        return jnp.sum(jnp.take_along_axis(z, predicted, axis=1))

    g = jax.grad(logit_of_predicted)(images)
    flat = jnp.sort(jnp.abs(g).reshape(len(g), -1), axis=1)
    # Entries tied with the last one that counts count too: only those of no gradient tie.
    least = flat[:, _share(0.05, flat.shape[1]) - 1].reshape(-1, 1, 1, 1)
    pushed = images + 0.5 * jnp.sign(g) * (jnp.abs(g) <= least)
    h = outputs['features'].astype(jnp.float32)
    h_eps = network.forward(pushed)['features'].astype(jnp.float32)
    _, top = jax.lax.top_k(h, _share(0.05, h.shape[1]))
    topmost = top[:, : _share(0.01, h.shape[1])]
    correction = jnp.sum(jnp.take_along_axis(jax.nn.relu(h_eps), top, axis=1), axis=1)
    return correction + 10.0 * jnp.sum(
        jnp.take_along_axis(jnp.abs(h - h_eps), topmost, axis=1), axis=1
    )


def _share(share, number):
    return max(1, int(share * number))


@struct.dataclass
class Nac:
    """For each layer: bins of α F ∂L/∂F, and how well each neuron's bins are covered."""

    edges: tuple
    alpha: tuple
    coverage: tuple


def fit_nac(
    bank,
    head,
    *,
    least: tuple[float, ...] = (50.0, 100.0, 5.0, 100.0),
    bins: tuple[int, ...] = (50, 500, 50, 500),
    alpha: tuple[float, ...] = (100.0, 1000.0, 0.001, 0.001),
) -> Nac:
    """How often each neuron's state falls in each bin, over 1,000 class-balanced training images.

    The settings are those of OpenOOD's CIFAR-10 ResNet-18, for the pooled features, then the maps
    before the last from the last back; entries that the network has no map for are left out. For
    CIFAR-100: least (50, 500, 500, 5), bins (50, 1000, 50, 50), alpha (50, 10, 1, .005).

    Args:
        least: O, the count at which a bin is fully covered.
        bins: M, as OpenOOD's port counts them: M - 2 that can be reached.
        alpha: steepness of the sigmoid.
    """
    if not len(least) == len(bins) == len(alpha):
        raise UserError(
            f'least={least}, bins={bins} and alpha={alpha} have an entry for each layer: give the '
            'same number of entries.'
        )
    if min(least) <= 0 or min(bins) < 4 or min(alpha) <= 0:
        raise UserError(f'least={least} and alpha={alpha} must be above 0, bins={bins} at least 4.')
    edges = tuple(_edges(M) for M in bins)
    found = list(bank['map'](lambda *x: _binned(edges, alpha, *x), rows=_balanced(bank['labels'])))
    coverage = []
    for places, O, M in zip(map(np.concatenate, zip(*found)), least, edges):
        counts = [np.bincount(neuron, minlength=len(M) + 1) for neuron in places.T]
        coverage.append(np.minimum(np.stack(counts) / O, 1.0).astype(np.float32))
    used = len(coverage)
    return Nac(edges[:used], alpha[:used], tuple(coverage))


def nac(params: Nac, outputs, head):
    """-mean over layers and neurons of how well the image's states are covered, in [-1, 0].

    Liu et al. 2024 (arXiv:2306.02879), Eq. 2-5: the state σ(α F̄ ⊙ ∂L/∂F̄) of every neuron, the
    factors pooled over space, L = -1/K Σ_c log p_c.
    """
    places = _binned(params.edges, params.alpha, outputs, head)
    covered = [
        jnp.mean(jnp.asarray(coverage)[jnp.arange(len(coverage)), place], axis=1)
        for coverage, place in zip(params.coverage, places)
    ]
    return -jnp.mean(jnp.stack(covered), axis=0)


def _binned(edges, alpha, outputs, head):
    """The bin of each neuron of each layer, int32[B, c]; the sigmoid is in the edges."""
    layers = zip(edges, alpha, _factors(outputs, head))
    return [jnp.searchsorted(e, a * pooled, side='right') for e, a, pooled in layers]


def _factors(outputs, head):
    """F̄ ⊙ ∂L/∂F̄ of the pooled features, then of the maps before the last, backwards: [B, c].

    The gradient goes back from stage to stage, so all of them take one pass.
    """
    network, maps = head['network'], outputs['maps']
    p = jax.nn.softmax(outputs['logits'].astype(jnp.float32))
    loss = lambda z: -jnp.sum(jnp.mean(jax.nn.log_softmax(z.astype(jnp.float32)), axis=-1))
    in_features = jnp.dot(
        p - 1.0 / p.shape[1], head['kernel'].T, precision=jax.lax.Precision.HIGHEST
    )
    yield outputs['features'] * in_features
    last = len(maps) - 1
    gradient = jax.grad(lambda F: loss(network.resume(last, F)['logits']))(maps[last])
    for stage in reversed(range(last)):
        _, back = jax.vjp(lambda F, i=stage: network.resume(i, F)['maps'][0], maps[stage])
        (gradient,) = back(gradient)
        space = tuple(range(1, gradient.ndim - 1))
        yield jnp.mean(maps[stage], axis=space) * jnp.mean(gradient, axis=space)


def _edges(M):
    """The M - 3 edges between the bins of OpenOOD's port (of copies of it; the repository of the
    paper was seen with equal bins), through the sigmoid's inverse.

    On (0, ½) they are log_1000 of M/2 equal steps from 1 to √1000, on (½, 1) their mirror image: up
    to 30 times finer around ½, where a neuron without influence lies. Comparing α F ∂L/∂F with
    logit(edge) is comparing the state with the edge, without rounding.
    """
    lower = np.log(np.linspace(1.0, np.sqrt(1000.0), M // 2)[1:-1]) / np.log(1000.0)
    lower = np.log(lower / (1.0 - lower))
    return np.concatenate([lower, [0.0], -lower[::-1]]).astype(np.float32)


def _balanced(labels):
    """The rows of the first images of each class, as many of each, 1,000 in all if there are."""
    labels = np.asarray(labels)
    classes = np.unique(labels)
    each = max(1, _NAC_IMAGES // len(classes))
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:each] for c in classes]))
