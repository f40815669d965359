"""Training methods. `DETECTORS` is the table of contents.

An entry is `Detector(loss_fn, init_extra, uses_outliers, head, classifies, trains, first)`:

    loss_fn(params, extra, batch, key, *, model, step, prepare, **keywords)
        -> (loss, (extra, metrics))
    init_extra(variables) -> extra

`variables` is what the model's `init` returns; `extra` is what a step carries along beside the
parameters. `batch` has `image` uint8[B, H, W, C], `label` int32[B] and `index` int32[B], and
`outlier_image` uint8[M, H, W, C] and `outlier_index` int32[M] for the methods that read outliers,
with `outlier_label` int32[M] (-1: none) and `outlier_is_id` bool[M] where their strategy tells of
sources. `head` names the one head that a method trains, if it needs its own; `classifies` is False
for those whose logits mean nothing, `trains` for the network as it begins. A method that updates
the weights twice on each batch has `first(**keywords) -> (loss, step)`: the loss of the update that
goes before `loss_fn`'s from that step on (`train.loop.train_step`).
`key` is the step's key; each row's randomness follows its index. `model` is a `Classifier`,
`prepare(images uint8, keys) -> float` augments and normalises. The config's keywords go to
`loss_fn`. `metrics` are scalars: `loss`, its terms, `accuracy`.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxood.detectors import doe, energy_oe, oe, plain, three_head


class Detector(NamedTuple):
    loss_fn: Callable
    init_extra: Callable
    uses_outliers: bool
    head: str | None = None
    classifies: bool = True
    trains: bool = True
    first: Callable | None = None


DETECTORS = {
    'plain': Detector(plain.loss_fn, plain.init_extra, uses_outliers=False),
    'oe': Detector(oe.loss_fn, plain.init_extra, uses_outliers=True),
    'energy_oe': Detector(energy_oe.loss_fn, plain.init_extra, uses_outliers=True),
    'doe': Detector(doe.loss_fn, doe.init_extra, uses_outliers=True),
    'doe_alternating': Detector(doe.alternating, doe.init_extra, True, first=doe.first),
    'three_head': Detector(three_head.loss_fn, plain.init_extra, True, head='three'),
    'two_way': Detector(three_head.two_way, plain.init_extra, True, head='three', classifies=False),
    'untrained': Detector(
        plain.loss_fn, plain.init_extra, uses_outliers=False, classifies=False, trains=False
    ),
}
