"""Training methods. `DETECTORS` is the table of contents.

An entry is `Detector(loss_fn, init_extra, uses_outliers)`:

    loss_fn(params, extra, batch, key, *, model, step, prepare, **keywords)
        -> (loss, (extra, metrics))
    init_extra(variables) -> extra

`variables` is what the model's `init` returns; `extra` is what a step carries along beside the
parameters. `batch` has `image` uint8[B, H, W, C], `label` int32[B] and `index` int32[B], and
`outlier_image` uint8[M, H, W, C] and `outlier_index` int32[M] for the methods that read outliers.
`key` is the step's key; each row's randomness follows its index. `model` is a `Classifier`,
`prepare(images uint8, keys) -> float` augments and normalises. The config's keywords go to
`loss_fn`. `metrics` are scalars: `loss`, its terms, `accuracy`.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxood.detectors import oe, plain


class Detector(NamedTuple):
    loss_fn: Callable
    init_extra: Callable
    uses_outliers: bool


DETECTORS = {
    'plain': Detector(plain.loss_fn, plain.init_extra, uses_outliers=False),
    'oe': Detector(oe.loss_fn, plain.init_extra, uses_outliers=True),
}
