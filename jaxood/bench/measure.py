"""Times, rates, and what a row of the table says."""

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

SIDE = {'cpu': 2048}  # of the matrices whose product is a device's rate; elsewhere 8192


def take_turns(ours: Callable, theirs: Callable | None, rounds: int):
    """Median seconds of both, measured alternately; None for what is not there."""
    times = ([], [])
    for f in (ours, theirs):
        if f is not None:
            f()  # warm
    for _ in range(rounds):
        for f, into in zip((ours, theirs), times):
            if f is not None:
                started = time.perf_counter()
                f()
                into.append(time.perf_counter() - started)
    return tuple(statistics.median(t) if t else None for t in times)


def speed(what, images, ours, theirs, rounds, *, peer='', flops=None, dtype='float32') -> dict:
    """A row of images/s.

    Args:
        images: that one call of `ours` and one of `theirs` work on.
        flops: floating-point operations of one call of ours.
    """
    a, b = take_turns(ours, theirs, rounds)
    share = None if flops is None else flops / a / matrix_rate(dtype)
    return row(what, 'images/s', images / a, b and images / b, peer, share=share)


def row(what, unit, ours, theirs=None, peer='', *, share=None) -> dict[str, Any]:
    """`ratio`: how many times faster ours is; `share`: of the device's matrix rate."""
    ratio = None
    if theirs is not None:
        ratio = ours / theirs if unit == 'images/s' else theirs / ours
    return {
        'what': f'{what}, {unit}',
        'unit': unit,
        'ours': ours,
        'theirs': theirs,
        'peer': '' if theirs is None else peer,
        'ratio': ratio,
        'share': share,
    }


def call(f: Callable, *arguments) -> Callable:
    """() -> f(*arguments), which returns when it is computed."""
    return lambda: jax.block_until_ready(f(*arguments))


def flops(f: Callable, *arguments) -> float:
    """Floating-point operations of a jitted function, by XLA's count; a loop's body counts once."""
    return float(f.lower(*arguments).cost_analysis()['flops'])


@functools.cache
def matrix_rate(dtype: str) -> float:
    """Floating-point operations a second of all devices at A·B of large square matrices."""
    side = SIDE.get(jax.default_backend(), 8192)
    a = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(product(a, a))
    seconds = min(take_turns(call(product, a, a), None, 3)[0] for _ in range(3))
    return 2.0 * side**3 / seconds * jax.device_count()


def has(*packages: str) -> bool:
    """Whether all of them are installed."""
    return all(importlib.util.find_spec(package) is not None for package in packages)


def torch_device(flags):
    """(device, compile a module or leave it, wait until it is computed)."""
    import torch

    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    wanted = flags.compile_theirs
    wanted = device.type == 'cuda' if wanted is None else wanted
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    return device, torch.compile if wanted else (lambda module: module), wait


def torch_dtype(flags):
    """A context in which PyTorch computes in `--dtype`."""
    import torch

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    return torch.autocast(device, dtype=torch.bfloat16, enabled=flags.dtype == 'bfloat16')
