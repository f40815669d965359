"""How public checkpoints name their arrays, and how the images behind them were prepared.

A `Layout` is one code base's naming of one architecture; every file in `backbones/` lists those of
its network. `pretrained` goes through them all to recognise a checkpoint and to convert it, name by
name: what is missing, unused or of another shape is an error.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]  # array name -> shape, prefixes such as 'module.' stripped


class Preprocessing(NamedTuple):
    """What happens to a picture before the network sees it.

    Attributes:
        size: pixels a side that the network sees.
        resize: the short side is brought to this first, then the middle `size` x `size` is cut out;
            None: to `size` itself.
        interpolation: 'bilinear' or 'bicubic', antialiased.
        mean, std: one a channel, of pixels in [0, 1].
    """

    size: int
    resize: int | None
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Target(NamedTuple):
    """Where one array of a checkpoint goes.

    Attributes:
        path: into our variables, e.g. 'params/backbone/conv1/kernel', 'params/head/bias',
            'batch_stats/backbone/bn1/mean'.
        convert: their array -> ours.
    """

    path: str
    convert: Callable[[np.ndarray], np.ndarray]


class Layout(NamedTuple):
    """One code base's names for one architecture.

    Attributes:
        source: whose, e.g. 'hendrycks/outlier-exposure'.
        backbone: a key of `BACKBONES`.
        recognise: shapes -> the backbone's keywords (depth, width ...), or None if names or ranks
            are not this layout's. It looks at enough to tell the layout, not at every array.
        targets: (keywords, shapes) -> name of theirs -> `Target`, for every array the architecture
            has, head included. `shapes` is only for what the keywords don't say.
        preprocessing: number of classes -> `Preprocessing`, from the source's own code.
        ignored: names (regular expressions, full match) that may be there and are not used.
    """

    source: str
    backbone: str
    recognise: Callable[[Shapes], dict[str, Any] | None]
    targets: Callable[[dict[str, Any], Shapes], dict[str, Target]]
    preprocessing: Callable[[int], Preprocessing]
    ignored: tuple[str, ...] = (r'.*num_batches_tracked',)


def conv(array: np.ndarray) -> np.ndarray:
    """PyTorch's OIHW -> Flax's HWIO; a depthwise [C, 1, h, w] -> [h, w, 1, C]."""
    return array.transpose(2, 3, 1, 0)


def linear(array: np.ndarray) -> np.ndarray:
    """PyTorch's [out, in] -> Flax's [in, out]."""
    return array.T


def same(array: np.ndarray) -> np.ndarray:
    """Vectors, and what both lay out alike."""
    return array


def batch_norm(theirs: str, ours: str) -> dict[str, Target]:
    """The four arrays of a BatchNorm: `theirs` e.g. 'layer1.0.bn1', `ours` below 'backbone/'."""
    return {
        f'{theirs}.weight': Target(f'params/backbone/{ours}/scale', same),
        f'{theirs}.bias': Target(f'params/backbone/{ours}/bias', same),
        f'{theirs}.running_mean': Target(f'batch_stats/backbone/{ours}/mean', same),
        f'{theirs}.running_var': Target(f'batch_stats/backbone/{ours}/var', same),
    }


def head(theirs: str) -> dict[str, Target]:
    """The two arrays of the last linear layer, e.g. 'fc'."""
    return {
        f'{theirs}.weight': Target('params/head/kernel', linear),
        f'{theirs}.bias': Target('params/head/bias', same),
    }


def cifar(mean: tuple[float, ...], std: tuple[float, ...]) -> Preprocessing:
    """32 x 32 pixels; larger pictures as the benchmarks' code shrinks them: short side, middle."""
    return Preprocessing(size=32, resize=32, interpolation='bilinear', mean=mean, std=std)


def openood(num_classes: int) -> Preprocessing:
    """CIFAR-100's constants for 100 classes, else CIFAR-10's (evaluation_api/preprocessor.py)."""
    if num_classes == 100:
        return cifar((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    return cifar((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def count(shapes: Shapes, pattern: str) -> int:
    """How many of pattern.format(0), pattern.format(1), ... there are, without a gap."""
    return next(i for i in itertools.count() if pattern.format(i) not in shapes)


def kernel(ours: str) -> Target:
    """A convolution's kernel: `ours` below 'backbone/'."""
    return Target(f'params/backbone/{ours}/kernel', conv)
