"""Whether it fits: what a compiled program takes of a device, and what to say of one that was full.

XLA tells, before anything runs, what a program holds (its arguments and results) and what it needs
meanwhile. The first does not depend on the rows of a call, the second is proportional to them.
"""

import contextlib
import os
from typing import NamedTuple

import jax

from jaxood.errors import UserError

FULL = 'RESOURCE_EXHAUSTED'  # so XLA's errors of a full device begin


class Need(NamedTuple):
    """Of one device, for one call: bytes held, bytes meanwhile, floating-point operations (of which
    XLA counts those in a loop once, however often it runs)."""

    held: int
    meanwhile: int
    flops: float


def need(program, *arguments) -> Need:
    """What a jitted function takes for arguments of these shapes; compiles it, runs nothing."""
    compiled = program.lower(*arguments).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    held -= memory.alias_size_in_bytes  # donated: the results lie where the arguments did
    return Need(held, memory.temp_size_in_bytes, float((cost or {}).get('flops', 0.0)))


def limit() -> int:
    """Bytes of a device of this host; of a CPU, those of the machine, shared by its devices."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if 'bytes_limit' in stats:
        return stats['bytes_limit']
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // jax.local_device_count()


def shown(size: float) -> str:
    """Bytes as people read them."""
    return f'{size / 1e9:.2f} GB' if size >= 1e9 else f'{size / 1e6:.1f} MB'


def fitting(rows: int, count: int, found: Need | None) -> int:
    """How many rows would fit where `rows` did not: a multiple of the devices, half at the most.

    Args:
        count: of devices.
        found: what a call of `rows` takes; None, or a program that should have fitted, halves.
    """
    wanted = rows // 2
    if found is not None and found.meanwhile > 0:
        room = 0.9 * limit() - found.held  # the allocator never fills all of it
        wanted = min(wanted, int(rows * room / found.meanwhile))
    return max(wanted // count, 1) * count


@contextlib.contextmanager
def watched(what: str, key: str, rows: int, count: int, ask):
    """Makes the error of a full device one that says how many rows would fit.

    Args:
        key: the setting that asks for `rows`.
        ask: () -> Need of the program, or None.

    Raises:
        UserError: in place of XLA's error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if FULL not in str(e):
            raise
        try:
            found = ask()
        except RuntimeError:  # it does not even compile within the memory
            found = None
        takes = ''
        if found is not None:
            takes = f' A call takes {shown(found.held + found.meanwhile)} of a device, which has '
            takes += f'{shown(limit())}.'
        raise UserError(
            f'{what}: a device is out of memory with {key}={rows}.{takes} About '
            f'{fitting(rows, count, found)} would fit: set {key} to that or less. Less memory is '
            "needed, too, with dtype='bfloat16', with accumulate above 1 beside a batch_size, with "
            'remat=True of a U-Net, with config.parallel.shard_state=True on several devices, or a '
            'lower config.data.device_limit.'
        ) from e
