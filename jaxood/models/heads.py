"""Classification heads: `(features [B, D], labels int32[B] or None, step) -> logits [B, K]`.

With `labels`, a head may put its margin on the target's logit; a row with label -1 has no target
and hence no margin (outliers, which share the ID rows' forward pass). Without, the logits are those
of inference. State that is not a parameter goes into a variable of another collection. Logits are
float32 whatever the features are.

A head takes `num_classes` and `axis_name` (of the pmap axis over which a batch is spread) beside
its own keywords, and refuses those out of range when it is made. Its parameters are `kernel` [D, K]
and, unless it is angular, `bias` [K]. Of an angular head's w_k only the direction counts; θ_k is
its angle with h. Formulas, their sources and ranges are in `losses.margin`.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxood.errors import UserError
from jaxood.losses import margin as margins


class Linear(nn.Module):
    """z = Wᵀh + b: the plain softmax head, without a margin.

    W ~ U(±1/√D), PyTorch's default; b = 0, as hendrycks/outlier-exposure (official code) sets it.
    """

    num_classes: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, features, labels=None, step=0):
        shape = (features.shape[-1], self.num_classes)
        uniform = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
        kernel = self.param('kernel', uniform, shape, jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, shape[1:], jnp.float32)
        return jnp.dot(features, kernel, precision=jax.lax.Precision.HIGHEST) + bias


class ThreeHeads(nn.Module):
    """g_in, a plain linear head, which makes the logits; g_bin and g_out beside it (`branch`).

    Yoon et al., SD-outliers (poster): linear heads of 2, C and C outputs on the same features.
    """

    num_classes: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, features, labels=None, step=0):
        uniform = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
        for name, width in (('bin_', 2), ('out_', self.num_classes), ('', self.num_classes)):
            shape = (features.shape[-1], width)
            kernel = self.param(f'{name}kernel', uniform, shape, jnp.float32)
            bias = self.param(f'{name}bias', nn.initializers.zeros, shape[1:], jnp.float32)
        return jnp.dot(features, kernel, precision=jax.lax.Precision.HIGHEST) + bias


def branch(params: Mapping[str, jax.Array], name: str, features: jax.Array) -> jax.Array:
    """Logits of g_bin ('bin', float32[B, 2]) or g_out ('out', float32[B, C]) of `ThreeHeads`."""
    kernel, bias = params[f'{name}_kernel'], params[f'{name}_bias']
    return jnp.dot(features, kernel, precision=jax.lax.Precision.HIGHEST) + bias


class Projection(nn.Module):
    """W2 ReLU(W1 h): what SimCLR compares (arXiv:2002.05709, Sec. 2.1). No head of a classifier.

    Attributes:
        num_classes: entries of the projection, 128 in SCAN's official code; there as many hidden
            units as features.
    """

    num_classes: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, features, labels=None, step=0):
        hidden = nn.relu(nn.Dense(features.shape[-1], name='hidden')(features))
        return nn.Dense(self.num_classes, name='out')(hidden)


class NormFace(nn.Module):
    """z_k = s cos θ_k, without a margin. Wang et al. 2017 (arXiv:1704.06369), Eq. 6.

    Attributes:
        scale: s > 0. 30 is our choice for all heads that have one, where the face papers have 64.
            The loss cannot fall below log(1 + (K-1) exp(-s K / (K-1))).
    """

    num_classes: int
    scale: float = 30.0
    axis_name: str | None = None

    def __post_init__(self):
        _check_scale(self.scale)
        super().__post_init__()

    @nn.compact
    def __call__(self, features, labels=None, step=0):
        return self.scale * _cosines(self, features)


class CosFace(nn.Module):
    """z_y = s (cos θ_y - m), the others s cos θ_k. `margin.cosface`.

    Attributes:
        scale: s > 0.
        margin: m in [0, 2), .35 in the paper.
    """

    num_classes: int
    scale: float = 30.0
    margin: float = 0.35
    axis_name: str | None = None

    def __post_init__(self):
        _check_scale(self.scale)
        _check_margin(self.margin, 0.0, 2.0, '0.35')
        super().__post_init__()

    @nn.compact
    def __call__(self, features, labels=None, step=0):
        formula = functools.partial(margins.cosface, margin=self.margin)
        return self.scale * margins.on_target(_cosines(self, features), labels, formula)


class ArcFace(nn.Module):
    """z_y = s cos(θ_y + m), the others s cos θ_k. `margin.arcface`.

    Attributes:
        scale: s > 0.
        margin: m in [0, π/2), .5 in the paper.
        easy: `margin.arcface_easy` instead, with a margin at θ_y < π/2 alone.
    """

    num_classes: int
    scale: float = 30.0
    margin: float = 0.5
    easy: bool = False
    axis_name: str | None = None

    def __post_init__(self):
        _check_scale(self.scale)
        _check_margin(self.margin, 0.0, math.pi / 2, '0.5 radians')
        super().__post_init__()

    @nn.compact
    def __call__(self, features, labels=None, step=0):
        formula = margins.arcface_easy if self.easy else margins.arcface
        formula = functools.partial(formula, margin=self.margin)
        return self.scale * margins.on_target(_cosines(self, features), labels, formula)


class SphereFace(nn.Module):
    """z_y = ‖h‖ (λ cos θ_y + ψ(θ_y)) / (1 + λ), the others ‖h‖ cos θ_k: A-Softmax.

    `margin.annealed_psi`; λ falls with the step (`margin.annealing`). The features' length is the
    scale.

    Attributes:
        margin: m, a whole number from 1 on; 4 in the paper.
    """

    num_classes: int
    margin: int = 4
    axis_name: str | None = None

    def __post_init__(self):
        if not isinstance(self.margin, int) or self.margin < 1:
            raise UserError(
                f'margin={self.margin} must be a whole number of at least 1 (usual: 4). '
                'sphereface_norm takes fractions.'
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, features, labels=None, step=0):
        weight = margins.annealing(step)
        formula = functools.partial(margins.annealed_psi, margin=self.margin, weight=weight)
        cos = margins.on_target(_cosines(self, features), labels, formula)
        return margins.length(features, 1) * cos


class SphereFaceNorm(nn.Module):
    """z_y = s cos(m θ_y), the others s cos θ_k. `margin.sphereface_norm`.

    Attributes:
        scale: s > 0.
        margin: m in [1, 2), 1.35 in ArcFace's experiments (arXiv:1801.07698, Table 2).
    """

    num_classes: int
    scale: float = 30.0
    margin: float = 1.35
    axis_name: str | None = None

    def __post_init__(self):
        _check_scale(self.scale)
        _check_margin(self.margin, 1.0, 2.0, '1.35')
        super().__post_init__()

    @nn.compact
    def __call__(self, features, labels=None, step=0):
        formula = functools.partial(margins.sphereface_norm, margin=self.margin)
        return self.scale * margins.on_target(_cosines(self, features), labels, formula)


class AdaCos(nn.Module):
    """z_k = s cos θ_k with a scale that needs no tuning, and no margin.

    s = √2 log(K - 1) (`margin.adacos_fixed`), or from there on as each training batch asks
    (`margin.adacos_dynamic`). The latter is the variable `scale` of the collection 'adacos': it
    changes when labels are given and the collection is mutable, before the logits are computed.

    Attributes:
        dynamic: whether the scale follows the batches.
    """

    num_classes: int  # from 3 on
    dynamic: bool = True
    axis_name: str | None = None

    @nn.compact
    def __call__(self, features, labels=None, step=0):
        cos, fixed = _cosines(self, features), margins.adacos_fixed(self.num_classes)
        if not self.dynamic:
            return fixed * cos
        scale = self.variable('adacos', 'scale', jnp.float32, fixed)
        learns = self.is_mutable_collection('adacos') and not self.is_initializing()
        if labels is not None and learns:
            rows = (cos, labels)
            if self.axis_name is not None:  # a median of medians is another one
                rows = jax.lax.all_gather(rows, self.axis_name, tiled=True)
            scale.value = margins.adacos_dynamic(*rows, scale.value)
        return scale.value * cos


def last_layer(params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """`kernel` [D, K] and `bias` [K] as scores read them, from a head's parameters.

    Wᵀh + b are the logits of a linear head. Of an angular one, W has unit columns and b = 0: then
    they are ‖h‖ cos θ_k, which are SphereFace's logits and those of normalised heads times ‖h‖ / s.
    Scores that compute logits anew, of reshaped features say, have that for them (our choice).
    """
    if 'bias' in params:
        return {name: params[name] for name in ('kernel', 'bias')}
    kernel = margins.unit(jnp.asarray(params['kernel']), 0)
    return {'kernel': kernel, 'bias': jnp.zeros(kernel.shape[1])}


def _cosines(module, features):
    """cos θ_k with the module's own w_k ~ N(0, 1/D): any direction, lengths near 1 (our choice)."""
    normal = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')
    shape = (features.shape[-1], module.num_classes)
    return margins.cosines(features, module.param('kernel', normal, shape, jnp.float32))


def _check_scale(scale):
    if not 0.0 < scale < math.inf:
        raise UserError(f'scale={scale} must be above 0 (usual: 10 to 64).')


def _check_margin(margin, low, high, usual):
    if not low <= margin < high:
        raise UserError(
            f'margin={margin} must be at least {low:g} and below {high:.4g} (usual: {usual}).'
        )


HEADS = {
    'linear': Linear,
    'three': ThreeHeads,
    'normface': NormFace,
    'cosface': CosFace,
    'arcface': ArcFace,
    'sphereface': SphereFace,
    'sphereface_norm': SphereFaceNorm,
    'adacos': AdaCos,
}
