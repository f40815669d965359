"""Devices: the same pure step on one device or many, by sharded `jit` (default) or by `pmap`.

A training step is `step(state, batch, key, *, axis_name=None) -> (state, metrics)`; a function of
rows is `f(shared, rows) -> rows`, each output row depending on its own input row only. Neither
knows how many devices there are. `Devices` compiles them, places their arguments, and takes the
results apart again:

* `'jit'`: global arrays over a mesh of all devices, rows split along the first axis. A mean in the
  step is the global mean, so `axis_name` stays None.
* `'pmap'`: one program a device on its own slice of rows; `axis_name='devices'`, and the step
  averages over it with `lax.pmean`.

Changing the mode or the number of devices changes the order of sums, nothing else.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxood.errors import UserError, unknown

AXIS = 'devices'
MODES = ('jit', 'pmap')
Tree = Any


@dataclasses.dataclass(frozen=True)
class Devices:
    """Where a run computes. Hashable, so that compiled steps can be memoised by it."""

    mode: str
    mesh: Mesh

    @property
    def count(self) -> int:
        return self.mesh.size

    @property
    def axis_name(self) -> str | None:
        """What a step and a BatchNorm average over; None under jit, where means are global."""
        return AXIS if self.mode == 'pmap' else None

    def replicate(self, tree: Tree) -> Tree:
        """The same values on every device (under pmap with a leading device axis)."""
        if self.mode == 'jit':
            return jax.device_put(tree, self._sharding())
        return jax.tree.map(self._stack, tree)

    def unreplicate(self, tree: Tree) -> Tree:
        """Undoes `replicate`: device arrays of the single copy."""
        return tree if self.mode == 'jit' else jax.tree.map(lambda x: x[0], tree)

    def shard(self, rows: Tree) -> Tree:
        """Splits rows [B, ...] over the devices. B is a multiple of `count`."""
        if self.mode == 'jit':
            return jax.device_put(rows, self._sharding(AXIS))
        split = jax.tree.map(
            lambda x: x.reshape(self.count, x.shape[0] // self.count, *x.shape[1:]), rows
        )
        return jax.device_put(split, self._sharding(AXIS))

    def gather(self, rows: Tree) -> Tree:
        """Rows [B, ...] back on the host, as NumPy arrays."""
        rows = jax.device_get(rows)
        if self.mode == 'jit':
            return rows
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)

    def compile_step(self, step: Callable) -> Callable:
        """Compiles `step(state, data, batch, key)`; the old state's memory is reused.

        Args:
            step: `step(state, data, batch, key, *, axis_name) -> (state, metrics)`; `data` is what
                lies on the devices for the whole run, `batch` the rows of this step.

        Returns:
            The same function on placed arguments: state and data from `replicate`, batch from
            `shard`, a plain key. Metrics come back as from one device.
        """
        if self.mode == 'jit':
            same, split = self._sharding(), self._sharding(AXIS)
            return jax.jit(
                functools.partial(step, axis_name=None),
                in_shardings=(same, same, split, same),
                out_shardings=(same, same),
                donate_argnums=0,
            )
        return jax.pmap(
            functools.partial(step, axis_name=AXIS),
            axis_name=AXIS,
            in_axes=(0, 0, 0, None),
            out_axes=(0, None),
            devices=list(self.mesh.devices.flat),
            donate_argnums=0,
        )

    def compile_rows(self, f: Callable) -> Callable:
        """Compiles `f(shared, rows) -> rows`: `shared` from `replicate`, rows from `shard`."""
        if self.mode == 'jit':
            same, split = self._sharding(), self._sharding(AXIS)
            return jax.jit(f, in_shardings=(same, split), out_shardings=split)
        return jax.pmap(f, axis_name=AXIS, devices=list(self.mesh.devices.flat))

    def batch_size(self, wanted: int) -> int:
        """The smallest multiple of the number of devices that is not below `wanted`."""
        return -(-wanted // self.count) * self.count

    def _sharding(self, *axes):
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def _stack(self, x):
        if not jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key):
            x = np.asarray(x)
        shape = (self.count, *x.shape)
        return jax.device_put(jnp.broadcast_to(x, shape), self._sharding(AXIS))


def setup(mode: str = 'jit', num_devices: int | None = None) -> Devices:
    """All devices of all hosts, or the first `num_devices` of them.

    Raises:
        UserError: unknown mode, or more devices asked for than there are.
    """
    if mode not in MODES:
        raise UserError(unknown(f'config.parallel.mode={mode!r}', mode, MODES))
    devices = jax.devices()
    if num_devices is not None and not 1 <= num_devices <= len(devices):
        raise UserError(
            f'config.parallel.num_devices={num_devices}, but this machine has {len(devices)} '
            f'({devices[0].platform}). Leave it unset to use all.'
        )
    devices = devices[:num_devices]
    mesh = jax.make_mesh((len(devices),), (AXIS,), (AxisType.Auto,), devices=devices)
    return Devices(mode, mesh)


def map_rows(
    devices: Devices, compiled: Callable, shared: Tree, chunks: Iterable[tuple[Tree, int]]
) -> Iterator[Tree]:
    """Runs a compiled row function over chunks of one fixed size, padding already inside.

    Args:
        compiled: from `Devices.compile_rows`.
        shared: from `Devices.replicate`.
        chunks: (rows [B, ...] with the same B each time, how many of them are real).

    Yields:
        The real rows of each result, as NumPy arrays. The next chunk is already being computed when
        one is handed out, and no more than two are held.
    """
    pending = None
    for rows, real in chunks:
        result = (compiled(shared, devices.shard(rows)), real)
        if pending is not None:
            yield _real(devices, *pending)
        pending = result
    if pending is not None:
        yield _real(devices, *pending)


def pad_rows(rows: Tree, size: int) -> tuple[Tree, int]:
    """Rows [n, ...] with n <= size, padded to `size` by repeating the last one; and n."""
    n = len(jax.tree.leaves(rows)[0])
    index = np.minimum(np.arange(size), n - 1)
    return jax.tree.map(lambda x: x[index], rows), n


def _real(devices, rows, real):
    return jax.tree.map(lambda x: x[:real], devices.gather(rows))
