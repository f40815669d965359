"""Devices: the same pure step on one device or many, by sharded `jit` (default) or by `pmap`.

A training step is `step(state, batch, key, *, axis_name=None) -> (state, metrics)`; a function of
rows is `f(shared, rows) -> rows`, each output row depending on its own input row only. Neither
knows how many devices there are. `Devices` compiles them, places their arguments, and takes the
results apart again:

* `'jit'`: global arrays over a mesh of all devices of all hosts, rows split along the first axis. A
  mean in the step is the global mean, so `axis_name` stays None.
* `'pmap'`: one program a device on its own slice of rows, on one host; `axis_name='devices'`, and
  the step averages over it with `lax.pmean`.

With `shard_state` (jit alone) the large arrays of a training's state, parameters, their average and
the optimiser's, are split over the devices too, along their largest axis that can be: XLA brings
them together where a step needs them (FSDP, ZeRO-3). A U-Net whose state fills a device fits then.

Changing the mode or the number of devices or hosts changes the order of sums, nothing else.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxood import hosts, memory
from jaxood.errors import UserError, unknown

AXIS = 'devices'
SMALL = 2**16  # numbers of an array that lies on every device also where states are split
MODES = ('jit', 'pmap')
Tree = Any


class Probed(Exception):
    """What one call takes: facts, as `probe` finds them. Raised to leave a stage that was tried."""

    def __init__(self, **facts):
        super().__init__(facts)
        self.facts = facts


@dataclasses.dataclass(frozen=True)
class Devices:
    """Where a run computes. Hashable, so that compiled steps can be memoised by it."""

    mode: str
    mesh: Mesh
    shard_state: bool = False
    probe: bool = False  # the first call of what takes long raises `Probed` in place of the rest

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
            return jax.tree.map(self._everywhere, tree)
        return jax.tree.map(self._stack, tree)

    def place_state(self, state: Tree) -> Tree:
        """A training's state as steps take it: replicated, or split if `shard_state` says so."""
        if not self.shard_state:
            return self.replicate(state)
        return jax.tree.map(lambda x: self._put(x, self._split(x)), state)

    def unreplicate(self, tree: Tree) -> Tree:
        """Undoes `replicate` and `place_state`: device arrays of the single copy."""
        return tree if self.mode == 'jit' else jax.tree.map(lambda x: x[0], tree)

    def shard(self, rows: Tree) -> Tree:
        """Splits rows [B, ...] over the devices. B is a multiple of `count`.

        Every host has all of them, but for those that `join` has placed already.
        """
        if self.mode == 'jit' and hosts.count() > 1:
            own = lambda x: self.join(np.asarray(x)[self.own(len(x))])
            return jax.tree.map(lambda x: x if _is_shared(x) else own(x), rows)
        if self.mode == 'jit':
            return jax.device_put(rows, self._sharding(AXIS))
        split = jax.tree.map(
            lambda x: x.reshape(self.count, x.shape[0] // self.count, *x.shape[1:]), rows
        )
        return jax.device_put(split, self._sharding(AXIS))

    def own(self, size: int) -> slice:
        """Which of `size` rows lie on the devices of this host."""
        share = size // hosts.count()
        return slice(hosts.index() * share, (hosts.index() + 1) * share)

    def join(self, rows: Tree) -> Tree:
        """Places the rows that this host has, its `own` of each batch, beside those of others.

        Under pmap, which works on one host, they wait for `shard`.
        """
        if self.mode != 'jit':
            return rows
        if hosts.count() == 1:
            return jax.device_put(rows, self._sharding(AXIS))
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self._sharding(AXIS), x), rows
        )

    def gather(self, rows: Tree) -> Tree:
        """Rows [B, ...] back on the host, on every one all of them, as NumPy arrays."""
        rows = fetch(rows)
        if self.mode == 'jit':
            return rows
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)

    def compile_step(self, step: Callable) -> Callable:
        """Compiles `step(state, data, batch, key)`; the old state's memory is reused.

        Args:
            step: `step(state, data, batch, key, *, axis_name) -> (state, metrics)`; `data` is what
                lies on the devices for the whole run, `batch` the rows of this step.

        Returns:
            The same function on placed arguments: state from `place_state`, data from `replicate`,
            batch from `shard`, a plain key. Metrics come back as from one device.
        """
        if self.shard_state:

            def split_step(state, data, batch, key):
                state, metrics = step(state, data, batch, key, axis_name=None)
                places = jax.tree.map(self._split, state)
                return jax.lax.with_sharding_constraint(state, places), metrics

            same, split = self._sharding(), self._sharding(AXIS)
            return jax.jit(split_step, in_shardings=(None, same, split, same), donate_argnums=0)
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

    def _everywhere(self, x):
        return self._put(x, self._sharding())

    def _put(self, x, sharding):
        """Places an array that every host has."""
        if hosts.count() == 1 or _is_shared(x):
            return jax.device_put(x, sharding)
        if jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key):
            data = self._put(jax.random.key_data(x), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    def _split(self, x):
        """Where an array of a split state lies."""
        able = [axis for axis, size in enumerate(x.shape) if size % self.count == 0]
        if x.size < SMALL or not able:
            return self._sharding()
        largest = max(able, key=lambda axis: x.shape[axis])
        return self._sharding(*[AXIS if axis == largest else None for axis in range(x.ndim)])

    def _sharding(self, *axes):
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def _stack(self, x):
        if not jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key):
            x = np.asarray(x)
        shape = (self.count, *x.shape)
        return jax.device_put(jnp.broadcast_to(x, shape), self._sharding(AXIS))


def setup(mode: str = 'jit', num_devices: int | None = None, shard_state: bool = False) -> Devices:
    """All devices of all hosts, or the first `num_devices` of them.

    Raises:
        UserError: unknown mode, more devices asked for than there are, or what several hosts
            cannot do.
    """
    if mode not in MODES:
        raise UserError(unknown(f'config.parallel.mode={mode!r}', mode, MODES))
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    if shard_state and mode == 'pmap':
        raise UserError(
            "config.parallel.shard_state splits states under config.parallel.mode='jit'; under "
            "'pmap' every device holds its own."
        )
    if hosts.count() > 1 and mode == 'pmap':
        raise UserError(
            f"config.parallel.mode='pmap' works on one host, and these are {hosts.count()}. Set it "
            "to 'jit', which gives the same numbers."
        )
    if hosts.count() > 1 and num_devices not in (None, len(devices)):
        raise UserError(
            f'config.parallel.num_devices={num_devices} leaves devices of some hosts idle: '
            f'{hosts.count()} hosts have {len(devices)}. Leave it unset to use all.'
        )
    if num_devices is not None and not 1 <= num_devices <= len(devices):
        raise UserError(
            f'config.parallel.num_devices={num_devices}, but this machine has {len(devices)} '
            f'({devices[0].platform}). Leave it unset to use all.'
        )
    devices = devices[:num_devices]
    # Not `make_mesh`, which may deal the devices of several hosts in turn: each has its own rows.
    mesh = Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
    return Devices(mode, mesh, shard_state)


def fetch(tree: Tree) -> Tree:
    """Arrays from wherever they lie, as NumPy arrays on every host."""
    return jax.tree.map(_fetch, tree)


def _fetch(x):
    if not _is_shared(x) or x.is_fully_replicated:
        return jax.device_get(x)
    return multihost_utils.process_allgather(x, tiled=True)


def _is_shared(x) -> bool:
    """Whether an array lies on the devices of several hosts already."""
    return isinstance(x, jax.Array) and not x.is_fully_addressable


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
    watched = lambda size, ask: memory.watched(
        'a pass over images', 'config.parallel.inference_batch', size, devices.count, ask
    )
    pending = None
    for rows, real in chunks:
        size, placed = len(jax.tree.leaves(rows)[0]), devices.shard(rows)
        ask = functools.partial(memory.need, compiled, shared, placed)
        with watched(size, ask):
            if devices.probe:
                raise Probed(images=size, **probe(functools.partial(compiled, shared, placed), ask))
            result = (compiled(shared, placed), real)
            done = None if pending is None else _real(devices, *pending)
        if pending is not None:
            yield done
        pending = result
    if pending is not None:
        with watched(size, ask):
            done = _real(devices, *pending)
        yield done


def probe(call: Callable, ask: Callable) -> dict[str, float]:
    """What a call takes: memory and operations as XLA counts them, seconds of the second one.

    Args:
        call: () -> arrays, repeatable.
        ask: () -> `memory.Need` of it.
    """
    found = ask()
    jax.block_until_ready(call())
    started = time.monotonic()
    jax.block_until_ready(call())
    seconds = time.monotonic() - started
    return found._asdict() | {'seconds': seconds, 'limit': memory.limit()}


def pad_rows(rows: Tree, size: int) -> tuple[Tree, int]:
    """Rows [n, ...] with n <= size, padded to `size` by repeating the last one; and n."""
    n = len(jax.tree.leaves(rows)[0])
    index = np.minimum(np.arange(size), n - 1)
    return jax.tree.map(lambda x: x[index], rows), n


def _real(devices, rows, real):
    return jax.tree.map(lambda x: x[:real], devices.gather(rows))
