"""The forward pass of pretrained classifiers, beside PyTorch on the same weights."""

import os

import jax
import numpy as np

from jaxood.bench import measure
from jaxood.models import pretrained


def rows(flags):
    batch = flags.batch or 256
    for path in flags.weights:
        found = pretrained.load(path)
        model, size = found.build(), found.preprocessing.size
        channels = len(found.preprocessing.mean)
        x = np.random.default_rng(0).normal(size=(batch, size, size, channels)).astype(np.float32)
        forward = jax.jit(lambda v, x, model=model: model.apply(v, x, train=False)['logits'])
        variables = jax.device_put(found.variables)
        yield measure.speed(
            f'{os.path.basename(path)} ({found.backbone["name"]})',
            batch,
            measure.call(forward, variables, x),
            _torch_forward(path, found, x),
            flags.rounds,
            peer='PyTorch, channels last',
            flops=measure.flops(forward, variables, x),
        )


def _torch_forward(path, found, x):
    """The same network in PyTorch, or None where it is not installed or the weights are ours."""
    if not measure.has('torch') or os.path.isdir(path):
        return None
    import torch

    from jaxood.models import torch_originals

    original = torch_originals.ORIGINALS[found.backbone['name']]
    state = {k: torch.from_numpy(v.copy()) for k, v in pretrained.read(path).items()}
    last = torch.channels_last
    state = {k: v.to(memory_format=last) if v.ndim == 4 else v for k, v in state.items()}
    images = torch.from_numpy(x.transpose(0, 3, 1, 2)).contiguous(memory_format=last)
    keywords = {k: v for k, v in found.backbone.items() if k != 'name'}

    def forward():
        with torch.inference_mode():
            return original(state, keywords, images)

    return forward
